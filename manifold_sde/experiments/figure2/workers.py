"""The two designs in two processes, with their progress on one screen."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from manifold_sde.errors import ManifoldSDEError
from manifold_sde.experiments.figure2.settings import DESIGNS, Plan, Settings
from manifold_sde.experiments.figure2.simulation import Figure2, Run, collect, run_design

#: Width of a progress bar, which goes through a pipe to the terminal.
_COLUMNS = 76
#: Seconds that a process has to clean up when it is told to end.
_PATIENCE = 10
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TQDM_NCOLS": str(_COLUMNS),
    "TQDM_MININTERVAL": "0.5",
}


class Watcher(Protocol):
    """What is told of the progress."""

    def bar(self, design: str, text: str) -> None:
        """A progress bar has a new state; an empty text ends it."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""


def simulate_in_processes(settings: Settings, folder: Path, watcher: Watcher) -> Figure2:
    """Run SGD for Figure 2, each design in a process of one thread.

    Args:
        settings: What to run.
        folder: Where ensembles and checkpoints are kept; a run that was stopped goes on from it.
        watcher: Told of the progress.

    Returns:
        The data of the figure, the same to the bit as those of :func:`simulate`.

    Raises:
        ManifoldSDEError: What a process raised, or that one died.
    """
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, tuple[str, Any]] = {}
    found: dict[str, list[Run]] = {}
    try:
        with _environment(_ENVIRONMENT):
            for design in DESIGNS:
                here, there = context.Pipe(duplex=False)
                process = context.Process(
                    target=_work, args=(there, settings, design, folder), daemon=True
                )
                process.start()
                there.close()
                running[here] = (design, process)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                design, process = running[connection]
                try:
                    kind, content = connection.recv()
                except EOFError:
                    process.join()
                    raise _died(design, process.exitcode) from None
                if kind == "end":
                    settings, found[design] = content
                    watcher.bar(design, "")
                    del running[connection]
                    process.join()
                elif kind == "error":
                    raise content
                elif kind == "bar":
                    watcher.bar(design, content)
                else:
                    watcher.note(content)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join(_PATIENCE)
            process.kill()
    return collect(settings, [run for design in DESIGNS for run in found[design]])


def _died(design: str, code: int | None) -> ManifoldSDEError:
    return ManifoldSDEError(
        "a process died before it was done",
        received=f"exit code {code} of the one for the {design} design",
        expected="a process that ends by itself",
        remedy="the same command goes on from where it stopped; --jobs 1 needs less memory",
    )


def _work(connection: Connection, settings: Settings, design: str, folder: Path) -> None:
    """What a process does: run a design, and send what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and then terminates:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exit that cleans up
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    relay = _Relay(connection)
    sys.stderr = relay

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        connection.send(("note", str(message)))

    warnings.showwarning = note

    def done(plan: Plan, seconds: float) -> None:
        connection.send(("note", f"{plan.label}: {describe(plan)}, {seconds:.0f} s"))

    try:
        result = run_design(settings, design, folder, progress=True, done=done)
    except ManifoldSDEError as error:
        connection.send(("error", error))
    except Exception as error:
        told = ManifoldSDEError(
            f"the process for the {design} design failed",
            received=f"{type(error).__name__}: {error}",
            remedy="--jobs 1 shows the whole traceback",
        )
        connection.send(("error", told))
    else:
        connection.send(("end", result))
    finally:
        sys.stderr = sys.__stderr__
        # Nothing is left to clean up; an exit inside what Python does at its end would be told.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def describe(plan: Plan) -> str:
    """How much an ensemble is, in words."""
    return f"{plan.n_paths} runs of {plan.kept[-1]:,} steps"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class _Relay(io.TextIOBase):
    """A stream that sends the latest state of the progress bar written to it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def write(self, text: str) -> int:
        """Send the last line that the text holds."""
        lines = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
        if lines:
            with contextlib.suppress(BrokenPipeError):
                self._connection.send(("bar", lines[-1]))
        return len(text)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes started within."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
