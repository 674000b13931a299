"""Chunks of paths in other processes, of loky or of Dask, or one after the other in this one."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import pickle
import threading
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from manifold_sde.arguments import integer
from manifold_sde.deadline import Progress
from manifold_sde.errors import ArgumentError, MissingDependencyError, WorkerError
from manifold_sde.solvers.archive import prepare_folder
from manifold_sde.solvers.chunk import Outcome, run_chunk
from manifold_sde.solvers.plan import Plan, Task
from manifold_sde.solvers.run import Run

BACKENDS = ("loky", "dask")
_INSTALL = 'pip install "manifold_sde[cluster]"'
_ONE_PROCESS = "leave workers out to run in this process"
_local = threading.local()


def check_workers(workers: object, backend: object) -> int | None:
    """The number of workers, or ``None``.

    Raises:
        ArgumentError: If this is no number of workers, or no backend.
    """
    count = integer(workers)
    if workers is not None and (count is None or count < 1):
        raise ArgumentError(
            "workers is not a number of processes",
            received=repr(workers),
            expected="a positive integer",
            remedy=_ONE_PROCESS,
        )
    if backend not in BACKENDS:
        raise ArgumentError(
            "there is no such backend",
            received=repr(backend),
            expected='"loky", processes on this machine, or "dask", those of your Client',
            remedy='leave it at "loky"',
        )
    return count


def outcomes(
    run: Run, workers: int | None, backend: str, progress: bool | str, checkpoint: Path | None
) -> Iterator[Outcome]:
    """The outcomes of all chunks of a run, in order, each when it is there.

    Args:
        run: The run.
        workers: Number of processes; with "dask", of chunks under way at once.
        backend: "loky" or "dask".
        progress: Whether to show a progress bar, or its label.
        checkpoint: Folder, or ``None``.
    """
    alone = workers is None and backend == "loky"
    if checkpoint is not None:
        prepare_folder(checkpoint)
    label = progress if isinstance(progress, str) else "SDE"
    total, unit = (run.steps, "step") if alone else (run.chunks, "chunk")
    with Progress(total=total, desc=label, unit=unit, disable=not progress) as bar:
        if alone:
            for task in run.tasks(checkpoint):
                yield run_chunk(run.plan, task, bar.update)
            return
        kept = None if checkpoint is None else checkpoint.resolve()
        results = _distributed(run, workers, backend, kept)
        with contextlib.closing(results):
            for outcome in results:
                bar.update()
                yield outcome


def _distributed(
    run: Run, workers: int | None, backend: str, kept: Path | None
) -> Generator[Outcome, None, None]:
    tasks = run.tasks(kept)
    try:
        if backend == "dask":
            yield from _on_dask(run.plan, tasks, workers)
        else:
            yield from _on_loky(run.plan, tasks, workers)
    except _LostWorker as error:
        raise WorkerError(
            "a worker died",
            received=str(error),
            expected="workers that live; one that is killed often ran out of memory",
            remedy=(
                f"the same call again: what was finished is in {kept}"
                if kept is not None
                else "checkpoint=FOLDER keeps finished chunks; a smaller chunk_size, or fewer "
                "workers, need less memory"
            ),
        ) from error.__cause__


class _LostWorker(Exception):
    """A worker died; the cause is what the backend says of it."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"{type(cause).__name__}: {_first_line(cause)}")
        self.__cause__ = cause


def _on_loky(
    plan: Plan, tasks: Iterator[Task], workers: int | None
) -> Generator[Outcome, None, None]:
    """Chunks in processes of this machine, through joblib."""
    joblib = _load("joblib")
    executor = importlib.import_module("joblib.externals.loky.process_executor")
    data = _packed(plan)
    calls = (joblib.delayed(_work)(data, _packed(task)) for task in tasks)
    try:
        with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
            parallel = joblib.Parallel(n_jobs=workers, batch_size=1, return_as="generator")
            results = parallel(calls)
        with contextlib.closing(results):
            yield from results
    except executor.BrokenProcessPool as error:
        raise _LostWorker(error) from error


def _on_dask(
    plan: Plan, tasks: Iterator[Task], workers: int | None
) -> Generator[Outcome, None, None]:
    """Chunks on the workers of a Dask client.

    Not through joblib, whose backend for Dask waits for ever for a chunk that Dask has given up,
    and for one whose message Dask warns of where warnings are errors.
    """
    distributed = _load("distributed")
    client = _client(distributed)
    killed = importlib.import_module("distributed.scheduler").KilledWorker
    config = importlib.import_module("dask").config
    large = {"distributed.admin.large-graph-warning-threshold": "1 PB"}

    def submit(*call: Any) -> Any:
        with config.set(large):
            return client.submit(*call, pure=False)

    # The plan is sent once. Bytes that are submitted, unlike what is scattered, are known to the
    # scheduler, which has them made again if the workers that hold them die.
    data = submit(_same, _packed(plan))
    under_way: deque[Any] = deque()

    def fill() -> None:
        most = workers or 2 * max(1, sum(client.ncores().values()))
        free = most - sum(not future.done() for future in under_way)
        for task in itertools.islice(tasks, max(0, free)):
            under_way.append(submit(_work, data, _packed(task)))

    try:
        fill()
        while under_way:
            if under_way[0].done():
                yield under_way.popleft().result()
            else:
                unfinished = [future for future in under_way if not future.done()]
                distributed.wait(unfinished, return_when="FIRST_COMPLETED")
            fill()
    except (killed, distributed.CancelledError) as error:
        raise _LostWorker(error) from error
    finally:
        client.cancel(list(under_way))


def _same(plan: bytes) -> bytes:
    return plan


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:120]


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            "runs in several processes need joblib, and Dask for its clusters",
            received=f"no module {name}",
            expected=f"{name}, an optional dependency",
            remedy=f"{_INSTALL}; or {_ONE_PROCESS}",
        ) from error


def _client(distributed: Any) -> Any:
    """The Dask client of this process."""
    try:
        return distributed.get_client()
    except ValueError as error:
        raise ArgumentError(
            "there is no Dask client",
            received='backend="dask" without one',
            expected="a distributed.Client of yours in this process",
            remedy="client = distributed.Client(), or Client('scheduler:8786')",
        ) from error


def _packed(value: Any) -> bytes:
    """What is sent to a worker, by cloudpickle, which also takes functions of the main module."""
    cloudpickle = _load("cloudpickle")
    try:
        data: bytes = cloudpickle.dumps(value)
    except Exception as error:
        raise WorkerError(
            "the run cannot be sent to a worker",
            received=f"{type(error).__name__}: {_first_line(error)}",
            expected="a loss, a noise and observables that can be pickled",
            remedy=f"functions without open files, locks or generators; or {_ONE_PROCESS}",
        ) from error
    return data


def _unpacked(plan: bytes) -> Plan:
    """The plan, with the kernels that this thread of the worker has compiled for it."""
    if getattr(_local, "packed", None) != plan:
        try:
            _local.plan = pickle.loads(plan)
        except (ImportError, AttributeError) as error:
            raise WorkerError(
                "a worker cannot import what the problem or an observable is made of",
                received=f"{type(error).__name__}: {error}",
                expected="functions of a module that every worker can import by its name; a file "
                "loaded by importlib (FILE.py:NAME) is no such module",
                remedy="put its folder on PYTHONPATH and import it by name, or install it; or "
                f"{_ONE_PROCESS}",
            ) from error
        _local.packed = plan
    found: Plan = _local.plan
    return found


def _work(plan: bytes, task: bytes) -> Outcome:
    """Run a chunk in a worker."""
    return run_chunk(_unpacked(plan), pickle.loads(task))
