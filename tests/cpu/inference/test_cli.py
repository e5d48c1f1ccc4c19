"""The verbs `evaluate` and `generate` as a user types them, on a tiny model in a directory."""

import json
from pathlib import Path

import pytest

from brim.cli import main
from brim.inference import Loaded, generate, perplexity

TEXT = "Filled to the brim and never over it.\n" * 6
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="session")
def directory(llama: Loaded, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    llama.model.save_pretrained(path)
    llama.tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def test_evaluate_json(directory: str, text_file: str, llama: Loaded, capsys: Captured) -> None:
    """`--json` prints one object with the library's own figures; against itself a model changes by nothing."""
    options = ["--data", text_file, "--baseline", directory, "--window", "64", "--max-tokens", "100"]
    assert main(["evaluate", directory, *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    expected = perplexity(llama, TEXT, window=64, stride=32, max_tokens=100)
    assert (result["schema"], result["model"], result["data"]) == (1, directory, text_file)
    assert (result["perplexity"], result["tokens"]) == (expected.value, 99)
    assert (result["window"], result["stride"]) == (64, 32)
    assert result["baseline"]["perplexity"] == expected.value
    assert result["relative_change"] == 0


def test_evaluate_table(directory: str, capsys: Captured) -> None:
    """Without `--data` the shipped text is used and named; the window is stated; progress stays off stdout."""
    assert main(["evaluate", directory, "--baseline", directory, "--window", "32", "--max-tokens", "80"]) == 0
    captured = capsys.readouterr()
    assert "+0.00%" in captured.out
    assert "79 tokens of WikiText-2 excerpt" in captured.out
    assert "window 32, stride 16" in captured.out
    assert "100 %" not in captured.out


def test_evaluate_refuses(directory: str, text_file: str, tmp_path: Path, capsys: Captured) -> None:
    """Bad data ends with 4, a bad question with 2, each with one line that says why."""
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"fine\n\xff\n")
    for arguments, code, said in (
        (["--data", str(broken)], 4, "broken.txt: line 2"),
        (["--data", str(tmp_path / "none.txt")], 4, "none.txt: cannot be read"),
        (["--data", text_file], 2, "--window 96"),
        (["--data", text_file, "--window", "1"], 2, "--window"),
    ):
        assert main(["evaluate", directory, *arguments]) == code
        assert said in capsys.readouterr().err
    assert main(["evaluate", "smollm2-135n", "--data", text_file]) == 2
    assert "did you mean smollm2-135m" in capsys.readouterr().err


def test_generate_prints_text_alone_on_stdout(directory: str, llama: Loaded, capsys: Captured) -> None:
    """stdout holds the text and nothing else; speed and bytes go to stderr."""
    assert main(["generate", directory, "abc", "--max-tokens", "8"]) == 0
    captured = capsys.readouterr()
    made = generate(llama, "abc", max_tokens=8)
    assert captured.out == made.text + "\n"
    assert f"{made.new_tokens} tokens at" in captured.err
    assert "KiB resident" in captured.err


def test_generate_json(directory: str, llama: Loaded, capsys: Captured) -> None:
    """`--json` prints one object with the text and what it took."""
    assert main(["generate", directory, "abc", "--max-tokens", "8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    made = generate(llama, "abc", max_tokens=8)
    assert result["schema"] == 1
    for key in ("text", "prompt_tokens", "new_tokens", "resident_bytes"):
        assert result[key] == getattr(made, key)
    assert result["tokens_per_s"] > 0


def test_generate_refuses(directory: str, capsys: Captured) -> None:
    """No prompt and no room end with 2."""
    assert main(["generate", directory, " "]) == 2
    assert main(["generate", directory, "abc", "--max-tokens", "0"]) == 2
    assert main(["generate", directory, "abc", "--max-tokens", "200"]) == 2
    assert "96 positions" in capsys.readouterr().err
