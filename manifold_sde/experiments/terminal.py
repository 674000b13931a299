"""How the command line ends: exit statuses, errors, and an interrupt that loses nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from manifold_sde.errors import Terminated
from manifold_sde.solvers.stopping import terminable

#: Exit status of wrong arguments and of everything else that fails, of Ctrl-C, and of SIGTERM.
USAGE, FAILURE, INTERRUPTED, TERMINATED = 2, 1, 130, 143

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
    """A run whose Ctrl-C or SIGTERM ends with the words that the same command goes on."""
    with stopping(f"Stopped. The same command goes on from here{said}."):
        yield


@contextlib.contextmanager
def stopping(said: str) -> Iterator[None]:
    """A block that Ctrl-C and SIGTERM end with some words, and the exit status that is theirs."""
    try:
        with terminable():
            yield
    except (KeyboardInterrupt, Terminated) as error:
        errors().print(said)
        code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        raise typer.Exit(code) from None
