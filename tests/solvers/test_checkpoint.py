"""Runs that stop and go on: the same bits, and named errors for files that do not fit."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch

from manifold_sde import CustomNoise, SamplingNoise, problems
from manifold_sde.errors import CheckpointError, WriteError
from manifold_sde.solvers import Solution, run_sgd
from manifold_sde.solvers.archive import read_archive, write_archive
from manifold_sde.solvers.sgd_step import BLOCK
from tests.warm import Program

SCRIPT = """
import sys
from manifold_sde import problems
from manifold_sde.solvers import run_sgd, sgd, stopping
stopping._CHECKPOINT_SECONDS = 0.0
sgd._CHUNK = 16
problem = problems.normalized_linear(seed=1)
run_sgd(problem, problem.minimizer, 0.02, 0.05, [0, 400, 1200], n_paths=32, seed=5,
        compile=False, checkpoint=sys.argv[1])
"""


def run(checkpoint=None, **changes):
    problem = problems.normalized_linear(seed=1)
    options = {"lr": 0.02, "weight_decay": 0.05, "steps": [0, 50, 120], "seed": 5, "n_paths": 40}
    options |= changes
    lr, decay, steps = (options.pop(k) for k in ("lr", "weight_decay", "steps"))
    return run_sgd(
        problem,
        problem.minimizer,
        lr,
        decay,
        steps,
        compile=False,
        checkpoint=checkpoint,
        **options,
    )


@pytest.fixture
def eager_checkpoints(monkeypatch):
    """A checkpoint after every block, and more than one chunk."""
    monkeypatch.setattr("manifold_sde.solvers.stopping._CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("manifold_sde.solvers.sgd._CHUNK", 16)


class Stop(Exception):
    """Stands for a run that is stopped."""


@pytest.mark.usefixtures("eager_checkpoints")
@pytest.mark.parametrize("after", [1, 2, 3, 5, 7])
def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path, monkeypatch, after):
    whole = run()
    path = tmp_path / "run.ckpt"
    writes = 0

    def counting(*arguments):
        nonlocal writes
        write_archive(*arguments)
        writes += 1
        if writes == after:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("manifold_sde.solvers.sgd.write_archive", counting)
        with pytest.raises(Stop):
            run(path)
    resumed = run(path)
    assert torch.equal(whole.ys, resumed.ys)
    assert torch.equal(whole.clock, resumed.clock)


@pytest.mark.usefixtures("eager_checkpoints")
def test_a_killed_process_loses_nothing(tmp_path):
    path = tmp_path / "killed.ckpt"
    process = Program("-c", SCRIPT, path)
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    ended = process.wait().returncode
    assert ended == -signal.SIGKILL, "the run ended before it could be killed"
    header, _ = read_archive(path, "checkpoint of run_sgd")
    assert 0 < header["step"] <= 1200
    assert not (header["chunk"] == 1 and header["step"] == 1200)
    assert Program("-c", SCRIPT, path).wait().returncode == 0
    _, killed = read_archive(path, "checkpoint of run_sgd")
    unbroken = tmp_path / "unbroken.ckpt"
    run(unbroken, n_paths=32, weight_decay=0.05, steps=[0, 400, 1200])
    _, whole = read_archive(unbroken, "checkpoint of run_sgd")
    for name in whole:
        np.testing.assert_array_equal(killed[name], whole[name])


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    first = run(path)

    def forbidden(*_, **__):
        raise AssertionError("a step was taken")

    monkeypatch.setattr("manifold_sde.solvers.sgd.advance", forbidden)
    again = run(path)
    assert torch.equal(first.ys, again.ys)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 6}, "seed"),
        ({"lr": 0.03}, "lr"),
        ({"weight_decay": 0.06}, "weight_decay"),
        ({"steps": [0, 50, 121]}, "kept"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, named):
    path = tmp_path / "run.ckpt"
    run(path)
    with pytest.raises(CheckpointError, match=named):
        run(path, **change)


def test_callable_schedules_are_told_apart(tmp_path):
    path = tmp_path / "run.ckpt"
    run(path, lr=lambda k: 0.02)
    with pytest.raises(CheckpointError, match="lr"):
        run(path, lr=lambda k: 0.03)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("step", [0, 5000, 9999])
def test_a_schedule_that_differs_at_one_step_is_refused(tmp_path, name, step):
    """One entry of 10,000, wherever it is, given as a sequence or as a function."""
    path = tmp_path / "run.ckpt"
    values = np.full(10_000, 0.01)
    other, block = values.copy(), step // 1024 * 1024
    other[step] *= 1.001
    problem = problems.great_circle()

    def start(schedule):
        # The first block is enough: what is compared is known before any step.
        rates = {"lr": values, "weight_decay": values, name: schedule}
        x0 = problem.minimizer
        run_sgd(problem, x0, rates["lr"], rates["weight_decay"], 10_000, checkpoint=path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("manifold_sde.solvers.sgd.advance", lambda *_, **__: iter([BLOCK]))
        start(values)
        start(lambda k: values[k])
        for schedule in (other, lambda k: other[k]):
            with pytest.raises(CheckpointError, match=f"{name}: another in steps {block} to"):
                start(schedule)


def test_noises_of_one_name_are_told_apart(tmp_path):
    """Two factors of a user's own, the noise of the second ten times that of the first."""
    path = tmp_path / "run.ckpt"

    def start(scale):
        def sigma(x):
            unit = x / x.norm()
            return scale / x.norm() * (torch.eye(3, dtype=x.dtype) - torch.outer(unit, unit))

        problem = problems.great_circle(noise=CustomNoise(sigma))
        return run_sgd(problem, problem.minimizer, 0.01, 0.05, 20, compile=False, checkpoint=path)

    first = start(0.3)
    assert torch.equal(start(0.3).ys, first.ys)
    with pytest.raises(CheckpointError, match="another run") as caught:
        start(3.0)
    assert "noise: " in caught.value.received
    assert "loss" not in caught.value.received


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": 10**9}, "step 1000000000 of 120"),
        ({"step": -1}, "step -1"),
        ({"step": "50"}, "step '50'"),
        ({"step": 7.5}, "step 7.5"),
        ({"chunk": 3}, "chunk 3"),
    ],
)
def test_a_header_that_does_not_fit_its_run_is_named(tmp_path, change, named):
    path, kind = tmp_path / "run.ckpt", "checkpoint of run_sgd"
    run(path)
    header, arrays = read_archive(path, kind)
    write_archive(path, kind, {**header, **change}, arrays)
    with pytest.raises(CheckpointError, match="incomplete") as caught:
        run(path)
    assert named in caught.value.received


def test_what_is_missing_in_a_checkpoint_is_named(tmp_path):
    path, kind = tmp_path / "run.ckpt", "checkpoint of run_sgd"
    run(path)
    header, arrays = read_archive(path, kind)
    for name in header:
        write_archive(path, kind, {k: v for k, v in header.items() if k != name}, arrays)
        with pytest.raises(CheckpointError, match="incomplete"):
            run(path)
    for name in arrays:
        write_archive(path, kind, header, {k: v for k, v in arrays.items() if k != name})
        with pytest.raises(CheckpointError, match="incomplete"):
            run(path)
        write_archive(path, kind, header, arrays | {name: arrays[name][..., :0]})
        with pytest.raises(CheckpointError):
            run(path)


def test_a_folder_is_no_file_for_a_checkpoint(tmp_path):
    """It is said before any step is taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("manifold_sde.solvers.sgd.advance", None)
        with pytest.raises(WriteError, match="Is a directory"):
            run(tmp_path)


def test_a_checkpoint_of_another_problem_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    run(path)
    problem = problems.normalized_linear(seed=1, noise=SamplingNoise())
    with pytest.raises(CheckpointError, match="problem"):
        run_sgd(
            problem,
            problem.minimizer,
            0.02,
            0.05,
            [0, 50, 120],
            n_paths=40,
            seed=5,
            compile=False,
            checkpoint=path,
        )


@pytest.mark.parametrize("spoil", ["cut", "noise", "empty"])
def test_a_corrupted_checkpoint_is_named(tmp_path, spoil):
    path = tmp_path / "run.ckpt"
    run(path)
    content = path.read_bytes()
    spoiled = {"cut": content[: len(content) // 2], "noise": b"x" * 1000, "empty": b""}[spoil]
    path.write_bytes(spoiled)
    with pytest.raises(CheckpointError, match="corrupted"):
        run(path)


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "solution.npz"
    run().save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="corrupted"):
        Solution.load(path)
