"""The end of a run: its report, and the model or adapter in OUTPUT."""

import json
import math
import platform
import statistics
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel

from brim.publish import write_whole
from brim.report import Measured, RunReport
from brim.training.adapters import save_adapter
from brim.training.build import Workload
from brim.training.fake_quantized import save_integers
from brim.training.history import History
from brim.training.job import Run
from brim.training.merge import write_merged
from brim.training.parts import whole_state
from brim.training.setbacks import told_of
from brim.training.workplace import publish

MERGED = "merged"
"""Where in OUTPUT a merged model is."""


def report_of(job: Run, history: History) -> RunReport:
    peaks = job.ranks.told((history.peak, history.ledger))
    peak, ledger = max(peaks, key=lambda measured: measured[0].highest_bytes)
    step_time_s = statistics.median(history.step_seconds[1:] or history.step_seconds)
    evaluation = {}
    if history.eval_loss is not None:
        evaluation = {"loss": history.eval_loss, "perplexity": math.exp(min(history.eval_loss, 700.0))}
    return RunReport(
        model=job.spec.name,
        recipe=job.recipe.to_dict(),
        steps=len(history.losses),
        first_loss=history.losses[0],
        last_loss=history.losses[-1],
        predicted=job.predicted,
        measured=Measured(
            peak=peak,
            ledger=ledger,
            ranks=tuple(own for own, _ in peaks) if job.ranks.count > 1 else (),
            step_time_s=step_time_s,
            tokens_per_s=job.recipe.tokens_per_step / step_time_s,
            meter=history.meter_name,
        ),
        environment=environment(),
        evaluation=evaluation,
        reasons=(*job.recipe.warnings(), *told_of(job, history)),
    )


def environment() -> dict[str, str]:
    """Versions that decide memory and speed."""
    packages = ("brim", "torch", "transformers", "peft")
    return {name: version(name) for name in packages} | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }


def publish_model(job: Run, workload: Workload, report: RunReport) -> None:
    """Model (or adapter), tokenizer and report into OUTPUT, whole or not at all; an error of the disk is all ranks'."""
    # Several ranks each have a part; those that do not write take part in gathering them.
    whole = whole_state(workload.model, keep=job.ranks.is_first) if job.ranks.count > 1 else None

    def write(directory: Path) -> None:
        # Training needs it off; who uses the model expects it as it was.
        workload.base.config.use_cache = job.spec.config.get("use_cache", True)
        if isinstance(workload.model, PeftModel):
            save_adapter(workload.model, job.spec, directory, state=whole)
            if job.merge:
                (directory / MERGED).mkdir()
                write_merged(workload.model, directory / MERGED)
                job.tokenizer.save_pretrained(directory / MERGED)
        elif job.recipe.method == "qat":
            save_integers(workload.base, directory, job.recipe)
        else:
            workload.base.save_pretrained(directory, state_dict=whole)
        job.tokenizer.save_pretrained(directory)
        write_whole(directory / "report.json", json.dumps(report.to_dict(), indent=2))

    job.ranks.together(lambda: publish(job.output, write) if job.ranks.is_first else None)
