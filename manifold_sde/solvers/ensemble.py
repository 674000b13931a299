"""Chunks of paths in other processes, through joblib, or one after the other in this one."""

from __future__ import annotations

import contextlib
import importlib
import pickle
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from manifold_sde.derivatives import integer
from manifold_sde.errors import ArgumentError, MissingDependencyError, WorkerError
from manifold_sde.solvers.archive import prepare_folder
from manifold_sde.solvers.chunk import Outcome, run_chunk
from manifold_sde.solvers.plan import Plan
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
    with tqdm(total=total, desc=label, unit=unit, disable=not progress) as bar:
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
    joblib = _load("joblib")
    pool = (_dask if backend == "dask" else _loky)(workers, _packed(run.plan))
    # Bytes: what Dask would otherwise place on one worker beforehand is lost with that worker.
    calls = (joblib.delayed(_work)(pool.plan, _packed(task)) for task in run.tasks(kept))
    try:
        with pool.settings:
            with joblib.parallel_config(**pool.config):
                parallel = joblib.Parallel(batch_size=1, return_as="generator", **pool.options)
                results = parallel(calls)
            with contextlib.closing(results):
                yield from results
    except pool.lost as error:
        raise WorkerError(
            "a worker died",
            received=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}",
            expected="workers that live; one that is killed often ran out of memory",
            remedy=(
                "the same call again: the chunks that were finished are in the checkpoint "
                f"{kept}, and are not run again"
                if kept is not None
                else "checkpoint=FOLDER keeps the chunks that are finished; fewer workers, or a "
                "smaller chunk_size, need less memory"
            ),
        ) from error


@dataclass(frozen=True)
class _Pool:
    """How joblib is to run the chunks.

    Attributes:
        plan: What stands for the plan in a call.
        config: Arguments of ``joblib.parallel_config``.
        options: Arguments of ``joblib.Parallel``.
        lost: The error that says that a worker died.
        settings: What holds during the run.
    """

    plan: Any
    config: dict[str, Any]
    options: dict[str, Any]
    lost: type[BaseException]
    settings: contextlib.AbstractContextManager[Any] = field(default_factory=contextlib.nullcontext)


def _loky(workers: int | None, plan: bytes) -> _Pool:
    executor = importlib.import_module("joblib.externals.loky.process_executor")
    config = {"backend": "loky", "inner_max_num_threads": 1}
    return _Pool(plan, config, {"n_jobs": workers}, executor.BrokenProcessPool)


def _dask(workers: int | None, plan: bytes) -> _Pool:
    client = _client()
    settings = contextlib.ExitStack()
    # Dask warns of a message above 10 MB, and where warnings are errors the run would hang.
    limit = {"distributed.admin.large-graph-warning-threshold": "1 PB"}
    settings.enter_context(_load("dask").config.set(limit))
    # Sent once; the scheduler has it made again if the workers that hold it die.
    future = client.submit(_same, plan, pure=False)
    return _Pool(
        future,
        {"backend": "dask"},
        {"n_jobs": -1, "pre_dispatch": workers or "2*n_jobs"},
        importlib.import_module("distributed.scheduler").KilledWorker,
        settings,
    )


def _same(plan: bytes) -> bytes:
    return plan


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


def _client() -> Any:
    """The Dask client of this process."""
    distributed = _load("distributed")
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
            received=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}",
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
