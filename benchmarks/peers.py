"""What other tools' published rules say about a row: weights, gradients and optimizer from parameter counts."""

from benchmarks.published import Case

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def peers(case: Case) -> dict[str, int]:
    """Bytes by tool; a tool that has no rule for such a run (packed weights) is absent."""
    parameters, weights = case.spec.num_parameters, case.recipe.precision.weights
    if case.writing is not None:
        # its documentation: "add up to an additional 20%" for inference (docs/source/usage_guides)
        return {"accelerate 1.2x": int(1.2 * parameters * _BYTES[weights])}
    devices = case.recipe.parallel.nodes * case.recipe.parallel.devices_per_node
    # deepspeed/runtime/zero/stage_1_and_2.py: 2P + 18P / N
    rules = {"DeepSpeed ZeRO-2": 2 * parameters + 18 * parameters // devices}
    if weights in _BYTES:
        # huggingface/accelerate@16cb6eb8, commands/estimate.py: "Training using Adam", 4 x the weights
        rules["accelerate 4x"] = 4 * parameters * _BYTES[weights]
    return rules
