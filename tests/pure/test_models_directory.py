"""Model directories: shards that stay inside, indexes that tell the truth, descriptions from headers alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from brim.errors import ModelFileError, UnknownNameError
from brim.models import describe
from brim.models.directory import INDEX, SINGLE, read_tensors, weight_files

LLAMA = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 32, "tie_word_embeddings": False,
}  # fmt: skip
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def ones(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ones(shape, np.float32)


def write_model(directory: Path, tensors: Mapping[str, Any], config: Mapping[str, Any] = LLAMA) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), directory / SINGLE)
    return directory


def write_shards(directory: Path, shards: Mapping[str, Mapping[str, Any]], weight_map: Mapping[str, str]) -> Path:
    (directory / "config.json").write_text(json.dumps(LLAMA))
    for name, tensors in shards.items():
        save_file(dict(tensors), directory / name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def test_shards_are_read_in_order_of_name(tmp_path: Path) -> None:
    """A sharded model's tensors are those of all shards; its files come in order of name."""
    shards = {"b.safetensors": {"x": ones(2)}, "a.safetensors": {"y": ones(3), "z": ones(4)}}
    write_shards(tmp_path, shards, {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"})
    assert [path.name for path in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    assert {t.name: t.numel for t in read_tensors(tmp_path)} == {"x": 2, "y": 3, "z": 4}


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/secret.safetensors", "sub/a.safetensors", "..\\a.safetensors", "C:a.safetensors",
     "a.bin", ".hidden.safetensors", "", "a\0.safetensors"],
)  # fmt: skip
def test_a_shard_name_cannot_leave_the_directory(name: str, tmp_path: Path) -> None:
    """A shard that is not a plain name in the directory is refused before any file of that name is touched."""
    inside = tmp_path / "model"
    inside.mkdir()
    save_file({"x": ones(2)}, tmp_path / "secret.safetensors")
    write_shards(inside, {}, {"x": name})
    with pytest.raises(ModelFileError, match="not a plain name"):
        read_tensors(inside)


def test_links_must_stay_inside(tmp_path: Path) -> None:
    """A weight file that links out of its directory is refused; one that links inside is read."""
    save_file({"x": ones(2)}, tmp_path / "outside.safetensors")
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / SINGLE).symlink_to("../outside.safetensors")
    with pytest.raises(ModelFileError, match="outside its directory"):
        read_tensors(inside)
    (inside / SINGLE).unlink()
    save_file({"x": ones(2)}, inside / "real.safetensors")
    (inside / SINGLE).symlink_to("real.safetensors")
    assert [t.name for t in read_tensors(inside)] == ["x"]


def test_links_into_the_hub_cache_are_followed(tmp_path: Path) -> None:
    """The Hub cache's own layout, snapshots that link to blobs, is read; a link to another model's blobs is not."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs, others = tmp_path / "models--a--b" / "blobs", tmp_path / "models--x--y" / "blobs"
    for place in (snapshot, blobs, others):
        place.mkdir(parents=True)
        save_file({"x": ones(2)}, place / "hash")
    (snapshot / SINGLE).symlink_to("../../blobs/hash")
    assert [t.name for t in read_tensors(snapshot)] == ["x"]
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(others / "hash")
    with pytest.raises(ModelFileError, match="outside its directory"):
        read_tensors(snapshot)


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    """A loop of links is a refusal, not an endless walk."""
    (tmp_path / SINGLE).symlink_to(SINGLE)
    with pytest.raises(ModelFileError, match="leads nowhere"):
        read_tensors(tmp_path)


INDEX_LIES = {
    "lacks tensor 'gone'": {"x": "a.safetensors", "y": "b.safetensors", "gone": "a.safetensors"},
    "is said to be in b.safetensors, but it is in a.safetensors": {"x": "b.safetensors", "y": "b.safetensors"}
    | {"z": "a.safetensors"},
    "does not exist": {"x": "a.safetensors", "y": "absent.safetensors"},
    "is not a name": {"x": 3},
    "has no weight_map": {},
}


@pytest.mark.parametrize("rule", INDEX_LIES)
def test_an_index_that_lies_is_refused(rule: str, tmp_path: Path) -> None:
    """What the index says and what the shards hold must be the same."""
    shards = {"a.safetensors": {"x": ones(2), "z": ones(1)}, "b.safetensors": {"y": ones(3)}}
    write_shards(tmp_path, shards, INDEX_LIES[rule])  # type: ignore[arg-type]  # one lie is of the wrong kind
    with pytest.raises(ModelFileError, match=rule):
        read_tensors(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """No tensor may be in two shards: readers would disagree on which one counts."""
    shards = {"a.safetensors": {"x": ones(2)}, "b.safetensors": {"x": ones(2), "y": ones(1)}}
    write_shards(tmp_path, shards, {"x": "a.safetensors", "y": "b.safetensors"})
    with pytest.raises(ModelFileError, match="in two shards"):
        read_tensors(tmp_path)


def test_pickle_is_refused_with_the_reason(tmp_path: Path) -> None:
    """A model whose weights are pickle is refused, and told how to become safe."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"pickle .* save the model as safetensors"):
        describe(str(tmp_path))


def test_a_tensorflow_checkpoint_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """The form of .index and .data files is named, and what turns it into another."""
    for name in ("bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelFileError, match=r"TensorFlow checkpoint .*from_tf=True.*save_pretrained"):
        weight_files(tmp_path)


def test_the_header_decides_whether_the_head_is_tied(tmp_path: Path) -> None:
    """No head in the file: tied and counted once, whatever the config says. A head of its own: untied, counted too."""
    tied = describe(str(write_model(tmp_path / "tied", {EMBEDDING: ones(32, 8)})))
    assert (tied.tied_head, tied.num_parameters) == (True, 256)
    own = {EMBEDDING: ones(32, 8), HEAD: 2 * ones(32, 8)}
    untied = describe(str(write_model(tmp_path / "untied", own, LLAMA | {"tie_word_embeddings": True})))
    assert (untied.tied_head, untied.num_parameters) == (False, 512)


def test_a_tied_head_stored_twice_counts_once(tmp_path: Path) -> None:
    """Files that hold a copy of the embedding as head, as their config says, are of a tied model."""
    copies = {EMBEDDING: ones(32, 8), HEAD: ones(32, 8)}
    spec = describe(str(write_model(tmp_path / "copies", copies, LLAMA | {"tie_word_embeddings": True})))
    assert (spec.tied_head, spec.num_parameters, spec.stored_bytes) == (True, 256, 2 * 256 * 4)


def test_buffers_and_scales_are_no_parameters(tmp_path: Path) -> None:
    """Causal masks, rotary frequencies and scales of quantized weights are stored, but not counted."""
    tensors = {
        "wte.weight": ones(5, 4),
        "h.0.attn.bias": ones(1, 1, 8, 8),
        "h.0.attn.c_attn.bias": ones(12),
        "layers.0.rotary_emb.inv_freq": ones(4),
        "layers.0.mlp.weight_scale": ones(4, 1),
    }
    spec = describe(str(write_model(tmp_path / "model", tensors, LLAMA | {"model_type": "gpt2"})))
    assert spec.num_parameters == 5 * 4 + 12


def test_a_directory_without_weights_is_counted_from_its_config(tmp_path: Path) -> None:
    """A config alone describes a model: parameters by closed form, no tensors."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    spec = describe(str(tmp_path))
    per_block = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8
    assert spec.num_parameters == 2 * 32 * 8 + per_block + 8
    assert spec.tensors == ()


def test_a_family_that_cannot_be_counted_lists_those_that_can(tmp_path: Path) -> None:
    """A config of an unknown family without weights is refused with the known families and the way out."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "oracle"}))
    with pytest.raises(UnknownNameError, match=r"'oracle'.*known: llama.*put its safetensors files"):
        describe(str(tmp_path))


def test_a_multimodal_config_describes_its_text_model(tmp_path: Path) -> None:
    """The text part of a nested config is the model; what it leaves out is taken from around it."""
    text = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
    nested = {"model_type": "vision", "text_config": text, "vision_config": {}, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    spec = describe(str(tmp_path))
    assert (spec.model_type, spec.hidden_size, spec.tied_head) == ("llama", 8, True)


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": "8"}, {"num_attention_heads": 0}, {"hidden_size": -8}])
def test_a_config_without_usable_sizes_is_refused(sizes: dict[str, object], tmp_path: Path) -> None:
    """A config that lacks a size, or has nonsense for one, is a bad model file, not a crash."""
    config = LLAMA | sizes if sizes else {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match=r"is not a size|incomplete"):
        describe(str(tmp_path))


BAD_CONFIGS = {
    "not JSON": "{",
    "not an object": "[]",
    "names no model_type": "{}",
    "occurs twice": '{"model_type": "llama", "model_type": "gpt2"}',
}


@pytest.mark.parametrize("rule", BAD_CONFIGS)
def test_a_bad_config_is_refused(rule: str, tmp_path: Path) -> None:
    """A config.json that is no configuration is refused by name and rule."""
    (tmp_path / "config.json").write_text(BAD_CONFIGS[rule])
    with pytest.raises(ModelFileError, match=rf"config\.json.*{rule}"):
        describe(str(tmp_path))


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    """A directory without config.json is said to be none."""
    with pytest.raises(ModelFileError, match="has no config"):
        describe(str(tmp_path))
