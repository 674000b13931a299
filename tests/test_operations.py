"""What becomes of each operation of torch in a loss, and that what is taken is right.

The truth is differences of eighth order of each derivative from the one before, and mpmath for the
linear algebra that is replaced. What stands in docs/operations.md is what is found here.
"""

from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from manifold_sde import (
    Geometry,
    LeastSquaresProblem,
    Problem,
    SphericalNoise,
    errors,
    torch_algebra,
)
from manifold_sde.compile import compile_batched, compiler
from manifold_sde.loss import Loss
from manifold_sde.sdes import DirectionDiffusion
from manifold_sde.solvers import solve
from manifold_sde.torch_algebra import REPLACEMENTS
from manifold_sde.torch_norms import WRONG_OPERATIONS, elementary, wrong_operations
from tests import operations
from tests.operations import DIM, EYE, OPERATIONS, POINT, A, B, C, Z, errors_of, loss_of, normal

TABLE = operations.table()
#: Ten times the largest error that was measured, that of the polygammas behind ``lgamma``.
TOLERANCE = 1e-9


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_right_replaced_or_refused(name: str) -> None:
    """Alone and as a thousandth of a loss, by the same verdict, which is that of the page."""
    what = TABLE[name][0]
    assert {operations.status(name), operations.status(name, 1e-3)} == {what}
    if what != "refused":
        for share in (None, 1e-3):
            problem = operations.problem_of(name, share)
            assert max(errors_of(problem.pointwise)) < TOLERANCE


def test_the_page_has_all_operations() -> None:
    assert list(TABLE) == list(OPERATIONS)
    assert {what for what, _ in TABLE.values()} == {"right", "replaced", "refused"}


#: What is replaced although its derivatives are right here: a function linear in w, and those that
#: raise otherwise.
HARMLESS = (
    *("solve with w on the right", "mse_loss"),
    *("lu_factor, lu_solve", "glu", "prelu", "celu", "attention", "attention, four dimensions"),
)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "name",
    [name for name, (what, _) in TABLE.items() if what == "replaced" and name not in HARMLESS],
)
def test_broken_twin_torchs_own_derivatives(name: str) -> None:
    """Without the replacement the comparison fails, and the operation is known as wrong."""
    loss = loss_of(name)
    assert max(errors_of(Loss(loss, DIM, None))) > 1e-3
    (wrong,) = wrong_operations(loss, POINT)
    assert wrong in WRONG_OPERATIONS
    assert wrong_operations(elementary(loss, POINT), POINT) == []


def test_an_operation_on_constants_is_no_fault() -> None:
    def loss(x: Tensor) -> Tensor:
        constant = torch.ops.aten._linalg_det(EYE + Z[:3, :3])[0]
        return constant * (Z @ (x / x.norm())).square().mean()

    assert wrong_operations(loss, POINT) == []
    Problem(loss, DIM, SphericalNoise(0.3))


# mpmath, in code of its own.

mp = mpmath.mp.clone()
mp.dps = 30


def matrix(tensor: Tensor) -> Any:
    return mp.matrix(tensor.tolist())


EXACT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Any], Any]]] = {
    "det": (torch.linalg.det, lambda m: mp.det(m)),
    "logdet": (
        lambda m: torch.logdet(m @ m.T),
        lambda m: mp.log(mp.det(m * m.T)),
    ),
    "slogdet": (lambda m: torch.slogdet(-m).logabsdet, lambda m: mp.log(abs(mp.det(m)))),
    "solve": (
        lambda m: torch.linalg.solve(m, C).sum(),
        lambda m: mp.fsum(mp.inverse(m) * matrix(C)),
    ),
    "cholesky_inverse": (
        lambda m: torch.cholesky_inverse(torch.linalg.cholesky(m @ m.T)).sum(),
        lambda m: mp.fsum(mp.inverse(m * m.T)),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_third_derivatives_of_linear_algebra_against_mpmath(name: str) -> None:
    function, exact = EXACT[name]

    def loss(x: Tensor) -> Tensor:
        return function(2.0 * EYE + x.reshape(3, 3))

    replaced = Loss(elementary(loss, POINT), DIM, None)
    x, a, b, c = 0.3 * POINT, A, B, A.flip(0)
    parts = [matrix(v.reshape(3, 3)) for v in (2.0 * EYE.flatten() + x, a, b, c)]

    def along(r: Any, s: Any, t: Any) -> Any:
        return exact(parts[0] + r * parts[1] + s * parts[2] + t * parts[3])

    want = float(mp.diff(along, (0, 0, 0), (1, 1, 1)))
    got = float(replaced.third_derivative(x, a, b) @ c)
    assert got == pytest.approx(want, rel=1e-11)
    assert float(loss(x)) == pytest.approx(float(along(0, 0, 0)), rel=1e-13)
    torchs = float(Loss(loss, DIM, None).third_derivative(x, a, b) @ c)
    assert torchs != pytest.approx(want, rel=1e-3)


#: Solutions whose right-hand side depends on x, too, and the same by the inverse.
SOLVED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "left": (
        lambda m: torch.linalg.solve(m, m[:, :2] ** 2),
        lambda m: torch.linalg.inv(m) @ m[:, :2] ** 2,
    ),
    "a vector": (
        lambda m: torch.linalg.solve(m, m[0] ** 2),
        lambda m: torch.linalg.inv(m) @ m[0] ** 2,
    ),
    "right": (
        lambda m: torch.linalg.solve(m, m[:2] ** 2, left=False),
        lambda m: m[:2] ** 2 @ torch.linalg.inv(m),
    ),
    "adjoint": (
        lambda m: torch.linalg.lu_solve(*torch.linalg.lu_factor(m), m**2, adjoint=True),
        lambda m: torch.linalg.inv(m.T) @ m**2,
    ),
    "right adjoint": (
        lambda m: torch.linalg.lu_solve(*torch.linalg.lu_factor(m), m**2, left=False, adjoint=True),
        lambda m: m**2 @ torch.linalg.inv(m.T),
    ),
    "as it was": (
        lambda m: torch.lu_solve(m**2, *torch.linalg.lu_factor(m)),
        lambda m: torch.linalg.inv(m) @ m**2,
    ),
    "a method": (
        lambda m: (m**2).lu_solve(*torch.linalg.lu_factor(m)),
        lambda m: torch.linalg.inv(m) @ m**2,
    ),
}


@pytest.mark.filterwarnings("ignore:torch.lu_solve is deprecated")
@pytest.mark.parametrize("name", SOLVED)
def test_solutions_at_several_points_are_those_at_each(name: str) -> None:
    """Torch's own Hessians in a batch are wrong, those of single points right: the twin."""

    def made_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(2.0 * EYE + x.reshape(3, 3)).sin().sum()

    solved, inverse = map(made_of, SOLVED[name])
    points = normal(4, DIM), normal(4, DIM), normal(4, DIM)
    found, want = (Loss(elementary(f, POINT), DIM, None) for f in (solved, inverse))
    for order, count in (("gradient", 1), ("hessian", 1), ("third_derivative", 3)):
        values, exact = (vmap(getattr(f, order))(*points[:count]) for f in (found, want))
        torch.testing.assert_close(values, exact, rtol=1e-10, atol=1e-10 * float(exact.abs().max()))
    if name not in ("left", "a vector", "right"):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_algebra, "_lu_solve", torch.linalg.lu_solve)
        twin, alone = (
            vmap(found.hessian)(points[0]),
            torch.stack(list(map(found.hessian, points[0]))),
        )
    exact = vmap(want.hessian)(points[0])
    assert float((alone - exact).norm() / exact.norm()) < 1e-10
    assert float((twin - exact).norm() / exact.norm()) > 1e-3


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda m: torch.linalg.lu_solve(*torch.linalg.lu_factor(m), C), (4, 3, 3)),
        (
            lambda m: torch.linalg.lu_solve(
                *torch.linalg.lu_factor(m), m[:, :2], left=False, adjoint=True
            ),
            (4, 3, 3),
        ),
        (lambda m: torch.linalg.solve(m, C, left=True), (4, 3, 3)),
        (lambda m: torch.linalg.solve(m, m[:, :2], left=False), (4, 3, 3)),
        (lambda m: torch.linalg.solve(m, m[:, 0]), (4, 3, 3)),
        (lambda m: torch.linalg.solve(m, C[:, 0]), (3, 3)),
        (torch.linalg.slogdet, (2, 4, 3, 3)),
        (torch.slogdet, (4, 4)),
        (Tensor.slogdet, (4, 4)),
        (torch.logdet, (5, 2, 2)),
        (Tensor.logdet, (2, 2)),
        (Tensor.det, (3, 2, 2)),
        (torch.det, (1, 1)),
        (lambda m: torch.cholesky_inverse(m.triu(), upper=True), (2, 3, 3)),
        (lambda m: m.tril().cholesky_inverse(), (3, 3)),
        (lambda m: torch.linalg.tensorsolve(m.reshape(2, 3, 6), m[:2, :3]), (6, 6)),
        (lambda m: torch.linalg.tensorsolve(m.reshape(2, 6, 3), m[:2, :3], dims=(1,)), (6, 6)),
        (lambda m: torch.linalg.householder_product(m, m[0, :2]), (4, 3)),
        (lambda m: m.orgqr(m[0]), (3, 3)),
    ],
)
def test_replacements_compute_the_same(
    function: Callable[[Tensor], Any], shape: tuple[int, ...]
) -> None:
    m = normal(*shape)
    replaced = elementary(function, m)
    assert replaced is not function
    got, want = replaced(m), function(m)
    assert type(got) is type(want)
    for g, w in zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]:
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.filterwarnings("ignore:`torch.triangular_solve`", "ignore:torch.triangular_solve")
@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("unit", [True, False])
def test_triangular_solve_computes_the_same(upper: bool, transpose: bool, unit: bool) -> None:
    m = EYE + 0.3 * normal(3, 3)
    replaced = REPLACEMENTS[torch.triangular_solve](C, m, upper, transpose, unit)
    want = torch.triangular_solve(C, m, upper, transpose, unit)
    torch.testing.assert_close(replaced.solution, want.solution)


# Compiled code.


def traced(x: Tensor) -> Tensor:
    """Residuals whose second derivatives write into an expanded tensor."""
    w = (x / (x * x).sum().sqrt()).reshape(3, 3)
    t = torch.trace(w)
    return torch.stack([(Z[0] * w.flatten()).sum() + t * t, (Z[1] * w.flatten()).sum() - t * t])


@pytest.mark.compile
def test_compiled_code_that_differs_is_replaced_by_the_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiler, "_said", set())
    f = Loss(lambda x: traced(x).square().mean(), DIM, None)
    x = normal(DIM, 16)
    want = vmap(f.hessian, in_dims=-1, out_dims=-1)(x)
    assert float((compile_batched(f.hessian, (x,))(x) - want).norm() / want.norm()) < 1e-12
    # Without its mending, torch's fault is there, and compiled code is seen to be wrong.
    rules = {k: v for k, v in compiler._DECOMPOSITIONS.items() if k not in compiler._WRITING}
    monkeypatch.setattr(compiler, "_DECOMPOSITIONS", rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler._Trials, "agree_with", lambda *_: True)
        wrong = compile_batched(f.hessian, (x,))(x)
    assert float((wrong - want).norm() / want.norm()) > 1e-3
    with pytest.warns(errors.CompilationWarning, match="runs uncompiled") as said:
        kernels = [compile_batched(f.hessian, (x,)) for _ in range(2)]
    assert len(said) == 1
    for kernel in kernels:
        assert torch.equal(kernel(x), want)


@pytest.mark.compile
def test_where_compiled_code_is_right_at_the_arguments_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a start on an axis the wrong part may vanish: code is compared near it, too."""
    monkeypatch.setattr(compiler, "_said", set())
    monkeypatch.setattr(compiler, "_compile_graph", lambda *_: lambda args: [args[-1] ** 2])
    zero = torch.zeros(3, 4, dtype=torch.float64)
    with pytest.warns(errors.CompilationWarning, match="runs uncompiled"):
        assert compiler.compile_function(torch.sin, (zero,)) is torch.sin


@pytest.mark.parametrize("name", ["silu", "eigh"])
def test_operations_in_c(name: str) -> None:
    assert operations.in_c(name) == (TABLE[name][1] == "C, torch")


@pytest.mark.thorough
@pytest.mark.compile
@pytest.mark.parametrize("name", [name for name, (what, _) in TABLE.items() if what != "refused"])
def test_compiled_operations(name: str) -> None:
    """The compiler is right or wrong as the page says."""
    assert operations.compiled(name) == TABLE[name][1]


@pytest.mark.thorough
@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::manifold_sde.errors.CompilationWarning")
def test_no_path_is_lost_by_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them were on this loss."""
    problem = LeastSquaresProblem(traced, DIM, SphericalNoise(0.3))
    y = torch.linalg.svd(Z[:2])[2][-1]
    y = Geometry(problem).limit_map(y + 0.1 * Z[2])
    runs = [
        solve(DirectionDiffusion(problem), y / y.norm(), [0.0, 1.0], n_paths=16, compile=mode)
        for mode in (True, False)
    ]
    assert [run.stats["lost_paths"] for run in runs] == [0, 0]
    torch.testing.assert_close(runs[0].ys, runs[1].ys, rtol=1e-9, atol=1e-9)


def test_a_mean_squared_error_in_a_loss() -> None:
    """``mse_loss`` as it is raises at its second derivative."""
    target = normal(5)
    for reduction in ("mean", "sum", "none"):

        def loss(x: Tensor, reduction: str = reduction) -> Tensor:
            return F.mse_loss(Z @ (x / x.norm()), target, reduction=reduction)

        problem = Problem(loss, DIM, SphericalNoise(0.3))
        torch.testing.assert_close(problem.loss(POINT), loss(POINT).mean())
