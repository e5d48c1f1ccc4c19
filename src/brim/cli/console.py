"""Where words go: data to stdout, progress and notes to stderr; plain lines where there is no terminal."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from brim import units

out = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
notes = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


_LONG_S = 10
"""Work that takes longer says how much time is left."""


def complain(message: str) -> None:
    """One error line on stderr; markup characters in the message are left as they are."""
    notes.print("brim:", style="bold red", end=" ")
    notes.print(message, markup=False)


def note(message: str) -> None:
    """One remark on stderr."""
    notes.print(message, style="dim", markup=False)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


class _Speed(ProgressColumn):
    """In the units of all else (rich's own column writes GB)."""

    def render(self, task: Task) -> Text:
        return Text(f"{units.format_bytes(int(task.speed))}/s" if task.speed else "")


@contextmanager
def progress(title: str, *, in_bytes: bool = False) -> Iterator[units.Progress]:
    """A bar with the time left on a terminal, and if it counts bytes their speed; elsewhere a line at each tenth."""
    if not notes.is_terminal:
        yield _plain_progress(title, in_bytes=in_bytes)
        return
    count = (DownloadColumn(binary_units=True), _Speed()) if in_bytes else ()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), *count, TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain_progress(title: str, *, in_bytes: bool) -> units.Progress:
    notes.print(f"{title} ...", markup=False)
    last_tenth, started_s = 0, time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last_tenth
        tenth = 10 * done // total if total else 10
        if tenth > last_tenth:
            last_tenth = tenth
            seconds = time.monotonic() - started_s
            speed = f", {units.format_bytes(int(done / seconds))}/s" if in_bytes and seconds > 0 else ""
            left = f", {units.format_duration(seconds * (total - done) / done)} left" if done < total else ""
            notes.print(f"{title}: {10 * tenth} %{speed}{left if seconds > _LONG_S else ''}", markup=False)

    return show


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with a text beside it that changes; elsewhere than on a terminal each text is a line."""
    if not notes.is_terminal:
        yield lambda done, total, text: notes.print(text, markup=False)
        return
    with Progress(BarColumn(bar_width=20), TextColumn("{task.description}"), console=notes, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)
