"""What other tools' published rules say about a row: weights, gradients and optimizer from parameter counts."""

from benchmarks.published import Case

_BYTES = {"fp32": 4, "bf16": 2}
ZERO2_BYTES = 2 + 18
"""DeepSpeed's estimator on one GPU, ZeRO-2: 2P + 18P/N with N = 1 (deepspeed/runtime/zero/stage_1_and_2.py)."""


def peers(case: Case) -> dict[str, int]:
    """Bytes by tool."""
    parameters = case.spec.num_parameters
    if case.writing is not None:
        # its documentation: "add up to an additional 20%" for inference (docs/source/usage_guides)
        return {"accelerate 1.2x": int(1.2 * parameters * _BYTES[case.recipe.precision.weights])}
    return {
        # huggingface/accelerate@16cb6eb8, commands/estimate.py: "Training using Adam", 4 x the weights
        "accelerate 4x": 4 * parameters * _BYTES[case.recipe.precision.weights],
        "DeepSpeed ZeRO-2": ZERO2_BYTES * parameters,
    }
