"""Tasks in worker processes of one thread each, with their progress on one screen."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.text import Text

from manifold_sde.errors import ManifoldSDEError, Terminated
from manifold_sde.solvers.stopping import terminable

Note = Callable[[str], None]
T = TypeVar("T")

_POLL_SECONDS = 0.1
#: Seconds that a worker process has to clean up after SIGTERM.
_PATIENCE = 10
#: Progress bars of workers go through a queue to the terminal, and need a fixed width.
_WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TQDM_NCOLS": "76",
    "TQDM_MININTERVAL": "0.5",
}


def run_tasks(
    tasks: Mapping[str, Callable[[Note], T]], console: Console, *, jobs: int
) -> dict[str, T]:
    """Run tasks in worker processes of one thread each, and show their progress.

    Args:
        tasks: What to run, by names that are shown. A task is called with a function that prints
            a line, and writes its progress bars to ``sys.stderr``. It is pickled, and so is its
            result.
        console: Where lines and progress are shown.
        jobs: Number of processes.

    Returns:
        The results, in the order of the tasks.

    Raises:
        ManifoldSDEError: If a process died. What a task raises is raised here.
    """
    context = multiprocessing.get_context("spawn")
    messages = context.SimpleQueue()
    others = multiprocessing.active_children()
    screen = Progress(
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    lines = {name: screen.add_task(f"{name}: starting") for name in tasks}
    futures: dict[str, Future[T]] = {}

    def show() -> None:
        while not messages.empty():
            name, text = messages.get()
            if name in lines:
                screen.update(lines[name], description=text, visible=bool(text))
            else:
                console.print(Text(text))

    finished: list[Future[T]] = []
    with screen, ProcessPoolExecutor(jobs, context, _start, (messages,)) as pool:
        try:
            with _environment(_WORKER_ENVIRONMENT):
                for name, task in tasks.items():
                    futures[name] = pool.submit(_work, name, task)
                    futures[name].add_done_callback(finished.append)
            seen = 0
            # Not by wait(...), whose locks stay taken where a signal raises an exception inside.
            while seen < len(tasks):
                time.sleep(_POLL_SECONDS)
                done = finished[seen:]
                show()
                for future in done:
                    future.result()
                seen += len(done)
            return {name: future.result() for name, future in futures.items()}
        except BrokenProcessPool as error:
            raise ManifoldSDEError(
                "a process died before it was done",
                received=f"the end of one of the processes for {', '.join(tasks)}",
                expected="processes that end by themselves",
                remedy="the same command goes on from where it stopped; --jobs 1 needs less memory",
            ) from error
        finally:
            if not all(future.done() for future in futures.values()):
                pool.shutdown(wait=False, cancel_futures=True)
                _end([p for p in multiprocessing.active_children() if p not in others])


def _end(processes: Sequence[Any]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(_PATIENCE)
        process.kill()
        process.join()


_messages: Any = None


def _start(messages: Any) -> None:
    """Prepare a worker process."""
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and then terminates
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    warnings.showwarning = lambda message, *_, **__: messages.put(("", str(message)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _work(name: str, task: Callable[[Note], T]) -> T:
    """Run a task in a worker process; SIGTERM leaves it as an exception, and ends the process."""
    with terminable(), contextlib.redirect_stderr(_Relay(name)):
        try:
            return task(lambda text: _messages.put(("", text)))
        except Terminated:
            os._exit(1)
        finally:
            _messages.put((name, ""))


class _Relay(io.TextIOBase):
    """A stream that sends the latest state of the progress bar written to it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def write(self, text: str) -> int:
        """Send the last line that the text holds."""
        lines = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
        if lines:
            _messages.put((self._name, lines[-1]))
        return len(text)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes started within."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
