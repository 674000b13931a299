"""Chunks on a real Dask cluster of two worker processes: the same bits, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from manifold_sde import Problem, SphericalNoise, WeightDecaySDE, problems
from manifold_sde.errors import ArgumentError, MissingDependencyError, WorkerError
from manifold_sde.solvers import Solution, solve

pytest.importorskip("joblib")
dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",  # any free port: several clusters may be running
            silence_logs=50,
        ) as cluster,
        distributed.Client(cluster) as found,
    ):
        yield found


def run(problem: Problem | None = None, last: int = 12, **options: Any) -> Solution:
    problem = problem or problems.great_circle()
    sde = WeightDecaySDE(problem, lr=0.1, weight_decay=0.1)
    options = {"n_paths": 22, "chunk_size": 4, "seed": 2, "compile": False, **options}
    return solve(sde, problems.great_circle().minimizer, [0.0, 3.5, last], **options)


def assert_same_bits(one: Solution, other: Solution) -> None:
    for name in ("ts", "ys", "clock"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)
    assert one.observed.keys() == other.observed.keys()
    for name, values in one.observed.items():
        torch.testing.assert_close(values, other.observed[name], rtol=0, atol=0)
    assert one.stats == other.stats


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("workers", [None, 1, 2])
def test_a_cluster_gives_the_bits_of_one_process(workers: int | None) -> None:
    options: dict[str, Any] = {"antithetic": True, "observables": {"all": lambda y: y}}
    assert_same_bits(run(backend="dask", workers=workers), run())
    assert_same_bits(run(backend="dask", workers=workers, **options), run(**options))


@pytest.mark.usefixtures("client")
def test_progress_counts_chunks(capfd: pytest.CaptureFixture[str]) -> None:
    run(backend="dask", progress="ensemble")
    assert "6/6" in capfd.readouterr().err


@pytest.mark.usefixtures("client")
def test_large_problems_are_sent_once_and_without_a_warning() -> None:
    """Dask warns of a message above 10 MB; the problem holds 16 MB, and warnings are errors."""
    data = torch.zeros(2_000_000, dtype=torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (x[2] / x.norm()) ** 2 + data[0]

    problem = Problem(loss, 3, SphericalNoise(0.3), rank=1)
    assert_same_bits(run(problem, backend="dask"), run(problem))


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing(client: Any) -> None:
    """Killed with SIGKILL in mid-run, while it works on a chunk and others wait."""
    client.wait_for_workers(2)
    pids: dict[str, int] = client.run(os.getpid)
    killed: list[str] = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            busy = [address for address, tasks in client.processing().items() if tasks]
            if len(busy) == 2:
                time.sleep(0.2)  # in the midst of a chunk, which takes about a second
                address = busy[0]
                os.kill(pids[address], signal.SIGKILL)
                killed.append(address)
                return
            time.sleep(0.02)

    whole = run(last=300)
    killer = threading.Thread(target=kill)
    killer.start()
    found = run(last=300, backend="dask")
    killer.join()
    assert killed, "no worker was caught at work"
    client.wait_for_workers(2)
    assert pids[killed[0]] not in client.run(os.getpid).values()
    assert_same_bits(found, whole)


def test_a_chunk_that_kills_its_workers_is_named(client: Any, tmp_path: Path) -> None:
    """It is tried again as often as Dask allows; then the run ends with an error."""
    here = os.getpid()

    def first(y: torch.Tensor) -> torch.Tensor:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return y[:, 0]

    allowed = dask.config.get("distributed.scheduler.allowed-failures")

    def allow(dask_scheduler: Any = None, number: int = 0) -> None:
        dask_scheduler.allowed_failures = number

    client.run_on_scheduler(allow, number=0)
    try:
        with pytest.raises(WorkerError, match="a worker died") as caught:
            run(n_paths=4, backend="dask", observables={"first": first}, checkpoint=tmp_path)
    finally:
        client.run_on_scheduler(allow, number=allowed)
    assert "KilledWorker" in caught.value.received
    client.wait_for_workers(2)


# Inside of Dask.


def inside() -> Solution:
    """What a user's own task runs."""
    return run(n_paths=6, last=4, backend="dask")


@contextlib.contextmanager
def one_thread_for_all(**options: Any) -> Iterator[Any]:
    """A cluster whose one thread a waiting task must not keep."""
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        dashboard_address=None,
        silence_logs=50,
        **options,
    ) as cluster:
        yield cluster


def test_a_task_that_solves_on_its_own_cluster_leaves_its_place_to_the_chunks() -> None:
    """More such tasks than threads: each would wait for ever for a chunk that waits for it."""
    expected = run(n_paths=6, last=4)
    with one_thread_for_all() as cluster, distributed.Client(cluster) as client:
        futures = [client.submit(inside, pure=False) for _ in range(3)]
        for future in futures:
            assert_same_bits(future.result(timeout=120), expected)
        # The thread is there again for others.
        assert client.submit(lambda: 7, pure=False).result(timeout=60) == 7


def test_broken_twin_a_task_that_keeps_its_place_waits_for_ever() -> None:
    @contextlib.contextmanager
    def keeping() -> Iterator[Any]:
        yield distributed.get_client()

    with (
        pytest.MonkeyPatch.context() as patch,
        one_thread_for_all() as cluster,
        distributed.Client(cluster) as client,
    ):
        patch.setattr(distributed, "worker_client", keeping)
        stuck = client.submit(inside, pure=False)
        try:
            with pytest.raises(TimeoutError):
                stuck.result(timeout=5)
        finally:
            # A second thread for the chunks: nothing is left waiting.
            worker = next(iter(cluster.workers.values()))
            executor = worker.executors["default"]
            executor._max_workers = 2
            executor._adjust_thread_count()
            worker.state.nthreads = 2
            client.submit(lambda: 7, pure=False)
            stuck.result(timeout=60)


def test_an_asynchronous_client_is_refused_and_the_way_out_works() -> None:
    async def program() -> Solution:
        async with (
            distributed.LocalCluster(
                n_workers=1,
                threads_per_worker=1,
                processes=False,
                dashboard_address=None,
                silence_logs=50,
                asynchronous=True,
            ) as cluster,
            distributed.Client(cluster, asynchronous=True) as client,
        ):
            with pytest.raises(ArgumentError, match="asynchronous") as caught:
                inside()
            assert "asyncio.to_thread" in caught.value.remedy
            assert "own.as_current()" in caught.value.remedy

            def apart() -> Solution:
                with distributed.Client(client.scheduler.address) as own, own.as_current():
                    return inside()

            return await asyncio.wait_for(asyncio.to_thread(apart), 120)

    assert_same_bits(asyncio.run(program()), run(n_paths=6, last=4))


def test_without_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise ValueError("No global client found and no address provided")

    monkeypatch.setattr(distributed, "get_client", none)
    with pytest.raises(ArgumentError, match="no Dask client") as caught:
        run(backend="dask")
    assert "distributed.Client()" in caught.value.remedy


def test_without_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingDependencyError, match=r"manifold_sde\[cluster\]") as caught:
        run(backend="dask")
    assert "distributed" in caught.value.received
