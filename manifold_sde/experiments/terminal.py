"""How the command line prints and ends, and the options of commands that settings declare."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import inspect
import io
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_type_hints

import torch
import typer
from rich.console import Console
from rich.text import Text

from manifold_sde.errors import Terminated
from manifold_sde.experiments.experiment import ExperimentSettings
from manifold_sde.solvers.stopping import terminable

#: Exit status of wrong arguments, of everything else that fails, of a verification that the budget
#: cut short, of Ctrl-C, and of SIGTERM.
USAGE, FAILURE, PARTIAL, INTERRUPTED, TERMINATED = 2, 1, 3, 130, 143

#: What is written for signs that the encoding of a stream lacks; Greek letters get their names.
_SPELLED = {"±": "+-", "•": "*", "…": "...", "×": "x", "√": "sqrt", "→": "->", "—": "-", "–": "-"}
_SPELLED |= {"λ": "lambda", "Λ": "Lambda"}  # Unicode's names of them lack a letter
_SPELLED |= {"²": "^2", "⁴": "^4", "⁻": "^-", "₁": "_1", "ᵀ": "^T", "∇": "grad ", "∂": "d"}


# Options.

_KIND = inspect.Parameter.POSITIONAL_OR_KEYWORD


def with_options(
    settings: type[ExperimentSettings], after: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that its settings declare, as ``**changes`` of the settings.

    Args:
        settings: The settings; fields whose option is absent are left out of the changes.
        after: Parameter of the command after which its settings' options are listed.
    """
    kinds = get_type_hints(settings)
    helps = _helps(settings)
    declared = {f.name: f for f in dataclasses.fields(settings) if "option" in f.metadata}

    def parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
        option, extras = field.metadata["option"], dict(field.metadata["extras"])
        kind, default = option["kind"] or kinds[field.name], field.default
        if option["shown"] is not None:
            kind, default, extras["show_default"] = kind | None, None, option["shown"]
        flags = [] if option["flag"] is None else [option["flag"]]
        annotation: Any = Annotated[kind, typer.Option(*flags, help=helps[field.name], **extras)]
        return inspect.Parameter(field.name, _KIND, default=default, annotation=annotation)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for own in inspect.signature(command, eval_str=True).parameters.values():
            if own.kind is not own.VAR_KEYWORD:
                parameters.append(own)
            if own.name == after:
                parameters += map(parameter, declared.values())

        @functools.wraps(command)
        def run(**given: Any) -> None:
            for name, field in declared.items():
                value, convert = given.pop(name), field.metadata["option"]["convert"]
                if value is not None and value != []:
                    given[name] = value if convert is None else convert(value)
            command(**given)

        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _helps(settings: type[ExperimentSettings]) -> dict[str, str]:
    """The first sentence about each field in the docstring of settings."""
    text = inspect.getdoc(settings) or ""
    found = re.findall(r"^    (\w+): ((?:.+\n?)(?: {8}.+\n?)*)", text, re.MULTILINE)
    return {name: re.split(r"(?<=\.)\s", " ".join(words.split()))[0] for name, words in found}


# Signs.


def print_in_any_encoding() -> None:
    """Have both streams spell the signs that their encodings lack, where they would refuse them."""
    codecs.register_error("manifold_sde", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="manifold_sde")


def spelled(text: str) -> str:
    """A text with the signs spelled that the output lacks, for what is laid out in columns."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(sign if sign.isascii() else _letters(sign) for sign in text)
    return text


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


# Ends.


class SpellingConsole(Console):
    """A console that lays out the signs as they are spelled where the output lacks them."""

    def render_str(self, text: str, **options: Any) -> Text:
        """The text, spelled."""
        return super().render_str(spelled(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts spelled; tables are by :meth:`render_str`."""
        plain = (
            Text(spelled(o.plain), o.style) if isinstance(o, Text) and not o.spans else o
            for o in objects
        )
        super().print(*plain, **options)


def errors() -> Console:
    """The console of the error stream."""
    return Console(stderr=True, highlight=False)


def one_thread() -> None:
    """More threads make the small operations here slower."""
    torch.set_num_threads(1)


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """A run whose Ctrl-C or SIGTERM ends with the words that the same command goes on."""
    with stopping("Stopped. The same command with --resume goes on from here."):
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
