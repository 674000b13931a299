"""Symbolic problems: exact derivatives in generated code, proofs, and closed forms of Phi."""

import copy
import pickle
import re
from collections.abc import Callable, Iterable
from typing import Any

import mpmath
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from manifold_sde import (
    CustomNoise,
    Geometry,
    LabelNoise,
    Problem,
    SamplingNoise,
    SphericalNoise,
)
from manifold_sde.compile import compile_function
from manifold_sde.derivatives import batched
from manifold_sde.errors import ManifoldSDEError, NoiseError, ScaleInvarianceError, SymbolicError
from manifold_sde.loss import Loss
from manifold_sde.symbolic import ClosedForm, SymbolicLoss, gamma
from manifold_sde.symbolic.analyticity import prove_analyticity
from manifold_sde.symbolic.expressions import unit
from manifold_sde.symbolic.proofs import prove_scale_invariance

X = x1, x2, x3, x4 = sympy.symbols("x1:5", real=True)
Y = sympy.symbols("x1:4")
NORM = sympy.sqrt(sum(x**2 for x in X))
NOISE = SphericalNoise(0.3)
U = [x / NORM for x in X]

#: Losses by name; together they use every construct that the generator knows.
LOSSES: dict[str, list[sympy.Expr]] = {
    "great circle": [U[2] ** 2 / 2],
    "linear model": [
        (0.3 * U[0] - 1.7 * U[1] + 0.9 * U[3] - 0.4) ** 2 / 2,
        (1.1 * U[0] + 0.2 * U[2] - 0.6 * U[3] + 0.1) ** 2 / 2,
        (0.5 * U[1] + 2.0 * U[2] + 0.7 * U[3]) ** 2 / 2,
    ],
    "two layers": [
        (U[3] * sympy.tanh(2 * U[0] - 3 * U[1]) + U[2] * sympy.tanh(U[0] + U[1]) - 1) ** 2 / 2,
        (U[3] * sympy.tanh(U[0] / 2 + U[1]) + U[2] * sympy.tanh(U[1]) + 2) ** 2 / 2,
    ],
    "logistic": [
        sympy.log(1 + sympy.exp(-3 * U[0] - U[1])),
        sympy.log(1 + sympy.exp(U[1] / 3 + U[3] * sympy.sqrt(2))),
    ],
    "powers": [
        (x1**2 + x2**2) ** sympy.Rational(3, 2) / NORM**3,
        sympy.cbrt(x1**2 + x3**2) * NORM ** sympy.Rational(-2, 3),
        (2 + U[0] ** 3) ** sympy.pi + U[1] ** 20,
        sympy.sqrt(1 - U[0] ** 2 / 2) + 2 ** U[1] + (2 + U[1]) ** U[2],
    ],
    "functions": [
        sympy.sin(U[0]) * sympy.cos(U[1]) + sympy.tan(U[2]) + sympy.sec(U[3]),
        sympy.sinh(U[0]) + sympy.cosh(U[1]) * sympy.atan(3 * U[2]) + sympy.asinh(U[3]),
        sympy.erf(U[0]) * sympy.erfc(U[1]),
        sympy.asin(U[0] / 2) + sympy.acos(U[1] / 2) + sympy.atanh(U[2] / 2) + sympy.acosh(3 + U[3]),
        sympy.sech(U[1]) + sympy.coth(2 + U[2]),
    ],
    "gamma functions": [
        sympy.loggamma(2 + U[2]) + sympy.digamma(3 + U[3]) + sympy.polygamma(2, 2 + U[0]),
    ],
    "kinks": [
        sympy.Max(U[0], U[1], U[2]) + sympy.Min(0, U[3]),
        sympy.Abs(U[0]) ** 3 + sympy.Heaviside(U[1]) * U[2],
        sympy.sign(U[0]) * U[1] ** 2,
    ],
    "equal and constant": [U[0], U[0], sympy.Integer(2)],
    "linear": [x1 + 2 * x2, x3 - x4],
    "numbers inside": [
        sympy.tanh(sympy.exp(sympy.Rational(1, 3)) * U[0] + sympy.log(3) * (U[1] - 2 * U[2])),
        sympy.sqrt(2) * (U[0] + U[1]) + sympy.cbrt(3) * (U[1] + 2 * U[2]),
    ],
    # Jacobians of single entries: as a constant column, and as a column of a product.
    "constant column": [
        sympy.tanh(U[0] * U[3] / 3 + sympy.Abs(1 + U[0])),
        sympy.tanh(U[0] * (4 - 5 * U[0] / 7 - 4 * U[1] - 3 * U[2] + 5 * U[3] / 3)),
    ],
    "column of a product": [
        sympy.tanh(5 * U[0] / 7 - 2 * U[1] + 4 * U[2] / 3 - 2 * U[3] + 1),
        sympy.tanh(-6 * U[0] / 7 + 3 * U[2] + 3 * U[3] / 7),
        sympy.tanh(sympy.exp(sympy.Abs(1 + U[0]) / 2)),
    ],
}


def build(name: str) -> SymbolicLoss:
    losses = [
        e.xreplace({f: sympy.Rational(f) for f in e.atoms(sympy.Float)}) for e in LOSSES[name]
    ]
    return SymbolicLoss(losses, X, len(losses) == 1)


def points(*batch: int, seed: int = 0, dim: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, dim, dtype=torch.float64, generator=generator)


def arguments(loss: Loss, *batch: int) -> dict[str, tuple[Tensor, ...]]:
    """Arguments of every function of a loss."""
    x, a, b = (points(*batch, seed=s) for s in range(3))
    found: dict[str, tuple[Tensor, ...]] = {
        "loss": (x,),
        "gradient": (x,),
        "hessian": (x,),
        "hessian_product": (x, a),
        "third_derivative": (x, a, b),
    }
    if loss.n_samples is not None:
        weights = points(*batch, seed=3, dim=loss.n_samples)
        found |= {
            "sample_losses": (x,),
            "weighted_gradient": (x, weights),
            "sample_derivatives": (x, a),
            "sample_gradients": (x,),
        }
    return found


def difference(one: Tensor, other: Tensor, least: float = 1e-300) -> float:
    """Largest difference, relative to the largest entry but at least to ``least``."""
    assert one.shape == other.shape
    return float((one - other).abs().max() / other.abs().max().clamp(min=least))


def worst_difference(ours: Loss, twin: Loss, least: float = 1e-300) -> float:
    """Largest relative difference of any function at any of five points."""
    return max(
        difference(
            getattr(ours, name)(*(v[i] for v in values)),
            getattr(twin, name)(*(v[i] for v in values)),
            least,
        )
        for name, values in arguments(ours, 5).items()
        for i in range(5)
    )


# Derivatives.


@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_are_those_of_forward_mode(name: str) -> None:
    """Ours are by reverse mode alone; its peers go forward, and one vector at a time."""
    ours = build(name)
    twin = Loss(ours.function, 4, ours.n_samples)
    assert worst_difference(ours, twin) < 1e-12


def test_broken_twin_of_forward_mode() -> None:
    ours = build("linear model")
    twin = Loss(lambda x: ours.function(x) * (1 + 1e-10 * x[0] / x.norm()), 4, 3)
    assert worst_difference(ours, twin) > 1e-11


#: Expressions whose derivatives are awkward, in two coordinates.
AWKWARD = [
    sympy.Abs(x1) ** 3 * x2 + sympy.Abs(x1 - x2),
    sympy.Max(x1, x2**2, x1 * x2) ** 2 + sympy.Min(x1, x2) * x2**3,
    sympy.sign(x1) * x2**3 + sympy.Heaviside(x2) * x1**4,
    (x1 - 2 * x2) ** 17 + (x1**2 + x2**2) ** 23,
    (x1**2 + x2**2) ** sympy.Rational(7, 2) + (x1**2 + x2**2) ** sympy.Rational(-9, 2),
    (x1**2 + 1) ** sympy.Rational(1, 3) + (2 + x2) ** sympy.pi,
    sympy.log(1 + sympy.exp(30 * x1 * x2)) + sympy.log(1 + sympy.exp(-30 * x1 * x2)),
    sympy.exp(sympy.log(1 + x1**2) * sympy.sin(x2)) + (1 + x1**2) ** x2,
    sympy.log(sympy.log(3 + sympy.exp(-(x1**2) / x2**2))),
    sympy.acos(x1 / 2) * sympy.atanh(x2 / 2) + sympy.acosh(2 + x1) / sympy.tan(x2),
    sympy.loggamma(x1**2) + sympy.digamma(2 + x2) * x1 + sympy.polygamma(1, x1**2 + x2**2),
    sympy.polygamma(3, 1 + x1**2) + sympy.erfc(3 * x2) * sympy.sech(x1),
]
PLACE, ALONG = (sympy.Rational(3, 8), sympy.Rational(-5, 8)), (sympy.Rational(1, 4), 2)


def tensor(values: Iterable[Any]) -> Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


def errors(expression: sympy.Expr) -> list[float]:
    """Relative errors of value, gradient, Hessian and third derivative against SymPy's."""
    symbols = (x1, x2)
    value = sympy.Matrix([expression])
    gradient = value.jacobian(symbols)
    hessian = gradient.jacobian(symbols)
    third = (hessian * sympy.Matrix(ALONG)).jacobian(symbols) * sympy.Matrix(ALONG)
    ours = SymbolicLoss([expression], symbols, True)
    x, a = tensor(PLACE), tensor(ALONG)
    computed = [ours.loss(x), ours.gradient(x), ours.hessian(x), ours.third_derivative(x, a, a)]
    found = []
    for table, result in zip((value, gradient, hessian, third), computed, strict=True):
        # Away from its step the derivative of a sign is 0.
        smooth = table.replace(sympy.DiracDelta, lambda *_: sympy.Integer(0)).doit()
        with mpmath.workdps(40):
            place = [mpmath.mpf(c.p) / c.q for c in PLACE]
            exact = tensor(sympy.lambdify(symbols, list(smooth), "mpmath")(*place))
        found.append(difference(result.reshape(-1), exact))
    return found


@pytest.mark.parametrize("expression", AWKWARD, ids=str)
def test_derivatives_are_those_of_sympy(expression: sympy.Expr) -> None:
    assert max(errors(expression)) < 1e-12


@pytest.mark.parametrize("name", ["loggamma", "digamma"])
def test_broken_twin_gamma_functions_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch differentiates its digamma function to nine digits only."""
    monkeypatch.setattr(gamma, name, {"loggamma": torch.lgamma, "digamma": torch.digamma}[name])
    value, *derivatives = errors(getattr(sympy, name)(x1**2) + x2**2)
    assert value < 1e-12
    assert max(derivatives) > 1e-11


@pytest.mark.parametrize("name", ["linear model", "powers", "functions", "gamma functions"])
def test_derivatives_are_exact_to_forty_digits(name: str) -> None:
    """Against difference quotients of mpmath's, at a rational point."""
    ours = build(name)
    loss = sum(ours.code.expressions) / len(ours.code.expressions)
    function = sympy.lambdify([X], loss, "mpmath", cse=True)
    point = [mpmath.mpf(n) / 8 for n in (3, -5, 2, 4)]
    a = [mpmath.mpf(i + 1) / 4 for i in range(4)]
    b = [mpmath.mpf(2 - i) / 4 for i in range(4)]

    def derivative(*directions: list[Any]) -> float:
        def moved(*steps: Any) -> Any:
            place = list(point)
            for step, direction in zip(steps, directions, strict=True):
                place = [p + step * d for p, d in zip(place, direction, strict=True)]
            return function(place)

        with mpmath.workdps(40):
            count = len(directions)
            return float(mpmath.diff(moved, (0,) * count, (1,) * count))

    x = tensor(point)
    basis = [unit(4, i) for i in range(4)]
    gradient = tensor(derivative(e) for e in basis)
    assert difference(ours.gradient(x), gradient) < 1e-13
    hessian = torch.stack([tensor(derivative(e, f) for e in basis) for f in basis])
    assert difference(ours.hessian(x), hessian) < 1e-13
    third = tensor(derivative(e, a, b) for e in basis)
    assert difference(ours.third_derivative(x, tensor(a), tensor(b)), third) < 1e-12


@given(st.data())
@settings(max_examples=25)
def test_derivatives_of_random_losses(data: st.DataObject) -> None:
    ours = SymbolicLoss(data.draw(random_losses()), X, False)
    twin = Loss(ours.function, 4, ours.n_samples)
    # Derivatives that vanish are compared absolutely: the losses are of order 1.
    assert worst_difference(ours, twin, 1.0) < 1e-11


@st.composite
def random_losses(draw: st.DrawFn) -> list[sympy.Expr]:
    """Scale-invariant losses: compositions of direction cosines."""
    number = st.integers(-4, 4).map(lambda n: sympy.Rational(n, 2))

    def combine(inner: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
        linear = st.tuples(number, inner, number, inner, number)
        functions = st.sampled_from([sympy.tanh, sympy.sin, sympy.cos, sympy.atan, sympy.exp])
        return st.one_of(
            linear.map(lambda t: t[0] * t[1] + t[2] * t[3] + t[4]),
            st.tuples(inner, inner).map(lambda t: t[0] * t[1]),
            st.tuples(inner, st.integers(2, 3)).map(lambda t: t[0] ** t[1]),
            st.tuples(functions, inner).map(lambda t: t[0](t[1] / 2)),
            inner.map(lambda e: 1 / sympy.sqrt(1 + e**2)),
        )

    expressions = st.recursive(st.sampled_from(U), combine, max_leaves=6)
    losses = draw(st.lists(expressions, min_size=1, max_size=3))
    # Of order 1, whatever is drawn.
    return [sympy.tanh(e) for e in losses]


def test_hessian_is_exactly_symmetric() -> None:
    for name in LOSSES:
        hessian = build(name).hessian(points(7))
        assert torch.equal(hessian, hessian.mT)


def test_hessian_above_the_entrywise_dimension_agrees_too() -> None:
    symbols = sympy.symbols("z1:8", real=True)
    norm = sympy.sqrt(sum(s**2 for s in symbols))
    u = [s / norm for s in symbols]
    losses = [
        sympy.tanh(u[0] - 2 * u[1] + u[2]) * u[3] + u[4] * u[5] ** 2,
        sympy.log(2 + u[6] * u[0]) + sympy.exp(u[1] - u[2] + u[5]),
    ]
    ours = SymbolicLoss(losses, symbols, False)
    twin = Loss(ours.function, 7, 2)
    x = points(7, dim=7)
    hessian = ours.hessian(x)
    assert difference(hessian, torch.vmap(twin.hessian)(x)) < 1e-13
    assert torch.equal(hessian, hessian.mT)
    assert difference(ours.sample_gradients(x), torch.vmap(twin.sample_gradients)(x)) < 1e-13


# What the generated code accepts and keeps.


@pytest.mark.parametrize("name", LOSSES)
def test_any_batch_and_vmap(name: str) -> None:
    loss = build(name)
    for function, values in arguments(loss, 3, 2).items():
        whole = getattr(loss, function)(*values)
        single = getattr(loss, function)(*(v[1, 0] for v in values))
        assert difference(whole[1, 0], single) < 1e-14
        mapped = torch.vmap(torch.vmap(getattr(loss, function)))(*values)
        assert difference(whole, mapped) < 1e-14
        assert getattr(loss, function)(*(v[:0] for v in values)).shape == (0, *whole.shape[1:])


@pytest.mark.parametrize("name", ["linear model", "equal and constant", "linear"])
def test_batches_of_several_arguments_are_broadcast(name: str) -> None:
    loss = build(name)
    for function, values in arguments(loss).items():
        if len(values) == 1:
            continue
        shapes = [(5, 1), (1, 4), (4,)]
        widened = [v.expand(*shape, -1) for v, shape in zip(values, shapes, strict=False)]
        expected = batched(
            getattr(Loss(loss.function, 4, loss.n_samples), function),
            *widened,
            event_dims=(1,) * len(values),
        )
        assert getattr(loss, function)(*widened).shape == expected.shape


@pytest.mark.parametrize("name", LOSSES)
def test_dtype_and_device_are_kept(name: str) -> None:
    loss = build(name)
    for function, values in arguments(loss, 3).items():
        exact = getattr(loss, function)(*values)
        single = getattr(loss, function)(*(v.float() for v in values))
        assert single.dtype == torch.float32
        assert difference(single.double(), exact) < 1e-2
        assert getattr(loss, function)(*(v.to("meta") for v in values)).device.type == "meta"
        with FakeTensorMode() as mode:
            fake = getattr(loss, function)(*(mode.from_tensor(v) for v in values))
            assert fake.dtype == torch.float64
            assert fake.shape == exact.shape


def test_code_composes_with_torch_func_and_traces() -> None:
    loss = build("two layers")
    x = points(3)
    exact = loss.hessian(x)
    nested = torch.vmap(torch.func.jacfwd(torch.func.grad(loss.loss)))(x)
    assert difference(nested, exact) < 1e-13
    graph = make_fx(lambda z: torch.vmap(loss.hessian)(z))(x)
    assert difference(graph(x), exact) < 1e-14
    other = points(5, seed=9)
    twice = make_fx(lambda z: loss.gradient(z), tracing_mode="symbolic")(x)
    assert difference(twice(other), loss.gradient(other)) < 1e-14
    # Of slices torch 2.13 keeps the size of the batch here.
    whole = build("linear model")
    twice = make_fx(lambda z: whole.hessian(z), tracing_mode="symbolic")(x)
    assert difference(twice(other), whole.hessian(other)) < 1e-14


def test_dynamo_captures_the_code_in_one_graph() -> None:
    loss = build("two layers")
    x = points(3)
    captured = torch.compile(loss.gradient, backend="eager", fullgraph=True)
    assert torch.equal(captured(x), loss.gradient(x))


@pytest.mark.compile
@pytest.mark.slow
def test_code_compiles() -> None:
    loss = build("linear model")
    x, a, b = (points(64, seed=s) for s in range(3))
    compiled = compile_function(lambda *v: loss.third_derivative(*v), (x, a, b))
    assert difference(compiled(x, a, b), loss.third_derivative(x, a, b)) < 1e-13


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_compute_the_same_bits(copied: Callable[[Any], Any]) -> None:
    problem = great_circle()
    twin = copied(problem)
    x = points(4, dim=3)
    assert torch.equal(twin.hessian(x), problem.hessian(x))
    assert torch.equal(twin.closed_form.limit_map(x), problem.closed_form.limit_map(x))
    assert dict(twin.closed_form.defects) == dict(problem.closed_form.defects)
    assert twin.scale_invariance == problem.scale_invariance
    assert repr(twin) == repr(problem)


def test_source_shares_what_is_common() -> None:
    source = build("linear model").source()
    assert source.count("rsqrt") == 1
    assert source.count(" @ ") == 2  # the norm, the inputs
    assert "for" not in source


@pytest.mark.parametrize(
    "noise",
    [
        SphericalNoise(0.3),
        SamplingNoise(batch_size=2),
        CustomNoise(lambda x: torch.eye(4, dtype=x.dtype)[:, :2] / x.norm()),
    ],
)
def test_noise_of_symbolic_problems(noise: Any) -> None:
    problem = Problem.from_sympy(LOSSES["linear model"], X, noise)
    twin = Problem(problem.pointwise.function, 4, copy.deepcopy(noise))
    x, w = points(5), points(5, seed=1, dim=problem.n_noise)
    assert difference(problem.noise_factor(x), twin.noise_factor(x)) < 1e-13
    assert difference(problem.noise_product(x, w), twin.noise_product(x, w)) < 1e-13
    assert difference(problem.noise_trace(x), twin.noise_trace(x)) < 1e-13
    assert difference(problem.sgd_noise(x), twin.sgd_noise(x)) < 1e-12
    projection = torch.eye(4, dtype=torch.float64).expand(5, 4, 4)
    correction = problem.noise_correction(x, projection)
    assert difference(correction, twin.noise_correction(x, projection)) < 1e-12


def test_problem_functions_agree_with_those_of_a_torch_problem() -> None:
    problem = Problem.from_sympy(LOSSES["linear model"], X, SamplingNoise())
    assert isinstance(problem.pointwise, SymbolicLoss)
    twin = Problem(problem.pointwise.function, 4, SamplingNoise())
    x, a, b = (points(2, 3, seed=s) for s in range(3))
    for name in ("loss", "sample_losses", "gradient", "hessian"):
        assert difference(getattr(problem, name)(x), getattr(twin, name)(x)) < 1e-13
    assert difference(problem.third_derivative(x, a, b), twin.third_derivative(x, a, b)) < 1e-12
    assert float(problem.scale_invariance_violation()) < 1e-14


# Proofs.


@pytest.mark.paper("Definition 2.2", "Lemma 2.5", "Assumption 2.3")
@pytest.mark.parametrize(
    ("loss", "method"),
    [
        (U[0] ** 2, "degrees of homogeneity"),
        (sympy.Max(0, x1) / NORM + sympy.sign(x2), "degrees of homogeneity"),
        (
            2 ** (x1 / NORM) + sympy.Abs(x2) ** sympy.Rational(1, 3) / NORM ** sympy.Rational(1, 3),
            "degrees of homogeneity",
        ),
        (sympy.log(x1**2 + x2**2) - sympy.log(NORM**2), "Euler's theorem"),
        (((x1 + 1) ** 2 - 2 * x1 - 1) / NORM**2, "Euler's theorem"),
        (sympy.Integer(3), "degrees of homogeneity"),
    ],
)
def test_scale_invariance_is_proved(loss: sympy.Expr, method: str) -> None:
    proof = prove_scale_invariance(loss, X)
    assert proof
    assert proof.verdict == "proved"
    assert proof.method == method
    assert method in str(proof)


@given(losses=random_losses())
@settings(max_examples=30)
@pytest.mark.paper("Definition 2.2")
def test_random_compositions_of_directions_are_proved(losses: list[sympy.Expr]) -> None:
    assert all(prove_scale_invariance(loss, X) for loss in losses)


@pytest.mark.paper("Definition 2.2", "Lemma 2.5")
@pytest.mark.parametrize(
    ("loss", "coordinates"),
    [
        (U[2] ** 2 / 2 + sympy.Rational(1, 1000) * x1, (0,)),
        (U[2] ** 2 / 2 + sympy.Rational(1, 1000) * sympy.tanh(x2 * x3), (1, 2)),
        (U[2] ** 2 / 2 + sympy.Rational(1, 10**12) * x4, (3,)),
        (x3**2 / (NORM**2 + sympy.Rational(1, 1000)), (0, 1, 2, 3)),
        (sympy.log(NORM), (0, 1, 2, 3)),
    ],
)
def test_broken_twin_scale_invariance_is_refuted(
    loss: sympy.Expr, coordinates: tuple[int, ...]
) -> None:
    with pytest.raises(ScaleInvarianceError, match="not scale-invariant") as caught:
        Problem.from_sympy(loss, X, NOISE)
    assert set(caught.value.coordinates) <= set(coordinates)
    assert caught.value.coordinates
    assert caught.value.violation is not None
    numeric = Problem(SymbolicLoss([loss], X, True).function, 4, NOISE)
    measured = float(numeric.scale_invariance_violation(points(64)))
    assert 1e-3 * measured < caught.value.violation < 1e3 * max(measured, 1e-13)


def test_refutation_names_the_sample_and_shows_what_the_user_wrote() -> None:
    losses = [U[0] ** 2, U[2] ** 2 + 0.001 * x1, U[1]]
    with pytest.raises(ScaleInvarianceError, match="sample loss 1") as caught:
        Problem.from_sympy(losses, X, NOISE)
    assert "0.001*x1" in caught.value.received
    assert caught.value.coordinates == (0,)


def test_rounded_numbers_are_not_refuted_at_rounding_level() -> None:
    # 0.1 and 0.3 are rounded, so the degree is 2e-17 and not 0.
    loss = sympy.Abs(x1) ** 0.1 * sympy.Abs(x2) ** 0.1 * sympy.Abs(x3) ** 0.1 / NORM**0.3
    problem = Problem.from_sympy(loss, X, NOISE)
    assert problem.scale_invariance.verdict == "undecided"
    assert re.search(r"\de-1[67]", problem.scale_invariance.detail)
    assert float(problem.scale_invariance_violation()) < 1e-14
    exact = sympy.Rational(2, 10**17)
    with pytest.raises(ScaleInvarianceError):
        Problem.from_sympy(sympy.Abs(x1) ** (1 + exact) / NORM, X, NOISE)


def test_undecided_stays_visible() -> None:
    """Too large to simplify, not homogeneous term by term, and yet scale-invariant."""
    loss = sum(sympy.cos(k * x1 / x2) for k in range(1, 200)) + sympy.log(x1**2) - sympy.log(x2**2)
    problem = Problem.from_sympy(loss, X, NOISE)
    assert problem.scale_invariance.verdict == "undecided"
    assert not problem.scale_invariance
    assert "random points" in problem.scale_invariance.detail
    both = Problem.from_sympy([U[0], loss, loss], X, NOISE).scale_invariance
    assert both.verdict == "undecided"
    assert both.detail.startswith("sample loss 1: ")
    assert both.detail.endswith("(and 1 more)")


def test_losses_that_are_defined_nowhere_have_no_proof() -> None:
    with pytest.raises(SymbolicError, match="not real and finite at any"):
        prove_scale_invariance(sympy.log(-1 - x1**2) + x2, X)


ANALYTIC = [
    U[0] ** 2,
    sympy.tanh(3 * U[0]) * sympy.exp(U[1]) + sympy.sin(U[2]) ** 2,
    sympy.log(NORM) - sympy.log(x1**2 + x2**2 + x3**2 + x4**2) / 2,
    x1**2 / (x1**2 + x1 * x2 + x2**2 + x3**2 / 7 + 2 * x4**2),
    x1**2 / ((x1 + x2) ** 2 + (x2 + x3) ** 2 + (x3 + x4) ** 2 + x4**2),
    1 / (2 + sympy.sin(U[0])) + sympy.sqrt(3 - sympy.cos(U[1]) + sympy.erf(U[2])),
    sympy.log(1 + sympy.exp(-U[0])) + sympy.loggamma(1 + U[1] ** 2),
    x1**4 / (x1**4 + x2**4 + 3 * x3**4 + x4**4),
    sympy.Abs(NORM**2) / NORM**2 + 2 ** U[0] + sympy.sign(1 + x1**2),
    1 / sympy.cosh(U[0]) ** 3,
]


@pytest.mark.paper("Assumption 5.3")
@pytest.mark.parametrize("loss", ANALYTIC, ids=str)
def test_analyticity_is_proved(loss: sympy.Expr) -> None:
    proof = prove_analyticity([loss], X)
    assert proof, proof


NOT_ANALYTIC = [
    (sympy.Abs(x1) / NORM, "Abs(x1)"),
    (sympy.Max(x1, x2) / NORM, "Max(x1, x2)"),
    (sympy.Piecewise((U[0], x1 > 0), (0, True)), "Piecewise"),
    (sympy.sign(x1), "sign(x1)"),
    (sympy.floor(U[0]), "floor"),
    (sympy.sqrt(x1**2 + x2**2) / NORM, "sqrt(x1**2 + x2**2)"),
    (x1**2 / (x1**2 + x2**2 + x3**2 - x4**2), "not proved nonzero"),
    (x1**2 / ((x1 + x2) ** 2 + (x2 + x3) ** 2 + (x3 + x4) ** 2 + (x4 + x1) ** 2), "nonzero"),
    (sympy.log(1 + sympy.sin(U[0])), "log"),
    (sympy.exp(-1 / x1**2), "x1"),
    (sympy.acos(U[0]), "acos"),
    (NORM ** sympy.Rational(1, 2) / (x1**2 - NORM**2) ** 2, "nonzero"),
    (sympy.Abs(x1) ** 3 / NORM**3, "Abs"),
]


@pytest.mark.paper("Assumption 5.3")
@pytest.mark.parametrize(("loss", "named"), NOT_ANALYTIC, ids=str)
def test_broken_twin_what_is_not_analytic_is_not_proved(loss: sympy.Expr, named: str) -> None:
    proof = prove_analyticity([U[0], loss], X)
    assert proof.verdict == "undecided"
    assert named in proof.detail
    assert "sample loss 1" in proof.detail


# Closed forms of Phi.

y1, y2, y3 = Y
LENGTH = sympy.sqrt(y1**2 + y2**2 + y3**2)
RADIUS = sympy.sqrt(y1**2 + y2**2)
CIRCLE = (y3 / LENGTH) ** 2 / 2
CIRCLE_MAP = [LENGTH * y1 / RADIUS, LENGTH * y2 / RADIUS, 0]


def great_circle() -> Problem:
    return Problem.from_sympy(CIRCLE, Y, NOISE, limit_map=CIRCLE_MAP, rank=1, name="circle")


def crossing() -> Problem:
    """L = (x1 x2)^2 / 2 |x|^4: x1^2 - x2^2 is kept along the flow, up to scale.

    Where |x1| > |x2| it ends at x2 = 0; the Hessian varies along that circle.
    """
    end = sympy.sqrt(y1**2 - y2**2 + y3**2)
    phi = [LENGTH * y1 * sympy.sqrt(1 - y2**2 / y1**2) / end, 0, LENGTH * y3 / end]
    return Problem.from_sympy((y1 * y2) ** 2 / LENGTH**4 / 2, Y, NOISE, limit_map=phi)


def bent() -> Problem:
    """L = x3^2 (x1^2 + 2 x2^2) / 2 |x|^4: x2 / x1^2 is kept, and Phi has mixed terms too."""
    kept, square = y2**2 / y1**4, y1**2 + y2**2 - y3**2
    first = (sympy.sqrt(1 + 4 * kept * square) - 1) / (2 * kept)
    a, b = y1 * sympy.sqrt(first / y1**2), y2 * first / y1**2
    end = sympy.sqrt(a**2 + b**2)
    loss = y3**2 * (y1**2 + 2 * y2**2) / LENGTH**4 / 2
    return Problem.from_sympy(loss, Y, NOISE, limit_map=[LENGTH * a / end, LENGTH * b / end, 0])


START = torch.tensor(
    [[1.0, 0.5, 0.3], [0.7, -0.6, -0.5], [-1.2, 0.3, 0.8], [2.0, 0.1, -0.4]], dtype=torch.float64
)


@pytest.mark.paper("Definition 2.6", "Lemma 2.8")
@pytest.mark.parametrize("make", [great_circle, crossing, bent])
def test_closed_form_agrees_with_gradient_flow_and_dense_derivatives(
    make: Callable[[], Problem],
) -> None:
    problem = make()
    form = problem.closed_form
    assert form is not None
    dense = Geometry(problem, method="dense")
    y = form.limit_map(START)
    assert difference(y, dense.limit_map(START)) < 1e-8
    factor = points(4, 3, dim=3)
    covariance = factor @ factor.mT
    v = points(4, seed=5, dim=3)
    assert difference(form.tangent_projection(y, v), dense.tangent_projection(y, v)) < 1e-9
    expected = dense.second_derivative(y, covariance)
    assert difference(form.second_derivative(y, covariance), expected) < 1e-9
    symbolic = Geometry(problem)
    assert torch.equal(
        symbolic.second_derivative(y, covariance), form.second_derivative(y, covariance)
    )


def test_closed_form_takes_batches_and_vmap() -> None:
    form = bent().closed_form
    assert form is not None
    covariance = torch.eye(3, dtype=torch.float64)
    whole = form.second_derivative(START, covariance)
    assert difference(whole[1], form.second_derivative(START[1], covariance)) < 1e-14
    mapped = torch.vmap(form.second_derivative, in_dims=(0, None))(START, covariance)
    assert difference(mapped, whole) < 1e-14
    v = points(5, 1, dim=3)
    assert form.tangent_projection(START, v).shape == (5, 4, 3)
    jacobian = torch.vmap(torch.func.jacfwd(form.limit_map))(START)
    along = form.tangent_projection(START, v[0])
    assert difference(along, (jacobian @ v[0, 0].unsqueeze(-1)).squeeze(-1)) < 1e-13
    assert "def value(x)" in form.source()


def test_second_derivative_against_differences_of_gradient_flow() -> None:
    """Independent of every formula: Phi by integrating the flow, differenced."""
    problem = crossing()
    flow = Geometry(problem, method="dense")
    assert problem.closed_form is not None
    y = problem.closed_form.limit_map(START[:1])
    direction = torch.tensor([[0.3, 0.8, -0.5]], dtype=torch.float64)
    step = 1e-2
    ends = [flow.limit_map(y + k * step * direction) for k in (-2, -1, 0, 1, 2)]
    weights = (-1 / 12, 4 / 3, -5 / 2, 4 / 3, -1 / 12)
    differences = sum(w * e for w, e in zip(weights, ends, strict=True)) / step**2
    covariance = direction.mT @ direction
    exact = problem.closed_form.second_derivative(y, covariance)
    assert difference(exact, differences) < 1e-4


@pytest.mark.parametrize("make", [great_circle, crossing, bent])
def test_nearest_point_misses_exactly_the_third_term(make: Callable[[], Problem]) -> None:
    """The nearest minimiser has the first two terms of the second derivative, not the third."""
    problem = make()
    nearest = [y1, 0, y3] if make is crossing else [y1, y2, 0]
    real = {s: sympy.Symbol(s.name, real=True) for s in Y}
    twin = ClosedForm(
        [sympy.sympify(e).xreplace(real) for e in nearest], problem.pointwise.code.symbols
    )
    assert problem.closed_form is not None
    y = problem.closed_form.limit_map(START)
    factor = points(4, 3, dim=3)
    covariance = factor @ factor.mT
    values, vectors = torch.linalg.eigh(problem.hessian(y))
    # One normal direction n with eigenvalue h: the third term is -P T[n n^T] (n Sigma n) / 2h.
    normal, height = vectors[..., -1], values[..., -1]
    size = torch.einsum("bi,bij,bj->b", normal, covariance, normal) / (2 * height)
    bend = problem.third_derivative(y, normal, normal)
    bend = bend - (bend * normal).sum(-1, keepdim=True) * normal
    third = -bend * size.unsqueeze(-1)
    gap = problem.closed_form.second_derivative(y, covariance) - twin.second_derivative(
        y, covariance
    )
    assert difference(gap, third) < 1e-9
    assert float(third.norm(dim=-1).min()) > 1e-3


@pytest.mark.paper("Definition 2.6", "Lemma 2.7", "Lemma 2.8")
@pytest.mark.parametrize(
    ("phi", "failing"),
    [
        ([y1, y2, 0], "|Phi(x)| = |x|"),
        ([LENGTH * y1 / RADIUS, LENGTH * y2 / RADIUS, y3], "gradient of L vanishes"),
        ([LENGTH, 0, 0], "projection onto the kernel"),
        ([0, 0, LENGTH], "at most L(x)"),
        ([-LENGTH * y1 / RADIUS, -LENGTH * y2 / RADIUS, 0], "Phi(Phi(x)) = Phi(x)"),
        ([y1 / RADIUS, y2 / RADIUS, 0], "Phi(2 x) = 2 Phi(x)"),
        ([1.0001 * c for c in CIRCLE_MAP], "Phi(Phi(x)) = Phi(x)"),
        ([sympy.log(-(y1**2)), y2, 0], "real and finite"),
    ],
)
def test_broken_twin_maps_that_are_not_phi(phi: list[Any], failing: str) -> None:
    with pytest.raises(SymbolicError, match=re.escape(failing)) as caught:
        Problem.from_sympy(CIRCLE, Y, NOISE, limit_map=phi)
    assert caught.value.remedy


@pytest.mark.paper("Definition 2.6")
def test_broken_twin_nearest_direction_is_not_phi() -> None:
    """The nearest minimiser of norm |x|: everything but the constancy along the flow holds."""
    flat = sympy.sqrt(y1**2 + y3**2)
    phi = [LENGTH * y1 / flat, 0, LENGTH * y3 / flat]
    with pytest.raises(SymbolicError, match=re.escape("dPhi(x) grad L(x) = 0")) as caught:
        Problem.from_sympy((y1 * y2) ** 2 / LENGTH**4 / 2, Y, NOISE, limit_map=phi)
    assert "nearest" in caught.value.remedy


# Bad input.


@pytest.mark.parametrize(
    ("losses", "symbols", "message"),
    [
        (CIRCLE + sympy.Symbol("z"), Y, "symbols that are not coordinates"),
        (CIRCLE.xreplace({y1: x1}), Y, "other assumptions"),
        ("x1/x2", Y, "not a SymPy expression"),
        ([CIRCLE, None], Y, "sample loss 1 is not a SymPy expression"),
        ([], Y, "no sample losses"),
        (sympy.Symbol("A", commutative=False), Y, "not a SymPy expression"),
        (sympy.I * CIRCLE, Y, "not real and finite"),
        (CIRCLE + sympy.sqrt(-(y1**2)), Y, "not real and finite"),
        (CIRCLE / 0, Y, "not real and finite"),
        (y1 > 0, Y, "not a SymPy expression"),
        (sympy.sqrt(y1 / LENGTH), Y, "not real and finite away from the origin"),
        (CIRCLE, "x1 x2 x3", "not coordinates"),
        (CIRCLE, 3, "not coordinates"),
        (CIRCLE, [y1, "x2"], "not coordinates"),
        (CIRCLE, [*Y, y1], "more than once"),
        (CIRCLE, [y1], "no directions in one dimension"),
        (CIRCLE, [y1, y2, sympy.Symbol("q", positive=True)], "assumed to be"),
        (CIRCLE, [y1, y2, sympy.Symbol("q", integer=True)], "assumed to be"),
        (sympy.Piecewise((y1 / LENGTH, y1 > 0), (0, True)), Y, "generated for Piecewise"),
        (sympy.floor(y1 / LENGTH), Y, "generated for floor"),
        (sympy.besselj(0, y1 / LENGTH), Y, "generated for besselj"),
        (sympy.Integral(CIRCLE, (y1, 0, 1)), Y, "generated for Integral"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_named(losses: Any, symbols: Any, message: str) -> None:
    with pytest.raises(SymbolicError) as caught:
        Problem.from_sympy(losses, symbols, NOISE)
    assert message in str(caught.value)
    assert caught.value.received
    assert caught.value.expected
    assert caught.value.remedy
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


@pytest.mark.parametrize(
    ("phi", "message"),
    [
        ([y1, y2], "2 entries"),
        ("x1", "str"),
        (y1, "Symbol"),
        ([y1, y2, sympy.Symbol("z")], "limit_map entry 2"),
        ([y1, y2, sympy.floor(y3)], "generated for floor"),
    ],
    ids=str,
)
def test_bad_limit_maps_are_named(phi: Any, message: str) -> None:
    with pytest.raises(SymbolicError) as caught:
        Problem.from_sympy(CIRCLE, Y, NOISE, limit_map=phi)
    assert message in str(caught.value)


@pytest.mark.parametrize("noise", [SamplingNoise(), LabelNoise(0.1), "white"])
def test_noise_has_to_fit(noise: Any) -> None:
    with pytest.raises(NoiseError):
        Problem.from_sympy(CIRCLE, Y, noise)


def test_rank_has_to_fit() -> None:
    with pytest.raises(ManifoldSDEError):
        Problem.from_sympy(CIRCLE, Y, NOISE, rank=3)


def test_numbers_and_matrices_are_losses_too() -> None:
    constant = Problem.from_sympy(2, Y, NOISE)
    assert torch.equal(constant.gradient(START), torch.zeros_like(START))
    assert constant.hessian(START).shape == (4, 3, 3)
    column = Problem.from_sympy(sympy.Matrix([CIRCLE, y1 / LENGTH]), Y, SamplingNoise())
    assert column.n_samples == 2
    assert column.name == "symbolic loss"
    assert column.closed_form is None


def test_floating_point_numbers_stand_for_what_they_are() -> None:
    problem = Problem.from_sympy(0.1 * CIRCLE, Y, NOISE)
    factor = sympy.Rational(problem.pointwise.code.expressions[0].as_coeff_Mul()[0])
    assert factor == sympy.Rational(0.1) / 2
