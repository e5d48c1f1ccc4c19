"""A run step by step, as panels below its ledgers: memory beside what was predicted, loss with the learning rate."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from brim.units import GIB, format_bytes

Steps = Sequence[Mapping[str, float]]
"""The lines of metrics.jsonl."""


def panels(directory: Path, *, predicted_bytes: int) -> list[Callable[[Axes], None]]:
    """Of all steps that the run in this directory has made, those before it was resumed too."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    return [lambda axes: _draw_memory(axes, steps, predicted_bytes), lambda axes: _draw_loss(axes, steps)]


def _draw_memory(axes: Axes, steps: Steps, predicted_bytes: int) -> None:
    measured = [step["allocated_bytes"] / GIB for step in steps]
    axes.plot(
        [step["step"] for step in steps], measured, color="#0072B2", marker="o", markersize=3, label="measured, highest"
    )
    label = f"predicted peak, {format_bytes(predicted_bytes)}"
    axes.axhline(predicted_bytes / GIB, color="black", linestyle="--", linewidth=1, label=label)
    axes.set_ylim(0, 1.3 * max(predicted_bytes / GIB, *measured))
    axes.set_ylabel("GiB allocated")
    _finish(axes)


def _draw_loss(axes: Axes, steps: Steps) -> None:
    axes.plot([step["step"] for step in steps], [step["loss"] for step in steps], color="#D55E00", label="loss")
    evaluated = [step for step in steps if "eval_loss" in step]
    if evaluated:
        axes.plot(
            [step["step"] for step in evaluated], [step["eval_loss"] for step in evaluated], "s",
            color="#009E73", markersize=4, label="on evaluation data",
        )  # fmt: skip
    axes.set_ylabel("loss")
    axes.margins(y=0.2)  # room for the legend
    rate = axes.twinx()
    rates = [step["learning_rate"] for step in steps]
    rate.plot([step["step"] for step in steps], rates, color="#999999", linewidth=1)
    axes.plot([], [], color="#999999", linewidth=1, label="learning rate (right)")
    rate.set_ylim(0, 1.3 * max(rates))
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.spines["top"].set_visible(False)
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9, loc="upper right", ncols=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
