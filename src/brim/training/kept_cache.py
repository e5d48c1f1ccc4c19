"""Keys and values that a model returns while it trains, as some families of older libraries do.

GPTBigCode of transformers 4 returns what attention has read (`presents`), under checkpoints, too: nobody asks for it,
and it lives until the loss is there. Keys and values are a view of the product that makes queries: all of it stays.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from brim.errors import RecipeError

_PRODUCT = "attn.c_attn"


class KeptCache:
    """Holds each block's product of queries, keys and values while the loss is computed, and not in backward."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._tensors: list[Tensor] = []
        self._is_open = False
        products = [module for name, module in base.named_modules() if name.endswith(_PRODUCT)]
        if base.config.model_type != "gpt_bigcode" or not products:
            raise RecipeError(
                f'library.cache = "kept" is GPTBigCode\'s, and the family is {base.config.model_type!r}; '
                'nearest: library.cache = "none"'
            )
        for product in products:
            product.register_forward_hook(self._keep)

    @contextmanager
    def until_loss(self) -> Iterator[None]:
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
            self._tensors.clear()

    def _keep(self, _: nn.Module, __: object, made: Tensor) -> None:
        if self._is_open:
            self._tensors.append(made.detach())
