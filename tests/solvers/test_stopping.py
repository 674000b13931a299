"""Ctrl-C and SIGTERM: what is done is saved, children end, and the same call goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from manifold_sde import problems
from manifold_sde.errors import Terminated
from manifold_sde.solvers import Solution, run_sgd
from manifold_sde.solvers.archive import read_archive
from tests.solvers.test_solve_checkpoint import adaptive, weights

#: A program with workers, which tell by a file each when they have taken some steps.
SCRIPT = """
import os, sys
from pathlib import Path
import torch
from manifold_sde import Problem, SphericalNoise, WeightDecaySDE
from manifold_sde.solvers import solve

here, folder, calls = os.getpid(), Path(sys.argv[1]), []

def loss(x):
    calls.append(1)
    if os.getpid() != here and len(calls) == 500:
        (folder / f"at-work-{os.getpid()}").touch()
    return 0.5 * (x[2] / x.norm()) ** 2

problem = Problem(loss, 3, SphericalNoise(0.3), rank=1)
sde = WeightDecaySDE(problem, lr=0.1, weight_decay=0.1)
start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
solve(sde, start, [0.0, 1e6], n_paths=8, chunk_size=4, compile=False, workers=2,
      checkpoint=folder / "run")
"""


def sgd(**options: Any) -> Solution:
    problem = problems.great_circle()
    options = {"n_paths": 4, "compile": False, **options}
    return run_sgd(problem, problem.minimizer, 0.02, 0.05, [0, 1100], **options)


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """The handlers of a plain program, which are there again at the end."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    after = {s: signal.getsignal(s) for s in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


RUNS: dict[str, tuple[Callable[..., Solution], str, int, str]] = {
    "solve": (weights, "manifold_sde.solvers.fixed.FixedSteps.rate", 25, "position"),
    "adaptive": (adaptive, "manifold_sde.solvers.fixed.FixedSteps.rate", 10, "position"),
    "run_sgd": (sgd, "manifold_sde.solvers.sgd_step.update", 1050, "step"),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_run_that_is_stopped_in_a_block_goes_on_with_the_same_bits(
    tmp_path: Path, name: str, number: int, kind: type[BaseException]
) -> None:
    """What was done by then is saved, long before the next regular checkpoint."""
    run, function, call, position = RUNS[name]
    whole = run()
    owner, _, attribute = function.rpartition(".")
    calls = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("manifold_sde.solvers.adaptive._TRIES", 2)
        real = _resolved(owner).__dict__[attribute]

        def stopping(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                signal.raise_signal(number)
            return real(*arguments)

        patch.setattr(function, stopping)
        place = tmp_path / "run"
        with pytest.raises(kind) as caught:
            run(checkpoint=place)
    files = [place] if place.is_file() else sorted(place.glob("*.npz"))
    assert files
    header, _ = read_archive(files[-1], read_kind(name))
    assert header[position] > 0
    if number == signal.SIGINT:
        assert str(caught.value) == (
            f"stopped; what was done is in {place}, and the same call goes on from it"
        )
        assert type(caught.value) is KeyboardInterrupt
        assert caught.value.__suppress_context__
        # This test, the run's own wrapper, the call, and the place that says it.
        assert len(traceback.extract_tb(caught.value.__traceback__)) <= 5
    else:
        assert caught.value.code == 143  # type: ignore[attr-defined]
    last = run(checkpoint=place)
    torch.testing.assert_close(last.ys, whole.ys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(last.clock, whole.clock, rtol=0, atol=0, equal_nan=True)


def _resolved(name: str) -> Any:
    module, _, rest = name.rpartition(".")
    return vars(sys.modules[module])[rest] if module in sys.modules else sys.modules[name]


def read_kind(name: str) -> str:
    return "checkpoint of run_sgd" if name == "run_sgd" else "chunk of a run of solve"


def test_without_a_checkpoint_it_is_said_how_to_keep_what_is_done() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "manifold_sde.solvers.sgd.advance",
            lambda *_, **__: signal.raise_signal(signal.SIGINT),
        )
        with pytest.raises(KeyboardInterrupt, match="nothing was saved: checkpoint="):
            sgd()


def test_a_program_that_handles_sigterm_is_left_alone(tmp_path: Path) -> None:
    """Its handler is called, and the run goes on as that wants it."""
    told: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "manifold_sde.solvers.integrate.one_thread",
            lambda: signal.raise_signal(signal.SIGTERM) or torch.no_grad(),
        )
        signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
        try:
            found = weights(checkpoint=tmp_path / "run")
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert told
    torch.testing.assert_close(found.ys, weights().ys, rtol=0, atol=0)


def test_other_threads_and_runs_with_nothing_to_save_set_no_handler(tmp_path: Path) -> None:
    seen: list[Any] = []

    def look(*_: Any, **__: Any) -> Iterator[int]:
        seen.append(signal.getsignal(signal.SIGTERM))
        return iter([1024])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("manifold_sde.solvers.sgd.advance", look)
        sgd()
        thread = threading.Thread(target=lambda: sgd(checkpoint=tmp_path / "run"))
        thread.start()
        thread.join()
        assert set(seen) == {signal.SIG_DFL}
        sgd(checkpoint=tmp_path / "other")
        assert signal.SIG_DFL not in seen[-1:]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.thorough)]
)
def test_workers_end_with_their_program(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM to the parent alone: the workers save, all end, with status 143.

    After SIGKILL nobody tells them; they see that they are alone. The broken form computed on for
    minutes.
    """
    pytest.importorskip("joblib")
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        try:
            workers = waited(lambda: pids(tmp_path), 2, 120)
            assert workers, "the workers did not begin"
            program.send_signal(number)
            begun = time.monotonic()
            _, said = program.communicate(timeout=60)
            assert not waited(lambda: [p for p in workers if alive(p)], 0, 20)
            assert time.monotonic() - begun < 60
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
    if number == signal.SIGTERM:
        assert program.returncode == 143
        assert said == ""
        files = sorted((tmp_path / "run").iterdir())
        # A chunk that has not ended its first block has nothing to save.
        assert files
        assert {file.name for file in files} <= {"chunk-000000.npz", "chunk-000001.npz"}
        for file in files:
            header, _ = read_archive(file, "chunk of a run of solve")
            assert header["position"] > 0
            assert not header["finished"]


def pids(folder: Path) -> list[int]:
    return [int(file.name.rpartition("-")[2]) for file in folder.glob("at-work-*")]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def waited(find: Callable[[], list[int]], count: int, seconds: float) -> list[int]:
    """What is found, once it is as many as asked for, or after some seconds."""
    deadline = time.monotonic() + seconds
    while len(find()) != count and time.monotonic() < deadline:
        time.sleep(0.05)
    return find()
