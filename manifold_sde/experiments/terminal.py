"""How the command line prints and ends: letters, exit statuses, errors, and interrupts."""

from __future__ import annotations

import codecs
import contextlib
import io
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from manifold_sde.errors import Terminated
from manifold_sde.solvers.stopping import terminable

#: Exit status of wrong arguments, of everything else that fails, of a verification that the budget
#: cut short, of Ctrl-C, and of SIGTERM.
USAGE, FAILURE, PARTIAL, INTERRUPTED, TERMINATED = 2, 1, 3, 130, 143

#: What is written for signs that the encoding of a stream lacks; Greek letters get their names.
_SPELLED = {"±": "+-", "•": "*", "…": "...", "×": "x", "√": "sqrt", "→": "->", "—": "-", "–": "-"}
_SPELLED |= {"²": "^2", "⁴": "^4", "⁻": "^-", "₁": "_1", "ᵀ": "^T", "∇": "grad ", "∂": "d"}

Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for the files.")]
Restart = Annotated[
    bool, typer.Option("--restart", help="Start anew, not from where a run was stopped.")
]
Compile = Annotated[
    bool, typer.Option(help="Compile the step of SGD, where there is a C++ compiler.")
]


def print_in_any_encoding() -> None:
    """Have both streams spell the signs that their encodings lack, where they would refuse them."""
    codecs.register_error("manifold_sde", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="manifold_sde")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """What is written for signs that cannot be encoded, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = "".join(map(_letters, error.object[error.start : error.end]))
    return text, error.end


def _letters(sign: str) -> str:
    """A sign in ASCII.

    Example:
        >>> [_letters(sign) for sign in "ηΓ²é\N{BLACK STAR}"]
        ['eta', 'Gamma', '^2', 'e', '?']
    """
    if sign in _SPELLED:
        return _SPELLED[sign]
    words = unicodedata.name(sign, "").split()
    if words[:1] == ["GREEK"] and len(words) == 4:
        return words[3].lower() if words[1] == "SMALL" else words[3].capitalize()
    plain = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()
    return plain or "?"


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
