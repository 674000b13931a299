"""The checks of problems of more than 1000 weights: by products, against matrices, and broken."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from manifold_sde import (
    CustomNoise,
    Geometry,
    LeastSquaresProblem,
    Problem,
    SamplingNoise,
    SphericalNoise,
    problems,
)
from manifold_sde.errors import NoiseError
from manifold_sde.geometry.tangent_noise import tangent_noise
from manifold_sde.networks import NormalizedMLP
from manifold_sde.networks.data import digits
from manifold_sde.solvers import run_sgd
from manifold_sde.verification import Result, Subject, properties, spectra, verify
from manifold_sde.verification.assumptions import by_products as assumed
from manifold_sde.verification.at_size import AS_THEY_ARE, FORMS, NOTES, REASONS, by_products
from manifold_sde.verification.effort import QUICK, Effort
from manifold_sde.verification.properties import differences
from manifold_sde.verification.spectra import extremes_of, hessian_range
from manifold_sde.verification.suite import all_checks
from tests.verification.assumptions import broken
from tests.verification.limit_theorem_twins import WrongRadius, WrongTau, other_rates

#: Dimension of the linear model, and the scales of its residuals.
DIM, SCALES = 1100, (3.0, 2.0, 1.5, 1.0, 0.7, 0.5)
SIZED = QUICK.at_size()
NOISE = SphericalNoise((DIM - 1) ** -0.5)


def rows() -> Tensor:
    """Orthogonal rows (M, D), of falling sizes."""
    normals = torch.randn(DIM, len(SCALES), generator=torch.Generator().manual_seed(0)).double()
    return torch.linalg.qr(normals)[0].T * torch.tensor(SCALES, dtype=torch.float64)[:, None]


def linear_model(eps: float = 0.0, noise: Any = NOISE, rank: int | None = None) -> Problem:
    """Residuals that are linear in the direction, of squares that are divided by |x|^2 + eps."""
    matrix = rows()

    def residuals(x: Tensor) -> Tensor:
        return (matrix @ x) * ((x * x).sum() + eps).rsqrt()

    return LeastSquaresProblem(residuals, DIM, noise, rank=rank)


@functools.cache
def base() -> Subject:
    """The linear model: what one test has found of it, the next one takes."""
    return Subject.of(linear_model())


def on(**changed: Any) -> Subject:
    """That subject with other parts, at the same points."""
    twin = replace(base(), **changed)
    twin.__dict__.update(start=base().start, walks=base().walks)
    return twin


def result(subject: Subject, name: str, effort: Effort = SIZED) -> Result:
    """What the check of a name finds in its form for this size."""
    check = next(check for check in all_checks() if check.name == name)
    found = by_products(check)(subject, effort)
    return next((r for r in found if r.name == name), found[0])


@functools.cache
def network(samples: int = 5, hidden: tuple[int, ...] = (16,)) -> tuple[Problem, Tensor]:
    """A network of about 1000 weights on digits, of ten residuals each, and a minimiser."""
    data, module = digits(samples), NormalizedMLP((64, *hidden, 10), seed=1).double()
    with torch.no_grad():
        targets = module(data.inputs)
    loss = torch.nn.MSELoss()
    problem = Problem.from_module(module, loss, data.inputs, targets, SphericalNoise(1 / 32))
    y = problem.vector(module)
    return problem, y / y.norm()


def test_every_check_has_its_place() -> None:
    """None is made with matrices by mistake, and none is passed over in silence."""
    lists = (AS_THEY_ARE, FORMS.keys(), REASONS.keys())
    names = [name for some in lists for name in some]
    assert sorted(names) == sorted(check.name for check in all_checks())
    assert NOTES.keys() <= AS_THEY_ARE | FORMS.keys()


def test_a_problem_of_this_size_is_verified_without_matrices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: Any) -> Tensor:
        raise AssertionError("a matrix of D x D")

    for name in ("hessian", "noise_factor", "noise_covariance"):
        monkeypatch.setattr(Problem, name, refused)
    report = verify(
        base(), checks=[name for name in FORMS if "SGD" not in name and "one eq" not in name]
    )
    assert report.passed, str(report)
    undecided = {r.name for r in report if r.verdict == "undecided"}
    assert undecided == {
        "one scaling group",
        "compactness",
        "Z of (7) tends to a Brownian motion",
        "Z of (15) to (17) tends to a Brownian motion",
    }
    assert all(r.detail for r in report)


def test_what_is_not_made_says_why() -> None:
    for name, why in REASONS.items():
        made = result(base(), name)
        assert (made.verdict, made.detail) == ("undecided", f"not made: {why}")
        assert "narrower network" in made.meaning


@pytest.mark.parametrize("slab", [spectra._SLAB_BYTES, 2**10])
def test_the_range_of_h_against_its_eigenvalues(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block of memory, or in several."""
    monkeypatch.setattr(spectra, "_SLAB_BYTES", slab)
    problem, y = network()
    values, vectors = torch.linalg.eigh(problem.hessian(y))
    own = hessian_range(problem, y, torch.Generator().manual_seed(0))
    assert own.rank == 50
    assert [len(block) for block in own.rows] == ([50] if slab > 2**20 else [32, 18])
    assert own.gap > 1e6
    assert own.left < 1e-12
    torch.testing.assert_close(own.values, values[-50:], rtol=1e-9, atol=1e-11)
    v = torch.randn(3, len(y), generator=torch.Generator().manual_seed(1)).double()
    kernel = vectors[:, :-50]
    assert float((own.project(v) - v @ kernel @ kernel.T).norm()) < 1e-9
    flattest = own.eigenvector(0)
    assert abs(float(flattest @ vectors[:, -50])) == pytest.approx(1.0, abs=1e-9)
    assert own.lowest >= -1e-12


def test_a_negative_eigenvalue_is_seen() -> None:
    def loss(x: Tensor) -> Tensor:
        u = x / x.norm()
        return u[0] ** 2 - 0.1 * u[1] ** 2

    y = torch.zeros(DIM, dtype=torch.float64)
    y[2] = 1.0
    own = hessian_range(Problem(loss, DIM, NOISE), y, torch.Generator().manual_seed(0))
    assert own.rank == 2
    assert own.lowest == pytest.approx(-0.1, rel=1e-9)


@pytest.mark.parametrize("low", [0.5, pytest.param(0.0, marks=pytest.mark.thorough)])
def test_extremes_against_singular_values(low: float) -> None:
    """Lanczos' interval holds the smallest eigenvalue, of the noise along the manifold."""
    scales = torch.linspace(low, 1.0, DIM, dtype=torch.float64)
    noise = CustomNoise(lambda x: torch.diag(scales) / x.norm() - _radial(scales * x, x))
    problem, y = linear_model(noise=noise), base().start
    dense = tangent_noise(problem, y[None], len(SCALES), [range(DIM)])[0][0]
    own, factor = base().hessian_range(y), problem.noise_factor(y)

    def project(v: Tensor) -> Tensor:
        v = own.project(v)
        return v - (y @ v) * y

    first = torch.randn(DIM, generator=torch.Generator().manual_seed(0)).double()
    seen = extremes_of(lambda v: factor @ (factor.T @ v), project, first, DIM - 7)
    smallest, largest = float(dense[-1]) ** 2, float(dense[0]) ** 2
    assert seen.least <= smallest <= seen.smallest * (1 + 1e-9)
    assert seen.largest == pytest.approx(largest, rel=1e-2)
    assert seen.smallest - seen.least < 0.02 * largest
    assert (seen.least > 0.0) is (low > 0.0)


def _radial(v: Tensor, x: Tensor) -> Tensor:
    return torch.outer(x, v) / x.norm() ** 3


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (problems.great_sphere, "constant rank of the Hessian"),
        (problems.great_sphere, "controllability"),
        (problems.great_sphere, "diffusion along the manifold"),
        (problems.varying_circle, "local minimality"),
        (problems.label_noise_circle, "diffusion along the manifold"),
        (problems.label_noise_circle, "controllability"),
        (broken.maximum, "local minimality"),
    ],
)
def test_verdicts_are_those_of_the_matrices(make: Callable[[], Problem], name: str) -> None:
    """On problems that are small enough for both forms."""
    problem = make()
    check = next(check for check in all_checks() if check.name == name)
    dense = check(Subject.of(problem), replace(QUICK, points=8))[0]
    subject = Subject(problem, Geometry(problem, "matrix_free"))
    assert subject.by_products
    assert result(subject, name).verdict == dense.verdict


# Broken twins.


def test_a_loss_that_is_nearly_scale_invariant_is_rejected() -> None:
    report = verify(linear_model(eps=1e-3), checks=["scale invariance", "Euler's theorem"])
    assert [r.verdict for r in report] == ["fails", "fails"]


class Missing(SphericalNoise):
    """Noise that is isotropic on the sphere, but does not move along one direction."""

    def __init__(self, direction: Tensor) -> None:
        super().__init__(NOISE.scale)
        self.direction = direction

    def product(self, loss: Any, x: Tensor, w: Tensor) -> Tensor:
        u = x / x.norm()
        t = self.direction - (self.direction @ u) * u
        return super().product(loss, x, w - t * ((t @ w) / (t @ t)))

    def transposed_product(self, loss: Any, x: Tensor, v: Tensor) -> Tensor:
        return self.product(loss, x, v)  # t and u are orthogonal: sigma is symmetric


def test_noise_that_misses_a_tangent_direction_is_rejected() -> None:
    subject = base()
    tangent = subject.hessian_range(subject.start).project(subject.normals(90, DIM))
    whole = result(subject, "controllability")
    assert whole.verdict == "holds"
    assert whole.statistic == pytest.approx(-1.0)
    twin = on(problem=linear_model(noise=Missing(tangent)))
    found = result(twin, "controllability")
    assert found.verdict == "fails"
    assert -found.statistic < 1e-7
    # A normal direction may be missing.
    other = on(problem=linear_model(noise=Missing(rows()[0])))
    assert result(other, "controllability").verdict == "holds"


def test_noise_of_few_columns_is_rejected() -> None:
    problem, y = network()
    subject = Subject.of(problem.with_noise(SamplingNoise()), x_init=y)
    assert result(subject, "diffusion along the manifold").verdict == "fails"  # interpolation
    columns = CustomNoise(lambda x: torch.eye(DIM, 3, dtype=x.dtype) / x.norm())
    found = result(on(problem=linear_model(noise=columns)), "controllability")
    assert found.verdict == "fails"
    assert "3 columns" in found.detail


@pytest.mark.parametrize("rank", [5, 7])
def test_a_rank_off_by_one_is_rejected(rank: int) -> None:
    found = result(on(problem=linear_model(rank=rank)), "constant rank of the Hessian")
    assert found.verdict == "fails"
    assert f"is {rank}, that of H 6" in found.detail
    assert result(base(), "constant rank of the Hessian").verdict == "holds"


class WiderTangentSpace(Geometry):
    """The flattest normal direction counts as a tangent one: the rank is one too small."""

    def tangent_projection(self, y: Tensor, v: Tensor) -> Tensor:
        q = rows()[-1] / rows()[-1].norm()
        return super().tangent_projection(y, v) + (v @ q)[..., None] * q


def test_a_projector_of_another_rank_is_rejected() -> None:
    y = base().start
    assert properties.tangent_projection(base(), y).verdict == "holds"
    twin = on(geometry=WiderTangentSpace(base().problem))
    assert properties.tangent_projection(twin, y).verdict == "fails"


LAWS = ("SGD at a fixed ratio tends to (8)", "SGD in the time tau tends to (13)")


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("SGD in the time tau tends to (13)", {"time_scale": WrongTau}),
        ("norm of SGD's weights", {"run_sgd": other_rates(decay=1.05)}),
        *(
            pytest.param(name, changed, marks=pytest.mark.thorough)
            for name, changed in (
                ("SGD in the time tau tends to (13)", {"time_scale": WrongRadius}),
                ("SGD at a fixed ratio tends to (8)", {"run_sgd": other_rates(lr=1.3)}),
                ("SGD without weight decay comes later", {"run_sgd": other_rates(decay=0.0)}),
                ("equilibrium norm of SGD's weights", {"run_sgd": other_rates(lr=1.2)}),
            )
        ),
    ],
)
def test_other_laws_are_rejected(name: str, changed: dict[str, Any]) -> None:
    assert result(base(), name).verdict == "holds"
    assert result(on(**changed), name).verdict == "fails"


def louder(problem: Problem, *arguments: Any, **options: Any) -> Any:
    """SGD with noise that is larger by a third."""
    return run_sgd(problem.with_noise(SphericalNoise(1.34 * NOISE.scale)), *arguments, **options)


@pytest.mark.parametrize("name", [LAWS[0], pytest.param(LAWS[1], marks=pytest.mark.thorough)])
def test_louder_noise_is_rejected(name: str) -> None:
    assert result(on(run_sgd=louder), name).verdict == "fails"


def test_a_noise_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assumed, "_MOST_BYTES", 10**6)
    columns = CustomNoise(lambda x: torch.eye(DIM, 200, dtype=x.dtype) / x.norm())
    subject = on(problem=linear_model(noise=columns))
    with pytest.raises(NoiseError, match="too large to be looked at"):
        assumed.require_products(subject)
    assumed.require_products(base())  # whose product needs no matrix


GROUPED = ("one scaling group", "compactness", "one equilibrium from every start")


def test_a_network_of_two_groups_fails_what_the_theorem_assumes() -> None:
    """Rightly: each group can be scaled alone. And the rows say what follows from it, and what not.

    A network of one group has none of it.
    """
    problem, y = network(3, (14, 12))
    subject = Subject.of(problem, x_init=y)
    first = torch.cat([torch.full((64 * 14,), 3.0), torch.ones(14 * 12)]).double()
    x = subject.normals(40, 4, problem.dim)
    torch.testing.assert_close(problem.loss(first * x), problem.loss(x), rtol=1e-12, atol=0.0)
    groups, compact, equilibrium = (result(subject, name) for name in GROUPED)
    assert [r.verdict for r in (groups, compact, equilibrium)] == ["fails"] * 3
    assert "2 groups of weights" in groups.detail
    assert "no fault" in groups.meaning
    assert "follows from the groups" in compact.meaning
    assert "Nothing was simulated" in equilibrium.meaning
    one, start = network()
    alone = [result(Subject.of(one, x_init=start), name).verdict for name in GROUPED]
    assert alone == ["holds", "holds", "undecided"]


@pytest.mark.thorough
def test_a_sharply_bent_manifold_is_no_fault_of_its_tangent_space() -> None:
    """Along the flattest normal direction Phi bends within steps of 0.03, which see no tangent."""
    problem, y = network(5, (14, 12))
    subject = Subject.of(problem, x_init=y)
    defect = properties.tangent_projection(subject, y)
    assert defect.verdict == "holds"
    assert "too ill-conditioned" not in defect.detail
    assert max(defect.values) < 1e-4
    flattest, h = subject.hessian_range(y).eigenvector(0), differences.FIRST
    ends = subject.limits(torch.stack([y + h * flattest, y - h * flattest]))
    assert float((ends[0] - ends[1]).norm()) / (2.0 * h) > 0.01


@pytest.mark.thorough
def test_twenty_thousand_weights_in_ten_minutes() -> None:
    """A digits network with a thousand constraints: time, and memory over that of J.

    The network has two groups of weights, and fails what asks for one. All other checks are made.
    """
    from benchmarks.bench_verify import measured

    found = measured("20k", 100)
    assert found.minutes <= 10.0
    assert found.memory <= 3.0
    assert found.late == 0
    assert set(found.failed) == set(GROUPED)
