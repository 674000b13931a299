"""The noises: their forms agree with each other, with formulas by hand, and with what SGD draws.

What a step draws is enumerated: over all draws of samples, and over the nodes of Gauss and Hermite
in place of the normals, which are exact for second moments.
"""

import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from manifold_sde import (
    CustomNoise,
    LabelNoise,
    LeastSquaresProblem,
    Problem,
    SamplingNoise,
    SphericalNoise,
    errors,
    problems,
)

DIM, SAMPLES = 4, 4
GENERATOR = torch.Generator().manual_seed(23)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


ROWS = normal(SAMPLES, DIM)
X = normal(2, 3, DIM)
EYE = torch.eye(DIM, dtype=torch.float64)


def residuals(x: Tensor) -> Tensor:
    return torch.sin(ROWS.to(x) @ (x / x.norm())) - 0.2


def tangent_factor(x: Tensor) -> Tensor:
    """Three columns of degree -1, orthogonal to x, that are no gradients."""
    unit = x / x.norm()
    columns = torch.stack([unit.roll(1), torch.tanh(ROWS[0].to(x) * unit), unit**2], dim=1)
    return (columns - torch.outer(unit, unit @ columns)) / x.norm()


NOISES: dict[str, Callable[[], Any]] = {
    "spherical": lambda: SphericalNoise(0.3),
    "sampling": SamplingNoise,
    "sampling, 3 of them": lambda: SamplingNoise(3),
    "sampling, 1 without": lambda: SamplingNoise(1, replacement=False),
    "sampling, 2 without": lambda: SamplingNoise(2, replacement=False),
    "sampling, 3 without": lambda: SamplingNoise(3, replacement=False),
    "sampling, 2 in epochs": lambda: SamplingNoise(2, replacement="epoch"),
    "labels": lambda: LabelNoise(0.5),
    "labels, 2 of them": lambda: LabelNoise(0.5, 2),
    "custom": lambda: CustomNoise(tangent_factor),
}
each_noise = pytest.mark.parametrize("name", NOISES)


def problem(name: str) -> LeastSquaresProblem:
    return LeastSquaresProblem(residuals, DIM, NOISES[name](), name=name)


# Forms.


@each_noise
def test_forms_agree(name: str) -> None:
    p = problem(name)
    sigma = p.noise_factor(X)
    assert sigma.shape == (2, 3, DIM, p.n_noise)
    w, v = normal(2, 3, p.n_noise), normal(2, 3, DIM)
    for got, want in [
        (p.noise_product(X, w), (sigma @ w[..., None])[..., 0]),
        (p.noise_covariance(X), sigma @ sigma.mT),
        (p.noise_trace(X), sigma.square().sum((-1, -2))),
        (
            torch.stack(
                [
                    p.noise.transposed_product(p.pointwise, x, u)
                    for x, u in zip(X.reshape(-1, DIM), v.reshape(-1, DIM), strict=True)
                ]
            ).reshape(2, 3, -1),
            (sigma.mT @ v[..., None])[..., 0],
        ),
    ]:
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@each_noise
def test_degree_and_tangency(name: str) -> None:
    p = problem(name)
    sigma = p.noise_factor(X)
    for a in (1e-3, 0.5, 7.0):
        torch.testing.assert_close(p.noise_factor(a * X), sigma / a, rtol=1e-11, atol=1e-13 / a)
    assert float((sigma.mT @ X[..., None]).abs().max()) < 1e-14
    assert max(p.noise_violations().values()) < 1e-12


@each_noise
def test_single_precision(name: str) -> None:
    p = problem(name)
    sigma = p.noise_factor(X.float())
    assert sigma.dtype == torch.float32
    torch.testing.assert_close(sigma, p.noise_factor(X).float(), rtol=1e-4, atol=1e-5)
    assert p.sgd_noise(X.float()).dtype == torch.float32


# Formulas by hand.


def gradients_by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals r and Jacobian J: r_i = sin(z_i x/|x|) - 0.2."""
    unit = x / x.norm()
    inner = ROWS @ unit
    jacobian = torch.cos(inner)[:, None] * (ROWS - torch.outer(inner, unit)) / x.norm()
    return torch.sin(inner) - 0.2, jacobian


def sampling_covariance(x: Tensor) -> Tensor:
    r, jacobian = gradients_by_hand(x)
    g = r[:, None] * jacobian
    return (g.T @ g) / SAMPLES - torch.outer(g.mean(0), g.mean(0))


def covariance_by_hand(name: str, x: Tensor) -> Tensor:
    if name == "spherical":
        unit = x / x.norm()
        return 0.09 / (x @ x) * (EYE - torch.outer(unit, unit))
    if name == "custom":
        return tangent_factor(x) @ tangent_factor(x).T
    if name.startswith("labels"):
        _, jacobian = gradients_by_hand(x)
        fresh = 0.25 * jacobian.T @ jacobian / SAMPLES
        return (sampling_covariance(x) + fresh) / (2 if "2" in name else 1)
    # Of drawing B of Xi: 1/B with, (Xi - B)/(B (Xi - 1)) without replacement.
    factor = {
        "sampling": 1.0,
        "sampling, 3 of them": 1 / 3,
        "sampling, 1 without": 1.0,
        "sampling, 2 without": 1 / 3,
        "sampling, 2 in epochs": 1 / 3,
        "sampling, 3 without": 1 / 9,
    }
    return factor[name] * sampling_covariance(x)


@pytest.mark.paper("Equation (2)", "Equation (18)", "Remark 6.1")
@each_noise
def test_covariance_by_hand(name: str) -> None:
    p = problem(name)
    for x in X.reshape(-1, DIM):
        want = covariance_by_hand(name, x)
        torch.testing.assert_close(p.noise_covariance(x), want, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(p.noise_trace(x), want.trace(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_the_batch_size_divides_the_covariance(batch: int) -> None:
    one, many = (
        LeastSquaresProblem(residuals, DIM, noise(b)).noise_covariance(X)
        for noise, b in ((SamplingNoise, 1), (SamplingNoise, batch))
    )
    torch.testing.assert_close(many, one / batch)
    labels = LeastSquaresProblem(residuals, DIM, LabelNoise(0.2, batch)).noise_covariance(X)
    alone = LeastSquaresProblem(residuals, DIM, LabelNoise(0.2)).noise_covariance(X)
    torch.testing.assert_close(labels, alone / batch)
    assert SamplingNoise(batch).variance_factor(10**6) == 1 / batch


def test_variance_factor_without_replacement() -> None:
    """Between 1 for a batch of one and 0 for all; that of hypergeometric counts (SciPy)."""
    for n, batch in [(8, 1), (8, 3), (8, 7), (1797, 128)]:
        counts = stats.hypergeom(n, 1, batch)  # how often one sample is drawn
        want = counts.var() / batch**2 * n**2 / (n - 1)  # against 1/n - 1/n^2 for one draw
        got = SamplingNoise(batch, replacement=False).variance_factor(n)
        assert got == pytest.approx(want, rel=1e-9)


def test_label_noise_on_the_manifold_is_the_hessian() -> None:
    for batch in (1, 4):
        p = problems.normalized_linear(noise=LabelNoise(0.3, batch))
        y = p.facts.circle.point(torch.linspace(-3, 3, 5, dtype=torch.float64))
        want = 0.09 / batch * p.hessian(y)
        torch.testing.assert_close(p.noise_covariance(y), want, rtol=1e-10, atol=1e-12)


# What a step of SGD draws, enumerated.


def hermite(count: int) -> Iterator[tuple[Tensor, float]]:
    """Nodes and weights that integrate polynomials of degree 5 over `count` normals exactly."""
    nodes = (-math.sqrt(3.0), 0.0, math.sqrt(3.0))
    weights = (1 / 6, 2 / 3, 1 / 6)
    for choice in itertools.product(range(3), repeat=count):
        point = torch.tensor([nodes[i] for i in choice], dtype=torch.float64)
        yield point, math.prod(weights[i] for i in choice)


def draws(noise: Any, count: int) -> Iterator[tuple[Tensor, float]]:
    """Uniforms for every draw, all equally likely."""
    if isinstance(noise, SamplingNoise) and noise.replacement is not True:
        orders: Any = list(itertools.permutations(range(SAMPLES), count))
    else:
        orders = list(itertools.product(range(SAMPLES), repeat=count))
    for order in orders:
        cells = (torch.tensor(order, dtype=torch.float64) + 0.37) / SAMPLES
        yield cells, 1 / len(orders)


def moments(p: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the stochastic gradient over everything that can be drawn."""
    normals, uniforms = p.noise.draw_counts(p.pointwise)
    values, weights = [], []
    for n, a in hermite(normals):
        for u, b in draws(p.noise, uniforms):
            values.append(p.noise.stochastic_gradient(p.pointwise, x, n, u))
            weights.append(a * b)
    g, weight = torch.stack(values), torch.tensor(weights, dtype=torch.float64)
    assert float(weight.sum()) == pytest.approx(1.0)
    mean = weight @ g
    return mean, (g - mean).T @ (weight[:, None] * (g - mean))


@pytest.mark.paper("Equation (1)", "Equation (2)")
@each_noise
def test_a_step_has_the_gradient_as_mean_and_the_covariance(name: str) -> None:
    p, x = problem(name), X[0, 0]
    mean, covariance = moments(p, x)
    torch.testing.assert_close(mean, p.gradient(x), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(covariance, p.noise_covariance(x), rtol=1e-11, atol=1e-13)


def test_broken_twins_of_the_enumeration() -> None:
    """A covariance off by 5 %, and a batch of two that counts for one."""
    x = X[0, 0]
    _, covariance = moments(problem("labels"), x)
    louder = LeastSquaresProblem(residuals, DIM, LabelNoise(0.5 * math.sqrt(1.05)))
    assert not torch.allclose(covariance, louder.noise_covariance(x), rtol=1e-3)
    _, covariance = moments(problem("sampling, 2 without"), x)
    assert not torch.allclose(covariance, problem("sampling").noise_covariance(x), rtol=1e-3)
    assert not torch.allclose(2 * covariance, problem("sampling").noise_covariance(x), rtol=1e-3)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_batch_without_replacement_has_its_size_despite_ties(
    batch: int, dtype: torch.dtype
) -> None:
    p = LeastSquaresProblem(residuals, DIM, SamplingNoise(batch, replacement=False))
    noise = p.noise
    assert isinstance(noise, SamplingNoise)
    for uniforms in ([0.5, 0.5, 0.5, 0.5], [0.1, 0.7, 0.1, 0.1], [0.9, 0.2, 0.2, 0.9]):
        drawn = noise._drawn(p.pointwise, torch.tensor(uniforms, dtype=dtype))
        assert len(drawn) == len(drawn.unique()) == batch


def test_uniforms_at_the_ends_draw_the_first_and_the_last() -> None:
    p = problem("sampling")
    assert isinstance(p.noise, SamplingNoise)
    for u, drawn in ((1e-9, 0), (1 - 1e-9, SAMPLES - 1), (1.0, SAMPLES - 1)):
        for dtype in (torch.float64, torch.float32):
            found = p.noise._drawn(p.pointwise, torch.tensor([u], dtype=dtype))
            assert found.tolist() == [drawn]


# What sgd_noise draws: the same, from the counter-based generator.

PATHS = 40_000
ALARM = 1e-4


def scores(draws: Tensor, covariance: Tensor) -> Tensor:
    """Standardised deviations of all means and of all second moments, as standard normals.

    Each is normal to the fourth digit at 40,000 draws of bounded or Gaussian noise.
    """
    pairs = [(i, j) for i in range(DIM) for j in range(i, DIM)]
    products = torch.stack([draws[:, i] * draws[:, j] for i, j in pairs], 1)
    values = torch.cat([draws, products], 1)
    second = torch.stack([covariance[i, j] for i, j in pairs])
    want = torch.cat([torch.zeros(DIM, dtype=torch.float64), second])
    return (values.mean(0) - want) / (values.std(0) / len(draws) ** 0.5)


def assert_drawn_with(draws: Tensor, covariance: Tensor) -> None:
    """False alarm 1e-4 by Bonferroni; a variance off by 5 % is 5 to 9 standard errors."""
    found = scores(draws, covariance)
    assert float(found.abs().max()) < stats.norm.isf(ALARM / 2 / len(found))


@each_noise
def test_noise_of_a_step_is_drawn_with_the_covariance(name: str) -> None:
    p, x = problem(name), X[0, 0]
    drawn = p.sgd_noise(x.expand(PATHS, DIM), seed=5, step=3)
    covariance = p.noise_covariance(x)
    assert_drawn_with(drawn, covariance)
    for twin in (1.05**0.5 * drawn, drawn + 0.05 * drawn.std(0)):
        with pytest.raises(AssertionError):
            assert_drawn_with(twin, covariance)


@each_noise
def test_a_draw_depends_on_seed_step_and_path(name: str) -> None:
    p = problem(name)
    x = X[0, 0].expand(6, DIM)
    first = p.sgd_noise(x, seed=1, step=2)
    assert torch.equal(first, p.sgd_noise(x, seed=1, step=2))
    torch.testing.assert_close(first[:2], p.sgd_noise(x[:2], seed=1, step=2))
    assert torch.equal(first.reshape(2, 3, DIM), p.sgd_noise(x.reshape(2, 3, DIM), seed=1, step=2))
    many = X[0, 0].expand(60, DIM)
    for other in (p.sgd_noise(many, seed=2, step=2), p.sgd_noise(many, seed=1, step=np.int64(3))):
        assert not torch.equal(other, p.sgd_noise(many, seed=1, step=2))


# Bad input.


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf, None, "0.3", True, [0.3, 0.4]])
def test_scales_that_cannot_be(scale: Any) -> None:
    for noise in (SphericalNoise, LabelNoise):
        with pytest.raises(errors.ArgumentError, match="positive finite number") as caught:
            noise(scale)
        assert caught.value.received == repr(scale)


@pytest.mark.parametrize("batch", [0, -1, 1.0, True, None, "2"])
def test_batch_sizes_that_cannot_be(batch: Any) -> None:
    for build in (lambda b: SamplingNoise(b), lambda b: LabelNoise(0.3, b)):
        with pytest.raises(errors.ArgumentError, match="batch_size is not an integer") as caught:
            build(batch)
        assert caught.value.received == repr(batch)


def random_factor(x: Tensor) -> Tensor:
    return torch.randn(DIM, 2, dtype=x.dtype)


def written_factor(x: Tensor) -> Tensor:
    sigma = torch.zeros(DIM, 2, dtype=x.dtype)
    sigma[:, 0] = x
    return sigma


TRAINED = torch.ones(DIM, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("noise", "loss", "message"),
    [
        (SamplingNoise(), lambda x: residuals(x).sum(), "before the mean"),
        (SamplingNoise(), lambda x: residuals(x)[:1], "at least 2 sample losses"),
        (SamplingNoise(4, replacement=False), residuals, "batch_size below 4"),
        (SamplingNoise(9, replacement=False), residuals, "batch_size=9 of 4"),
        (LabelNoise(0.3), residuals, "LeastSquaresProblem"),
        (CustomNoise(lambda x: x), residuals, r"\(4, m\)"),
        (CustomNoise(lambda x: x[None]), residuals, r"\(1, 4\)"),
        (CustomNoise(lambda x: [x]), residuals, "list"),
        (CustomNoise(lambda x: x[:, None][:, :0]), residuals, "no column"),
        (CustomNoise(lambda x: x[:, None].float()), residuals, "torch.float32"),
        (CustomNoise(lambda x: (x - 10.0).log()[:, None]), residuals, "finite: False"),
        (CustomNoise(lambda x: ROWS[:, :3] @ x), residuals, "raised at a test point"),
        (CustomNoise(lambda x: (x * TRAINED)[:, None]), residuals, "requires_grad_"),
        (CustomNoise(random_factor), residuals, "draw random constants"),
        (CustomNoise(written_factor), residuals, "torch.stack"),
        (CustomNoise(lambda x: (x / x.norm().item())[:, None]), residuals, "no .item()"),
        (CustomNoise(lambda x: (x / x.norm().detach())[:, None]), residuals, "no detach()"),
    ],
)
def test_noises_that_do_not_fit(noise: Any, loss: Any, message: str) -> None:
    with pytest.raises(errors.NoiseError, match=message) as caught:
        Problem(loss, DIM, noise)
    assert all(word in str(caught.value) for word in ("received", "expected", "hint"))


def test_a_factor_that_is_no_function() -> None:
    with pytest.raises(errors.NoiseError, match="Tensor"):
        CustomNoise(torch.ones(3, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "factor",
    [
        lambda x: torch.ones(DIM, 2, dtype=x.dtype),
        lambda x: 1e-9 * (1e9 + x)[:, None],
        lambda x: (x.float() / x.float().norm()).double()[:, None],
        lambda x: torch.relu(x - 1.0)[:, None],
        lambda x: torch.sin(300.0 * x)[:, None],
    ],
)
def test_no_false_alarm_for_a_custom_factor(factor: Callable[[Tensor], Tensor]) -> None:
    """Constants, tiny changes, single precision inside, kinks, fast oscillation."""
    Problem(residuals, DIM, CustomNoise(factor))


@each_noise
def test_noises_pickle_and_say_what_they_are(name: str) -> None:
    p = problem(name)
    again = pickle.loads(pickle.dumps(p))
    assert torch.equal(again.noise_factor(X), p.noise_factor(X))
    assert repr(again.noise) == repr(p.noise)


def test_representations() -> None:
    assert repr(SamplingNoise(2, replacement=False)) == (
        "SamplingNoise(batch_size=2, replacement=False)"
    )
    assert repr(SamplingNoise()) == "SamplingNoise(batch_size=1)"
    assert repr(SphericalNoise(np.float64(0.25))) == "SphericalNoise(scale=0.25)"
    assert repr(LabelNoise(1, np.int32(4))) == "LabelNoise(scale=1, batch_size=4)"
    assert repr(CustomNoise(tangent_factor)) == "CustomNoise(tangent_factor)"


def test_one_custom_noise_serves_problems_of_several_dimensions() -> None:
    noise = CustomNoise(lambda x: (x.roll(1) / (x @ x))[:, None].expand(-1, len(x) - 1))
    small = Problem(lambda x: x[0] / x.norm(), 3, noise)
    large = Problem(lambda x: x[0] / x.norm(), 5, noise)
    assert (small.n_noise, large.n_noise) == (2, 4)
