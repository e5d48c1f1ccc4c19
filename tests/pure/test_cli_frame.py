"""The frame around every verb: usage errors, help, signals and exit codes."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import typer

import brim
from brim import cli, errors


@pytest.fixture
def verb() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Registers a function as the verb `probe` for one test."""
    before = list(cli.app.registered_commands)

    def register(function: Callable[[], object]) -> None:
        cli.app.command("probe")(function)

    yield register
    cli.app.registered_commands[:] = before


Verb = Callable[[Callable[[], object]], None]
Captured = pytest.CaptureFixture[str]


def raising(error: BaseException) -> Callable[[], object]:
    def command() -> None:
        raise error

    return command


def test_help_is_asked_for(capsys: Captured) -> None:
    """`--help` prints the verbs on stdout and ends well."""
    assert cli.main(["--help"]) == 0
    captured = capsys.readouterr()
    assert "Usage: brim" in captured.out
    assert captured.err == ""


def test_no_arguments_is_a_usage_error_that_helps(capsys: Captured) -> None:
    """Without a verb, help is printed and the exit code says that nothing was done."""
    assert cli.main([]) == 2
    assert "Usage: brim" in capsys.readouterr().out


def test_version(capsys: Captured) -> None:
    """`--version` prints the package's own version."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"brim {brim.__version__}\n"


def test_unknown_option_is_named(capsys: Captured) -> None:
    """An unknown option ends with exit code 2 and one line that names it."""
    assert cli.main(["--nope"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "brim: No such option: --nope\n"
    assert captured.out == ""


def test_missing_argument_of_a_verb_is_named(verb: Callable[[object], None], capsys: Captured) -> None:
    """A verb's own usage errors take the same way as the frame's."""

    def command(model: str) -> None:
        print(model)

    verb(command)
    assert cli.main(["probe"]) == 2
    assert "Missing argument 'model'" in capsys.readouterr().err
    assert cli.main(["probe", "--colour"]) == 2
    assert "No such option: --colour" in capsys.readouterr().err


def test_unknown_verb_names_the_nearest(verb: Verb, capsys: Captured) -> None:
    """A misspelt verb names the one meant; one that resembles none lists them all."""
    verb(lambda: None)
    assert cli.main(["prob"]) == 2
    assert "did you mean probe" in capsys.readouterr().err
    assert cli.main(["xyz"]) == 2
    message = capsys.readouterr().err
    assert "unknown verb 'xyz'" in message
    assert "probe" in message


@pytest.mark.parametrize("code", [0, 3, 75])
def test_exit_codes_pass_through(code: int, verb: Verb) -> None:
    """A verb chooses its exit code, by returning it or by typer.Exit."""
    verb(lambda: code)
    assert cli.main(["probe"]) == code
    cli.app.registered_commands.pop()
    verb(raising(typer.Exit(code)))
    assert cli.main(["probe"]) == code


@pytest.mark.parametrize(
    "kind",
    [
        errors.UsageError,
        errors.RecipeError,
        errors.UnknownNameError,
        errors.DoesNotFitError,
        errors.ModelFileError,
        errors.DataError,
        errors.RanOutOfMemoryError,
        errors.Stopped,
    ],
)
def test_errors_become_one_line_and_their_code(kind: type[errors.BrimError], verb: Verb, capsys: Captured) -> None:
    """An error the user can mend is one line on stderr, its markup left alone, and its class's exit code."""
    verb(raising(kind("layer [0]: too large; take less")))
    assert cli.main(["probe"]) == kind.exit_code
    captured = capsys.readouterr()
    assert captured.err == "brim: layer [0]: too large; take less\n"
    assert captured.out == ""


def test_exit_codes_are_those_of_the_contract() -> None:
    """2 usage, 3 does not fit, 4 bad file or data, 5 out of memory, 75 resumable."""
    codes = {kind.__name__: kind.exit_code for kind in errors.BrimError.__subclasses__()}
    assert codes == {
        "UsageError": 2, "UnknownNameError": 2, "MissingPartError": 2, "DoesNotFitError": 3,
        "ModelFileError": 4, "DataError": 4, "RanOutOfMemoryError": 5, "Stopped": 75,
    }  # fmt: skip


def test_ctrl_c_has_no_traceback(verb: Verb, capsys: Captured) -> None:
    """Ctrl-C ends with 130 and one line."""
    verb(raising(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "brim: stopped by Ctrl-C\n"


def test_errors_of_files_name_the_file(verb: Verb, capsys: Captured) -> None:
    """A file that cannot be opened is a line with its name; a full disk does not fit."""
    verb(raising(PermissionError(errno.EACCES, "Permission denied", "out/model.safetensors")))
    assert cli.main(["probe"]) == 4
    assert capsys.readouterr().err == "brim: out/model.safetensors: Permission denied\n"
    cli.app.registered_commands.pop()
    verb(raising(OSError(errno.ENOSPC, "No space left on device")))
    assert cli.main(["probe"]) == 3


def test_our_own_errors_keep_their_traceback(verb: Verb) -> None:
    """What no user can mend is not dressed up as a user's error."""
    for error in (ZeroDivisionError("ours"), OSError("neither file nor disk")):
        verb(raising(error))
        with pytest.raises(type(error), match=str(error)):
            cli.main(["probe"])
        cli.app.registered_commands.pop()


def test_reader_that_goes_away_is_no_error() -> None:
    """`brim ... | head` ends quietly with 0."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "brim.cli", "--help"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
