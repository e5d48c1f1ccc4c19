"""Bytes that a block of Mamba keeps and passes on in backward, as transformers runs it without its kernels. No torch.

The scan is written out, a token after another, over states of N numbers for each of I channels (transformers'
models/mamba/modeling_mamba.py, `mamba_selective_scan`; the paper: Gu and Dao, arXiv:2312.00752). What is as large as
all states of all tokens is nearly all that a block keeps.
"""

from brim.models.spec import ModelSpec

_FP32 = 4


def scans(spec: ModelSpec) -> bool:
    return spec.model_type == "mamba"


def states_bytes(spec: ModelSpec, tokens: int) -> int:
    """All states of all tokens (of all rows), FP32."""
    return _FP32 * tokens * _channels(spec) * spec.first("state_size")


def block_bytes(spec: ModelSpec, tokens: int, element_bytes: int, *, trained: bool) -> int:
    """What the scan keeps, and what the layers around it do.

    States: the discretized A and B, each step's state, and its cast for the product with C. Channels: both halves of
    the first projection, the convolution, its activation, that in FP32, the step size before and after its softplus,
    act(gate), what the scan gives in FP32, and the last projection's input, if that is trained. Width: the norm's
    FP32 input and what it gives, before its weight too, if that is trained.
    """
    states = 3 * states_bytes(spec, tokens)
    if element_bytes < _FP32:
        states += states_bytes(spec, tokens) * element_bytes // _FP32
    channels = (7 + trained) * element_bytes + 2 * _FP32
    width = _FP32 + (1 + trained) * element_bytes
    return states + tokens * (channels * _channels(spec) + width * spec.hidden_size)


def passing_bytes(spec: ModelSpec, tokens: int) -> int:
    """In backward: gradients of the discretized A and of the inputs, and what a step's slice adds to one of them."""
    return 3 * states_bytes(spec, tokens)


def linear_result_bytes(spec: ModelSpec, tokens: int, element_bytes: int) -> int:
    """What selective checkpointing keeps: projections in, of the scan's parameters, of the step size, and out."""
    parameters = spec.first("time_step_rank", default=-(-spec.hidden_size // 16)) + 2 * spec.first("state_size")
    return element_bytes * tokens * (3 * _channels(spec) + parameters + spec.hidden_size)


def _channels(spec: ModelSpec) -> int:
    return spec.first("intermediate_size", default=2 * spec.hidden_size)
