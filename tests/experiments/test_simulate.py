"""``manifold-sde simulate``: its numbers are those of the library, and what it says and refuses."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from manifold_sde import CustomNoise, DirectionDiffusion, Geometry, SamplingNoise, problems
from manifold_sde.errors import ArgumentError, LostPathsError, LostPathsWarning
from manifold_sde.experiments import cli
from manifold_sde.experiments.problem_file import load_problem
from manifold_sde.experiments.simulate.command import at_batch_size
from manifold_sde.experiments.simulate.plots import plot_law
from manifold_sde.experiments.simulate.summary import law_table, measured, summarize
from manifold_sde.solvers import DirectionSolution, Solution, predict_sgd, run_sgd, solve
from manifold_sde.verification import Subject

FILE = """
import torch
from beside import SCALE
from manifold_sde import LabelNoise, Problem, SamplingNoise, SphericalNoise, problems

def loss(x):
    return 0.5 * (x[2] / x.norm()) ** 2

def groups(x):
    return 0.5 * (x[0] / x[:2].norm() - 0.6) ** 2 + 0.5 * (x[2] / x[2:].norm()) ** 2

def downhill(x):
    return -x[0]

bare = Problem(loss, 3, SphericalNoise(SCALE))
nowhere = Problem(downhill, 3, SphericalNoise(0.3))
two = Problem(groups, 5, SphericalNoise(0.3))
circle = problems.great_circle()
mixed = problems.mixed_noise_circle()
label = problems.label_noise_circle()
silent = problems.normalized_linear().with_noise(SamplingNoise())
"""
RATES = ["--lr", "0.02", "--weight-decay", "0.05"]
SMALL = [*RATES, "--steps", "50,200", "--paths", "20"]


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(FILE)
    (tmp_path / "beside.py").write_text("SCALE = 0.3\n")
    return tmp_path


def call(name: str, *arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["simulate", f"my.py:{name}", *arguments])


def done(name: str, *arguments: str) -> Result:
    result = call(name, *arguments)
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert "…" not in result.stdout
    return result


def last(name: str) -> Path:
    """The file of a name in the last folder of results that has one."""
    return max(Path("results").glob(f"*/{name}"), key=lambda path: path.stat().st_mtime_ns)


def test_numbers_are_those_of_the_library() -> None:
    """The table against the clock of the direction, path by path; the file; the figure."""
    result = done("mixed", *SMALL, "--norm", "1.2", "--seed", "4")
    problem = problems.mixed_noise_circle()
    run = solve(DirectionDiffusion(problem), problem.minimizer, [0.0, 1.0], n_paths=20, seed=4)
    assert isinstance(run, DirectionSolution)
    wanted = run.at_steps(0.02, 0.05, [50, 200], norm=1.2)
    mean, error = wanted.expectation(lambda y: y.norm(dim=1))
    geometry = Geometry(problem)
    logs = wanted.expectation(lambda y: geometry.log_pseudo_determinant(y / y.norm(dim=1)[:, None]))
    spread = 1.0 - wanted.directions.mean(1).norm(dim=-1)
    for k, step in enumerate((50, 200)):
        cells = [measured(float(m[k]), float(e[k])) for m, e in ((mean, error), logs)]
        cells += [f"{float(spread[k]):.4f}", "20"]
        lines = [line for line in result.output.splitlines() if line.strip().startswith(f"{step} ")]
        assert len(lines) == 1
        for cell in cells:
            assert cell in lines[0]
    saved = Solution.load(last("simulate_my_mixed.npz"))
    rows = [saved.ts.tolist().index(step) for step in (50, 200)]
    torch.testing.assert_close(saved.ys[rows], wanted.ys, rtol=1e-12, atol=1e-13)
    assert float(saved.ts[0]) == 0.0
    assert last("simulate_my_mixed.png").read_bytes().startswith(b"\x89PNG")


def test_sgd_beside_it() -> None:
    result = done("circle", *SMALL, "--compare-sgd", "--output", "new/both.npz")
    problem = problems.great_circle()
    sgd = run_sgd(problem, problem.minimizer, 0.02, 0.05, [50, 200], n_paths=20)
    assert torch.equal(Solution.load("new/both_sgd.npz").ys, sgd.ys)
    shown = measured(*(float(v[1]) for v in sgd.expectation(lambda y: y.norm(dim=1))))
    assert shown in result.output
    assert Path("new/both.png").is_file()


def test_equation_8_in_its_own_time() -> None:
    done("circle", "--ratio", "2", "--times", "0.1,0.25", "--paths", "4")
    saved = Solution.load(last("simulate_my_circle.npz"))
    t = saved.ts
    fourth = torch.exp(-8.0 * t) + 2 * 0.18 * (-torch.expm1(-8.0 * t)) / 8.0
    wanted = fourth.pow(0.25)[:, None].expand(-1, 4)
    torch.testing.assert_close(saved.norms, wanted, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("ending", ["npy", "pt"])
def test_a_start_of_ones_own(ending: str) -> None:
    """Off the manifold, and said so; in single precision too."""
    x0 = torch.tensor([0.6, 0.0, 0.8])
    if ending == "npy":
        np.save("x0.npy", x0.numpy())
    else:
        torch.save(x0, "x0.pt")
    result = done("bare", *RATES, "--steps", "50", "--paths", "2", "--x0", f"x0.{ending}")
    assert "not on the manifold" in result.output
    first = Solution.load(last("simulate_my_bare.npz")).ys[0]
    limit = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).expand(2, -1)
    torch.testing.assert_close(first, limit, rtol=0.0, atol=1e-7)


def test_several_starts_are_the_paths() -> None:
    np.save("x0.npy", np.array([[0.6, 0.8, 0.0], [0.0, 2.0, 0.0], [-1.0, 0.0, 0.0]]))
    done("bare", *RATES, "--steps", "20", "--x0", "x0.npy")
    assert Solution.load(last("simulate_my_bare.npz")).ys.shape[1:] == (3, 3)


def test_what_is_no_diffusion_is_not_shown_as_one() -> None:
    result = done("label", *RATES, "--steps", "20,50")
    assert "deterministic flow and no" in result.output
    assert "Law of the theory" not in result.output
    assert "±" not in result.output
    assert Solution.load(last("simulate_my_label.npz")).ys.dim() == 2
    refused = call("silent", *SMALL)
    assert refused.exit_code == 1
    assert "the noise vanishes on the manifold" in refused.stderr


def test_several_groups_are_said() -> None:
    np.save("x0.npy", np.array([0.5, 0.9, 0.1, 0.7, 0.3]))
    result = done("two", *RATES, "--steps", "20", "--paths", "2", "--x0", "x0.npy")
    assert "2 groups of weights" in result.output
    assert "5.4 on the equilibrium does not apply" in " ".join(result.output.split())


def test_warnings_are_short() -> None:
    result = done(
        "circle", "--lr", "0.5", "--weight-decay", "0.05", "--steps", "3", "--norm", "0.3"
    )
    assert "Warning: SGD is unstable" in result.stderr.replace("\n", " ")
    assert "StepSizeWarning" not in result.stderr


def test_a_stopped_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    done("circle", *SMALL, "--checkpoint", "run")
    first = Solution.load(last("simulate_my_circle.npz")).ys
    assert list(Path("run").iterdir())
    done("circle", *SMALL, "--checkpoint", "run")
    assert torch.equal(Solution.load(last("simulate_my_circle.npz")).ys, first)
    other = call("circle", *SMALL, "--checkpoint", "run", "--seed", "1")
    assert other.exit_code == 1
    assert "belongs to another run" in other.stderr

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("manifold_sde.experiments.simulate.command.predict_sgd", stop)
    stopped = call("circle", *SMALL, "--checkpoint", "run")
    assert stopped.exit_code == 130
    assert "goes on from here" in stopped.stderr


def test_resume_goes_on_in_the_folder_of_the_run_that_was_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Solution, "save", stop)
        assert call("circle", *SMALL).exit_code == 130
    (folder,) = Path("results").iterdir()
    assert list(folder.glob("*.unfinished/*"))
    assert call("circle", *SMALL, "--resume", "--seed", "1").exit_code == 2
    done("circle", *SMALL, "--resume")
    assert list(Path("results").iterdir()) == [folder]
    assert Solution.load(folder / "simulate_my_circle.npz").ys.shape[1] == 20
    assert not list(folder.glob("*.unfinished"))


@pytest.mark.slow
def test_workers_have_the_file_and_what_lies_beside_it() -> None:
    np.save("x0.npy", np.array([1.0, 0.0, 0.0]))
    arguments = [*SMALL, "--x0", "x0.npy"]
    done("bare", *arguments)
    alone = Solution.load(last("simulate_my_bare.npz")).ys
    done("bare", *arguments, "--workers", "2")
    there = Solution.load(last("simulate_my_bare.npz")).ys
    torch.testing.assert_close(there, alone, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("mean", "error", "shown"),
    [
        (0.84123, 0.00147, "0.8412 ± 0.0015"),
        (-12.0, 25.0, "-12 ± 25"),
        (0.2264651, 6.03e-05, "0.226465 ± 6e-05"),
        (1.5, 0.0, "1.5"),
        (1.5, float("nan"), "1.5"),
        (1.5, 1e-17, "1.5"),
    ],
)
def test_means_have_the_digits_that_their_errors_leave(
    mean: float, error: float, shown: str
) -> None:
    assert measured(mean, error) == shown


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "what to simulate is not clear"),
        (["--lr", "0.01"], "what to simulate is not clear"),
        ([*SMALL, "--ratio", "1"], "what to simulate is not clear"),
        (["--ratio", "1", "--times", "1", "--compare-sgd"], "what to simulate is not clear"),
        ([*RATES, "--steps", "many"], "--steps is not a list"),
        ([*RATES, "--steps", "0"], "--steps is not a list"),
        ([*RATES, "--steps", "5,2"], "--steps is not a list"),
        (["--ratio", "1", "--times", "nan"], "--times is not a list"),
        (["--ratio", "-1", "--times", "1"], "ratio cannot be used"),
        (["--lr", "-1", "--weight-decay", "0.1", "--steps", "5"], "lr"),
        ([*SMALL, "--norm", "-1"], "--norm is not the norm"),
        ([*SMALL, "--x0", "no.npy"], "there is no such file"),
        ([*SMALL, "--x0", "my.py"], "the start cannot be read"),
        ([*SMALL, "--x0", "short.npy"], "--x0"),
        ([*SMALL, "--dt", "0"], "dt is not a step"),
        ([*SMALL, "--output", "law.csv"], "the output cannot be written"),
        ([*SMALL, "--output", "my.py/law.npz"], "the output cannot be written"),
        ([*SMALL, "--paths", "0"], "Invalid value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(arguments: list[str], part: str) -> None:
    np.save("short.npy", np.ones(2))
    result = call("circle", *arguments)
    assert result.exit_code == 2, result.output
    assert part in result.stderr
    assert "Traceback" not in result.output
    assert not list(Path().glob("**/*.npz"))
    assert not Path("results").exists() or not list(Path("results").iterdir())


def test_without_a_start_it_is_the_one_that_info_and_verify_find() -> None:
    done("bare", *RATES, "--steps", "50", "--paths", "2", "--seed", "5")
    problem = load_problem("my.py:bare")
    wanted = Subject.of(problem).start
    found = Solution.load(last("simulate_my_bare.npz")).ys[0]
    torch.testing.assert_close(found, wanted.expand(2, 3), rtol=1e-9, atol=1e-9)
    height = problem.describe()["loss there"]
    assert float(height) == pytest.approx(float(problem.loss(wanted)), abs=1e-12)


def test_without_a_minimiser_it_says_what_to_give() -> None:
    result = call("nowhere", *SMALL)
    assert result.exit_code == 2
    assert "no minimiser" in result.stderr
    assert "--x0 x0.npy" in result.stderr


def test_no_folder_is_left_where_nothing_is_written() -> None:
    assert call("nowhere", *SMALL).exit_code == 2
    assert call("nowhere", *SMALL, "--output", "deep/down/law.npz").exit_code == 2
    assert not Path("results").exists()
    assert not Path("deep").exists()


def test_results_of_two_problems_lie_side_by_side() -> None:
    done("circle", *RATES, "--steps", "5", "--paths", "2")
    first = last("simulate_my_circle.npz").read_bytes()
    done("mixed", *RATES, "--steps", "5", "--paths", "2")
    assert last("simulate_my_circle.npz").read_bytes() == first
    names = {path.name for path in Path("results").glob("*/*")}
    ends = ("npz", "png", "toml")
    assert names == {f"simulate_my_{n}.{e}" for n in ("circle", "mixed") for e in ends}
    done("circle", *RATES, "--steps", "5", "--paths", "2")  # beside the first, not over it
    assert len(list(Path("results").glob("*/simulate_my_circle.npz"))) == 2


def test_batch_sizes() -> None:
    """The covariance is divided; a noise without batches is refused."""
    for problem in (
        problems.great_circle(),
        problems.mixed_noise_circle(),
        problems.label_noise_circle(),
    ):
        other = at_batch_size(problem, 4)
        y = problem.minimizer
        wanted = problem.noise_covariance(y) / 4
        torch.testing.assert_close(other.noise_covariance(y), wanted)
        assert at_batch_size(problem, None) is problem
    without = problems.mixed_noise_circle(noise=SamplingNoise(1, replacement=False))
    assert repr(at_batch_size(without, 2).noise) == "SamplingNoise(batch_size=2, replacement=False)"
    custom = CustomNoise(lambda x: (x.new_tensor([[0.0], [0.0], [1.0]]) * x[0]) / x.norm() ** 2)
    with pytest.raises(ArgumentError, match="has no batch size"):
        at_batch_size(problems.great_circle(noise=custom), 2)


def test_lost_paths_are_counted_and_left_out_with_a_warning() -> None:
    """One of a hundred and one; of the first three it is an error."""
    problem = load_problem("my.py:circle")
    three = torch.tensor([[[1.0, 0, 0], [torch.nan] * 3, [0, 2.0, 0]]], dtype=torch.float64)
    ys = torch.cat([three, three[:, ::2].repeat(1, 49, 1)], 1)
    solution = Solution(torch.tensor([10.0]), ys, torch.zeros(1, 101, dtype=torch.float64))
    with pytest.warns(LostPathsWarning, match="1 of 101 paths lost"):
        (row,) = summarize(problem, solution)
    assert row.paths == 100
    assert row.norm == pytest.approx((1.5, 0.5 / 99**0.5))
    few = Solution(solution.ts, three, solution.clock[:, :3])
    with pytest.raises(LostPathsError, match="1 of 3 paths lost") as caught:
        summarize(problem, few)
    assert "the file of the solution" in caught.value.remedy
    assert row.spread == pytest.approx(1.0 - 0.5**0.5)
    table = law_table("title", [row], "steps")
    assert [str(column.header) for column in table.columns][-1] == "paths"


def test_figure_shows_both() -> None:
    problem = problems.great_circle()
    paths = predict_sgd(problem, problem.minimizer, 0.02, 0.05, [0, 10, 20], n_paths=4)
    rows = summarize(problem, paths)
    figure = plot_law(rows, rows[1:], "title", "steps")
    norm, spread = figure.axes
    assert norm.lines[0].get_xydata()[:, 0].tolist() == [0.0, 10.0, 20.0]  # type: ignore[union-attr]
    law, sgd = (container.lines[0].get_xydata() for container in spread.containers)
    assert law[:, 1] == pytest.approx([row.spread for row in rows])
    assert sgd[:, 0].tolist() == [10.0, 20.0]
    assert all(container.has_yerr for container in spread.containers)
    u = paths.directions[-1]
    along = u @ (u.mean(0) / u.mean(0).norm())
    assert rows[-1].spread_error == pytest.approx(float(along.std()) / 2.0)
    assert re.match("norm", norm.get_ylabel())
