"""What solve refuses, in words for a terminal of 80 columns, and its progress bar."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manifold_sde import (
    DirectionDiffusion,
    LimitingDiffusion,
    Problem,
    SamplingNoise,
    WeightDecaySDE,
    problems,
)
from manifold_sde.errors import (
    ArgumentError,
    CheckpointError,
    DTypeError,
    LostPathsWarning,
    ManifoldSDEError,
    NoiseError,
    NonFiniteError,
    NotOnManifoldError,
    ShapeError,
    ZeroVectorError,
)
from manifold_sde.progress import quiet
from manifold_sde.solvers import Solution, halving, solve

PROBLEM = problems.great_circle()
START = PROBLEM.minimizer
LIMIT = LimitingDiffusion(PROBLEM)
SDE = WeightDecaySDE(PROBLEM, lr=0.1, weight_decay=0.1)


def run(**changes: Any) -> Solution:
    """A run that takes milliseconds, with changes."""
    options = {"sde": SDE, "y0": START, "ts": [0, 1], "compile": False} | changes
    return solve(options.pop("sde"), options.pop("y0"), options.pop("ts"), **options)


def refused(error: type[ManifoldSDEError], words: str, **changes: Any) -> None:
    """The run is refused with such an error, all of it narrow, with received, expected, hint."""
    with pytest.raises(error, match=words) as caught:
        run(**changes)
    assert type(caught.value) is error
    assert caught.value.received
    assert caught.value.expected
    assert caught.value.remedy
    wide = [line for line in str(caught.value).splitlines() if len(line) > 80]
    assert wide == []


@pytest.mark.parametrize(
    ("sde", "method", "words"),
    [
        (LIMIT, "rk4", "no such method for LimitingDiffusion"),
        (LIMIT, None, "no such method"),
        (SDE, "split", "no such method for WeightDecaySDE"),
        (SDE, "weak2", "'euler', 'heun', 'midpoint'"),
        (LIMIT, "heun", "the ito form"),
        (LIMIT.with_calculus("stratonovich"), "euler", r"sde.with_calculus\('ito'\)"),
        (DirectionDiffusion(PROBLEM), "weak2", "the stratonovich form"),
        (DirectionDiffusion(PROBLEM), "rk4", "'walk'"),
        (LIMIT, "walk", "leaves the norm alone"),
        (SDE, "midpoint", "drifts differ"),
    ],
)
def test_methods(sde: Any, method: Any, words: str) -> None:
    refused(ArgumentError, words, sde=sde, method=method)


@pytest.mark.parametrize(
    "ts",
    [
        [0, 1, 1],
        [1, 0],
        [0],
        [],
        1.0,
        "01",
        None,
        [0, math.nan],
        [0, math.inf],
        [False, True],
        ["0", "1"],
        torch.zeros(2, 2),
        np.zeros((2, 2)),
    ],
)
def test_times(ts: Any) -> None:
    refused(ArgumentError, "ts are not times", ts=ts)


def test_times_of_any_kind_are_read() -> None:
    wanted = [0.0, 0.5, 1.0]
    kinds: list[Any] = [torch.tensor(wanted), np.array(wanted), np.float32(wanted), tuple(wanted)]
    for ts in [*kinds, (t for t in wanted), range(3)]:
        found = run(ts=ts).ts
        assert found.dtype == torch.float64
        assert found.tolist() == (wanted if not isinstance(ts, range) else [0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("y0", "error", "words"),
    [
        (math.nan * START, NonFiniteError, "y0 holds NaN"),
        (0.0 * START, ZeroVectorError, "y0 contains the zero vector"),
        (torch.ones(4, dtype=torch.float64), ShapeError, r"y0 .*\n.* \(4,\)"),
        (torch.tensor(1.0), ShapeError, "y0 has the wrong shape"),
        (START.expand(2, 2, 3), ArgumentError, r"y0 of shape \(2, 2, 3\)"),
        (START.expand(0, 3), ArgumentError, r"y0 of shape \(0, 3\)"),
        (["1", "0", "0"], DTypeError, "y0 is not numbers"),
        (torch.tensor([1, 0, 0]), DTypeError, "int64"),
        (START.to(torch.complex128), DTypeError, "complex128"),
    ],
)
def test_starts(y0: Any, error: type[ManifoldSDEError], words: str) -> None:
    refused(error, words, y0=y0)


def test_starts_off_the_manifold() -> None:
    off = START + torch.tensor([0.0, 0.0, 0.1])
    refused(NotOnManifoldError, r"1 of 1 points.*\n.*\n.*limit_map", sde=LIMIT, y0=off)
    both = torch.stack([START, off])
    refused(NotOnManifoldError, "1 of 2 points", sde=DirectionDiffusion(PROBLEM), y0=both)
    assert run(y0=off).ys.shape == (2, 3), "equation (3) lives in the whole space"


def test_interpolation_is_not_a_silent_constant_path() -> None:
    """Every sample is fitted on the circle: the noise of SGD vanishes there."""
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    fitted = Problem(lambda x: weights * (x[2] / x.norm()) ** 2, 3, SamplingNoise())
    with pytest.raises(NoiseError, match="interpolation"):
        run(sde=LimitingDiffusion(fitted))


@pytest.mark.parametrize("n_paths", [0, -1, 2.0, True, "2"])
def test_numbers_of_paths(n_paths: Any) -> None:
    refused(ArgumentError, "n_paths is not a number of paths", n_paths=n_paths)


def test_a_number_of_paths_beside_their_starts() -> None:
    refused(ArgumentError, "n_paths=3", y0=START.expand(2, 3), n_paths=3)
    assert run(y0=START.expand(2, 3), n_paths=2).ys.shape == (2, 2, 3)
    assert run(n_paths=1).ys.shape == (2, 1, 3)
    assert run().ys.shape == (2, 3)


@pytest.mark.parametrize("dt", [-1.0, 0, math.nan, math.inf, 1e-14, "a", True])
def test_steps(dt: Any) -> None:
    refused(ArgumentError, "dt is not a step", dt=dt)


@pytest.mark.parametrize("compile", ["maybe", None, 2])
def test_modes_of_compiling(compile: Any) -> None:
    refused(ArgumentError, "compile is not one of its choices", compile=compile)


@pytest.mark.parametrize("seed", [-1, 1.5, None, 2**64])
def test_seeds(seed: Any) -> None:
    refused(ArgumentError, "seed is not an integer", seed=seed)


@pytest.mark.parametrize("workers", [0, -1, 1.0, True, "2"])
def test_workers(workers: Any) -> None:
    refused(ArgumentError, "workers is not a number of processes", workers=workers)


@pytest.mark.parametrize("backend", ["mpi", None, "threading"])
def test_backends(backend: Any) -> None:
    refused(ArgumentError, "no such backend", backend=backend)


@pytest.mark.parametrize("chunk_size", [0, -2, 2.0, True, "all"])
def test_chunk_sizes(chunk_size: Any) -> None:
    refused(ArgumentError, "chunk_size is not a number of paths", chunk_size=chunk_size)


def test_pairs_stay_together() -> None:
    refused(ArgumentError, "even, as pairs", chunk_size=3, n_paths=4, antithetic=True)
    refused(ArgumentError, "n_paths=4", n_paths=3, antithetic=True)
    refused(ArgumentError, "come in pairs", antithetic=True)
    refused(ArgumentError, "antithetic must be True or False", antithetic="no")


@pytest.mark.parametrize(
    ("observables", "error", "words"),
    [
        ({}, ArgumentError, "one or more names"),
        (lambda y: y[:, 0], ArgumentError, "with names"),
        ({1: lambda y: y[:, 0]}, ArgumentError, "with names"),
        ({"a": 1}, ArgumentError, "the observable 'a' is not a function"),
        ({"a": lambda y: y.mean(0)}, ShapeError, r"'a' .*\n.* shape \(3,\)"),
        ({"a": lambda y: y[0]}, ShapeError, "given all states at once"),
        ({"a": lambda y: 1.0}, ShapeError, "float for states"),
        ({"a": lambda y: torch.exp(1j * y[:, 0])}, DTypeError, "complex"),
    ],
)
def test_observables(observables: Any, error: type[ManifoldSDEError], words: str) -> None:
    refused(error, words, observables=observables)


def test_equations() -> None:
    refused(DTypeError, "LeastSquaresProblem", sde=PROBLEM)
    refused(DTypeError, "the class LimitingDiffusion", sde=LimitingDiffusion)


def test_checkpoints_are_folders(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for value in (True, 3):
        refused(ArgumentError, "checkpoint is not the path", checkpoint=value)
    with pytest.raises(ArgumentError, match="a file"):
        run(checkpoint=file)
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(checkpoint=file / "below")


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    plain = run(n_paths=4, seed=3, dt=0.5, chunk_size=2)
    numpy = run(n_paths=np.int64(4), seed=np.int64(3), dt=np.float32(0.5), chunk_size=np.int32(2))
    assert torch.equal(plain.ys, numpy.ys)
    numpy.save(tmp_path / "solution.npz")


def test_starts_may_have_gradients(tmp_path: Path) -> None:
    start = START.clone().requires_grad_()
    found = run(y0=start, n_paths=2, checkpoint=tmp_path)
    assert not found.ys.requires_grad
    assert torch.equal(found.ys, run(n_paths=2).ys)


@pytest.mark.paper("Equation (13)")
def test_the_split_scheme_starts_from_any_norm() -> None:
    """Where the trace is constant, ||Y(T)||^4 = V + (||Y(0)||^4 - V) e^(-2T), path by path."""
    trace = 2 * 0.3**2
    norms = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    found = run(sde=LIMIT, y0=norms[:, None] * START, ts=[0.0, 0.1], dt=0.5)
    expected = (trace + (norms**4 - trace) * math.exp(-0.2)) ** 0.25
    torch.testing.assert_close(found.norms[1], expected, rtol=1e-12, atol=0)
    assert float(found.directions[1, :, 1].abs().min()) > 0


def test_the_step_that_is_stated_gives_the_same_run() -> None:
    """Steps of the clock are stated in the equation's own time, in which dt is given."""
    first = run(sde=LIMIT, y0=1.5 * START, ts=[0.0, 0.1], dt=0.25)
    assert first.config["dt"] == pytest.approx(0.25, rel=1e-15)
    again = run(sde=LIMIT, y0=1.5 * START, ts=[0.0, 0.1], dt=first.config["dt"])
    torch.testing.assert_close(first.ys, again.ys, rtol=0, atol=1e-14)


# The progress bar.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_off_by_default_but_on_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    assert capfd.readouterr() == ("", "")
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    run()  # shorter than a second
    assert shown.getvalue() == ""
    monkeypatch.setattr("manifold_sde.progress._DELAY", 0.0)
    with quiet():
        run()
    run(progress=False)
    assert shown.getvalue() == ""
    run()
    assert "SDE: 100%" in shown.getvalue()


@pytest.mark.parametrize(("progress", "label"), [(True, "SDE"), ("my run", "my run")])
def test_progress_goes_to_stderr_and_counts_steps(
    progress: bool | str, label: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three chunks of 75 steps: blocks of 64 steps and of 11."""
    found = run(ts=[0, 75], n_paths=5, chunk_size=2, progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.split("\r")[-1].startswith(f"{label}: 100%")
    assert "225/225" in err
    assert "step" in err
    assert found.stats["steps"] == 225


def test_progress_of_a_run_that_goes_on_counts_what_was_done(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        run(ts=[0, 10], n_paths=5, chunk_size=2, progress=True, checkpoint=tmp_path)
        assert "30/30" in capfd.readouterr().err


def test_progress_of_steps_whose_number_is_estimated(capfd: pytest.CaptureFixture[str]) -> None:
    """How many steps of the clock it takes is not known beforehand."""
    found = run(sde=LIMIT, ts=[0.0, 0.2], dt=0.1, n_paths=2, progress=True)
    assert "100%" in (last := capfd.readouterr().err.split("\r")[-1])
    assert f"{found.stats['steps']}/{found.stats['steps']}" in last


def test_the_split_scheme_takes_no_step_more_than_it_needs() -> None:
    """Constant noise trace: the clock at T is known, and so is the number of steps."""
    trace = 2 * 0.3**2
    problem = problems.great_circle(noise_scale=0.3)
    found = run(sde=LimitingDiffusion(problem), ts=[0.0, 0.5], dt=0.1, n_paths=2)
    clock = math.log1p(trace * math.expm1(1.0)) / (2 * trace)
    assert found.stats["steps"] == math.ceil(clock / 0.1)


def test_lost_paths_do_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ito drifts are taken from eigenvectors, which there are none of where a path is lost."""
    monkeypatch.setattr(halving, "MOST_HALVINGS", 0)
    problem = problems.mixed_noise_circle()

    def directions(y0: Tensor) -> Tensor:
        options: Any = {"method": "euler", "dt": 20.0, "n_paths": 10, "seed": 1}
        with pytest.warns(LostPathsWarning):
            return run(sde=DirectionDiffusion(problem), y0=y0, ts=[0, 20, 40], **options).ys

    found = directions(problem.minimizer)
    lost = torch.isnan(found).any(-1)
    assert 0 < int(lost[1].sum()) < int(lost[2].sum()) < 10
    assert bool((lost[1] <= lost[2]).all())
    gradient = problem.gradient(found[2][~lost[2]])
    assert float(gradient.norm(dim=-1).max()) < 1e-12


def test_broken_twin_a_bar_that_counts_blocks(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting blocks in place of steps is seen by what the tests above look at."""
    from manifold_sde.solvers import solver

    def counting(simulation: Any, chunk: Any, report: Callable[..., object]) -> Any:
        return real(simulation, chunk, lambda _, *others: report(1, *others))

    real = solver.integrate
    monkeypatch.setattr(solver, "integrate", counting)
    run(ts=[0, 75], n_paths=5, chunk_size=2, progress=True)
    assert "225/225" not in capfd.readouterr().err
