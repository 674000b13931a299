"""The command ``manifold-sde reference``."""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from manifold_sde.errors import ArgumentError
from manifold_sde.experiments.run_folder import Run
from manifold_sde.verification import Reference
from manifold_sde.verification.reference import Comparison


def write_references(name: str | None, draws: int, seed: int, run: Run, console: Console) -> bool:
    """Write one entry or all, and print what their draws give; whether all of them are right.

    Raises:
        ArgumentError: If there is no such entry, or the set is there.
        WriteError: If it cannot be written.
    """
    names = Reference.names() if name is None else (name,)
    entries = [Reference.of(one) for one in names]
    for one in names:
        run.require_free(one)
    right = True
    for entry in entries:
        found = entry.write(run.folder, draws, seed)[1]
        right &= found.passed
        said = f"{entry.name}: {draws:,} draws, largest deviation {found.largest_z:.1f} s.e., "
        console.print(f"{said}{'passed' if found.passed else 'NOT PASSED'}", highlight=False)
    run.note("reference", finished=True)
    console.print(f"\nWritten: {run.folder}", highlight=False, soft_wrap=True)
    return right


def check_states(name: str | None, file: Path, bias: float, console: Console) -> Comparison:
    """Print what a file of states makes of an entry.

    Raises:
        ArgumentError: If no entry is named, the file cannot be read, or holds no states of it.
    """
    if name is None:
        raise ArgumentError(
            "which entry the states are of is not said",
            received=f"--check {file} alone",
            expected=f"one of {', '.join(Reference.names())}",
            remedy=f"manifold-sde reference varying_circle --check {file}",
        )
    entry = Reference.of(name)
    states = _states(file)
    comparison = entry.compare(states, bias=bias)
    console.print(str(comparison), highlight=False, markup=False, soft_wrap=True)
    return comparison


def _states(file: Path) -> Any:
    """The array of a .npy, or that of the name states of a .npz.

    Raises:
        ArgumentError: If it is not there or cannot be read.
    """
    try:
        with contextlib.ExitStack() as stack:
            found = np.load(file, allow_pickle=False)
            return stack.enter_context(found)["states"] if file.suffix == ".npz" else found
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ArgumentError(
            "the states cannot be read",
            received=f"{file}: {type(error).__name__}",
            expected="an array (times, paths, D) in a .npy, or of the name states in a .npz",
            remedy="numpy.savez(FILE, states=...)",
        ) from error
