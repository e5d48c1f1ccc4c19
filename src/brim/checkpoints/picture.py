"""A conversion as a picture: what each tensor lost, layer by layer. Needs matplotlib (`pip install 'brim[plot]'`)."""

import re
from collections import defaultdict
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from brim.checkpoints.audit import QuantizationReport, TensorReport

_LAYER = re.compile(r"\.(\d+)\.")


def draw_report(path: Path, report: QuantizationReport) -> None:
    """Signal to noise above, outliers below; a line for each kind of tensor, along the layers."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    errors, outliers = figure.subplots(2, 1, sharex=True)
    for kind, tensors in _by_kind(report).items():
        layers = [layer for layer, _ in tensors]
        errors.plot(layers, [tensor.sqnr_db for _, tensor in tensors], marker=".", label=kind)
        outliers.plot(layers, [tensor.outlier_ratio for _, tensor in tensors], marker=".")
    errors.set_ylabel("signal to noise in dB (more is better)")
    errors.set_title(f"{report.model} to {report.to}: what each tensor lost")
    outliers.set_ylabel("largest element / root mean square")
    outliers.set_xlabel("layer")
    for axes in (errors, outliers):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    with rc_context({"svg.fonttype": "none"}):  # text stays text, which can be searched and read aloud
        figure.savefig(path, dpi=150)


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
