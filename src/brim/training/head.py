"""The output head and its loss: all logits at once, or chunk by chunk.

The head is also where the ledger changes lines: what it allocates is `loss`, and so is what backward allocates until
the gradient has passed through it.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from brim.errors import RecipeError
from brim.layers.chunked_loss import IGNORED, Finish, chunk_tokens, chunked_cross_entropy
from brim.layers.soft_labels import SoftLabels, cross_entropy, soft_labels
from brim.memory import owners
from brim.recipe import Library, Task
from brim.training.generations import generation_loss, litgpt_logits, litgpt_loss, torchtune_loss
from brim.training.kept_cache import KeptCache
from brim.training.litgpt_lora import Adapted

_CLASSIFIERS = ("score", "classifier", "classification_head", "logits_proj")
"""What families call a classifier's head."""

_FACTORS = {
    "cohere": "logit_scale", "cohere2": "logit_scale", "cohere2_moe": "logit_scale",
    "cohere_compass_text": "logit_scale", "falcon_h1": "lm_head_multiplier", "hyperclovax": "logits_scaling",
}  # fmt: skip
"""Family -> the key of its config that logits are multiplied by."""


class OutputHead:
    """The model's last layer, watched; in chunked mode the model runs without it.

    Shapes: B rows, T tokens, H hidden size, V vocabulary, C classes.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        task: Task,
        chunked: bool,
        library: Library | None = None,
        teacher_share: float = 0.0,
    ) -> None:
        self._teacher_share = teacher_share
        if task == "sequence-classification":
            self.chunked = False
            self._library = Library()
            base.get_submodule(classifier_name(base)).register_forward_pre_hook(_watch)
            return
        self.chunked = chunked
        self._base = base
        self._library = library or Library()
        self._linear = base.get_output_embeddings()
        if not isinstance(self._linear, nn.Linear | Adapted):
            raise RecipeError(
                f"{type(base).__name__} has no linear output head: it cannot be trained as a language model"
            )
        self._finish = finish_of(base)
        self._bound: list[Tensor] = []
        self._cache = KeptCache(base) if self._library.cache == "kept" else None
        self._linear.register_forward_pre_hook(_watch)

    @property
    def apart(self) -> list[nn.Parameter]:
        """Trained parameters whose gradient is not brought by backward: those of an untied head in chunked mode."""
        if not self.chunked:
            return []
        inside = {id(parameter) for module, parameter in _all_parameters(self._base) if module is not self._linear}
        return [p for p in self._linear.parameters() if p.requires_grad and id(p) not in inside]

    def loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        labels: Tensor,
        *,
        scale: float,
        soft: SoftLabels | None = None,
    ) -> Tensor:
        """`scale` times the sum of the cross-entropy over labels that are not -100, in FP32.

        `soft`: what a teacher says of the same tokens; its share of the target is the recipe's.
        Labels are BT (of tokens) or B (of rows). Call `backward` on the result itself: in chunked mode the head's
        gradient is there already.
        """
        if self._library.loss != "brim":
            return self._by_library(model, inputs, labels, scale=scale)
        labels_N, share = labels.flatten(), self._teacher_share
        said = None if soft is None else soft.mapped(lambda tensor: tensor.flatten(0, -2))
        if not self.chunked and said is not None:
            return cross_entropy(model(**inputs).logits.flatten(0, -2).float(), labels_N, said, share) * scale
        if not self.chunked:
            # One expression: a name for the logits would keep them alive through backward.
            total = F.cross_entropy(
                model(**inputs).logits.flatten(0, -2).float(), labels_N, ignore_index=IGNORED, reduction="sum"
            )
            return total * scale
        hidden_NH = self.hidden_states(model, inputs).flatten(0, 1)
        owners.switch("loss")
        return chunked_cross_entropy(
            hidden_NH, self._linear, labels_N, scale=scale, finish=self._finish, soft=said, share=share
        )

    def taught(self, model: nn.Module, inputs: dict[str, Tensor], count: int) -> SoftLabels:
        """What the model as it is says of each token, by `count` likeliest; never all logits at once."""
        hidden_BTH = self.hidden_states(model, inputs)
        parts = [
            soft_labels(self._finish(self._linear(hidden_CH)), count)
            for hidden_CH in hidden_BTH.flatten(0, 1).split(chunk_tokens(self._linear.out_features))
        ]
        rows = hidden_BTH.shape[:2]
        ids, probabilities = (torch.cat(kind).unflatten(0, rows) for kind in zip(*parts, strict=True))
        return SoftLabels(ids, probabilities)

    def _by_library(self, model: nn.Module, inputs: dict[str, Tensor], labels_BT: Tensor, *, scale: float) -> Tensor:
        if self._library.loss == "litgpt-first":
            self._bound = []  # nothing before was as long
        if self._library.has_litgpt_loss:
            return self._by_litgpt(model, inputs, labels_BT) * scale
        kind = self._library.cross_entropy
        if self._library.loss == "torchtune":
            hidden_BTH = self.hidden_states(model, inputs)
            owners.switch("loss")
            return torchtune_loss(hidden_BTH, self._linear, labels_BT, kind) * scale
        with nullcontext() if self._cache is None else self._cache.until_loss():
            total, held = generation_loss(
                self._library.loss, self._base, model, inputs, labels_BT, kind=kind, widened=self._library.autocast
            )
        loss = total * scale
        loss.held = held  # type: ignore[attr-defined]  # lives as long as the loss: through backward
        return loss

    def _by_litgpt(self, model: nn.Module, inputs: dict[str, Tensor], labels_BT: Tensor) -> Tensor:
        whole = self._library.loss == "litgpt-full"
        hidden_BTH = self.hidden_states(model, inputs)
        owners.switch("loss")
        # A name of the loop's: logits and the graph behind them live until the next batch's forward has its own.
        self._bound = litgpt_logits(hidden_BTH, self._linear, whole=whole)
        del hidden_BTH
        return litgpt_loss(self._bound, labels_BT, whole=whole)

    def hidden_states(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """hidden_BTH: what the model hands to its head, where it stops: nothing after the head runs on it."""
        self._linear.forward = _stop
        try:
            model(**inputs)
        except _HeadReachedError as reached:
            return reached.hidden_BTH
        finally:
            del self._linear.forward
        raise RecipeError(
            f'memory.loss = "chunked": {type(model).__name__} does not use its head; nearest: memory.loss = "full"'
        )

    def check_finish(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        """Raises RecipeError when the model does more to its logits than the chunked loss knows of."""
        # Without dropout, which would make any two passes differ.
        model.eval()
        with torch.no_grad():
            expected_BTV = model(**inputs).logits
            ours_BTV = self._finish(self._linear(self.hidden_states(model, inputs)))
        model.train()
        if not torch.allclose(ours_BTV.float(), expected_BTV.float(), rtol=1e-2, atol=1e-2):
            raise RecipeError(
                'memory.loss = "chunked" does not know what this model does to its logits after the head; '
                'nearest: memory.loss = "full"'
            )


class LossModule(nn.Module):
    """The model with its loss as the one result: what sharding wraps, so that the head's weight is there for the loss.

    Called for the forward pass of a micro-batch. `look`: what to do instead, where the model is whole for it.
    """

    def __init__(self, model: nn.Module, head: OutputHead) -> None:
        super().__init__()
        self.model = model
        self.head = head

    def forward(
        self,
        inputs: dict[str, Tensor],
        labels: Tensor | None = None,
        *,
        scale: float = 1.0,
        soft: SoftLabels | None = None,
        look: Callable[[nn.Module, dict[str, Tensor]], None] | None = None,
    ) -> Tensor | None:
        """As `OutputHead.loss`."""
        if look is not None:
            return look(self.model, inputs)
        assert labels is not None
        return self.head.loss(self.model, inputs, labels, scale=scale, soft=soft)


def finish_of(base: PreTrainedModel) -> Finish:
    """What the family does to logits after the head: softcap (Gemma), factor (Granite, Cohere), bias (BART), nothing.

    `models.families.FULL_LOSS_ONLY` names families for which this is not all.
    """
    config, family = base.config, base.config.model_type
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    if softcap:
        return lambda logits: torch.tanh(logits / softcap) * softcap
    divisor = getattr(config, "logits_scaling", None)
    if divisor and family.startswith("granite"):
        return lambda logits: logits / divisor
    factor = getattr(config, _FACTORS.get(family, ""), None)
    if factor:
        return lambda logits: logits * factor
    bias_V = getattr(base, "final_logits_bias", None)
    if bias_V is not None:
        return lambda logits: logits + bias_V
    return lambda logits: logits


def classifier_name(base: PreTrainedModel) -> str:
    """Name of the module that turns hidden states into classes. Raises RecipeError where none is known."""
    for name in _CLASSIFIERS:
        if hasattr(base, name):
            return name
    raise RecipeError(f"{type(base).__name__}: its classifier is called none of {', '.join(_CLASSIFIERS)}")


def _watch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
    owners.switch("loss")
    if args[0].requires_grad:
        args[0].register_hook(_leave_loss)


def _leave_loss(_: Tensor) -> None:
    owners.switch("activations")


def _all_parameters(base: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """(module, its own parameter), tied ones with each of their modules."""
    for module in base.modules():
        for parameter in module.parameters(recurse=False):
            yield module, parameter


class _HeadReachedError(Exception):
    """Ends a forward pass at the head."""

    def __init__(self, hidden_BTH: Tensor) -> None:
        super().__init__()
        self.hidden_BTH = hidden_BTH


def _stop(hidden_BTH: Tensor) -> Tensor:
    raise _HeadReachedError(hidden_BTH)
