"""FP8 with a scale per row. Shapes: R rows, K elements of a row."""

import torch
from torch import Tensor

from brim.checkpoints.conversion import Encoded
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.statistics import compare
from brim.numerics.encode import TORCH_DTYPES, storable_scale
from brim.numerics.formats import FORMATS

WORK_BYTES = 40


def encode_float_rows(block_RK: Tensor, scratch: Scratch, *, format: str, scale_dtype: torch.dtype) -> Encoded:
    """Elements (R, K) and scales (R,): the largest element of a row becomes the format's largest."""
    largest = FORMATS[format].largest
    top_R = block_RK.float().abs().amax(dim=-1)
    stored_R = storable_scale(top_R / largest, largest_code=largest, dtype=scale_dtype)
    encoded = encode_float_shared(block_RK, scratch, format=format, scale=stored_R)
    return Encoded((*encoded.parts, stored_R), encoded.statistics, encoded.decoded)


def encode_float_shared(block_RK: Tensor, scratch: Scratch, *, format: str, scale: Tensor) -> Encoded:
    """Elements (R, K), for scales (R,) or one for all (1,)."""
    largest = FORMATS[format].largest
    values_RK, stored_R = block_RK.float(), scale
    scale_R1 = stored_R.float().unsqueeze(-1)
    # Where the scale was rounded down, the largest is a little past the last value, and E5M2 would make it Inf.
    scaled_RK = (values_RK / scale_R1).clamp_(-largest, largest)
    small_RK = scaled_RK.to(TORCH_DTYPES[format])
    decoded_RK = small_RK.float() * scale_R1
    sums = compare(block_RK, decoded_RK, scratch, scale=stored_R)
    if block_RK.dtype == torch.float64:
        sums.overflowed = max(sums.overflowed, int(torch.isinf(values_RK).sum()))
    return Encoded((small_RK,), sums, lambda: decoded_RK)
