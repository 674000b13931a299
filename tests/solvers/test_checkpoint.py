"""Runs that stop and go on: the same bits, and named errors for files that do not fit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from manifold_sde import SamplingNoise, problems
from manifold_sde.errors import CheckpointError
from manifold_sde.solvers import Solution, run_sgd
from manifold_sde.solvers.archive import read_archive, write_archive

SCRIPT = """
import sys
from manifold_sde import problems
from manifold_sde.solvers import run_sgd, runner
runner._CHECKPOINT_SECONDS = 0.0
runner._CHUNK = 16
problem = problems.normalized_linear(seed=1)
run_sgd(problem, problem.minimizer, 0.02, 0.05, [0, 900, 2500], n_paths=32, seed=5,
        compile=False, checkpoint=sys.argv[1])
"""


def run(checkpoint=None, **changes):
    problem = problems.normalized_linear(seed=1)
    options = {"lr": 0.02, "weight_decay": 0.05, "steps": [0, 50, 120], "seed": 5} | changes
    lr, decay, steps = (options.pop(k) for k in ("lr", "weight_decay", "steps"))
    return run_sgd(
        problem,
        problem.minimizer,
        lr,
        decay,
        steps,
        n_paths=40,
        compile=False,
        checkpoint=checkpoint,
        **options,
    )


@pytest.fixture
def eager_checkpoints(monkeypatch):
    """A checkpoint after every block, and more than one chunk."""
    monkeypatch.setattr("manifold_sde.solvers.runner._CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("manifold_sde.solvers.runner._CHUNK", 16)


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
        patch.setattr("manifold_sde.solvers.runner.write_archive", counting)
        with pytest.raises(Stop):
            run(path)
    resumed = run(path)
    assert torch.equal(whole.ys, resumed.ys)
    assert torch.equal(whole.clock, resumed.clock)


def test_a_killed_process_loses_nothing(tmp_path):
    path = tmp_path / "killed.ckpt"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    header, _ = read_archive(path, "checkpoint of run_sgd")
    assert 0 < header["step"] <= 2500
    assert not (header["chunk"] == 1 and header["step"] == 2500)
    resumed = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], env=environment, check=True, timeout=300
    )
    assert resumed.returncode == 0
    _, killed = read_archive(path, "checkpoint of run_sgd")
    unbroken = tmp_path / "unbroken.ckpt"
    subprocess.run([sys.executable, "-c", SCRIPT, str(unbroken)], env=environment, check=True)
    _, whole = read_archive(unbroken, "checkpoint of run_sgd")
    for name in whole:
        np.testing.assert_array_equal(killed[name], whole[name])


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    first = run(path)

    def forbidden(*_, **__):
        raise AssertionError("a step was taken")

    monkeypatch.setattr("manifold_sde.solvers.runner.advance", forbidden)
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
