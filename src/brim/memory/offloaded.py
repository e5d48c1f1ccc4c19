"""An estimate's ledger split between a device and its host: what is offloaded, by the number of parameters. No torch.

The rehearsal does not read this: it runs the crossings.
"""

from dataclasses import replace

from brim.memory.kept import ELEMENT_BYTES
from brim.memory.rough import block_bytes, kept_bytes, table_bytes, trained_parameters
from brim.models.spec import ModelSpec
from brim.recipe import Recipe
from brim.report import Ledger


def split(ledger: Ledger, spec: ModelSpec, recipe: Recipe) -> tuple[Ledger, int]:
    """(what is left on the device, bytes on its host) of a moment whose ledger knows one memory.

    On the device stay one block's activations, and of weights and gradients those outside of blocks and one block's;
    where ranks divide the weights, what they gather and the gradients that they have not summed yet.
    """
    memory, host = recipe.memory, 0
    if memory.offloads_optimizer:
        host += ledger.optimizer
        ledger = replace(ledger, optimizer=0)
    if memory.offloads_activations:
        left = min(ledger.activations, block_bytes(spec, recipe))
        host += kept_bytes(spec, recipe)
        ledger = replace(ledger, activations=left)
    if memory.offloads_weights and recipe.parallel.divides_weights:
        parts = trained_parameters(spec, recipe) * ELEMENT_BYTES[recipe.plain_format] // recipe.parallel.state_shards
        gradients = max(0, ledger.gradients - parts)
        host += ledger.weights + ledger.gradients - gradients
        ledger = replace(ledger, weights=0, gradients=gradients)
    elif memory.offloads_weights:
        tables = min(ledger.weights, table_bytes(spec, recipe))
        fetched = (ledger.weights - tables) // max(1, spec.num_layers)
        gradients = min(ledger.gradients, tables + fetched)
        host += ledger.weights - tables + ledger.gradients - gradients
        ledger = replace(ledger, weights=tables, gathered=ledger.gathered + fetched, gradients=gradients)
    return ledger, host
