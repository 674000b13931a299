"""What commands print of what they found, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: What is said where an experiment goes on.
GOING_ON = "Going on from where this was stopped (--restart starts anew)."


def plain_table(title: str, caption: str | None = None) -> Table:
    """A table without columns yet, its title and caption on the left."""
    return Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def print_findings(
    console: Console, table: Table, sentences: Iterable[str], files: Sequence[Path]
) -> None:
    """The table, what it comes to in words, and the files written."""
    console.print()
    console.print(table)
    console.print()
    for sentence in sentences:
        console.print(Text("• " + sentence))
    console.print()
    for file in files:
        console.print(Text(str(file)), soft_wrap=True)


def print_full_form(console: Console, what: str, command: str) -> None:
    """How to get all of it, after the quick form."""
    console.print()
    console.print(f"{what} For all of it, in some minutes:", highlight=False)
    console.print(f"    manifold-sde {command} --full", highlight=False, style="bold")
