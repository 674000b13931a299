"""What the experiments share: settings, saved data, and the files of results."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_type_hints

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from manifold_sde.errors import ArgumentError, NonFiniteError
from manifold_sde.experiments.run_folder import Run
from manifold_sde.solvers.archive import complete, read_archive, versions, write_archive
from manifold_sde.writing import held, replacing, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

GOING_ON = "Going on from where this was stopped (--restart starts anew)."

# Settings.


def option(
    default: Any,
    metavar: str | None = None,
    *,
    flag: str | None = None,
    shown: str | bool | None = None,
    convert: Callable[[Any], Any] | None = None,
    kind: Any = None,
    **limits: Any,
) -> Any:
    """Declare a field of settings that is also an option of the command.

    The option's help is the first sentence about the field in the docstring of the settings.

    Args:
        default: Default of the field.
        metavar: Placeholder of the value in the help.
        flag: Name of the option, by default that of the field.
        shown: Default in the help where the option is absent by default (``False`` shows none);
            ``None`` gives the option the field's default.
        convert: Converts the option's value to the field's.
        kind: Type of the option where it is not the field's.
        **limits: Limits ``min`` and ``max``.
    """
    declared = {"flag": flag, "shown": shown, "convert": convert, "kind": kind}
    extras = {"metavar": metavar, **limits}
    return dataclasses.field(default=default, metadata={"option": declared, "extras": extras})


@dataclass(frozen=True)
class ExperimentSettings:
    """Numbers that say what an experiment runs, saved with its data."""

    #: Fields that the quick form changes.
    QUICK: ClassVar[Mapping[str, Any]] = {}
    #: Fields that the numbers do not depend on.
    NOT_IN_KEY: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def quick(cls, **changes: Any) -> Self:
        """Return the quick form, with other fields changed."""
        return cls(**{**cls.QUICK, **changes})

    def require(
        self, usable: bool, problem: str, *, expected: str, remedy: str, received: str = ""
    ) -> None:
        """Refuse settings that cannot be used.

        Raises:
            ArgumentError: If ``usable`` is false; it shows all settings unless told what to show.
        """
        if not usable:
            shown = received or repr(self)
            raise ArgumentError(problem, received=shown, expected=expected, remedy=remedy)

    def key(self, *left_out: str) -> str:
        """Return a short hash of the versions and of all settings but some."""
        names = {*left_out, *self.NOT_IN_KEY}
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in names}
        text = json.dumps([fields, versions()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


# Saved data.


class SavedData:
    """A dataclass that is saved to one file: its arrays, and its other fields in the header."""

    KIND: ClassVar[str]

    def header(self) -> dict[str, Any]:
        """Return the fields that are not arrays, in the form that JSON has."""
        fields = vars(self).items()
        return {name: _plain(v) for name, v in fields if not isinstance(v, np.ndarray)}

    def arrays(self) -> dict[str, Array]:
        """Return the arrays by name."""
        return {name: v for name, v in vars(self).items() if isinstance(v, np.ndarray)}

    @classmethod
    def restored(cls, header: dict[str, Any], arrays: dict[str, Array]) -> Self:
        """Return the data of a header and arrays."""
        kinds = get_type_hints(cls)
        fields = {k: restored(kinds[k], v) for k, v in header.items() if k in kinds}
        return cls(**fields, **arrays)

    def save(self, path: str | Path) -> None:
        """Write everything to one file, with the versions that made it."""
        header = {**self.header(), "versions": versions()}
        write_archive(path, self.KIND, header, self.arrays())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: If the file is missing, corrupted, or holds something else.
        """
        header, arrays = read_archive(path, cls.KIND)
        what = f"what {cls.__name__}.save of this version wrote"
        with complete(path, what, "make the figure anew, with --restart"):
            return cls.restored(header, arrays)

    @classmethod
    def kept(cls, path: Path | None, make: Callable[[Path | None], Self]) -> Self:
        """Load data if they are there, or else make and save them; without a path, only make them.

        ``make`` is given the path of a checkpoint, which is removed once the data are saved.
        """
        if path is None:
            return make(None)
        if path.exists():
            return cls.load(path)
        checkpoint = path.with_suffix(".ckpt")
        data = make(checkpoint)
        data.save(path)
        discard(checkpoint)
        return data


class SavedValues(SavedData):
    """The same with a field ``values`` of arrays by name, of which there are those of ``NAMES``."""

    NAMES: ClassVar[tuple[str, ...]]

    values: dict[str, Array]

    def header(self) -> dict[str, Any]:
        """Return the fields that are not arrays, in the form that JSON has."""
        return {name: value for name, value in super().header().items() if name != "values"}

    def arrays(self) -> dict[str, Array]:
        """Return the arrays by name."""
        return super().arrays() | {f"value_{name}": v for name, v in self.values.items()}

    @classmethod
    def restored(cls, header: dict[str, Any], arrays: dict[str, Array]) -> Self:
        """Return the data of a header and arrays."""
        values = {name: arrays.pop(f"value_{name}") for name in cls.NAMES}
        return super().restored({**header, "values": values}, arrays)


def restored(kind: Any, value: Any) -> Any:
    """Convert a value from JSON, where dataclasses are dictionaries, and tuples are lists."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return kind(**{name: _tuples(part) for name, part in value.items()})
    return value


def _plain(value: Any) -> Any:
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_record else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def joined_arrays(parts: Sequence[SavedData], prefix: str) -> dict[str, Array]:
    """Return the arrays of several data, their names behind a prefix with the part's number."""
    named = ((prefix.format(i), part.arrays()) for i, part in enumerate(parts))
    return {front + name: array for front, own in named for name, array in own.items()}


def split_arrays(arrays: dict[str, Array], prefix: str, number: int) -> dict[str, Array]:
    """Return the arrays of one of the parts of :func:`joined_arrays`."""
    front = prefix.format(number)
    return {k.removeprefix(front): a for k, a in arrays.items() if k.startswith(front)}


def require_finite(blown: int, runs: str, remedy: str) -> None:
    """Refuse runs of SGD, described in words, some of which blew up.

    Raises:
        NonFiniteError: If their number is not 0.
    """
    if blown:
        raise NonFiniteError(
            "runs of SGD blew up",
            received=f"{blown} of {runs}",
            expected="finite weights",
            remedy=remedy,
        )


# Results.


def discard(path: Path) -> None:
    """Remove what unfinished runs left behind, a folder or a file, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def held_results(
    run: Run, name: str, settings: object = None, *, restart: bool = False, stem: str = ""
) -> Iterator[Path]:
    """Hold the folder for what is unfinished of some results, for this command alone.

    Args:
        run: The run, in whose folder the results are; made if it is not there.
        name: Their name.
        settings: What is noted of the run beside them, before and after.
        restart: Whether to discard what is there.
        stem: Name of the files, where it is another one.

    Raises:
        ArgumentError: If the results are there, and are not to be overwritten.
        CheckpointError: If another command makes the same results; it is named.
        WriteError: If nothing can be written there.
    """
    unfinished = run.folder / f"{name}.unfinished"
    if not restart:
        run.require_free(stem or name)
    with held(run.folder / f".{name}.lock", unfinished, readable=False):
        if restart:
            discard(unfinished)
        with run.noted(stem or name, settings):
            yield unfinished
            discard(unfinished)


@dataclass(frozen=True)
class Findings:
    """What an experiment found, to be written and printed.

    Attributes:
        figure: The picture.
        dpi: Its resolution as PNG.
        table: What is printed.
        sentences: The table in words.
        csv: Names of columns and rows of CSV files, by the ends of the files' names.
        text: A description to be written, or nothing.
        quick: What the quick form leaves out, and ``command`` without --full; or nothing.
    """

    figure: Figure
    dpi: int
    table: Table
    sentences: Sequence[str]
    csv: Mapping[str, tuple[Sequence[str], Sequence[Mapping[str, Any]]]]
    text: str = ""
    quick: str = ""
    command: str = ""

    def write(self, stem: Path, data: SavedData | None = None) -> list[Path]:
        """Write PNG and PDF, the data if there are any, the tables and the description.

        Raises:
            WriteError: If something cannot be written.
        """
        files = []

        def named(end: str) -> Path:
            files.append(stem.with_name(stem.name + end))
            return files[-1]

        save_figure(self.figure, named(".png"), dpi=self.dpi)
        save_figure(self.figure, named(".pdf"))
        if data is not None:
            data.save(named(".npz"))
        for end, (names, rows) in self.csv.items():
            write_csv(named(end), names, rows)
        if self.text:
            write_text(named(".txt"), self.text)
        return files

    def print(self, console: Console, files: Sequence[Path]) -> None:
        """Print the table, the sentences, the files written, and how to get the full form."""
        console.print()
        console.print(self.table)
        console.print()
        for sentence in self.sentences:
            console.print(Text("• " + sentence))
        console.print()
        print_files(console, files)
        if self.quick:
            console.print()
            console.print(f"{self.quick} For all of it, in some minutes:", highlight=False)
            console.print(f"    manifold-sde {self.command} --full", highlight=False, style="bold")


def print_files(console: Console, files: Sequence[Path]) -> None:
    """Print the names of files, one a line, however long."""
    for file in files:
        console.print(Text(str(file)), soft_wrap=True)


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure in one step, in the form that the file's ending says.

    Raises:
        WriteError: If it cannot be written.
    """
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], **options)


def write_csv(path: Path, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV in one step, their columns by name.

    Raises:
        WriteError: If it cannot be written.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, names)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def plain_table(title: str, *caption: str) -> Table:
    """Return a table without columns yet, its title and the lines of its caption on the left."""
    return Table(
        title=title,
        caption="\n".join(caption) or None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
