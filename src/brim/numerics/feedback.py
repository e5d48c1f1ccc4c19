"""Error feedback: what rounding a weight loses is made up for by weights that are still to be rounded.

GPTQ (Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022, arXiv:2210.17323, equations 2 and 3 and algorithm 1). A linear layer's output error over the inputs
X is, row by row, (w - v) H (w - v)^T with H = X^T X. Columns are rounded one after the other; with U the upper Cholesky
factor of the inverse of H, rounding column i by e = (w_i - v_i) / U_ii moves each later column j by -e U_ij.

How this differs from the paper: scales are fixed before the first column is rounded, so columns may go in the order of
their power (largest first: the paper's successors call it act-order) and every group still has one scale in the layout.
Shapes: R rows (outputs), K inputs, G groups of a row.
"""

import torch
from torch import Tensor

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: inputs that never vary alone would make H singular (the paper's value)."""
_COLUMNS = 128
"""Rounded before what they lost is handed on to all later ones in one product."""


def feedback_codes(
    weight_RK: Tensor, scale_RG: Tensor, power_KK: Tensor, *, codes: tuple[int, int], damping: float = DAMPING
) -> Tensor:
    """int8 codes (R, K) of a weight whose inputs have the second moments `power_KK`, X^T X up to a factor.

    Inputs that were zero throughout take and give nothing: their weights are rounded to the nearest code.
    """
    order, codes_KR, _ = _rounded(weight_RK, scale_RG, power_KK, codes, damping)
    return _in_place(codes_KR, order).to(torch.int8).contiguous()


def fed_weight(
    weight_RK: Tensor, scale_RG: Tensor, power_KK: Tensor, *, codes: tuple[int, int], damping: float = DAMPING
) -> Tensor:
    """The weight (R, K) whose nearest codes are those of `feedback_codes`: each column as it was when it was rounded,
    with what was lost before it."""
    order, _, left_KR = _rounded(weight_RK, scale_RG, power_KK, codes, damping)
    return _in_place(left_KR, order).contiguous()


def _in_place(columns_KR: Tensor, order_K: Tensor) -> Tensor:
    unordered = torch.empty_like(columns_KR)
    unordered[order_K] = columns_KR
    return unordered.t()


def _rounded(
    weight_RK: Tensor, scale_RG: Tensor, power_KK: Tensor, codes: tuple[int, int], damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(order of the columns; in it their codes, and what they were when they were rounded)."""
    low, high = codes
    inputs = weight_RK.shape[1]
    diagonal = power_KK.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    upper_KK = _upper_factor(power_KK[order][:, order], damping)
    # By column, so that a column is one run of memory.
    left_KR = weight_RK.float().t()[order].contiguous()
    scale_KR = scale_RG.float().t()[torch.div(order, inputs // scale_RG.shape[1], rounding_mode="floor")].contiguous()
    codes_KR = torch.empty_like(left_KR)
    for begin in range(0, inputs, _COLUMNS):
        end = min(begin + _COLUMNS, inputs)
        lost_CR = torch.empty_like(left_KR[begin:end])
        for column in range(begin, end):
            wanted, scale = left_KR[column], scale_KR[column]
            torch.div(wanted, scale, out=codes_KR[column]).round_().clamp_(low, high)
            lost = lost_CR[column - begin]
            torch.sub(wanted, codes_KR[column] * scale, out=lost).div_(upper_KK[column, column])
            left_KR[column + 1 : end].addr_(upper_KK[column, column + 1 : end], lost, alpha=-1)
        left_KR[end:].addmm_(upper_KK[begin:end, end:].t(), lost_CR, alpha=-1)
    return order, codes_KR, left_KR


def output_error(difference_RK: Tensor, power_KK: Tensor) -> float:
    """Squared error of a layer's outputs, summed: trace(D H D^T), for D = weight - decoded."""
    difference = difference_RK.double()
    return float(((difference @ power_KK.double()) * difference).sum())


def _upper_factor(power_KK: Tensor, damping: float) -> Tensor:
    """U with U^T U = (H + damping)^-1. In FP64: FP32 finds some H of real layers not positive."""
    damped = power_KK.double()
    diagonal = damped.diagonal()
    mean = float(diagonal.mean())
    diagonal.add_(damping * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
