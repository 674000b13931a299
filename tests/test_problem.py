"""Problems: what they compute, in every shape, and what they refuse.

Formulas by hand for the loss (a, x/|x|)^2 / 2 and its sums; the other checks measure violations
that were put in with a known size.
"""

import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from manifold_sde import (
    CustomNoise,
    LabelNoise,
    LeastSquaresProblem,
    Problem,
    SamplingNoise,
    SphericalNoise,
    errors,
    problems,
    scale_invariance,
)
from manifold_sde.solvers import run_sgd

DIM = 5
GENERATOR = torch.Generator().manual_seed(11)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


ROWS = normal(4, DIM)
X = normal(2, 3, DIM)


def samples(x: Tensor) -> Tensor:
    return 0.5 * (ROWS.to(x) @ (x / x.norm())) ** 2


def by_hand(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and Hessian of the mean of the samples at one point, by hand.

    With q = x^T A x / |x|^2 and A = ROWS^T ROWS / 4: L = q/2, grad L = (A x - q x) / |x|^2, and
    H = (A - q I - 2 x g^T - 2 g x^T) / |x|^2 with g = grad L.
    """
    a = ROWS.T @ ROWS / 4
    square = x @ x
    q = x @ a @ x / square
    g = (a @ x - q * x) / square
    turned = torch.outer(x, g)
    return q / 2, g, (a - q * torch.eye(DIM, dtype=x.dtype) - 2 * (turned + turned.T)) / square


def problem(noise: Any = None, **options: Any) -> Problem:
    return Problem(samples, DIM, noise or SamplingNoise(), **options)


def test_loss_gradient_and_hessian_by_hand() -> None:
    p = problem()
    for got, want in zip(
        (p.loss(X), p.gradient(X), p.hessian(X)),
        zip(*(by_hand(x) for x in X.reshape(-1, DIM)), strict=True),
        strict=True,
    ):
        expected = torch.stack(list(want)).reshape(got.shape)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(p.sample_losses(X).mean(-1), p.loss(X))


METHODS: dict[str, tuple[Callable[[Problem, Tensor], Tensor], tuple[int, ...]]] = {
    "loss": (lambda p, x: p.loss(x), ()),
    "sample_losses": (lambda p, x: p.sample_losses(x), (4,)),
    "gradient": (lambda p, x: p.gradient(x), (DIM,)),
    "hessian": (lambda p, x: p.hessian(x), (DIM, DIM)),
    "third_derivative": (lambda p, x: p.third_derivative(x, x, x), (DIM,)),
    "noise_factor": (lambda p, x: p.noise_factor(x), (DIM, -1)),
    "noise_product": (
        lambda p, x: p.noise_product(x, torch.linspace(-1, 2, p.n_noise).to(x)),
        (DIM,),
    ),
    "noise_covariance": (lambda p, x: p.noise_covariance(x), (DIM, DIM)),
    "noise_trace": (lambda p, x: p.noise_trace(x), ()),
    "noise_correction": (
        lambda p, x: p.noise_correction(x, torch.eye(DIM, dtype=x.dtype, device=x.device)),
        (DIM,),
    ),
    "sgd_noise": (lambda p, x: p.sgd_noise(x), (DIM,)),
}


def residuals(x: Tensor) -> Tensor:
    return ROWS.to(x) @ (x / x.norm()) - 0.1


def rotation(x: Tensor) -> Tensor:
    turned = torch.stack([-x[1], x[0], *(0.0 * x[2:])])
    return turned[:, None] / (x @ x)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "sampling": problem,
    "spherical": lambda: problem(SphericalNoise(0.3)),
    "custom": lambda: problem(CustomNoise(rotation)),
    "labels": lambda: LeastSquaresProblem(residuals, DIM, LabelNoise(0.3, 2)),
}


@pytest.mark.parametrize("which", PROBLEMS)
@pytest.mark.parametrize("name", METHODS)
def test_shapes_dtypes_and_devices(which: str, name: str) -> None:
    p = PROBLEMS[which]()
    method, event = METHODS[name]
    event = tuple(p.n_noise if size == -1 else size for size in event)
    for dtype in (torch.float64, torch.float32):
        x = X.to(dtype)
        whole = method(p, x)
        assert whole.shape == (2, 3, *event)
        assert whole.dtype == dtype
        assert not whole.requires_grad
        assert method(p, x[0]).shape == (3, *event)
        assert method(p, x[0, 0]).shape == event
        assert method(p, x[:0]).shape == (0, 3, *event)
        if name != "sgd_noise":  # each point of a batch draws its own
            tolerance = 1e-12 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(
                whole[1, 2], method(p, x[1, 2]), rtol=tolerance, atol=tolerance
            )
            close = method(p, X).to(dtype)
            assert float((whole - close).norm() / close.norm()) < 1e-4
        on_meta = method(p, x.to("meta"))
        assert (on_meta.device.type, on_meta.shape, on_meta.dtype) == ("meta", whole.shape, dtype)


def fakeable(x: Tensor) -> Tensor:
    """Without constants: fake tensors do not mix with real ones."""
    unit = x / x.norm()
    return torch.stack([unit[0] * unit[1], unit[2] ** 2, unit[3], unit[4]])


# torch 2.13 fails inside itself on the forward mode of a fake tensor under an inner vmap.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "hessian"])
def test_fake_tensors(name: str) -> None:
    p = Problem(fakeable, DIM, SamplingNoise())
    method, event = METHODS[name]
    with FakeTensorMode():
        x = torch.ones(2, DIM, dtype=torch.float32)
        result = method(p, x)
    assert result.shape == (2, *(4 if size == -1 else size for size in event))
    assert result.dtype == torch.float32


def test_a_users_vmap_and_grad_go_through() -> None:
    p, x = problem(), X[0]
    torch.testing.assert_close(torch.func.vmap(p.gradient)(x), p.gradient(x))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(p.loss))(x), p.gradient(x))
    leaf = x.clone().requires_grad_()
    p.loss(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, p.gradient(x))


def test_scalar_loss_has_no_samples() -> None:
    p = Problem(lambda x: samples(x).mean(), DIM, SphericalNoise(0.3))
    assert p.n_samples is None
    torch.testing.assert_close(p.gradient(X), problem().gradient(X))
    with pytest.raises(errors.NoiseError, match="returns one number"):
        p.sample_losses(X)


def test_names_and_representations() -> None:
    assert repr(problem()) == "Problem('samples', dim=5, n_samples=4, SamplingNoise(batch_size=1))"
    named = problem(SphericalNoise(0.25), rank=np.int64(3), name="mine")
    assert repr(named) == "Problem('mine', dim=5, n_samples=4, SphericalNoise(scale=0.25), rank=3)"
    assert type(named.rank) is int
    assert Problem(samples, np.int64(DIM), SamplingNoise(np.int64(2))).dim == DIM
    with pytest.raises(errors.ArgumentError, match="does not know a minimiser") as caught:
        _ = named.minimizer
    assert "limit_map" in caught.value.remedy


def test_problems_of_module_level_functions_pickle() -> None:
    for build in (problem, lambda: LeastSquaresProblem(residuals, DIM, LabelNoise(0.3))):
        p = build()
        p.kernels["something"] = lambda: None
        again = pickle.loads(pickle.dumps(p))
        assert again.kernels == {}
        assert torch.equal(again.gradient(X), p.gradient(X))
        assert torch.equal(again.noise_covariance(X), p.noise_covariance(X))


# Bad input.


@pytest.mark.parametrize(
    ("loss", "dim", "error", "message"),
    [
        ("x", DIM, errors.DTypeError, "the loss is not a function"),
        (samples, 1, errors.ArgumentError, "at least 2"),
        (samples, 5.0, errors.ArgumentError, "5.0"),
        (samples, True, errors.ArgumentError, "True"),
        (samples, None, errors.ArgumentError, "None"),
        (samples, 6, errors.ArgumentError, "raised at a test point"),
        (lambda x: ROWS.float() @ x, DIM, errors.ArgumentError, "dtype and device of x"),
        (lambda x: x.outer(x), DIM, errors.ShapeError, r"\(5, 5\)"),
        (lambda x: x[:0], DIM, errors.ShapeError, "at least one"),
        (lambda x: float(x[0]), DIM, errors.DTypeError, "float"),
        (lambda x: None, DIM, errors.DTypeError, "NoneType"),
        (lambda x: samples(x).float(), DIM, errors.DTypeError, "torch.float32"),
        (lambda x: (x > 0).sum(), DIM, errors.DTypeError, "torch.int64"),
        (lambda x: (x - 10).log(), DIM, errors.NonFiniteError, "(?s)nan.*check the data for NaN"),
        (lambda x: x[0] / 0.0, DIM, errors.NonFiniteError, "inf"),
        (lambda x: WEIGHT @ x, DIM, errors.ArgumentError, "requires_grad_"),
    ],
)
def test_losses_that_cannot_be_used(
    loss: Any, dim: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        Problem(loss, dim, SphericalNoise(0.3))
    assert all(word in str(caught.value) for word in ("received", "expected", "hint"))


WEIGHT = torch.ones(DIM, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("rank", [-1, 0, DIM, 2.0, True, "3"])
def test_ranks_that_cannot_be(rank: Any) -> None:
    with pytest.raises(errors.ArgumentError, match=r"\[1, 4\]"):
        problem(rank=rank)


@pytest.mark.parametrize("noise", [None, 0.3, SphericalNoise, torch.ones(3)])
def test_what_is_not_a_noise(noise: Any) -> None:
    with pytest.raises(errors.NoiseError, match="SphericalNoise"):
        Problem(samples, DIM, noise)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.ones(4), errors.ShapeError),
        (torch.zeros(DIM), errors.ZeroVectorError),
        (torch.full((DIM,), torch.nan), errors.NonFiniteError),
        (torch.ones(DIM, dtype=torch.float16), errors.DTypeError),
        (torch.ones(DIM, dtype=torch.int64), errors.DTypeError),
    ],
)
def test_points_that_cannot_be_used(name: str, x: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        METHODS[name][0](problem(), x)


def test_other_arguments_that_cannot_be_used() -> None:
    p, x = problem(), X[0]
    eye = torch.eye(DIM, dtype=torch.float64)
    with pytest.raises(errors.ShapeError, match=r"w has the wrong shape"):
        p.noise_product(x, torch.ones(3, dtype=torch.float64))
    with pytest.raises(errors.DTypeError, match="differ in dtype"):
        p.noise_product(x, torch.ones(4))
    with pytest.raises(errors.ShapeError, match="batch dimensions"):
        p.third_derivative(x, x[:2], x)
    with pytest.raises(errors.NonFiniteError, match="b holds NaN"):
        p.third_derivative(x, x, x * torch.nan)
    for projection, error in [
        (eye[:3], errors.ShapeError),
        ([[1.0]], errors.ShapeError),
        (eye + torch.diag(torch.ones(4, dtype=torch.float64), 1), errors.ArgumentError),
        (eye * torch.nan, errors.ArgumentError),
        (eye.float(), errors.DTypeError),
    ]:
        with pytest.raises(error):
            p.noise_correction(x, projection)
    for step in (-1, 2**48, 1.0, None, True):
        with pytest.raises(errors.ArgumentError, match="step is not an integer"):
            p.sgd_noise(x, step=step)  # type: ignore[arg-type]
    for seed in (-1, 2**64, 0.5, "0", None):
        with pytest.raises(errors.ArgumentError, match="seed"):
            p.sgd_noise(x, seed=seed)  # type: ignore[arg-type]
    with pytest.raises(errors.ShapeError, match="at one point"):
        p.derivative_errors(x)
    for empty in (p.scale_invariance_violation, p.noise_violations):
        with pytest.raises(errors.ShapeError, match="no point"):
            empty(x[:0])


def test_constants_of_another_dtype_are_named() -> None:
    p = Problem(lambda x: ROWS @ (x / x.norm()), DIM, SphericalNoise(0.3))
    for method in (p.loss, p.gradient, p.hessian):
        with pytest.raises(errors.DifferentiationError, match=r"Z\.to\(x\)"):
            method(X.float())


# Scale scale_invariance, and the coordinates that break it.


@pytest.mark.paper("Assumption 2.1", "Definition 2.2", "Lemma 2.5")
@pytest.mark.parametrize(
    "build",
    [
        problem,
        lambda: Problem(fakeable, DIM, SamplingNoise()),
        problems.normalized_linear,
        problems.great_sphere,
        problems.varying_circle,
        lambda: Problem(two_layers(), 30, SphericalNoise(0.3)),
    ],
)
def test_invariant_losses_pass(build: Callable[[], Problem]) -> None:
    p = build()
    assert float(p.scale_invariance_violation()) < 1e-13
    p.require_scale_invariance()
    points = normal(7, p.dim)
    p.require_scale_invariance(1e3 * points)
    p.require_scale_invariance(1e-3 * points)
    p.require_scale_invariance(points.float())


def test_points_of_the_manifold_alone_do_not_look_like_a_violation() -> None:
    """There the gradient is what is left of terms that cancel: rounding, in any direction."""
    p = Problem(lambda x: samples(x).mean(), DIM, SphericalNoise(0.3))
    lowest = torch.linalg.eigh(ROWS.T @ ROWS)[1][:, 1]
    y = torch.linspace(0.5, 2.0, 20, dtype=torch.float64)[:, None] * lowest
    gradient = p.gradient(y)
    assert float(gradient.norm(dim=1).max()) < 1e-14
    radial = (gradient * y).sum(1).abs() / (gradient.norm(dim=1) * y.norm(dim=1))
    assert float(radial.max()) > 1e-3  # what a measure without a reference would report
    p.require_scale_invariance(y)


def two_layers(
    *, bias: bool = False, affine: bool = False, eps: float = 0.0, frozen: bool = True
) -> Callable[[Tensor], Tensor]:
    """A tanh network of 12 + 18 weights, then 3 biases, 6 affine parameters or 6 last weights."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(8, 4, dtype=torch.float64, generator=generator)
    head = torch.randn(6, 2, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])

    def normalise(h: Tensor, eps: float = 0.0) -> Tensor:
        h = h - h.mean(-1, keepdim=True)
        return h / (h.square().mean(-1, keepdim=True) + eps).sqrt()

    def loss(x: Tensor) -> Tensor:
        first, second, rest = x[:12].reshape(4, 3), x[12:30].reshape(3, 6), x[30:]
        hidden = inputs.to(x) @ first
        hidden = torch.tanh(normalise(hidden) + (rest[:3] if bias else 0.0))
        outputs = normalise(hidden @ second, eps)
        if affine:
            outputs = outputs * rest
        logits = outputs @ head.to(x) if frozen else outputs[:, :3] @ rest.reshape(3, 2)
        return F.cross_entropy(logits, labels, reduction="none")

    return loss


@pytest.mark.parametrize(
    ("options", "dim", "guilty", "shown"),
    [
        ({"bias": True}, 33, range(30, 33), "coordinates 30-32"),
        ({"affine": True}, 36, range(30, 36), "coordinates 30-35"),
        ({"frozen": False}, 36, range(30, 36), "coordinates 30-35"),
        ({"eps": 1e-3}, 30, range(12, 30), "coordinates 12-29"),
        ({"eps": 1e-6}, 30, range(12, 30), "coordinates 12-29"),
    ],
)
def test_the_coordinates_that_break_invariance_are_named(
    options: dict[str, Any], dim: int, guilty: range, shown: str
) -> None:
    """Exactly the biases, affine parameters, unnormalised layer, or the layer before an eps."""
    p = Problem(two_layers(**options), dim, SphericalNoise(0.3))
    with pytest.raises(errors.ScaleInvarianceError, match=shown) as caught:
        p.require_scale_invariance()
    assert caught.value.coordinates == tuple(guilty)
    assert caught.value.violation == float(p.scale_invariance_violation())
    assert "eps" in caught.value.remedy


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-8])
def test_a_violation_is_measured_at_its_size(size: float) -> None:
    """L = (invariant) + c x_0 / 2 has <x, grad L> = c x_0 / 2."""
    p = Problem(lambda x: samples(x).mean() + size * x[0] / 2, DIM, SphericalNoise(0.3))
    points = X.reshape(-1, DIM) / X.reshape(-1, DIM).norm(dim=1, keepdim=True)
    measured = float(p.scale_invariance_violation(points))
    largest = float(p.gradient(points).norm(dim=1).max())
    assert measured <= size * float(points[:, 0].abs().max()) / 2 / largest * (1 + 1e-6)
    assert measured > 0.05 * size
    with pytest.raises(errors.ScaleInvarianceError) as caught:
        p.require_scale_invariance()
    assert 0 in caught.value.coordinates
    p.require_scale_invariance(tolerance=2 * size)


def test_one_sample_that_is_not_invariant_is_found() -> None:
    """Its violation cancels in the mean with that of another sample."""

    def loss(x: Tensor) -> Tensor:
        push = 1e-3 * torch.stack([x[1], -x[1], 0.0 * x[0], 0.0 * x[0]])
        return samples(x) + push

    p = Problem(loss, DIM, SamplingNoise())
    assert float(p.scale_invariance_violation()) > 1e-5
    with pytest.raises(errors.ScaleInvarianceError):
        p.require_scale_invariance()


@pytest.mark.parametrize(
    ("loss", "dim", "guilty"),
    [
        (lambda x: (x * x).sum(), 3, (0, 1, 2)),
        (lambda x: (x[0] * x[1] - 1.0) ** 2, 3, (0, 1)),
        (lambda x: (x[0] / x[1] + x[2]) ** 2, 3, (2,)),
        (lambda x: (x[:400] / x[:400].norm())[:3].prod() + x[500:].square().sum(), 600, None),
    ],
)
def test_coordinates_of_other_losses(
    loss: Callable[[Tensor], Tensor], dim: int, guilty: tuple[int, ...] | None
) -> None:
    p = Problem(loss, dim, SphericalNoise(0.3))
    with pytest.raises(errors.ScaleInvarianceError) as caught:
        p.require_scale_invariance()
    if guilty is None:  # too many to solve for: those that the violation depends on
        assert min(caught.value.coordinates) >= 500
    else:
        assert caught.value.coordinates == guilty


def test_broken_twin_tolerance_of_float32_in_double_precision() -> None:
    """The default tolerance is that of the points' dtype: 1e-6 passes in float32 alone."""
    p = Problem(lambda x: samples(x).mean() + 1e-6 * x[0], DIM, SphericalNoise(0.3))
    p.require_scale_invariance(X.float())
    with pytest.raises(errors.ScaleInvarianceError):
        p.require_scale_invariance(X)


# The two properties of a noise.


def tangent_factor(x: Tensor) -> Tensor:
    unit = x / x.norm()
    matrix = ROWS.to(x).T @ ROWS.to(x)
    return (matrix - torch.outer(unit, unit @ matrix)) / x.norm()


@pytest.mark.parametrize(
    ("factor", "degree", "radial"),
    [
        (tangent_factor, 0.0, 0.0),
        (lambda x: tangent_factor(x) * x.norm(), 1.0, 0.0),  # 2 sigma(2x) = 2 sigma(x)
        (lambda x: tangent_factor(x) / x.norm(), 1.0, 0.0),  # sigma(x/2)/2 = 2 sigma(x)
        (lambda x: tangent_factor(x) * (x.norm() ** 1e-3), 6.93e-4, 0.0),
        (lambda x: x[:, None] / (x @ x), 0.0, 1.0),
        (lambda x: torch.eye(DIM, dtype=x.dtype) / x.norm(), 0.0, DIM**-0.5),
    ],
)
def test_noise_violations_are_measured(
    factor: Callable[[Tensor], Tensor], degree: float, radial: float
) -> None:
    p = problem(CustomNoise(factor))
    for points in (None, X, 10.0 * X):
        found = p.noise_violations(points)
        assert found["degree"] == pytest.approx(degree, rel=2e-3, abs=1e-13)
        assert found["radial"] == pytest.approx(radial, rel=1e-9, abs=1e-13)


def test_a_small_radial_part_is_measured() -> None:
    p = problem(CustomNoise(lambda x: tangent_factor(x) + 1e-3 * x[:, None] / (x @ x)))
    want = (
        1e-3 * DIM**0.5 / float((X.norm(dim=-1) * p.noise_factor(X).flatten(-2).norm(dim=-1)).min())
    )
    assert p.noise_violations(X)["radial"] == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("noise", [SphericalNoise(0.3), SamplingNoise(), SamplingNoise(2)])
def test_noises_of_the_paper_have_both_properties(noise: Any) -> None:
    found = problem(noise).noise_violations()
    assert found["degree"] < 1e-13
    assert found["radial"] < 1e-13


def test_noise_that_vanishes_on_the_manifold_is_measured_as_none() -> None:
    """Interpolation: every sample loss is minimal on Gamma, so sampling noise is 0 there."""
    p = problems.normalized_linear(noise=SamplingNoise())
    on = p.facts.circle.point(torch.linspace(0, 6, 20, dtype=torch.float64))
    assert float(p.noise_trace(on).max()) < 1e-28
    assert float(p.noise_trace(X.new_ones(10)).max()) > 1e-3
    found = p.noise_violations(on)
    assert max(found.values()) < 1e-9


@pytest.mark.parametrize("scalar", [False, True])
def test_invariance_of_large_problems_is_that_of_small_ones(
    scalar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of Euler's theorem without the gradients of all samples; sizes are not the largest."""

    def loss(x: Tensor) -> Tensor:
        values = samples(x) + 0.1 * x[0] ** 2
        return values.mean() if scalar else values

    pointwise = Problem(loss, DIM, SphericalNoise(0.3)).pointwise
    points = X.reshape(-1, DIM)
    sums, size = scale_invariance.euler_defects(pointwise, points)
    monkeypatch.setattr(scale_invariance, "_AT_ONCE", 0)
    lean_sums, lean_size = scale_invariance.euler_defects(pointwise, points)
    torch.testing.assert_close(lean_sums, sums, rtol=1e-12, atol=1e-13)
    if scalar:
        torch.testing.assert_close(lean_size, size)
    else:
        assert 0.2 < float(lean_size / size) < 2.0


def test_a_program_in_which_warnings_are_errors() -> None:
    """At the first forward-mode derivative of a process torch warns of itself."""
    program = """
import warnings
warnings.simplefilter("error")
import torch
from manifold_sde import Geometry, Problem, SphericalNoise
problem = Problem(lambda x: 0.5 * (x[2] / x.norm()) ** 2, 3, SphericalNoise(0.3))
x = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
print(Geometry(problem).second_derivative(Geometry(problem).limit_map(x)).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([3])\n"


def test_arrays_of_negative_strides_are_points() -> None:
    points, problem = np.arange(6.0).reshape(2, 3), problems.varying_circle()
    found, want = (
        run_sgd(problem, x, 0.01, 0.0, 1).ys for x in (points[:, ::-1], points[:, ::-1].copy())
    )
    assert torch.equal(found, want)
