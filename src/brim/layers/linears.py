"""Which linear layers of a model can be packed or fake-quantized: all below the head whose weight is theirs alone."""

from collections import Counter
from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D


def linears_below(head: nn.Module | None, model: PreTrainedModel) -> Callable[[str, nn.Module], bool]:
    """A filter for `layers.swap`. GPT-2's transposed linears count; the head and shared weights do not."""
    in_head = set() if head is None else set(head.modules())
    holders = Counter(id(tensor) for module in model.modules() for tensor in module.parameters(recurse=False))

    def match(_: str, module: nn.Module) -> bool:
        # not any subclass: some read their own weight
        if type(module) not in (nn.Linear, Conv1D, FalconLinear):
            return False
        return module not in in_head and holders[id(module.weight)] == 1

    return match
