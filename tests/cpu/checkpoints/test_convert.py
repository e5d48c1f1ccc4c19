"""`quantize`: what becomes of each tensor, by numpy; what transformers makes of the result."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from brim.checkpoints import conversion, job, stream
from brim.checkpoints.convert import quantize
from brim.checkpoints.targets import Target
from brim.checkpoints.writer import plan_shards
from brim.errors import UsageError
from brim.models.directory import read_tensors

Maker = Callable[..., Path]
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FAMILIES = ("llama", "untied", "t5")


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def load(directory: Path, **options: Any) -> Any:
    """As a user loads it; nothing may be missing, unexpected or misshapen."""
    config = json.loads((directory / "config.json").read_text())
    kind: Any = AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM
    model, loading = kind.from_pretrained(directory, output_loading_info=True, dtype="auto", **options)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model: Any) -> Tensor:
    tokens = torch.arange(16).reshape(2, 8)
    inputs = {"decoder_input_ids": tokens.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        return model(tokens, **inputs).logits


def linear_weights(directory: Path) -> set[str]:
    """Names of the weights of all nn.Linear modules but the head, from the model with its weights."""
    model = load(directory)
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def decoded(directory: Path) -> dict[str, Tensor]:
    """Weights of an INT8 directory by numpy: codes times scale, in the scale's dtype; the rest as it is."""
    tensors = tensors_of(directory)
    found = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            scale = tensors[f"{name}_scale"]
            product = tensor.numpy().astype(np.float32) * scale.float().numpy()
            found[name] = torch.from_numpy(product).to(scale.dtype)
        elif not name.endswith("_scale"):
            found[name] = tensor
    return found


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "mixtral"])
@pytest.mark.parametrize("to", ["fp16", "bf16"])
def test_floats_are_cast(family: str, to: Target, tiny: Maker, tmp_path: Path) -> None:
    """Every float tensor is torch's cast of the source's, every other one its bytes; transformers loads it so."""
    source, output = tiny(family), tmp_path / "output"
    quantize(source, output, to=to)
    before, after = tensors_of(source), tensors_of(output)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert raw(after[name]) == raw(tensor.to(TORCH[to]) if tensor.is_floating_point() else tensor), name
    assert json.loads((output / "config.json").read_text())["dtype"] == {"fp16": "float16", "bf16": "bfloat16"}[to]
    model = load(output)
    assert model.dtype == TORCH[to]
    if family in ("llama", "t5", "gpt2"):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    close = torch.nn.functional.cosine_similarity(logits(model).float(), logits(load(source)), dim=-1)
    assert float(close.min()) > 0.99


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("family", FAMILIES)
def test_linear_weights_become_codes(family: str, dtype: str, tiny: Maker, tmp_path: Path) -> None:
    """Weights of linear modules are the nearest codes at scale absmax/127 per row, by numpy; the rest is untouched."""
    source, output = tiny(family, dtype=TORCH[dtype]), tmp_path / "output"
    quantize(source, output, to="int8")
    before, after = tensors_of(source), tensors_of(output)
    linears = linear_weights(source) & before.keys()
    assert len(linears) >= 14
    assert after.keys() == before.keys() | {f"{name}_scale" for name in linears}
    for name, tensor in before.items():
        if name not in linears:
            assert (raw(after[name]), after[name].dtype, after[name].shape) == (raw(tensor), tensor.dtype, tensor.shape)
            continue
        scale = after[f"{name}_scale"]
        assert (after[name].dtype, scale.dtype, scale.shape) == (torch.int8, tensor.dtype, (tensor.shape[0], 1))
        weight = tensor.float().numpy()
        largest = torch.from_numpy(np.abs(weight).max(axis=1, keepdims=True) / np.float32(127))
        assert torch.equal(scale, largest.to(tensor.dtype))
        codes = np.clip(np.rint(weight / scale.float().numpy()), -127, 127)
        assert np.array_equal(after[name].numpy(), codes)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_with_the_decoded_weights(family: str, dtype: str, tiny: Maker, tmp_path: Path) -> None:
    """`from_pretrained(directory)` has the logits, bit by bit, of the source model with numpy's decoded weights."""
    source, output = tiny(family, dtype=TORCH[dtype]), tmp_path / "output"
    quantize(source, output, to="int8")
    plain = tmp_path / "decoded"
    shutil.copytree(source, plain)
    save_file(decoded(output), plain / "model.safetensors", {"format": "pt"})
    model, weights = load(output), decoded(output)
    held = {name: parameter for name, parameter in model.named_parameters() if name in weights}
    assert held
    assert all(torch.equal(parameter, weights[name]) for name, parameter in held.items())
    # transformers widens `wo` of a plain FP16 T5 to FP32, and that of a quantized one not (5.23).
    if (family, dtype) != ("t5", "fp16"):
        assert torch.equal(logits(model), logits(load(plain)))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family != "untied")
    change = (logits(model) - logits(load(source))).float().norm() / logits(load(source)).float().norm()
    assert 0 < float(change) < 0.1


def test_int8_survives_saving_and_generating(tiny: Maker, tmp_path: Path) -> None:
    """What was loaded generates, and can be saved and loaded again with the same logits."""
    output = tmp_path / "output"
    quantize(tiny("llama"), output, to="int8")
    model = load(output)
    made = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert made.shape[1] <= 7


def test_a_model_saved_without_head_is_found(tiny: Maker, tmp_path: Path) -> None:
    """A file of the bare model, whose names lack a prefix, is quantized as the full one is."""
    source, output = tmp_path / "bare", tmp_path / "output"
    load(tiny("llama")).base_model.save_pretrained(source)
    report = quantize(source, output, to="int8")
    assert "layers.0.self_attn.q_proj.weight" in {tensor.name for tensor in report.converted}
    assert len(report.converted) == 14
    plain = tmp_path / "decoded"
    shutil.copytree(source, plain)
    save_file(decoded(output), plain / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(load(output)), logits(load(plain)))


def test_a_head_of_its_own_stays_so(tiny: Maker, tmp_path: Path) -> None:
    """A file with a head that differs from the embedding, though the config calls them tied, keeps both (FLAN-T5)."""
    source, output = tiny("t5"), tmp_path / "output"
    tensors = tensors_of(source)
    tensors["lm_head.weight"] = torch.full_like(tensors["shared.weight"], 0.25)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = quantize(source, output, to="int8")
    assert len(report.converted) == 32
    assert raw(tensors_of(output)["lm_head.weight"]) == raw(tensors["lm_head.weight"])


def test_conv1d_is_refused_and_explained(tiny: Maker, tmp_path: Path) -> None:
    """GPT-2 has Conv1D in place of linear modules, which INT8's readers do not know: said, with what works."""
    with pytest.raises(UsageError, match=r"gpt2 has none .*Conv1D.*use --to bf16 or fp16"):
        quantize(tiny("gpt2"), tmp_path / "output", to="int8")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("to", ["int8", "bf16"])
def test_shards_in_and_out_change_nothing(
    to: Target, tiny: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model in several files becomes the same tensors as one in one file; a result in several files loads alike."""
    whole = tiny("llama")
    sharded = tmp_path / "sharded"
    load(whole).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    quantize(whole, tmp_path / "one", to=to)
    quantize(sharded, tmp_path / "two", to=to)
    monkeypatch.setattr(job, "plan_shards", partial(plan_shards, limit_bytes=10_000))
    quantize(sharded, tmp_path / "three", to=to)
    assert len(list((tmp_path / "three").glob("model-*-of-*.safetensors"))) > 2
    one, two, three = (tensors_of(tmp_path / name) for name in ("one", "two", "three"))
    assert one.keys() == two.keys() == three.keys()
    assert all(raw(one[name]) == raw(two[name]) == raw(three[name]) for name in one)
    assert torch.equal(logits(load(tmp_path / "one")), logits(load(tmp_path / "three")))
    for path in (tmp_path / "three").glob("*.safetensors"):
        names = set(load_file(path))
        assert all(name.removesuffix("_scale") in names for name in names)


def test_the_tile_does_not_show(tiny: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tile's size, the files are the same byte by byte, and so is the report but for summation order."""
    source = tiny("untied")
    first = quantize(source, tmp_path / "whole", to="int8")
    monkeypatch.setattr(conversion, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 100)
    second = quantize(source, tmp_path / "tiles", to="int8")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "tiles"))
    assert one == other
    for a, b in zip(first.tensors, second.tensors, strict=True):
        assert (a.name, a.clipped_share, a.zeroed_share, a.scale_min) == (
            b.name,
            b.clipped_share,
            b.zeroed_share,
            b.scale_min,
        )
        assert a.sqnr_db == pytest.approx(b.sqnr_db, abs=1e-4)


@pytest.mark.parametrize("to", ["int8", "fp16", "bf16"])
def test_the_report_adds_up(to: Target, tiny: Maker, tmp_path: Path) -> None:
    """Bytes are those of the files; SQNR, largest error, zeros and scales are what numpy finds in them, in FP64."""
    source, output = tiny("untied"), tmp_path / "output"
    report = quantize(source, output, to=to)
    saved = json.loads((output / "quantization_report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    before, after = tensors_of(source), tensors_of(output)
    assert saved["totals"]["bytes_before"] == sum(tensor.nbytes for tensor in before.values())
    assert saved["totals"]["bytes_after"] == sum(tensor.nbytes for tensor in after.values())
    assert saved["totals"]["bytes_after"] == sum(tensor.nbytes for tensor in read_tensors(output))
    results = decoded(output)
    for entry in saved["tensors"]:
        name = entry["name"]
        signal = before[name].double().numpy()
        error = (results[name].double().numpy()) - signal
        scale = after.get(f"{name}_scale")
        assert entry["bytes_before"] == before[name].nbytes
        assert entry["bytes_after"] == after[name].nbytes + (scale.nbytes if scale is not None else 0)
        assert entry["shape"] == list(signal.shape)
        if not error.any():
            assert entry["sqnr_db"] is None
            continue
        assert entry["sqnr_db"] == pytest.approx(10 * math.log10((signal**2).sum() / (error**2).sum()), abs=1e-3)
        assert entry["largest_error"] == pytest.approx(np.abs(error).max(), rel=3e-5)
        assert entry["zeroed_share"] == pytest.approx(((signal != 0) & (results[name].double().numpy() == 0)).mean())
        assert entry["clipped_share"] == 0
        if scale is not None:
            assert (entry["scale_min"], entry["scale_max"]) == (float(scale.min()), float(scale.max()))
    converted = [entry for entry in saved["tensors"] if entry["format"] != entry["source_format"]]
    assert saved["totals"]["converted"] == len(converted) > 0
    assert saved["totals"]["worst_sqnr_db"] == min(entry["sqnr_db"] for entry in converted if entry["sqnr_db"])


def test_rows_of_zeros_stay_zeros(tiny: Maker, tmp_path: Path) -> None:
    """A row of zeros has scale 1 and codes 0, and counts neither as loss nor as zeroed."""
    source, output = tiny("llama"), tmp_path / "output"
    tensors = tensors_of(source)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = quantize(source, output, to="int8")
    entry = next(tensor for tensor in report.tensors if tensor.name == name)
    assert (entry.sqnr_db, entry.largest_error, entry.zeroed_share, entry.scale_min) == (None, 0.0, 0.0, 1.0)
    assert not tensors_of(output)[name].any()


def test_what_belongs_to_a_model_goes_along(tiny: Maker, tmp_path: Path) -> None:
    """Tokenizer, generation settings and licence are copied as contents; other files, and code, are not."""
    source, output = tiny("llama"), tmp_path / "output"
    for name in ("tokenizer.json", "LICENSE", "tokenizer.model", "modeling_own.py", "optimizer.pt", "notes.txt"):
        (source / name).write_text(name)
    (source / "merges.txt").symlink_to("notes.txt")
    quantize(source, output, to="bf16")
    assert {path.name for path in output.iterdir()} == {
        "config.json", "model.safetensors", "quantization_report.json", "generation_config.json",
        "tokenizer.json", "LICENSE", "tokenizer.model", "merges.txt",
    }  # fmt: skip
    assert (output / "merges.txt").read_text() == "notes.txt"
    assert not (output / "merges.txt").is_symlink()


def test_other_tensors_pass_through(tiny: Maker, tmp_path: Path) -> None:
    """Integers, booleans, scalars and empty tensors are kept as they are by every conversion; so is the config."""
    source = tiny("llama")
    odd = {"a": torch.tensor(7), "b": torch.tensor([True, False]), "c": torch.ones(0, 4), "d": torch.tensor(1.5),
           "e": torch.ones(3, dtype=torch.float8_e4m3fn), "f": torch.ones(2, dtype=torch.complex64)}  # fmt: skip
    save_file(tensors_of(source) | odd, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    for to in ("int8", "bf16"):
        quantize(source, tmp_path / to, to=to)
        after = tensors_of(tmp_path / to)
        for name, tensor in odd.items():
            kept = tensor.bfloat16() if to == "bf16" and tensor.dtype == torch.float32 else tensor
            assert (raw(after[name]), after[name].dtype, after[name].shape) == (raw(kept), kept.dtype, kept.shape)
        result = json.loads((tmp_path / to / "config.json").read_text())
        changed = {key for key in result.keys() | config.keys() if result.get(key) != config.get(key)}
        assert changed == ({"dtype"} if to == "bf16" else {"quantization_config"})


def test_double_precision_is_judged_in_double(tiny: Maker, tmp_path: Path) -> None:
    """An FP64 source's errors are measured against its own values, and become INT8 with scales in FP32."""
    source = tiny("llama", dtype=torch.float64)
    before = tensors_of(source)
    report = quantize(source, tmp_path / "int8", to="int8")
    name = "model.layers.0.mlp.up_proj.weight"
    after = tensors_of(tmp_path / "int8")
    assert after[f"{name}_scale"].dtype == torch.float32
    back = after[name].double() * after[f"{name}_scale"].double()
    entry = next(tensor for tensor in report.tensors if tensor.name == name)
    assert entry.largest_error == pytest.approx(float((back - before[name]).abs().max()), rel=1e-4)
    tiny_values = {**before, name: torch.full_like(before[name], 1e-60)}
    save_file(tiny_values, source / "model.safetensors", {"format": "pt"})
    report = quantize(source, tmp_path / "bf16", to="bf16")
    entry = next(tensor for tensor in report.tensors if tensor.name == name)
    assert entry.zeroed_share == 1.0
    assert entry.sqnr_db == pytest.approx(0.0)
