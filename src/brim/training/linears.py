"""Which linear layers of a model are packed or fake-quantized: all below what a task takes for the head."""

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from brim.layers.linears import linears_below
from brim.recipe import Task
from brim.training.head import classifier_name


def inner_linears(model: PreTrainedModel, task: Task) -> Callable[[str, nn.Module], bool]:
    """A filter for `layers.swap`."""
    classifies = task == "sequence-classification"
    head = getattr(model, classifier_name(model)) if classifies else model.get_output_embeddings()
    return linears_below(head, model)
