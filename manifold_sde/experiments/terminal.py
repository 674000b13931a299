"""How the command line ends: exit statuses, errors, and an interrupt that loses nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

#: Exit status of wrong arguments and of everything else that fails, and of an interrupt.
USAGE, FAILURE, INTERRUPTED = 2, 1, 130

Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for the files.")]
Restart = Annotated[
    bool, typer.Option("--restart", help="Start anew, not from where a run was stopped.")
]
Compile = Annotated[
    bool, typer.Option(help="Compile the step of SGD, where there is a C++ compiler.")
]


def errors() -> Console:
    """The console of the error stream."""
    return Console(stderr=True, highlight=False)


def one_thread() -> None:
    """More threads make the small operations here slower."""
    import torch

    torch.set_num_threads(1)


@contextlib.contextmanager
def resumable(said: str = "; --restart starts anew") -> Iterator[None]:
    """A run whose Ctrl-C ends with the words that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        errors().print(f"Stopped. The same command goes on from here{said}.")
        raise typer.Exit(INTERRUPTED) from None
