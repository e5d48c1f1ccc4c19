"""A conversion as a picture: what each tensor lost, layer by layer. Needs matplotlib (`pip install 'brim[plot]'`)."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from brim.checkpoints.audit import QuantizationReport, TensorReport
from brim.checkpoints.portrait import Portrait

_BINS = 201
_BEFORE, _AFTER = "tab:blue", "tab:red"
_LAYER = re.compile(r"\.(\d+)\.")


def draw_report(path: Path, report: QuantizationReport, portrait: Portrait | None = None) -> None:
    """Signal to noise above, outliers below it; a line for each kind of tensor, along the layers. Below them one
    tensor's elements before and after, if there is a portrait of it."""
    figure = Figure(figsize=(9, 7 if portrait is None else 12), layout="constrained")
    errors, outliers, *below = figure.subplots(2 if portrait is None else 4, 1)
    outliers.sharex(errors)
    for kind, tensors in _by_kind(report).items():
        layers = [layer for layer, _ in tensors]
        errors.plot(layers, [tensor.sqnr_db for _, tensor in tensors], marker=".", label=kind)
        outliers.plot(layers, [tensor.outlier_ratio for _, tensor in tensors], marker=".")
    errors.set_ylabel("signal to noise in dB\n(more is better)")
    errors.set_title(f"{report.model} to {report.to}: what each tensor lost", loc="left", fontsize="medium")
    outliers.set_ylabel("largest element /\nroot mean square")
    outliers.set_xlabel("layer")
    for axes in (errors, outliers):
        axes.grid(alpha=0.3)
    if portrait is not None:
        _draw_tensor(below[0], portrait)
        _draw_block(below[1], portrait)
    figure.legend(loc="outside right upper", fontsize="small")
    with rc_context({"svg.fonttype": "none"}):  # text stays text, which can be searched and read aloud
        figure.savefig(path, dpi=150)


def _draw_tensor(axes: Axes, portrait: Portrait) -> None:
    """All elements, in bins of equal width; how many on a scale of powers of ten."""
    limit = float(max(portrait.before.abs().max(), portrait.after.abs().max())) or 1.0
    bins = np.linspace(-limit, limit, _BINS).tolist()
    axes.hist(portrait.before.numpy(), bins=bins, alpha=0.4, color=_BEFORE)
    axes.hist(portrait.after.numpy(), bins=bins, histtype="step", color=_AFTER)
    axes.set_yscale("log")
    axes.set_ylabel("elements")
    shown = f"{portrait.name}: {len(portrait.before):,} elements, before (filled) and in {portrait.format} (line)"
    axes.set_title(shown, loc="left", fontsize="medium")


def _draw_block(axes: Axes, portrait: Portrait) -> None:
    """Elements that share a scale: before, in bins; after, on the values of the grid that they have become."""
    before, after = portrait.block_before.numpy(), portrait.block_after.numpy()
    axes.hist(before, bins=min(_BINS, max(10, len(before) // 4)), alpha=0.4, color=_BEFORE)
    values, counts = np.unique(after, return_counts=True)
    axes.vlines(values, 0, counts, color=_AFTER, linewidth=1)
    axes.plot(values, counts, ".", color=_AFTER, markersize=4)
    for value in values:
        axes.axvline(value, color=_AFTER, alpha=0.12, linewidth=0.8, zorder=0)
    axes.set_ylabel("elements")
    axes.set_xlabel("value")
    shared = f"the {len(before):,} elements that share the scale of the largest one"
    axes.set_title(f"{shared}: {len(values)} values of the grid are used", loc="left", fontsize="medium")


def _by_kind(report: QuantizationReport) -> dict[str, list[tuple[int, TensorReport]]]:
    """Converted tensors that lost something: last words of the name -> (layer, tensor), in order of layers."""
    kinds: dict[str, list[tuple[int, TensorReport]]] = defaultdict(list)
    for tensor in report.converted:
        if tensor.sqnr_db is None:
            continue
        layer = _LAYER.search(tensor.name)
        kind = ".".join(tensor.name.removesuffix(".weight").split(".")[-2:])
        kinds[kind].append((int(layer[1]) if layer else 0, tensor))
    return {kind: sorted(tensors, key=lambda pair: pair[0]) for kind, tensors in sorted(kinds.items())}
