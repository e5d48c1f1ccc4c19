"""FP8 E4M3 with a scale per row. Shapes: R rows, K elements of a row."""

import torch
from torch import Tensor

from brim.checkpoints.conversion import Encoded
from brim.checkpoints.layouts.float_quantized import FORMAT
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.statistics import compare
from brim.numerics.encode import TORCH_DTYPES, storable_scale
from brim.numerics.formats import FORMATS

WORK_BYTES = 40
_LARGEST = int(FORMATS[FORMAT].largest)


def encode_float_rows(block_RK: Tensor, scratch: Scratch, *, scale_dtype: torch.dtype) -> Encoded:
    """Elements (R, K) and scales (R,): the largest element of a row becomes the format's largest."""
    values_RK = block_RK.float()
    stored_R = storable_scale(values_RK.abs().amax(dim=-1) / _LARGEST, largest_code=_LARGEST, dtype=scale_dtype)
    scale_R1 = stored_R.float().unsqueeze(-1)
    # Where the scale was rounded down, the largest is a little past the last value; torch's cast would keep it there.
    scaled_RK = (values_RK / scale_R1).clamp_(-_LARGEST, _LARGEST)
    small_RK = scaled_RK.to(TORCH_DTYPES[FORMAT])
    sums = compare(block_RK, small_RK.float() * scale_R1, scratch, scale=stored_R)
    if block_RK.dtype == torch.float64:
        sums.overflowed = max(sums.overflowed, int(torch.isinf(values_RK).sum()))
    return Encoded((small_RK, stored_R), sums)
