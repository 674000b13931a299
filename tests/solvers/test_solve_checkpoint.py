"""Runs of solve that are killed and taken up: the same bits, and files that do not fit refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manifold_sde import (
    CustomNoise,
    DirectionDiffusion,
    Geometry,
    LimitingDiffusion,
    Problem,
    SphericalNoise,
    WeightDecaySDE,
    problems,
)
from manifold_sde.errors import CheckpointError
from manifold_sde.solvers import DirectionSolution, Solution, solve
from manifold_sde.solvers.archive import read_archive, write_archive
from tests.warm import Program

#: A process that runs solve in children, which kill themselves with SIGKILL at given moments or
#: are killed from outside, until the run is finished; then the result is held against another.
SCRIPT = '''
import os, signal, sys, time
from pathlib import Path
import torch
from manifold_sde.solvers import archive, fixed, solver, stopping
from tests.solvers.test_solve_checkpoint import RUNS, bits

stopping._CHECKPOINT_SECONDS = 0.0
fixed._BLOCK_STEPS = 3
run, folder = RUNS[sys.argv[1]], Path(sys.argv[2])
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

def nth(owner, name, number, before=None, after=None):
    """Do something at the n-th call of a function."""
    real, calls = getattr(owner, name), [0]
    def counting(*arguments, **options):
        calls[0] += 1
        if calls[0] == number and before is not None:
            before(*arguments, **options)
        result = real(*arguments, **options)
        if calls[0] == number and after is not None:
            after()
        return result
    setattr(owner, name, counting)

def half(file, **arrays):
    file.write(b"PK half of a file"); file.flush(); die()

TRAPS = {
    "0.02": None, "0.05": None,
    "in a step": lambda: nth(fixed.FixedSteps, "block", 2, before=die),
    "while writing": lambda: nth(archive.np, "savez", 2, before=half),
    "before the file is in place": lambda: nth(archive.Path, "replace", 2, before=die),
    "after it is": lambda: nth(archive.Path, "replace", 1, after=die),
    "between two chunks": lambda: nth(solver, "integrate", 2, before=die),
    "0.2": None,
}
whole = bits(run())
killed = 0
for moment, trap in TRAPS.items():
    child = os.fork()
    if child == 0:
        if trap is not None:
            trap()
        run(checkpoint=folder)
        os._exit(0)
    if trap is None:
        time.sleep(float(moment))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert died or (trap is None and os.WIFEXITED(status)), (moment, status)
    killed += died
resumed = bits(run(checkpoint=folder))
assert all(torch.equal(whole[name].nan_to_num(), resumed[name].nan_to_num()) for name in whole)
assert whole.keys() == resumed.keys()
assert not list(folder.glob(".*")), "unfinished files are left"
print("killed", killed)
'''


def weights(**options: Any) -> Solution:
    problem = problems.great_circle()
    sde = WeightDecaySDE(problem, lr=0.1, weight_decay=0.1)
    options = {"n_paths": 10, "chunk_size": 4, "seed": 5, "compile": False, **options}
    return solve(sde, problem.minimizer, [0.0, 11.5, 23.0], **options)


def observed(**options: Any) -> Solution:
    functions = {"first": lambda y: y[:, 0], "both": lambda y: y[:, :2]}
    return weights(**{"observables": functions, "antithetic": True, **options})


def direction(**options: Any) -> Solution:
    problem = problems.mixed_noise_circle()
    sde = DirectionDiffusion(problem)
    options = {"n_paths": 6, "chunk_size": 4, "seed": 5, "compile": False, **options}
    times = [0.0, 0.33, 1.0]
    return solve(sde, problem.minimizer, times, method="euler", dt=0.2, **options)


def limit(**options: Any) -> Solution:
    problem = problems.great_circle()
    sde = LimitingDiffusion(problem)
    options = {"n_paths": 6, "chunk_size": 4, "seed": 5, "compile": False, **options}
    return solve(sde, problem.minimizer, [0.0, 0.1, 0.25], **({"dt": 0.1} | options))


def adaptive(**options: Any) -> Solution:
    problem = problems.great_circle()
    sde = WeightDecaySDE(problem, lr=0.1, weight_decay=0.1, calculus="stratonovich")
    options = {"n_paths": 6, "chunk_size": 4, "seed": 5, "compile": False, **options}
    return solve(sde, problem.minimizer, [0.0, 1.3, 2.0], method="heun", rtol=0.01, **options)


def torchsde(**options: Any) -> Solution:
    return weights(method="torchsde:euler", **options)


RUNS: dict[str, Callable[..., Solution]] = {
    "weights": weights,
    "observed": observed,
    "direction": direction,
    "limit": limit,
    "adaptive": adaptive,
    "torchsde": torchsde,
}


def bits(solution: Solution) -> dict[str, torch.Tensor]:
    """All tensors of a solution, by name."""
    found = dict(solution._arrays())
    if isinstance(solution, DirectionSolution):
        again = solution.at(ratio=0.5, times=[0.1, 0.2])
        found |= {f"at_{name}": value for name, value in again._arrays().items()}
    for name, (mean, error) in solution.observed.items():
        found |= {f"mean_{name}": mean, f"error_{name}": error}
    return found


def assert_same_bits(one: Solution, other: Solution) -> None:
    found, expected = bits(one), bits(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights", "direction"])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    tmp_path: Path, name: str
) -> None:
    """Five kills at chosen moments, the most delicate ones, and others after a time."""
    done = Program("-c", SCRIPT, name, tmp_path / "run").wait()
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 5


class Stop(Exception):
    """Stands for a run that is stopped."""


@pytest.fixture
def eager_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every block of two steps."""
    monkeypatch.setattr("manifold_sde.solvers.stopping._CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("manifold_sde.solvers.fixed._BLOCK_STEPS", 2)


@pytest.mark.usefixtures("eager_checkpoints")
@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Stopped after its first, second, ... write, again and again on one folder."""
    run = RUNS[name]
    whole = run()
    stops = 0
    while True:
        writes = 0

        def counting(*arguments: Any) -> None:
            nonlocal writes
            writes += 1
            write_archive(*arguments)
            if writes == 2:
                raise Stop

        with monkeypatch.context() as patch:
            patch.setattr("manifold_sde.solvers.integrate.write_archive", counting)
            try:
                last = run(checkpoint=tmp_path)
                break
            except Stop:
                stops += 1
    assert stops >= 2
    assert_same_bits(last, whole)
    assert last.stats == whole.stats


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    first = RUNS[name](checkpoint=tmp_path)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a step was taken")

    monkeypatch.setattr("manifold_sde.solvers.fixed.FixedSteps.block", forbidden)
    again = RUNS[name](checkpoint=tmp_path)
    assert first.stats == again.stats
    for key in ("ys", "clock"):
        torch.testing.assert_close(getattr(first, key), getattr(again, key), rtol=0, atol=0)
    for key, (mean, error) in first.observed.items():
        torch.testing.assert_close(again.observed[key], (mean, error), rtol=0, atol=0)


@pytest.mark.usefixtures("eager_checkpoints")
def test_broken_twin_a_resumed_run_that_starts_its_noise_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose position is forgotten draws other increments, which the comparison sees."""
    whole = weights()

    def stopping(*arguments: Any) -> None:
        write_archive(*arguments)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("manifold_sde.solvers.integrate.write_archive", stopping)
        with pytest.raises(Stop):
            weights(checkpoint=tmp_path)
    (file,) = tmp_path.glob("*.npz")
    header, arrays = read_archive(file, "chunk of a run of solve")
    write_archive(file, "chunk of a run of solve", {**header, "position": 0}, arrays)
    with pytest.raises(AssertionError, match="not equal"):
        assert_same_bits(weights(checkpoint=tmp_path), whole)


PROBLEM = problems.great_circle()
BASE: dict[str, Any] = {
    "sde": WeightDecaySDE(PROBLEM, lr=0.1, weight_decay=0.1),
    "y0": PROBLEM.minimizer,
    "ts": [0.0, 2.0],
    "n_paths": 4,
    "compile": False,
    "observables": {"a": lambda y: (y[:, 0] > 0.5).double()},
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"ts": [0.0, 2.5]}, "times"),
        ({"dt": 0.5}, "dt: 1.0 there, 0.5 here"),
        ({"n_paths": 6}, "paths: 4 there, 6 here"),
        ({"chunk_size": 2}, "chunk size: 4096 there, 2 here"),
        ({"antithetic": True}, "antithetic: False there, True here"),
        ({"y0": PROBLEM.minimizer.roll(1)}, "start"),
        ({"y0": PROBLEM.minimizer.float()}, "dtype"),
        ({"sde": WeightDecaySDE(PROBLEM, lr=0.1, weight_decay=0.2)}, "weight_decay=0.2"),
        ({"sde": WeightDecaySDE(problems.great_circle(0.4), 0.1, 0.1)}, "scale=0.4"),
        ({"observables": None}, "observables"),
        ({"observables": {"b": lambda y: (y[:, 0] > 0.5).double()}}, "observables"),
        ({"observables": {"a": lambda y: (y[:, 0] > 0.6).double()}}, "observables"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_says_what_differs(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    def run(**changed: Any) -> None:
        options = {**BASE, **changed}
        solve(options.pop("sde"), options.pop("y0"), options.pop("ts"), **options)

    run(checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        run(checkpoint=tmp_path, **changes)
    assert named in caught.value.received
    assert str(tmp_path) in caught.value.received
    run(checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rtol": 0.02}, "rtol: 0.01 there, 0.02 here"),
        ({"atol": 0.02}, "atol"),
        ({"dt_max": 0.25}, "grid"),
        ({"dt_min": 1e-4}, "smallest_dt"),
        ({"dt": 0.125, "adaptive": True}, "dt"),
        ({"rtol": None, "dt": 0.5}, "step control"),
    ],
)
def test_adaptive_steps_are_told_apart(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    def run(**changed: Any) -> None:
        sde = WeightDecaySDE(PROBLEM, lr=0.1, weight_decay=0.1, calculus="stratonovich")
        options = {"method": "heun", "rtol": 0.01, "compile": False, **changed}
        solve(sde, PROBLEM.minimizer, [0.0, 1.0], checkpoint=tmp_path, **options)

    run()
    run()
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        run(**changes)
    assert named in caught.value.received


def test_problems_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    """Their gradients differ, or their noise: nothing that can be seen in a repr."""

    def run(noise: Callable[[torch.Tensor], torch.Tensor]) -> None:
        problem = problems.great_circle(noise=CustomNoise(noise))
        sde = WeightDecaySDE(problem, lr=0.1, weight_decay=0.1)
        solve(sde, problem.minimizer, [0.0, 1.0], compile=False, checkpoint=tmp_path)

    def factor(scale: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def sigma(x: torch.Tensor) -> torch.Tensor:
            unit = x / x.norm()
            return scale / x.norm() * (torch.eye(3, dtype=x.dtype) - torch.outer(unit, unit))

        return sigma

    run(factor(0.3))
    run(factor(0.3))
    with pytest.raises(CheckpointError, match="noise"):
        run(factor(0.31))


def loss_with_a_bump(height: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The great circle's loss, with more of it where the start, x_0 > 0, does not look."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        unit = x / x.norm()
        return 0.5 * unit[2] ** 2 * (1.0 + height * torch.relu(-unit[0] - 0.5) ** 4)

    return loss


def test_a_loss_that_differs_only_away_from_the_start_is_refused(tmp_path: Path) -> None:
    """Near the start the two are equal to the bit, and so is all that is said of them."""
    losses = [loss_with_a_bump(height) for height in (0.0, 1.0)]
    start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    near = start + 0.2 * torch.randn(200, 3, dtype=torch.float64)
    assert all(float(losses[0](x)) == float(losses[1](x)) for x in near)

    def run(loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
        problem = Problem(loss, 3, SphericalNoise(0.3), rank=1, name="bump")
        sde = WeightDecaySDE(problem, lr=0.1, weight_decay=0.1)
        solve(sde, start, [0.0, 1.0], compile=False, checkpoint=tmp_path)

    run(losses[0])
    run(loss_with_a_bump(0.0))
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        run(losses[1])
    assert "loss: " in caught.value.received
    assert "gradient: " in caught.value.received


def test_a_folder_of_one_geometry_is_not_continued_by_another(tmp_path: Path) -> None:
    """Dense it steps by "weak2", matrix-free by "walk": both are "split" of the same equation."""
    problem = problems.mixed_noise_circle()

    def run(method: str, last: float = 0.2) -> None:
        sde = LimitingDiffusion(problem, geometry=Geometry(problem, method))
        times = [0.0, last]
        solve(sde, problem.minimizer, times, dt=0.1, compile=False, checkpoint=tmp_path)

    run("dense")
    run("dense")
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        run("matrix_free")
    assert "scheme: weak2 there, walk here" in caught.value.received
    assert "geometry: dense, HessianField" in caught.value.received


def test_another_machine_may_go_on_and_another_format_may_not(tmp_path: Path) -> None:
    """The last bits of what was seen differ there; a difference of 1e-6 is one."""
    weights(checkpoint=tmp_path)
    file = tmp_path / "chunk-000000.npz"
    kind = "chunk of a run of solve"
    header, arrays = read_archive(file, kind)
    names = [name for name in arrays if name.startswith("run ")]
    assert {"run start", "run loss", "run gradient", "run noise", "run sgd_noise"} < set(names)
    for name in names:
        for off, refused in ((1e-14, False), (1e-6, True)):
            moved = arrays | {name: arrays[name] * (1.0 + off)}
            write_archive(file, kind, header, moved)
            if refused:
                with pytest.raises(CheckpointError, match=f"{name.removeprefix('run ')}: "):
                    weights(checkpoint=tmp_path)
            else:
                weights(checkpoint=tmp_path)
    for name, version in (("format", 1), ("manifold_sde", "0.0.1")):
        changed = {**header, "run": {**header["run"], name: version}}
        write_archive(file, kind, changed, arrays)
        with pytest.raises(CheckpointError, match=f"{name}: {version} there"):
            weights(checkpoint=tmp_path)


@pytest.mark.usefixtures("eager_checkpoints")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"position": 10**9}, "position 1000000000"),
        ({"position": -1}, "-1 is not a number of steps"),
        ({"position": "3"}, "'3' is not a number"),
        ({"steps": None}, ""),
        ({"finished": True}, ""),
    ],
)
def test_a_header_that_does_not_fit_its_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], named: str
) -> None:
    def stopping(*arguments: Any) -> None:
        write_archive(*arguments)
        raise Stop

    if "steps" in change:
        weights(checkpoint=tmp_path)
    else:
        with monkeypatch.context() as patch:
            patch.setattr("manifold_sde.solvers.integrate.write_archive", stopping)
            with pytest.raises(Stop):
                weights(checkpoint=tmp_path)
    file, kind = tmp_path / "chunk-000000.npz", "chunk of a run of solve"
    header, arrays = read_archive(file, kind)
    write_archive(file, kind, {**header, **change}, arrays)
    with pytest.raises(CheckpointError, match="incomplete") as caught:
        weights(checkpoint=tmp_path)
    assert named in caught.value.received


def test_what_is_missing_in_a_chunk_is_named(tmp_path: Path) -> None:
    whole = weights(checkpoint=tmp_path)
    file, kind = tmp_path / "chunk-000000.npz", "chunk of a run of solve"
    header, arrays = read_archive(file, kind)
    # What files of earlier versions do not have.
    write_archive(file, kind, {k: v for k, v in header.items() if k != "flatness"}, arrays)
    assert torch.equal(weights(checkpoint=tmp_path).ys, whole.ys)
    for name in header.keys() - {"flatness"}:
        write_archive(file, kind, {k: v for k, v in header.items() if k != name}, arrays)
        with pytest.raises(CheckpointError, match="incomplete"):
            weights(checkpoint=tmp_path)
    for name in arrays:
        write_archive(file, kind, header, {k: v for k, v in arrays.items() if k != name})
        with pytest.raises(CheckpointError, match="incomplete"):
            weights(checkpoint=tmp_path)


@pytest.mark.parametrize("spoil", ["cut", "noise", "empty", "other", "part"])
def test_a_spoilt_file_is_named(tmp_path: Path, spoil: str) -> None:
    weights(checkpoint=tmp_path)
    file = tmp_path / "chunk-000001.npz"
    content = file.read_bytes()
    kind = "chunk of a run of solve"
    header, arrays = read_archive(file, kind)
    if spoil == "other":
        write_archive(file, "solution", header, arrays)
    elif spoil == "part":
        del arrays["kept_x"]
        write_archive(file, kind, header, arrays)
    else:
        cut = content[: len(content) // 2]
        file.write_bytes({"cut": cut, "noise": b"x" * 1000, "empty": b""}[spoil])
    words = {"other": "something else", "part": "incomplete"}.get(spoil, "corrupted")
    with pytest.raises(CheckpointError, match=words) as caught:
        weights(checkpoint=tmp_path)
    assert "chunk-000001.npz" in caught.value.received
    file.unlink()
    assert_same_bits(weights(checkpoint=tmp_path), weights())
