"""Files that commands read and write, checked before anything is computed."""

from __future__ import annotations

import contextlib
import csv
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde.errors import ArgumentError
from manifold_sde.writing import held, replacing, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def discard(folder: Path) -> None:
    """Remove what unfinished runs left behind, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def held_results(out: Path, name: str) -> Iterator[Path]:
    """The folder for what is unfinished of some results, for this command alone.

    Args:
        out: Folder of the results; made if it is not there.
        name: Their name.

    Raises:
        CheckpointError: If another command makes the same results; it is named.
        WriteError: If nothing can be written there.
    """
    unfinished = out / f"{name}.unfinished"
    with held(out / f".{name}.lock", unfinished, readable=False):
        yield unfinished


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure in one step, in the form that the file's ending says.

    Raises:
        WriteError: If it cannot be written.
    """
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], **options)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Write rows as CSV in one step, their columns by name.

    Raises:
        WriteError: If it cannot be written.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, names)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def read_array(file: Path) -> Tensor:
    """The weights of the option --x0, in double precision.

    Args:
        file: A file .npy, or .pt with one tensor.

    Raises:
        ArgumentError: If it is not there or cannot be read.
    """
    remedy = "numpy.save(FILE, x0) or torch.save(x0, FILE), with x0 the weights as one vector"
    expected = "a file .npy or .pt with one array of numbers"
    if not file.is_file():
        raise ArgumentError(
            "there is no such file", received=f"--x0 {file}", expected=expected, remedy=remedy
        )
    try:
        if file.suffix == ".npy":
            found: Any = torch.from_numpy(np.load(file, allow_pickle=False))
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
        return torch.as_tensor(found).detach().to(torch.float64)
    except Exception as error:
        # Whatever a damaged or a foreign file makes the readers raise.
        lines = str(error).splitlines() or [""]
        raise ArgumentError(
            "the start cannot be read",
            received=f"--x0 {file}: {type(error).__name__}: {lines[0][:80]}",
            expected=expected,
            remedy=remedy,
        ) from error


def output_of(file: Path | None, command: str, target: str, suffix: str) -> Path:
    """Where a command writes, checked before anything is computed; no folder is made yet.

    Args:
        file: The file of the option --output, or ``None`` for one that bears the problem's name,
            so that those of several problems lie side by side.
        command: The command, with which that name begins.
        target: The problem, "FILE.py:NAME".
        suffix: The ending that it must have.

    Raises:
        ArgumentError: If it cannot be written there.
    """
    path, _, name = target.rpartition(":")
    own = Path("results", f"{command}_{Path(path).stem}_{name}{suffix}")
    file = own if file is None else file
    folder = next(f for f in (file.parent, *file.parent.parents) if f.exists())
    what = ""
    if file.suffix != suffix:
        what = f"a file that does not end in {suffix}"
    elif file.is_dir():
        what = "a folder"
    elif not folder.is_dir():
        what = f"of which {folder} is a file"
    else:
        try:
            probe = folder / f".{file.name}.probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            what = f"{type(error).__name__}: {error.strerror}"
    if what:
        raise ArgumentError(
            "the output cannot be written there",
            received=f"--output {file}, {what}",
            expected=f"a path that ends in {suffix}, in a folder that can be written to",
            remedy=f"--output {own}",
        )
    return file
