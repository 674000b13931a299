"""Chunks of paths in other processes, of loky or of Dask."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import itertools
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from manifold_sde.errors import ArgumentError, MissingDependencyError, Terminated, WorkerError
from manifold_sde.solvers.chunk import Chunk, ChunkResult
from manifold_sde.solvers.integrate import integrate
from manifold_sde.solvers.simulation import Simulation

_INSTALL = 'pip install "manifold_sde[cluster]"'
_ONE_PROCESS = "leave workers out to run in this process"
#: Seconds after which a process without work ends, and that one has to save its work.
_IDLE, _PATIENCE = 300, 10
_ONE = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
_local = threading.local()


def integrate_in_workers(
    simulation: Simulation,
    workers: int | None,
    backend: str,
    checkpoint: Path | None,
    report: Callable[[], object],
) -> Generator[ChunkResult, None, None]:
    """Results of all chunks, in order, each when it is there.

    Args:
        simulation: The simulation.
        workers: Number of processes; with "dask", of chunks under way at once.
        backend: "loky" or "dask".
        checkpoint: Folder, or ``None``.
        report: Called after each chunk.

    Raises:
        WorkerError: If a worker died, or the simulation cannot be sent to workers.
        MissingDependencyError: If joblib or Dask is not installed.
    """
    kept = None if checkpoint is None else checkpoint.resolve()
    chunks = simulation.chunks(kept)
    # Each chunk has its own starts.
    sent = replace(simulation, start=simulation.start[:1].clone())
    run = _on_dask if backend == "dask" else _on_loky
    try:
        with contextlib.closing(run(sent, chunks, workers)) as results:
            for result in results:
                report()
                yield result
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


def _in_order(
    submit: Callable[[Chunk], Any],
    wait: Callable[[list[Any]], object],
    most: Callable[[], int],
    chunks: Iterator[Chunk],
    under_way: deque[Any],
) -> Generator[ChunkResult, None, None]:
    """ChunkResults of chunks in their order.

    Args:
        submit: Gives a chunk to a worker and returns its future.
        wait: Waits until one of some futures is done.
        most: Number of chunks that may be with workers at once.
        chunks: The chunks.
        under_way: The futures, which the caller cancels when this ends early.
    """

    def fill() -> None:
        free = most() - sum(not future.done() for future in under_way)
        under_way.extend(submit(chunk) for chunk in itertools.islice(chunks, max(0, free)))

    fill()
    while under_way:
        if under_way[0].done():
            yield under_way.popleft().result()
        else:
            wait([future for future in under_way if not future.done()])
        fill()


def _on_loky(
    simulation: Simulation, chunks: Iterator[Chunk], workers: int | None
) -> Generator[ChunkResult, None, None]:
    """Chunks in processes of this machine, by the executor that joblib brings along.

    Not by joblib itself, which ends its processes with SIGKILL: here they save their chunks first.
    """
    _load("joblib")
    data = _packed(simulation)
    loky = importlib.import_module("joblib.externals.loky")
    executor = loky.get_reusable_executor(workers, timeout=_IDLE, initializer=_begin, env=_ONE)
    under_way: deque[Any] = deque()

    def submit(chunk: Chunk) -> Any:
        return executor.submit(_work_apart, data, _packed(chunk))

    def wait(unfinished: list[Any]) -> None:
        concurrent.futures.wait(unfinished, return_when="FIRST_COMPLETED")

    try:
        yield from _in_order(submit, wait, lambda: 2 * (workers or 1), chunks, under_way)
    except loky.BrokenProcessPool as error:
        raise _LostWorker(error) from error
    except BaseException:
        _end(executor, under_way)
        raise


def _end(executor: Any, under_way: deque[Any]) -> None:
    """End processes of loky, after they have saved what they do."""
    for future in under_way:
        future.cancel()
    for process in list(executor._processes.values()):
        process.terminate()
    concurrent.futures.wait(under_way, timeout=_PATIENCE)
    executor.shutdown(wait=True, kill_workers=True)


class _Worker:
    """What a process of loky knows of itself."""

    working = False
    stopping = False


def _begin() -> None:
    """How a process of loky begins: Ctrl-C is for the parent, which says when to stop.

    It ends when the parent does, however that came about.
    """

    def stop(*_: object) -> None:
        _Worker.stopping = True
        if _Worker.working:
            _Worker.working = False
            raise Terminated

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()


def _work_apart(simulation: bytes, chunk: bytes) -> ChunkResult:
    """Run a chunk in a process of loky, unless that has been told to stop."""
    if _Worker.stopping:
        raise Terminated
    _Worker.working = True
    try:
        return _work(simulation, chunk)
    finally:
        _Worker.working = False


def _on_dask(
    simulation: Simulation, chunks: Iterator[Chunk], workers: int | None
) -> Generator[ChunkResult, None, None]:
    """Chunks on the workers of a Dask client.

    Not through joblib, whose backend for Dask waits for ever for a chunk that Dask has given up,
    and for one whose message Dask warns of where warnings are errors.
    """
    distributed = _load("distributed")
    killed = importlib.import_module("distributed.scheduler").KilledWorker
    config = importlib.import_module("dask").config
    large = {"distributed.admin.large-graph-warning-threshold": "1 PB"}
    with _client(distributed) as client:

        def submit(*call: Any) -> Any:
            with config.set(large):
                return client.submit(*call, pure=False)

        def wait(unfinished: list[Any]) -> None:
            distributed.wait(unfinished, return_when="FIRST_COMPLETED")

        def most() -> int:
            return workers or 2 * max(1, sum(client.ncores().values()))

        # Sent once. Bytes that are submitted, unlike what is scattered, are known to the scheduler,
        # which has them made again if the workers that hold them die.
        data = submit(bytes, _packed(simulation))
        under_way: deque[Any] = deque()
        try:
            yield from _in_order(
                lambda chunk: submit(_work, data, _packed(chunk)), wait, most, chunks, under_way
            )
        except (killed, distributed.CancelledError) as error:
            raise _LostWorker(error) from error
        finally:
            client.cancel(list(under_way))


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


@contextlib.contextmanager
def _client(distributed: Any) -> Iterator[Any]:
    """The Dask client of this process. A task that waits for others leaves its place to them."""
    with contextlib.ExitStack() as stack:
        try:
            distributed.get_worker()
        except ValueError:
            try:
                client = distributed.get_client()
            except ValueError as error:
                raise ArgumentError(
                    "there is no Dask client",
                    received='backend="dask" without one',
                    expected="a distributed.Client of yours in this process",
                    remedy="client = distributed.Client(), or Client('scheduler:8786')",
                ) from error
        else:
            client = stack.enter_context(distributed.worker_client())
        if client.asynchronous:
            raise ArgumentError(
                "the Dask client is asynchronous, and solve waits for its results",
                received=f"{type(client).__name__}(asynchronous=True)",
                expected="a client that can be waited for",
                remedy="in a thread (asyncio.to_thread): with distributed.Client(ADDRESS) as own, "
                "own.as_current(): solve(...)",
            )
        yield client


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


def _unpacked(simulation: bytes) -> Simulation:
    """The simulation, with the kernels that this thread of the worker has compiled for it."""
    if getattr(_local, "packed", None) != simulation:
        try:
            _local.simulation = pickle.loads(simulation)
        except (ImportError, AttributeError) as error:
            raise WorkerError(
                "a worker cannot import what the problem or an observable is made of",
                received=f"{type(error).__name__}: {error}",
                expected="functions of a module that every worker can import by its name; a file "
                "loaded by importlib (FILE.py:NAME) is no such module",
                remedy="put its folder on PYTHONPATH and import it by name, or install it; or "
                f"{_ONE_PROCESS}",
            ) from error
        _local.packed = simulation
    found: Simulation = _local.simulation
    return found


def _work(simulation: bytes, chunk: bytes) -> ChunkResult:
    """Run a chunk in a worker."""
    return integrate(_unpacked(simulation), pickle.loads(chunk))
