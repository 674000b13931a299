"""Tasks in worker processes: their results and lines, their errors, and their death."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from rich.console import Console

from manifold_sde.errors import ArgumentError, ManifoldSDEError
from manifold_sde.experiments.processes import Note, run_tasks


def count(number: int, note: Note) -> tuple[int, int, str]:
    note(f"number {number}")
    sys.stderr.write(f"\rbar {number}")
    time.sleep(0.5)  # long enough to be seen
    return number, torch.get_num_threads(), os.environ["TQDM_NCOLS"]


def refuse(note: Note) -> None:
    raise ArgumentError("not this", received="that", expected="this", remedy="give this")


def die(note: Note) -> None:
    os._exit(7)


def sleep(note: Note) -> None:
    time.sleep(600)


def run(tasks: dict[str, Callable[[Note], object]], jobs: int) -> tuple[dict[str, object], str]:
    shown = Console(file=io.StringIO(), force_terminal=True, width=80)
    try:
        found = run_tasks(tasks, shown, jobs=jobs)
    finally:
        assert multiprocessing.active_children() == []
        assert "TQDM_NCOLS" not in os.environ
    return found, shown.file.getvalue()  # type: ignore[attr-defined]


def test_results_are_in_the_order_of_the_tasks_and_lines_are_printed() -> None:
    found, shown = run({"b": partial(count, 2), "a": partial(count, 1)}, jobs=1)
    assert list(found.items()) == [("b", (2, 1, "76")), ("a", (1, 1, "76"))]
    for part in ("number 1", "number 2", "b: starting", "bar 2"):
        assert part in shown


def test_an_error_of_a_task_is_raised_here_and_ends_the_others() -> None:
    begun = time.monotonic()
    with pytest.raises(ArgumentError, match="not this") as caught:
        run({"sleep": sleep, "refuse": refuse}, jobs=2)
    assert caught.value.remedy == "give this"
    assert time.monotonic() - begun < 300


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(ManifoldSDEError, match="a process died") as caught:
        run({"die": die}, jobs=1)
    assert "--jobs 1" in caught.value.remedy
