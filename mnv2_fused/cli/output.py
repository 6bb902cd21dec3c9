"""What the commands print and write: text, tables, progress bars and JSON.

Everything is printed as it is. Labels, paths and messages come from users, so nothing is read as Rich's markup, and
commands get their consoles, tables and bars from here alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.progress import Progress, ProgressColumn, TextColumn
from rich.table import Table

from mnv2_fused.cli.options import InputError


def console(arguments: argparse.Namespace, least_width: int = 80) -> Console:
    """The console for text and tables: standard output, or standard error if the JSON goes to standard output.

    A terminal's tables are as wide as the terminal, but at least `least_width` columns; a pipe's may be 160 wide.
    """
    stderr = arguments.json == "-"
    found = _console(stderr)
    return _console(stderr, width=max(found.width if found.is_terminal else 160, least_width))


def _console(stderr: bool, width: int | None = None) -> Console:
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def say(target: Console, text: str, style: str | None = None) -> None:
    """Prints `text` on a line of its own, however long it is."""
    target.print(text, style=style, soft_wrap=True)


def table(*columns: str, **options) -> Table:
    """A table. Its columns are right-aligned unless their name starts with `<`; `options` are Rich's."""
    result = Table(**{"box": box.SIMPLE_HEAD, **options})
    for column in columns:
        # Rich would cut a long word off and put an ellipsis in its place.
        result.add_column(column.lstrip("<"), justify="left" if column.startswith("<") else "right", overflow="fold")
    return result


class Sheet(NamedTuple):
    """A title, columns as `table` takes them, rows of text, and sentences below them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def draw(self, console: Console) -> None:
        """Prints the sheet as a table."""
        say(console, self.title, style="bold")
        drawn = table(*self.columns)
        for row in self.rows:
            drawn.add_row(*row)
        console.print(drawn)
        for note in self.notes:
            say(console, note)
        say(console, "")

    def markdown(self) -> str:
        """The sheet as a section in Markdown."""
        names = [column.lstrip("<") for column in self.columns]
        lines = ["---" if column.startswith("<") else "---:" for column in self.columns]
        rows = [
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (names, lines, *self.rows)
        ]
        return "\n".join([f"## {self.title}", "", *rows, "", *map(paragraph, self.notes)])


def paragraph(text: str) -> str:
    """A paragraph in Markdown, in lines of 120 columns."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def progress(target: Console | None, *columns: str | ProgressColumn) -> Progress:
    """A progress bar that disappears when it is done; strings are text columns. None stands for standard error.

    A console that is not a terminal shows none.
    """
    target = _console(stderr=True) if target is None else target
    parts = (TextColumn(column, markup=False) if isinstance(column, str) else column for column in columns)
    return Progress(*parts, console=target, transient=True, disable=not target.is_terminal)


def check_json(target: str | None) -> None:
    """Raises InputError if --json names a file that cannot be written, so that the work does not end in that error."""
    if target in (None, "-"):
        return
    path = Path(target)
    if path.is_dir():
        raise InputError(f"--json: expected a file, got a directory: {target}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--json: no such directory: {path.absolute().parent}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise InputError(f"--json: no permission to write {target}")


def check_plot(directory: str | Path) -> None:
    """Raises InputError if --plot names a directory that cannot be written to."""
    if not Path(directory).is_dir():
        raise InputError(f"--plot: expected a directory, got {directory}")
    if not os.access(directory, os.W_OK):
        raise InputError(f"--plot: no permission to write to {directory}")


def write_json(target: str | None, content: dict) -> None:
    """Writes `content` to the file that --json names, or to standard output for `-`. Raises InputError."""
    if target is None:
        return
    text = json.dumps(content, indent=1) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json: cannot write {target}: {error.strerror}") from error
