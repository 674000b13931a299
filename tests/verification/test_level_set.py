"""Gamma_1 as a manifold of geomstats: its conventions, geodesics and means."""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys

import numpy as np
import pytest
import torch

from manifold_sde import errors, problems
from tests.verification.assumptions import broken
from tests.verification.assumptions.test_moving import bent_surface

# An extra of its own, for an older numpy: without it there is nothing to test here.
gs = pytest.importorskip("geomstats.backend", exc_type=ImportError)
Hypersphere = pytest.importorskip("geomstats.geometry.hypersphere").Hypersphere
FrechetMean = pytest.importorskip("geomstats.learning.frechet_mean").FrechetMean
MinimiserManifold = importlib.import_module("manifold_sde.verification").MinimiserManifold


@pytest.fixture(scope="module", params=["small circle", "sphere", "surface"])
def space(request: pytest.FixtureRequest) -> MinimiserManifold:
    gs.random.seed(7)
    make = {
        "small circle": lambda: problems.normalized_linear(5, 3, design="orthogonal"),
        "sphere": lambda: problems.great_sphere(4),
        "surface": bent_surface,
    }[request.param]
    return MinimiserManifold(make())


def circle_points(space: MinimiserManifold, *angles: float) -> np.ndarray:
    circle = space.problem.facts.circle
    return circle.point(torch.tensor(angles, dtype=torch.float64)).numpy()


# What geomstats asks of every manifold.


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_conventions_of_points_and_vectors(
    space: MinimiserManifold, shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(1)
    dim = space.problem.dim
    x = rng.standard_normal((*shape, dim))
    y = space.projection(x)
    assert y.shape == x.shape
    assert np.all(space.belongs(y))
    assert np.shape(space.belongs(y)) == shape
    assert not np.any(space.belongs(x))
    assert not np.any(space.belongs(1.01 * y))
    np.testing.assert_allclose(space.projection(y), y, atol=1e-12)
    v = space.to_tangent(rng.standard_normal((*shape, dim)), y)
    assert v.shape == x.shape
    assert np.all(space.is_tangent(v, y))
    assert not np.any(space.is_tangent(v + y, y))
    np.testing.assert_allclose(space.to_tangent(v, y), v, atol=1e-12)
    several = space.to_tangent(rng.standard_normal((4, dim)), space.start)
    assert several.shape == (4, dim)
    assert space.is_tangent(several, space.start).tolist() == [True] * 4


def test_random_points_and_vectors(space: MinimiserManifold) -> None:
    assert space.random_point().shape == (space.problem.dim,)
    points = space.random_point(5)
    assert points.shape == (5, space.problem.dim)
    assert space.belongs(points).all()
    vectors = space.random_tangent_vec(points)
    assert space.is_tangent(vectors, points).all()
    gs.random.seed(3)
    first = space.random_point(2)
    gs.random.seed(3)
    np.testing.assert_array_equal(space.random_point(2), first)


def test_exponential_and_logarithm_are_inverse(space: MinimiserManifold) -> None:
    points = space.random_point(4)
    vectors = space.random_tangent_vec(points)
    vectors *= 0.6 / np.linalg.norm(vectors, axis=-1, keepdims=True)
    ends = space.metric.exp(vectors, points)
    assert space.belongs(ends, atol=1e-9).all()
    np.testing.assert_allclose(space.metric.log(ends, points), vectors, atol=1e-9)
    np.testing.assert_allclose(space.metric.dist(points, ends), 0.6, atol=1e-9)
    np.testing.assert_allclose(space.metric.dist(ends, points), 0.6, atol=1e-9)
    np.testing.assert_allclose(space.metric.log(points, points), 0.0, atol=1e-9)
    half = space.metric.geodesic(initial_point=points[0], end_point=ends[0])(0.5)
    np.testing.assert_allclose(space.metric.dist(points[0], half), 0.3, atol=1e-9)


# Against closed forms and an independent integrator.


def test_geodesics_of_a_great_sphere_are_those_of_the_sphere() -> None:
    space, sphere = MinimiserManifold(problems.great_sphere(4)), Hypersphere(2)
    a, b = np.eye(4)[:2], np.array([[0.6, 0.0, 0.8, 0.0], [0.48, 0.6, 0.64, 0.0]])
    np.testing.assert_allclose(
        space.metric.log(b, a)[:, :3], sphere.metric.log(b[:, :3], a[:, :3]), atol=1e-11
    )
    np.testing.assert_allclose(
        space.metric.dist(a, b), sphere.metric.dist(a[:, :3], b[:, :3]), atol=1e-11
    )


def test_distances_along_a_small_circle() -> None:
    space = MinimiserManifold(problems.normalized_linear())
    radius = space.problem.facts.circle.radius
    points = circle_points(space, 0.0, 0.5, 1.5, 2.9, -2.0)
    distances = space.metric.dist(points[0], points[1:])
    np.testing.assert_allclose(distances, radius * np.array([0.5, 1.5, 2.9, 2.0]), atol=1e-8)


def test_geodesics_of_a_surface_against_steps_without_acceleration() -> None:
    """y_{k+1} is the retraction of 2 y_k - y_{k-1}, first order, extrapolated twice."""
    space = MinimiserManifold(bent_surface())
    point = torch.from_numpy(space.projection(np.array([0.8, 0.5, -0.4, 0.1, 0.2])))
    vector = torch.from_numpy(space.to_tangent(np.array([0.3, -1.0, 0.8, 0.0, 0.0]), point.numpy()))
    vector = 0.9 * vector / vector.norm()

    def end(steps: int) -> np.ndarray:
        bend = space.metric.curvature_vector(vector.numpy(), point.numpy())
        h = 1.0 / steps
        before = point.numpy()
        here = space.retract(before + h * vector.numpy() + 0.5 * h * h * bend)
        for _ in range(steps - 1):
            before, here = here, space.retract(2.0 * here - before)
        return here

    coarse, middle, fine = (end(steps) for steps in (24, 48, 96))
    exact = space.metric.exp(vector.numpy(), point.numpy())
    off = [float(np.linalg.norm(found - exact)) for found in (coarse, middle, fine)]
    assert off[1] / off[2] == pytest.approx(2.0, rel=0.1)
    once = 2.0 * middle - coarse, 2.0 * fine - middle
    assert np.linalg.norm((4.0 * once[1] - once[0]) / 3.0 - exact) < 0.01 * off[2]


def test_frechet_means_on_a_circle_and_on_a_sphere() -> None:
    space = MinimiserManifold(problems.normalized_linear(5, 3, design="orthogonal"))
    angles = (-0.9, 0.1, 0.4, 1.2)
    mean = FrechetMean(space).set(epsilon=1e-16)
    mean.fit(circle_points(space, *angles))
    expected = circle_points(space, sum(angles) / 4)[0]
    np.testing.assert_allclose(mean.estimate_, expected, atol=1e-7)

    sphere = MinimiserManifold(problems.great_sphere(4))
    turns = 2.0 * math.pi / 3.0 * np.arange(3)
    around = np.stack([0.8 * np.ones(3), 0.6 * np.cos(turns), 0.6 * np.sin(turns), 0 * turns], 1)
    mean = FrechetMean(sphere).set(epsilon=1e-16)
    mean.fit(around)
    np.testing.assert_allclose(mean.estimate_, np.eye(4)[0], atol=1e-7)


# What is refused.


def test_saddles_other_levels_and_the_origin_do_not_belong() -> None:
    space = MinimiserManifold(broken.circle_and_higher_minimum())
    assert space.belongs(space.start)
    # The higher circle: minimisers of another loss.
    height = float(space.projection(np.array([0.2, 0.3, 0.8]))[2])
    assert height > 0.5
    assert not space.belongs(space.projection(np.array([0.2, 0.3, 0.8])))
    assert not space.belongs(np.array([0.0, 0.0, 1.0]))
    assert not space.belongs(np.zeros(3))
    with pytest.raises(errors.LimitMapError):
        MinimiserManifold(problems.great_circle()).projection(np.array([0.0, 0.0, 1.0]))


def test_opposite_points_have_no_geodesic_from_the_segment() -> None:
    space = MinimiserManifold(problems.normalized_linear(5, 3, design="orthogonal"))
    a, b = circle_points(space, 0.0, math.pi)
    with pytest.raises(errors.ManifoldSDEError):
        space.metric.log(b, a)


def import_without_geomstats(monkeypatch: pytest.MonkeyPatch) -> str:
    """The message of an import that fails."""
    name = "manifold_sde.verification.level_set"
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(errors.MissingDependencyError) as info:
        importlib.import_module(name)
    assert all(len(line) <= 80 for line in str(info.value).splitlines())
    return str(info.value)


def test_a_missing_geomstats_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geomstats.backend", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = import_without_geomstats(monkeypatch)
    assert message.startswith("geomstats is not installed\n")
    assert 'pip install "manifold_sde[geomstats]"' in message


def test_a_geomstats_that_does_not_run_with_this_numpy_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What geomstats 2.8 raises under numpy 2.4."""

    class Fails(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == "geomstats.backend":
                raise ImportError("cannot import name 'trapz' from 'numpy' (/a/long/path.py)")

    monkeypatch.delitem(sys.modules, "geomstats.backend")
    monkeypatch.setattr(sys, "meta_path", [Fails(), *sys.meta_path])
    message = import_without_geomstats(monkeypatch)
    assert message.startswith("geomstats cannot be imported\n")
    assert f"cannot import name 'trapz' from 'numpy' (numpy {np.__version__})" in message
    assert "numpy < 2.4" in message
