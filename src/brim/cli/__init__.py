"""The command line: one file per verb; each parses, calls one library function and prints."""

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import brim
from brim import errors
from brim.cli import console, demo, doctor, evaluate, formats, generate, growth, plan, predict, quantize, tune
from brim.cli.quiet import quiet_torch

INTERRUPTED = 130


class Verbs(TyperGroup):
    """The verbs, with a word of help for one that does not exist."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        verb = args[0]
        if verb not in self.commands and not verb.startswith("-"):
            meant = errors.did_you_mean(verb, self.commands) or f"; verbs: {', '.join(self.commands)}"
            raise errors.UsageError(f"unknown verb {verb!r}{meant}")
        return super().resolve_command(ctx, args)


app = typer.Typer(name="brim", cls=Verbs, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def frame(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Fills the memory you have to the brim and never over it."""
    if version:
        print(f"brim {brim.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


app.command("demo")(demo.command)
app.command("doctor")(doctor.command)
app.command("evaluate")(evaluate.command)
# A negative number begins like an option.
app.command("formats", context_settings={"ignore_unknown_options": True})(formats.command)
app.command("generate")(generate.command)
app.command("growth")(growth.command)
app.command("plan")(plan.command)
app.command("predict")(predict.command)
app.command("quantize")(quantize.command)
app.command("tune")(tune.command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb in this process and return its exit code (DESIGN: 0, 2, 3, 4, 5, 75; 130 for Ctrl-C).

    An error the user can mend is one line on stderr; one of ours keeps its traceback.
    """
    quiet_torch()
    try:
        result = _invoke(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
    except errors.BrimError as error:
        console.complain(str(error))
        return error.exit_code
    except typer.TyperException as error:
        console.complain(error.format_message())
        return errors.UsageError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        console.complain("stopped by Ctrl-C")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) went away: nothing to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _complain_of_file(error)
    return result


def _invoke(argv: list[str]) -> int:
    """The verb's exit code: what its function returns if that is a number, else 0.

    Typer's own `app()` is not called: it turns Ctrl-C into a silent exit and a closed pipe into exit code 1.
    """
    command = typer.main.get_command(app)
    try:
        with command.make_context("brim", argv) as context:
            result = command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    return result if isinstance(result, int) else 0


def _complain_of_file(error: OSError) -> int:
    """Say which file could not be read or written; an error without a file is ours, and raised again."""
    if error.filename is None and error.errno != errno.ENOSPC:
        raise error
    where = f"{error.filename}: " if error.filename is not None else ""
    console.complain(f"{where}{error.strerror}")
    full = error.errno == errno.ENOSPC
    return errors.DoesNotFitError.exit_code if full else errors.ModelFileError.exit_code


def run() -> None:
    """Entry point of the `brim` command."""
    sys.exit(main())
