"""Every implementation of the normal space, against whole tensors and against itself.

A new implementation joins by one line of :data:`SPACES`.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from manifold_sde import (
    DirectionDiffusion,
    Geometry,
    LabelNoise,
    LeastSquaresProblem,
    LimitingDiffusion,
    Problem,
    SphericalNoise,
    problems,
)
from manifold_sde.geometry import drift
from manifold_sde.geometry.dense import DenseSpace
from manifold_sde.geometry.least_squares import LeastSquaresSpace
from manifold_sde.geometry.matrix_free_spaces import HessianSpace, JacobianSpace
from manifold_sde.geometry.normal_space import NormalSpace
from manifold_sde.geometry.retraction import retract
from manifold_sde.solvers import solve
from manifold_sde.solvers.schemes import SCHEMES
from manifold_sde.verification.properties import norm_identity
from manifold_sde.verification.strategies.models import NormalizedNetwork, TiltedModel
from tests.geometry.drift_reference import Reference
from tests.geometry.test_matrix_free import start_of, taught
from tests.geometry.test_zero_residuals import bent, on_manifold
from tests.networks.disputed_labels import disputed

CALCULI = ("ito", "stratonovich", "tangent")
#: What an implementation may differ by from the reference, relative to its size.
AGREE = 1e-9


@dataclass(frozen=True)
class Case:
    """An implementation, with points of its manifold.

    Attributes:
        space: The implementation.
        y: Unit vectors (D, n).
    """

    space: NormalSpace
    y: Tensor

    @property
    def basis(self) -> Tensor:
        """Reference bases of points nearby."""
        moved = self.y + 1e-3 * torch.sin(17.0 * self.y)
        basis = self.space.reference_basis(moved / moved.norm(dim=0))
        return retract(self.space, moved, basis)[1]

    @functools.cached_property
    def references(self) -> list[Reference]:
        """The same by whole tensors, point by point."""
        return [Reference(self.space.problem, y, self.space.rank) for y in self.y.T]


def case(
    make: Callable[[Problem], NormalSpace], problem: Problem, start: Tensor | None = None
) -> Case:
    """An implementation at three points of a problem's manifold."""
    x = problem.minimizer if start is None else start
    generator = torch.Generator().manual_seed(9)
    moves = 0.1 * torch.randn(3, problem.dim, dtype=torch.float64, generator=generator)
    y = Geometry(problem, "dense").limit_map(x + moves / problem.dim**0.5)
    return Case(make(problem), (y / y.norm(dim=1, keepdim=True)).T.contiguous())


def dense(problem: Problem) -> NormalSpace:
    assert problem.rank is not None
    return DenseSpace(problem, problem.rank)


#: Implementations by name, each on a problem that it is for.
SPACES: dict[str, Callable[[], Case]] = {
    "elimination, linear model": lambda: case(dense, problems.normalized_linear()),
    "elimination, varying trace": lambda: case(dense, problems.varying_circle()),
    "elimination, bent": lambda: case(dense, bent(), on_manifold(bent(), 1)[0]),
    "eigenbasis, mixed noise": lambda: case(dense, problems.mixed_noise_circle()),
    "eigenbasis, sampling": lambda: case(dense, TiltedModel(12, 4, seed=2)),
    "eigenbasis, labels": lambda: case(dense, problems.label_noise_circle()),
    "rows of J, linear model": lambda: case(rows, problems.normalized_linear()),
    "rows of J, varying trace": lambda: case(rows, problems.varying_circle()),
    "rows of J, bent": lambda: case(rows, bent(), on_manifold(bent(), 1)[0]),
    "products with J": lambda: case(jacobian, taught(samples=True), start_of(15)),
    "products with J, labels": lambda: case(
        jacobian, taught(samples=True).with_noise(LabelNoise(0.4)), start_of(15)
    ),
    "products with H, sampling": lambda: case(hessian, TiltedModel(12, 4, seed=2)),
    "products with H, isotropic": lambda: case(
        hessian, TiltedModel(12, 4, seed=2).with_noise(SphericalNoise(0.2))
    ),
    "products with H, mixed": lambda: case(hessian, problems.mixed_noise_circle()),
    "products with H, samples of a network": lambda: case(hessian, *disputed()),
}


def rows(problem: Problem) -> NormalSpace:
    assert isinstance(problem, LeastSquaresProblem)
    return LeastSquaresSpace(problem, needs_basis=True)


def jacobian(problem: Problem) -> NormalSpace:
    assert isinstance(problem, LeastSquaresProblem)
    return JacobianSpace(problem, problem.pointwise.n_residuals, 1 << 20)


def hessian(problem: Problem) -> NormalSpace:
    assert problem.rank is not None
    return HessianSpace(problem, problem.rank, 1 << 20)


@functools.cache
def cases(name: str) -> Case:
    with torch.no_grad():
        return SPACES[name]()


@pytest.fixture(params=sorted(SPACES))
def one(request: pytest.FixtureRequest) -> Case:
    return cases(request.param)


def close(found: Tensor, wanted: list[Tensor]) -> None:
    """Agreement with the values at the points, (D,) each."""
    columns = torch.stack(wanted, -1)
    size = float(columns.abs().max()) + 1e-3
    torch.testing.assert_close(found, columns, rtol=AGREE, atol=AGREE * size)


def vectors(case: Case, count: int, seed: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, case.y.shape[1], dtype=torch.float64, generator=generator)


@torch.no_grad()
def test_projection_and_inverse(one: Case) -> None:
    space, v = one.space, vectors(one, len(one.y))
    basis = one.basis
    frame = space.frame(one.y, basis)
    projected = [r.P @ u for r, u in zip(one.references, v.T, strict=True)]
    close(space.project(one.y, frame, v), projected)
    close(space.project(one.y, space.tangent_frame(one.y, basis), v), projected)
    inverse = [r.inverse @ u for r, u in zip(one.references, v.T, strict=True)]
    close(space.inverse(one.y, frame, v), inverse)


@torch.no_grad()
def test_third_derivatives(one: Case) -> None:
    """P T[H^+], H^+ T[P], and the blocks of a covariance."""
    space, y = one.space, one.y
    frame = space.frame(y, one.basis)
    found = space.project(y, frame, space.third_of_inverse(y, frame))
    close(found, [r.P @ r.script_t(r.inverse) for r in one.references])
    wanted = [r.inverse @ r.script_t(r.P) for r in one.references]
    close(space.third_of_projection(y, frame), wanted)
    if isinstance(space, LeastSquaresSpace) or (len(frame) == 2 and isinstance(space, DenseSpace)):
        return  # the noise of (18) needs no blocks
    factor = vectors(one, 2 * len(y), 3).reshape(len(y), 2, -1)
    sigma = torch.einsum("imn,jmn->ijn", factor, factor)
    wanted = [r.second_derivative(sigma[..., k]) for k, r in enumerate(one.references)]
    close(drift.second_derivative(space, y, frame, covariance=sigma), wanted)
    close(drift.second_derivative(space, y, frame, factor=factor), wanted)
    own = [r.second_derivative(r.covariance) for r in one.references]
    close(drift.second_derivative(space, y, frame), own)
    close(space.noise_correction(y, frame), [r.correction for r in one.references])


@torch.no_grad()
@pytest.mark.parametrize("calculus", CALCULI)
def test_drift_and_noise(one: Case, calculus: str) -> None:
    space, y, basis = one.space, one.y, one.basis
    w = vectors(one, space.problem.n_noise)
    wanted = [r.drift(calculus) for r in one.references]
    close(drift.direction_drift(space, y, basis, calculus), wanted)
    noise = [r.P @ r.sigma @ u for r, u in zip(one.references, w.T, strict=True)]
    close(space.tangent_noise(y, basis, w), noise)
    for found, right in zip(
        drift.direction_drift_and_noise(space, y, basis, w, calculus), (wanted, noise), strict=True
    ):
        close(found, right)
    factor = space.tangent_factor(y, basis)
    close(torch.einsum("dmn,mn->dn", factor, w), noise)
    close(space.kernels.noise_trace(y)[None], [r.trace[None] for r in one.references])
    if calculus == "tangent":
        h = torch.tensor([0.1, 0.2, 0.3], dtype=y.dtype)
        steps = [t * b + s for t, b, s in zip(h, wanted, noise, strict=True)]
        close(drift.tangent_increment(space, y, basis, h, w), steps)


@torch.no_grad()
def test_retraction(one: Case) -> None:
    """It arrives at the norm of the start, agrees with Phi to first order, and loses NaN alone."""
    space, y = one.space, one.y
    geometry = Geometry(space.problem, "dense")
    apart = []
    for size in (1e-2, 1e-3):
        moved = 2.0 * (y + size * torch.sin(17.0 * y))
        found, basis, arrived = retract(space, moved, space.reference_basis(y))
        assert bool(arrived.all())
        torch.testing.assert_close(found.norm(dim=0), moved.norm(dim=0))
        assert float(space.problem.gradient(found.T).norm(dim=1).max()) < 1e-11
        apart.append(float((found - geometry.limit_map(moved.T).T).abs().max()))
    assert apart[1] < 0.03 * apart[0] + 1e-11
    lost = torch.cat([moved[:, :2], moved[:, 2:] * torch.nan], 1)
    assert retract(space, lost, basis)[2].tolist() == [True, True, False]


@torch.no_grad()
def test_points_in_pieces_are_the_same(one: Case) -> None:
    space, y = one.space, one.y
    w = vectors(one, space.problem.n_noise)

    def both() -> tuple[Tensor, Tensor]:
        return drift.direction_drift_and_noise(space, y, one.basis, w, "stratonovich")

    whole = both()
    if isinstance(space, (JacobianSpace, HessianSpace)):
        space = type(space)(space.problem, space.rank, 1)
    for found, wanted in zip(both(), whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


#: Parts of the drift that a broken implementation drops or turns.
FAULTS: dict[str, Callable[[Reference], Tensor]] = {
    "no Ito term": lambda r: r.drift("ito") + 0.5 * r.second_derivative(r.covariance),
    "nearest point for Phi": lambda r: (
        r.drift("ito") + 0.5 * r.P @ r.script_t(r.lyapunov(r.covariance))
    ),
    "no mixed term": lambda r: r.drift("ito") + r.P @ r.script_t(r.mixed(r.covariance)),
    "no derivative of sigma": lambda r: r.drift("stratonovich") + 0.5 * r.P @ r.correction,
}


@torch.no_grad()
@pytest.mark.parametrize("fault", FAULTS)
def test_broken_drifts_are_told(fault: str) -> None:
    one = cases("eigenbasis, mixed noise")
    calculus = "stratonovich" if fault == "no derivative of sigma" else "ito"
    found = drift.direction_drift(one.space, one.y, one.basis, calculus)
    with pytest.raises(AssertionError):
        close(found, [FAULTS[fault](r) for r in one.references])


# The drift that verify checks is the drift that solve steps.


def network() -> tuple[Problem, Tensor]:
    problem = NormalizedNetwork(3, 4, 2, seed=1)
    return problem, problem.minimizer


TRACED: dict[str, Callable[[], tuple[Problem, Tensor]]] = {
    "bent": lambda: (bent(), on_manifold(bent(), 1)[0]),
    "linear model": lambda: _known(problems.normalized_linear()),
    "varying circle": lambda: _known(problems.varying_circle()),
    "network": network,
}


def _known(problem: Problem) -> tuple[Problem, Tensor]:
    return problem, problem.minimizer


def drift_functions(run: Callable[[], object]) -> set[str]:
    """Names of the package's functions, but those of the noise, that a drift is computed by."""
    entries = {f.__code__ for f in (drift.direction_drift, drift.direction_drift_and_noise)}
    inside, found = 0, set()

    def look(frame: types.FrameType, event: str, _: object) -> None:
        nonlocal inside
        code = frame.f_code
        if code in entries:
            inside += {"call": 1, "return": -1}.get(event, 0)
        ours = inside and event == "call" and "manifold_sde/geometry" in code.co_filename
        if ours and not any(
            word in code.co_qualname for word in ("noise", "over_points", "at_once")
        ):
            found.add(code.co_qualname)

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_drift_that_is_checked_is_the_drift_that_is_stepped(name: str, method: str) -> None:
    """Function by function, of ``verify`` and of ``solve``."""
    problem, y = TRACED[name]()
    calculus = SCHEMES[method].calculus or "ito"
    sde = LimitingDiffusion(problem, calculus)
    options = {"method": method, "dt": 2.0**-7, "compile": False}
    checked = drift_functions(lambda: norm_identity(problem, y))
    stepped = drift_functions(lambda: solve(sde, y, [0.0, 2.0**-7], **options))
    asked = drift_functions(lambda: sde.f(torch.zeros(()), y[None]))
    assert len(stepped) > 5
    assert stepped <= checked
    assert asked - {"direction_drift"} <= stepped
    # The twin: another implementation has other functions.
    assert drift_functions(lambda: solve(sde, y, [0.0, 0.01], method="phi_jet")) == set()


@pytest.mark.parametrize("calculus", ["ito", "stratonovich"])
def test_a_fault_in_the_drift_is_seen_by_both(
    calculus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One factor of 2 in one place moves ``f`` and the step of ``solve`` by the same."""
    problem = problems.varying_circle()
    y = problem.facts.circle.point(torch.tensor(0.7, dtype=torch.float64))
    h = 2.0**-8

    def both() -> tuple[Tensor, Tensor]:
        sde = DirectionDiffusion(problem, calculus)
        method = "euler" if calculus == "ito" else "heun"
        options = {"method": method, "dt": h, "seed": 1, "compile": False}
        moved = solve(sde, y, [0.0, h], **options).ys[-1]
        return sde.f(torch.zeros(()), y[None])[0], moved

    checked, stepped = both()
    original = drift.tangent_force
    monkeypatch.setattr(drift, "tangent_force", lambda *a: 2.0 * original(*a))
    wrong, moved = both()
    tangent = Geometry(problem).tangent_projection(y, wrong - checked)
    tangent = tangent - y * (y @ tangent)
    assert float(tangent.norm()) > 1e-3
    change = (moved - stepped) / h
    torch.testing.assert_close(change, tangent, rtol=0.0, atol=0.1 * float(tangent.norm()))
