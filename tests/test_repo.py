"""The project's own rules: one direction of imports, a lean start, small files, words that match what is there."""

import ast
import importlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import brim
from brim.cli import app

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "brim"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

# DESIGN's house: a part imports only from parts named before it, or from itself.
ORDER = [
    "errors", "units", "publish", "cache", "hardware", "models", "numerics", "recipe", "report", "checkpoints",
    "layers", "memory", "speed", "answers", "growth", "planning", "inference", "training", "rehearsal", "launch", "cli",
    "web",
]  # fmt: skip
RANK = {part: rank for rank, part in enumerate(ORDER)}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def tracked() -> list[Path]:
    """Files that git tracks, or would: not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def sources() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


def part_of(path: Path) -> str:
    """`models` for src/brim/models/spec.py, `units` for src/brim/units.py."""
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imported_parts(node: ast.AST, package: str) -> list[str]:
    """Parts of brim that an import statement names; `package` is the importing file's own, for relative imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])])
        names = [f"{base}.{alias.name}" for alias in node.names] if base == "brim" else [base]
    else:
        return []
    found = [name.split(".")[1] for name in names if name.startswith("brim.")]
    return [part for part in found if (SRC / part).is_dir() or (SRC / f"{part}.py").is_file()]


def upward_imports(code: str, *, part: str, package: str = "brim") -> list[str]:
    """Parts that this code imports from above it; under TYPE_CHECKING counts too."""
    return [
        target
        for node in ast.walk(ast.parse(code))
        for target in imported_parts(node, package)
        if RANK[target] > RANK[part]
    ]


def lazy_imports(code: str) -> list[int]:
    """Lines of imports inside functions."""
    functions = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [
        inner.lineno
        for function in functions
        for inner in ast.walk(function)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]


def test_every_part_has_a_rank() -> None:
    """A new part takes its place in the order before anything imports it."""
    assert {part_of(path) for path in sources()} - {"__init__"} <= set(RANK)


def test_imports_point_one_way() -> None:
    """A part imports only itself or parts before it, so it can be read with what lies below it."""
    for path in sources():
        if path == SRC / "__init__.py":
            continue
        package = ".".join(["brim", *path.relative_to(SRC).parent.parts])
        found = upward_imports(path.read_text(encoding="utf-8"), part=part_of(path), package=package)
        assert found == [], f"{path}: imports {found}; move it down or pass it in"


def test_no_import_hides_in_a_function() -> None:
    """Only the command line imports when it runs: elsewhere a lazy import would hide a cycle."""
    for path in sources():
        if part_of(path) != "cli":
            assert lazy_imports(path.read_text(encoding="utf-8")) == [], path


@pytest.mark.parametrize(
    "planted",
    [
        "import brim.training.build",
        "from brim.training import build",
        "from brim import training",
        "from ..training import build",
        "from .. import training",
        "def f():\n    from brim.training import build",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from brim.training import build",
    ],
)
def test_guard_catches_a_planted_import(planted: str) -> None:
    """The guard sees each way of writing an import that points up, and lets the one that points down pass."""
    assert upward_imports(planted, part="memory", package="brim.memory") == ["training"]
    assert upward_imports(planted, part="rehearsal", package="brim.memory") == []
    assert lazy_imports(planted) == ([2] if planted.startswith("def") else [])


HEAVY = ("torch", "transformers", "numpy", "peft", "safetensors", "huggingface_hub")


def imports_of(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after this statement."""
    code = f"import sys\n{statement}\nprint('\\n' + ' '.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("statement", ["import brim", "import brim.cli", "from brim.cli import main; main(['--help'])"])
def test_start_is_lean(statement: str) -> None:
    """`import brim` and `brim --help` load neither torch nor what comes with it."""
    loaded = imports_of(statement)
    assert "brim" in loaded
    assert loaded.isdisjoint(HEAVY), f"{statement} loads {loaded.intersection(HEAVY)}"


def test_lean_guard_sees_a_heavy_import() -> None:
    """The guard finds numpy where numpy is imported."""
    assert "numpy" in imports_of("import brim, numpy")


def test_help_answers_at_once() -> None:
    """`brim --help` takes under 0.3 s of processor time, interpreter included, best of three after one to warm up."""
    seconds = []
    for _ in range(4):
        before = os.times()
        subprocess.run([sys.executable, "-m", "brim.cli", "--help"], capture_output=True, check=True)
        after = os.times()
        # Processor time, not the clock's: on a machine that does other work the clock measures that.
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    assert min(seconds[1:]) < 0.3


@pytest.mark.parametrize(
    "module", sorted({"brim", *(f"brim.{path.parent.name}" for path in SRC.glob("*/__init__.py"))} - {"brim.cli"})
)
def test_surface_is_what_all_says(module: str) -> None:
    """`__all__` is sorted, names what exists, and names every public thing that the module defines or brings in."""
    loaded = importlib.import_module(module)
    exported = getattr(loaded, "__all__", [])
    assert list(exported) == sorted(exported)
    visible = {name for name, value in vars(loaded).items() if not name.startswith("_") and not _is_module(value)}
    assert visible == set(exported)


def _is_module(value: object) -> bool:
    return isinstance(value, type(sys))


def test_files_and_functions_stay_small() -> None:
    """A file is one noun, a function one job: at most 400 and 60 lines."""
    for path in tracked():
        if path.suffix != ".py":
            continue
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= MAX_FILE_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {lines} lines"


def verbs() -> set[str]:
    return {str(command.name) for command in app.registered_commands}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def shell_lines(document: str) -> Iterator[str]:
    """Lines of shell in a document's fences, and commands in its running text."""
    for fence in re.findall(r"^```(?:console|bash|sh)\n(.*?)^```", document, flags=re.DOTALL | re.MULTILINE):
        yield from fence.splitlines()
    yield from re.findall(r"(?<!`)`((?:\.venv/bin/)?(?:brim|make) [^`]+)`(?!`)", document)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_what_exists(path: Path) -> None:
    """A command that a document shows names a verb or make target that exists."""
    for line in shell_lines(path.read_text(encoding="utf-8")):
        words = line.split("#")[0].removeprefix("$ ").split()
        if words[:1] == ["make"]:
            named = {word for word in words[1:] if re.fullmatch("[a-z]+", word)}
            assert named <= make_targets(), line
        if words and words[0].removeprefix(".venv/bin/") == "brim" and len(words) > 1:
            assert words[1] in verbs() or words[1].startswith("-"), line


def test_readme_has_a_line_for_each_verb() -> None:
    """README's table holds the verbs that exist: all of them and no other."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `brim (\w+)", readme, flags=re.MULTILINE)) == verbs()


def test_links_lead_somewhere() -> None:
    """A relative link in a document names a file of the project."""
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_no_path_of_one_machine() -> None:
    """No tracked file names a folder of somebody's machine."""
    folders = ["home", "root", "work", "Users", "opt", "tmp"]
    personal = re.compile("(?<![\\w.~}/])/(?:" + "|".join(folders) + ")/\\w")
    assert personal.search("see " + "/ho" + "me/jo/model")
    for path in tracked():
        if path.suffix in {".svg", ".txt", ".jsonl", ".gguf", ".safetensors", ".h5", ".keras"}:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert not personal.search(line), f"{path}:{number}: {line.strip()}"


def test_wheel_works_from_an_empty_directory(tmp_path: Path) -> None:
    """The built wheel holds all that the command line needs, data included, wherever it runs."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path)]
    copy = tmp_path / "source"
    files = tracked()
    for path in files:
        relative = path.relative_to(ROOT)
        if relative.parts[0] == "src" or len(relative.parts) == 1:
            (copy / relative).parent.mkdir(parents=True, exist_ok=True)
            (copy / relative).write_bytes(path.read_bytes())
    subprocess.run([*build, str(copy)], env={**os.environ, "PIP_NO_INDEX": "1"}, check=True, capture_output=True)
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(unpacked)
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "brim.cli", "--version"],
        cwd=empty, env={**os.environ, "PYTHONPATH": str(unpacked)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"brim {brim.__version__}\n"
    shipped = {path.relative_to(ROOT / "src") for path in files if path.is_relative_to(SRC)}
    assert {path for path in shipped if not (unpacked / path).exists()} == set()


def test_every_way_to_harm_names_its_test() -> None:
    """Each row of docs/hostile_files.md names tests that there are."""
    tests = [path.read_text(encoding="utf-8") for path in tracked() if path.match("test_*.py")]
    there = {name for text in tests for name in re.findall(r"^def (test_\w+)", text, flags=re.MULTILINE)}
    lines = (ROOT / "docs" / "hostile_files.md").read_text(encoding="utf-8").splitlines()
    named = [re.findall(r"`(test_\w+)`", line) for line in lines if line.startswith("| ")][2:]
    assert len(named) > 20
    assert all(names and set(names) <= there for names in named), named
