"""Tasks in processes of one thread each, with their progress on one screen."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from manifold_sde.errors import ManifoldSDEError

T = TypeVar("T")
Note = Callable[[str], None]

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

    def bar(self, name: str, text: str) -> None:
        """A task's progress bar has a new state; an empty text ends it."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""


def run_in_processes(
    tasks: Mapping[str, Callable[[Note], T]], watcher: Watcher, *, jobs: int = 2
) -> dict[str, T]:
    """Run tasks, each in a process of its own with one thread.

    Args:
        tasks: What to run, by names that are shown. A task is called with a function that takes
            lines worth telling, and writes its progress bars to ``sys.stderr``. It is pickled, and
            so is what it returns.
        watcher: Told of the progress.
        jobs: Number of processes that run at once.

    Returns:
        What the tasks returned, in their order.

    Raises:
        ManifoldSDEError: What a process raised, or that one died.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(tasks)
    running: dict[Connection, tuple[str, Any]] = {}
    found: dict[str, T] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                here, there = context.Pipe(duplex=False)
                process = context.Process(
                    target=_work, args=(there, name, tasks[name]), daemon=True
                )
                with _environment(_ENVIRONMENT):
                    process.start()
                there.close()
                running[here] = (name, process)
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                name, process = running[connection]
                try:
                    kind, content = connection.recv()
                except EOFError:
                    process.join()
                    raise _died(name, process.exitcode) from None
                if kind == "end":
                    found[name] = content
                    watcher.bar(name, "")
                    del running[connection]
                    process.join()
                elif kind == "error":
                    raise content
                elif kind == "bar":
                    watcher.bar(name, content)
                else:
                    watcher.note(content)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join(_PATIENCE)
            process.kill()
    return {name: found[name] for name in tasks}


def _died(name: str, code: int | None) -> ManifoldSDEError:
    return ManifoldSDEError(
        "a process died before it was done",
        received=f"exit code {code} of the one for {name}",
        expected="a process that ends by itself",
        remedy="the same command goes on from where it stopped; --jobs 1 needs less memory",
    )


def _work(connection: Connection, name: str, task: Callable[[Note], Any]) -> None:
    """What a process does: run a task, and send what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and then terminates:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exit that cleans up
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    sys.stderr = _Relay(connection)

    def note(text: str) -> None:
        connection.send(("note", text))

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        note(str(message))

    warnings.showwarning = warn
    try:
        result = task(note)
    except ManifoldSDEError as error:
        connection.send(("error", error))
    except Exception as error:
        told = ManifoldSDEError(
            f"the process for {name} failed",
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


class Screen:
    """Progress of the processes: a line for each at the bottom, what is done above."""

    def __init__(self, console: Console, names: list[str]) -> None:
        self.console = console
        self._bars = dict.fromkeys(names, "")
        self._live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self._live.start()
            for name in self._bars:
                self.bar(name, f"{name}: starting")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def bar(self, name: str, text: str) -> None:
        """Show the new state of a process's bar; an empty text removes it."""
        self._bars[name] = text
        if self.console.is_terminal:
            lines = [Text(line, no_wrap=True) for line in self._bars.values() if line]
            self._live.update(Group(*lines), refresh=True)

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(Text(text))
