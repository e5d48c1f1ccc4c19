"""The catalogue and the names that `describe` understands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from brim.errors import ModelFileError, UnknownNameError
from brim.models import catalogue, describe
from brim.models.count import count_from_config, known

ALIASES = list(catalogue.entries())


def test_no_name_means_two_models() -> None:
    """Aliases and Hub ids, in any case, are all different; and an alias is never another entry's Hub id's last part."""
    entries = catalogue.entries().values()
    names = [name.casefold() for name in catalogue.names()]
    assert len(set(names)) == len(names)
    for entry in entries:
        namesakes = [other for other in entries if other.key.rpartition("/")[2].casefold() == entry.alias]
        assert namesakes in ([], [entry])


@pytest.mark.parametrize("alias", ALIASES)
def test_every_entry_is_described(alias: str) -> None:
    """Each alias and its Hub id give a description whose sizes can be asked for."""
    entry = catalogue.entries()[alias]
    for name in (alias, entry.key, entry.key.upper()):
        spec = describe(name)
        assert spec.kind == "catalogue"
        assert spec.num_parameters == entry.num_parameters
        assert spec.hidden_size > 0
        assert spec.num_layers > 0
        assert spec.vocab_size > 0
        assert spec.num_heads >= spec.num_kv_heads > 0


@pytest.mark.parametrize("alias", [alias for alias in ALIASES if describe(alias).model_type in known()])
def test_closed_form_counts_what_building_counts(alias: str) -> None:
    """The closed form gives the count that was made by building the model, for every family it knows."""
    assert count_from_config(describe(alias)) == catalogue.entries()[alias].num_parameters


def test_exactly_published_counts_are_the_built_ones() -> None:
    """Where the publisher gives an exact count, it is the built one, to 0.05 % (two files count their buffers in)."""
    for entry in catalogue.entries().values():
        if entry.published_exact:
            assert entry.num_parameters == pytest.approx(entry.published_parameters, rel=5e-4)


def test_flan_t5_has_a_head_of_its_own() -> None:
    """FLAN-T5 and mT5 are untied as released, T5 is tied; the head's parameters are counted accordingly."""
    flan, plain = describe("flan-t5-small"), describe("t5-small")
    assert (flan.num_parameters, flan.tied_head) == (76_961_152, False)
    assert (plain.num_parameters, plain.tied_head) == (60_506_624, True)
    assert plain.task == "seq2seq-lm"


def test_an_unknown_name_gets_the_nearest() -> None:
    """A misspelt model is refused with exit code 2 and the names that look like it."""
    with pytest.raises(UnknownNameError, match="did you mean smollm2-135m") as caught:
        describe("smollm-135m")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("source", ["", "\0", "x" * 5000, "no such thing", "@", "gpt2@", "/" * 3000])
def test_nonsense_is_an_unknown_name(source: str) -> None:
    """Whatever is neither a name nor a path is refused as unknown, never by a crash."""
    with pytest.raises((UnknownNameError, ModelFileError)):
        describe(source)


@pytest.mark.parametrize("source", ["./absent", "/absent/model", "~/absent-model", "absent.gguf", "a/b/c", "absent/"])
def test_a_path_that_is_absent_is_said_so(source: str) -> None:
    """What looks like a path is not looked for on the Hub."""
    with pytest.raises(UnknownNameError, match="does not exist"):
        describe(source)


def test_other_files_are_no_models(tmp_path: Path) -> None:
    """A file that is not GGUF is refused with the forms that are read."""
    path = tmp_path / "model.bin"
    path.write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"not a \.gguf file"):
        describe(str(path))


def test_describing_needs_neither_torch_nor_numpy_nor_the_hub() -> None:
    """A catalogue name is described without torch, transformers, numpy or an HTTP client."""
    code = (
        "import sys; from brim import describe; describe('smollm2-135m'); describe('llama-3.1-8b');"
        "heavy = ('torch', 'transformers', 'numpy', 'huggingface_hub', 'httpx2');"
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert found.stdout.strip() == "[]"
