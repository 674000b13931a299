"""What solutions draw of themselves: the numbers in the pictures, and what they refuse."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from manifold_sde.drawing import STYLES
from manifold_sde.errors import ArgumentError, ShapeError
from manifold_sde.solvers import Solution
from manifold_sde.solvers.solution_plots import Slice, time_label

GENERATOR = torch.Generator().manual_seed(0)


def normals(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


def solution(ys: torch.Tensor, **config: Any) -> Solution:
    return Solution(torch.arange(len(ys)) * 1.0, ys, torch.zeros(ys.shape[:-1]), {}, config)


def on_circle(dim: int, n: int = 400, height: float = 0.6) -> torch.Tensor:
    """Three times of n points on a circle, (3, n, D), the first of them one point."""
    angles = normals(3, n) * torch.tensor([[0.0], [0.3], [9.0]])
    flat = torch.stack([angles.cos(), angles.sin()], -1) * math.sqrt(1 - height**2)
    flat = torch.cat([flat, torch.full((3, n, 1), height, dtype=torch.float64)], -1)
    turn = torch.linalg.qr(normals(dim, dim))[0]
    return torch.nn.functional.pad(flat, (0, dim - 3)) @ turn


@pytest.fixture(scope="module")
def runs() -> Solution:
    return solution(2.0 * on_circle(5), lr="0.1")


def test_means_are_drawn_with_two_standard_errors(runs: Solution) -> None:
    ax = runs.plot(lambda y: y[:, :2])
    mean, error = runs.expectation(lambda y: y[:, :2])
    for k in range(2):
        np.testing.assert_allclose(ax.lines[k].get_ydata(), mean[:, k])
        ends = ax.collections[k].get_paths()[0].vertices[:, 1]
        assert ends.max() == pytest.approx(float((mean + 2 * error)[:, k].max()))
        assert ends.min() == pytest.approx(float((mean - 2 * error)[:, k].min()))
    assert ax.get_xlabel() == "steps $k$"
    assert [text.get_text() for text in ax.get_legend().texts][-1] == "± 2 standard errors"


def test_an_observable_is_drawn_by_its_name() -> None:
    observed = {"loss": (torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.5]))}
    kept = Solution(torch.arange(2.0), torch.zeros(2, 0, 3), torch.zeros(2, 0), observed=observed)
    assert list(kept.plot("loss").lines[0].get_ydata()) == [1.0, 2.0]
    with pytest.raises(ArgumentError, match="no observable of this name"):
        kept.plot("lost")
    with pytest.raises(ArgumentError, match="not kept"):
        kept.plot_norm()


def test_curves_differ_in_grey_too(runs: Solution) -> None:
    lines = runs.plot(lambda y: y).lines
    assert len({(str(line.get_linestyle()), line.get_marker()) for line in lines}) == len(lines)
    assert len({style["color"] for style in STYLES}) == len(STYLES)
    assert all(to_rgb(style["color"]) != (0.0, 0.0, 0.0) for style in STYLES)


def test_norms(runs: Solution) -> None:
    ax = runs.plot_norm()
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), 2.0)
    assert ax.get_ylabel() == r"norm $\|x_k\|$"


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({"lr": "0.1", "sde": "LimitingDiffusion(...)"}, "steps $k$"),
        ({"sde": "DirectionDiffusion(...)"}, "intrinsic clock $u$"),
        ({"sde": "DirectionDiffusion(...)", "ratio": 2.0}, r"time $t = \eta^2 k$"),
        ({"sde": "LimitingDiffusion(...)"}, "time $T$"),
        ({"sde": "FixedRatioDiffusion(...)", "ratio": 0.5}, "time $T$"),
        ({"sde": "WeightDecaySDE(...)", "ratio": 0.5}, "steps $k$"),
        ({}, "time"),
    ],
)
def test_times_have_the_symbols_of_the_paper(config: dict[str, Any], label: str) -> None:
    assert time_label(config) == label


def test_a_circle_is_found_in_any_dimension(runs: Solution) -> None:
    found = Slice.of(runs.directions.flatten(0, 1).numpy())
    assert found.kind == "circle"
    assert found.radius == pytest.approx(0.8)
    assert np.linalg.norm(found.center) == pytest.approx(0.6)
    points = found.coordinates(runs.directions[2].numpy())
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 0.8)
    assert len(runs.plot_directions().patches) == 2  # the circle and the density around it


def test_a_sphere_is_found_and_seen_from_where_the_points_are() -> None:
    points = normals(2, 300, 3) + torch.tensor([2.0, 0.0, 0.0])
    turn = torch.linalg.qr(normals(6, 6))[0]
    ys = torch.nn.functional.pad(points, (0, 3)) @ turn
    found = Slice.of(solution(ys).directions.flatten(0, 1).numpy())
    assert (found.kind, found.radius) == ("sphere", pytest.approx(1.0))
    here = solution(ys).directions[1].numpy()
    turned = found.seen_from(found.coordinates(here).mean(0))
    np.testing.assert_allclose(turned.axes @ turned.axes.T, np.eye(3), atol=1e-12)
    assert turned.coordinates(here).mean(0)[2] > 0.5
    assert solution(ys).plot_directions(0.2).get_legend().texts[0].get_text() == (
        "directions at time = 0"
    )


def test_other_directions_are_drawn_in_the_plane_of_most_spread() -> None:
    ys = normals(2, 300, 6) * torch.tensor([9.0, 3.0, 1.0, 1.0, 1.0, 1.0])
    ax = solution(ys).plot_directions()
    assert ax.get_xlabel().startswith("first principal direction (")
    still = torch.ones(2, 1, 6, dtype=torch.float64)
    assert Slice.of(solution(still).directions[:, 0].numpy()).kind == "plane"
    assert len(solution(still).plot_directions().lines) == 3  # the path, its points, its start


def test_densities_integrate_to_one(runs: Solution) -> None:
    ax = runs.plot_density()
    assert [line.get_label() for line in ax.lines] == ["$k$ = 1", "$k$ = 2"]
    assert ax.get_xlabel() == "angle from the start"
    for line in ax.lines:
        x, density = line.get_data()
        assert (x[1] - x[0]) * density.sum() == pytest.approx(1.0)
        assert -math.pi < x.min() < x.max() < math.pi
    narrow, wide = (np.ptp(line.get_xdata()) for line in ax.lines)
    assert narrow < 0.5 * wide
    other = runs.plot_density(lambda y: y[:, 0] + 5.0, times=[2.0])
    assert np.mean(other.lines[0].get_xdata()) == pytest.approx(5.0, abs=1.0)


def test_lost_paths_are_left_out() -> None:
    ys = on_circle(3)
    ys[2, 7] = torch.nan
    run = solution(ys)
    assert len(run.plot_directions().lines[0].get_xdata()) == 399
    assert np.isfinite(run.plot_density().lines[-1].get_ydata()).all()
    with pytest.raises(ArgumentError, match="no directions"):
        solution(torch.full((2, 3, 3), torch.nan)).plot_directions()


def test_what_cannot_be_drawn_is_named(runs: Solution) -> None:
    with pytest.raises(ShapeError, match="too few paths"):
        solution(on_circle(3, 10)).plot_density()
    with pytest.raises(ShapeError, match="one number"):
        runs.plot_density(lambda y: y)
    with pytest.raises(ArgumentError, match="not a time"):
        runs.plot_directions("late")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="ax is not"):
        runs.plot_norm(ax=Figure())  # type: ignore[arg-type]


def test_axes_are_drawn_in_and_returned(runs: Solution) -> None:
    ax = Figure().subplots()
    assert runs.plot(lambda y: y[:, 0], ax) is ax
    assert runs.plot_norm(ax) is ax
    assert runs.plot_directions(ax=ax) is ax
    assert runs.plot_density(ax=ax) is ax


def test_what_takes_long_to_import_is_imported_when_it_is_used() -> None:
    """Pictures load matplotlib; ``import manifold_sde`` takes little more than torch alone."""
    late = {"matplotlib", "scipy", "sympy", "torchsde", "typer", "rich", "xarray", "sklearn"}
    code = f"import sys, torch; late = {late} - {{*sys.modules}}; import manifold_sde; "
    code += "assert not late & {*sys.modules}, late & {*sys.modules}; import manifold_sde.solvers; "
    code += "assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
