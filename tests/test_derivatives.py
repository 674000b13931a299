"""Derivatives of losses in ordinary torch, against mpmath and against differences.

The truth for three losses is mpmath at 40 digits, in code of its own. For the others each order is
held against differences of eighth order of the one before, from the loss on.
"""

import copy
import importlib
import itertools
import math
import random
import sys
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from manifold_sde import (
    LeastSquaresProblem,
    Problem,
    SphericalNoise,
    arguments,
    derivatives,
    errors,
    loss_checks,
    reverse_mode,
)
from manifold_sde.loss import Loss
from manifold_sde.torch_norms import ElementaryFunction, elementary, functions_called

DIM = 12
GENERATOR = torch.Generator().manual_seed(7)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


Z = normal(6, DIM)
INPUTS = normal(6, 4)
LAYER_NORM = nn.LayerNorm(3, eps=0.1).double().requires_grad_(False)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
POINTS = normal(2, DIM)
A, B, C = normal(3, DIM)

# Losses as users write them: one vector in, the sample losses or one number out.


def logits(x: Tensor) -> Tensor:
    return INPUTS @ x.reshape(4, 3)


def by_hand_group_norm(h: Tensor, groups: int, eps: float) -> Tensor:
    g = h.reshape(h.shape[0], groups, -1)
    g = g - g.mean(-1, keepdim=True)
    return (g / (g.pow(2).mean(-1, keepdim=True) + eps).sqrt()).reshape(h.shape)


def network(x: Tensor, last: nn.Module | None = None) -> Tensor:
    hidden = torch.tanh(F.layer_norm(INPUTS[:, :3] @ x[:6].reshape(3, 2).repeat(1, 2), (4,)))
    return F.cross_entropy(hidden[:, :3] * F.normalize(x[6:9], dim=0), LABELS, reduction="none")


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "x / x.norm()": lambda x: (Z @ (x / x.norm())).square(),
    "F.normalize": lambda x: (Z @ F.normalize(x, dim=0)).square(),
    "linalg.vector_norm": lambda x: (Z @ (x / torch.linalg.vector_norm(x))).square(),
    "linalg.norm": lambda x: (Z @ (x / torch.linalg.norm(x))).square(),
    "rsqrt": lambda x: (Z @ (x * (x * x).sum().rsqrt())).exp(),
    "einsum": lambda x: torch.einsum("ni,i,j,nj->n", Z, x, x, Z) / (x @ x),
    "layer_norm": lambda x: F.layer_norm(logits(x), (3,), eps=0.1).pow(3).mean(1),
    "nn.LayerNorm": lambda x: LAYER_NORM(logits(x)).exp().mean(1),
    "batch_norm": lambda x: (
        F.batch_norm(logits(x), None, None, training=True, eps=0.1).pow(3).mean(1)
    ),
    "batch_norm, eps 0": lambda x: (
        F.batch_norm(logits(x), None, None, training=True, eps=0.0).pow(3).mean(1)
    ),
    "instance_norm": lambda x: (
        F.instance_norm(logits(x).reshape(2, 3, 3), eps=0.1).pow(3).mean(1).flatten()
    ),
    "group_norm": lambda x: F.group_norm(logits(x), 1, eps=0.1).pow(3).mean(1),
    "group norm by hand": lambda x: (
        by_hand_group_norm(Z @ torch.outer(x, x[:6]), 2, 0.1).pow(3).mean(1)
    ),
    "rms_norm": lambda x: F.rms_norm(logits(x), (3,), eps=0.1).pow(3).mean(1),
    "softmax": lambda x: torch.softmax(logits(x / x.norm()), 1)[:, 0],
    "log_softmax": lambda x: F.nll_loss(F.log_softmax(logits(x / x.norm()), 1), LABELS),
    "cross_entropy": lambda x: F.cross_entropy(logits(x / x.norm()), LABELS, reduction="none"),
    "logsumexp": lambda x: torch.logsumexp(logits(x / x.norm()), 1),
    "tanh network": network,
    "gelu": lambda x: F.gelu(Z @ (x / x.norm())),
    "silu": lambda x: F.silu(Z @ (x / x.norm())),
    "softplus": lambda x: F.softplus(Z @ (x / x.norm())),
    "mse_loss": lambda x: F.mse_loss(Z @ (x / x.norm()), Z[:, 0], reduction="none"),
    "cosine_similarity": lambda x: F.cosine_similarity(Z, x[None], dim=1, eps=0.0),
    "convolution": lambda x: (
        F.conv2d(Z.reshape(2, 1, 6, 6), (x / x.norm()).reshape(3, 1, 2, 2)).square().mean((1, 2, 3))
    ),
    "attention": lambda x: (
        F.scaled_dot_product_attention(*(3 * [F.normalize(logits(x), dim=1)[None]]))
        .square()
        .sum((0, 2))
    ),
    "std": lambda x: (Z @ ((x - x.mean()) / x.std())).square(),
    "inverse": lambda x: torch.linalg.inv(
        3.0 * torch.eye(3, dtype=x.dtype) + (x / x.norm())[:9].reshape(3, 3)
    )[0],
    "cholesky": lambda x: (
        torch.linalg.cholesky(
            torch.eye(3, dtype=x.dtype)
            + (x / x.norm()).reshape(4, 3).T @ (x / x.norm()).reshape(4, 3)
        )
        .diagonal()
        .log()
    ),
}


def problem_of(loss: Callable[[Tensor], Tensor], dim: int = DIM) -> Problem:
    return Problem(loss, dim, SphericalNoise(0.3))


# Eighth-order central differences.

TOLERANCE = 1e-10  # ten times what was measured
WEIGHTS = (4 / 5, -1 / 5, 4 / 105, -1 / 280)


def difference(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, h: float = 1e-3) -> Tensor:
    terms = [w * (f(x + k * h * v) - f(x - k * h * v)) for k, w in enumerate(WEIGHTS, start=1)]
    return sum(terms[1:], terms[0]) / h


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = float((got - want).norm() / want.norm())
    assert error < tolerance, error


@pytest.mark.parametrize("name", LOSSES)
def test_three_orders_against_differences(name: str) -> None:
    problem = problem_of(LOSSES[name])
    x = POINTS / POINTS.norm(dim=1, keepdim=True)
    a, b = A / A.norm(), B / B.norm()
    assert_near(problem.gradient(x) @ a, difference(problem.loss, x, a), TOLERANCE)
    assert_near(problem.hessian(x) @ a, difference(problem.gradient, x, a), TOLERANCE)
    third = difference(lambda z: problem.hessian(z) @ a, x, b)
    assert_near(problem.third_derivative(x, a, b), third, TOLERANCE)
    assert max(problem.derivative_errors(x[0]).values()) < 1e-8


# mpmath at 40 digits, in code of its own.

mp = mpmath.mp.clone()
mp.dps = 40


def exact(tensor: Tensor) -> list[Any]:
    return [exact(row) if row.dim() else mp.mpf(float(row)) for row in tensor]


def matmul(matrix: list[Any], columns: list[Any]) -> list[Any]:
    return [[mp.fdot(row, col) for col in zip(*columns, strict=True)] for row in matrix]


def mp_quadratic(x: list[Any]) -> Any:
    norm = mp.sqrt(mp.fdot(x, x))
    return mp.fsum(mp.fdot(row, x) ** 2 for row in exact(Z)) / norm**2 / 6


def mp_layer_norm(row: list[Any], eps: Any) -> list[Any]:
    mean = mp.fsum(row) / len(row)
    variance = mp.fsum((v - mean) ** 2 for v in row) / len(row)
    return [(v - mean) / mp.sqrt(variance + eps) for v in row]


def mp_layer_norm_cubed(x: list[Any]) -> Any:
    rows = matmul(exact(INPUTS), [x[3 * i : 3 * i + 3] for i in range(4)])
    cubes = [v**3 for row in rows for v in mp_layer_norm(row, mp.mpf(0.1))]
    return mp.fsum(cubes) / len(cubes)


def mp_network(x: list[Any]) -> Any:
    weights = [(x[2 * i : 2 * i + 2]) * 2 for i in range(3)]
    rows = matmul(exact(INPUTS[:, :3]), weights)
    size = mp.sqrt(mp.fdot(x[6:9], x[6:9]))
    total = mp.mpf(0)
    for row, label in zip(rows, LABELS.tolist(), strict=True):
        hidden = [mp.tanh(v) for v in mp_layer_norm(row, mp.mpf(1e-5))][:3]
        outputs = [h * w / size for h, w in zip(hidden, x[6:9], strict=True)]
        total += mp.log(mp.fsum(mp.exp(o) for o in outputs)) - outputs[label]
    return total / len(rows)


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        ("x / x.norm()", mp_quadratic),
        ("F.normalize", mp_quadratic),
        ("linalg.vector_norm", mp_quadratic),
        ("layer_norm", mp_layer_norm_cubed),
        ("tanh network", mp_network),
    ],
)
def test_three_orders_against_mpmath(name: str, truth: Callable[[list[Any]], Any]) -> None:
    problem, x = problem_of(LOSSES[name]), POINTS[0]
    point, a, b, c = (exact(v) for v in (x, A, B, C))

    def along(r: Any, s: Any, t: Any) -> Any:
        return truth([p + r * i + s * j + t * k for p, i, j, k in zip(point, a, b, c, strict=True)])

    want = [mp.diff(along, (0, 0, 0), order) for order in ((0, 0, 1), (0, 1, 1), (1, 1, 1))]
    got = [
        problem.gradient(x) @ C,
        B @ problem.hessian(x) @ C,
        problem.third_derivative(x, A, B) @ C,
    ]
    assert abs(float(problem.loss(x)) - along(0, 0, 0)) < 1e-14
    for value, true in zip(got, want, strict=True):
        assert abs(mp.mpf(float(value)) - true) < 1e-11 * max(abs(true), 1), (value, true)


def test_third_derivative_is_symmetric_and_batches() -> None:
    problem = problem_of(LOSSES["tanh network"])
    thirds = problem.third_derivative(POINTS, A, B)
    torch.testing.assert_close(thirds, problem.third_derivative(POINTS, B, A))
    for i, x in enumerate(POINTS):
        torch.testing.assert_close(thirds[i], problem.third_derivative(x, A, B))
    torch.testing.assert_close(thirds @ C, problem.third_derivative(POINTS, C, A) @ B)


# What torch differentiates wrongly is replaced, or refused.


@pytest.mark.parametrize(
    "function",
    [
        lambda h: F.layer_norm(h, (6, 5), eps=0.1),
        lambda h: torch.layer_norm(h, (5,)),
        nn.LayerNorm(5).double(),
        nn.BatchNorm1d(6, track_running_stats=False).double(),
        nn.BatchNorm1d(6).double().eval(),
        nn.InstanceNorm1d(6).double(),
        nn.InstanceNorm1d(6, affine=True, track_running_stats=True).double().eval(),
        lambda h: F.batch_norm(h, h.new_ones(6), 2 * h.new_ones(6), h.new_ones(6), h.new_ones(6)),
        lambda h: F.instance_norm(h, weight=2 * h.new_ones(6), bias=h.new_ones(6)),
        lambda h: torch.batch_norm(h, None, None, None, None, True, 0.1, 1e-5, False),
        lambda h: torch.instance_norm(h, None, None, None, None, True, 0.1, 1e-5, False),
    ],
)
def test_replacements_compute_the_same(function: Callable[[Tensor], Tensor]) -> None:
    h = normal(4, 6, 5)
    replaced = elementary(function, h)
    assert isinstance(replaced, ElementaryFunction)
    torch.testing.assert_close(replaced(h), function(h), rtol=1e-13, atol=1e-13)


def test_functions_that_torch_differentiates_rightly_are_left_alone() -> None:
    for name in ("x / x.norm()", "group_norm", "cross_entropy", "rms_norm"):
        assert elementary(LOSSES[name], POINTS[0]) is LOSSES[name]
    assert F.layer_norm in functions_called(LOSSES["layer_norm"], POINTS[0])


def frozen_deviation(x: Tensor) -> Tensor:
    """Layer norm whose derivative takes the deviation for a constant: torch's fault, by hand."""
    h = logits(x)
    h = h - h.mean(1, keepdim=True)
    return (h / (h.square().mean(1, keepdim=True).detach() + 0.1).sqrt()).pow(3).mean(1)


class DetachedBackward(torch.autograd.Function):
    """A square whose first derivative is right and whose second is not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0].detach() * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * tangent


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * cotangent


class NoForwardMode(DetachedBackward):
    jvp = torch.autograd.Function.jvp


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


BUFFER = torch.zeros(DIM, dtype=torch.float64)


def writes_on_a_captured_buffer(x: Tensor) -> Tensor:
    BUFFER.copy_(x)
    return (Z @ unit(BUFFER)).square()


def writes_on_a_new_tensor(x: Tensor) -> Tensor:
    y = torch.zeros(DIM, dtype=x.dtype)
    y[:] = x
    return (Z @ unit(y)).square()


def writes_on_a_clone(x: Tensor) -> Tensor:
    y = x.clone()
    y[0] = 2.0 * y[0]
    return (Z @ unit(y)).square()


def writes_on_its_argument(x: Tensor) -> Tensor:
    x /= x.norm()
    return (Z @ x).square()


def under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        norm = x.norm()
    return (Z @ (x / norm)).square()


def assigns_by_mask(x: Tensor) -> Tensor:
    y = Z @ unit(x)
    y[y < 0] = 0.0
    return y


def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy((Z.numpy() @ unit(x).detach().numpy()) ** 2)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "detach": (lambda x: (Z @ (x / x.norm().detach())).square(), "no detach()"),
    "data": (lambda x: (Z @ (x / x.data.norm())).square(), ".data"),
    "no_grad": (under_no_grad, "torch.no_grad()"),
    "straight-through": (lambda x: Z @ x + (torch.sign(Z @ x) - Z @ x).detach(), "no detach()"),
    "all detached": (lambda x: (Z @ unit(x.detach())).square(), "no detach()"),
    "item": (lambda x: (Z @ (x / x.norm().item())).square(), "no .item()"),
    "branch": (lambda x: (Z @ unit(x)).square() if x[0] > 0 else Z @ unit(x), "torch.where"),
    "captured buffer": (writes_on_a_captured_buffer, "torch.stack"),
    "new tensor": (writes_on_a_new_tensor, "torch.cat"),
    "clone": (writes_on_a_clone, "torch.cat"),
    "argument": (writes_on_its_argument, "nothing written into a tensor"),
    "mask": (assigns_by_mask, "torch.where(mask"),
    "numpy": (through_numpy, "no numpy"),
    "old-style Function": (lambda x: OldStyle.apply(Z @ unit(x)), "setup_context"),
    "no forward mode": (lambda x: NoForwardMode.apply(Z @ unit(x)), "jvp"),
    "detached backward": (lambda x: DetachedBackward.apply(Z @ unit(x)), "backward and jvp"),
    "cdist": (lambda x: torch.cdist(unit(x)[None], Z)[0], "for cdist"),
    "huber_loss": (
        lambda x: F.huber_loss(Z @ unit(x), Z[:, 0], reduction="none"),
        "of huber_loss",
    ),
    "norm with p=3": (lambda x: (x / torch.norm(x, p=3)).square(), "(x * x).sum().sqrt()"),
    "native_layer_norm": (
        lambda x: torch.native_layer_norm(logits(x), (3,), None, None, 0.1)[0].pow(3).mean(1),
        "functional.layer_norm for native",
    ),
    "a small share of native_layer_norm": (
        lambda x: (
            (Z @ unit(x)).square()
            + 1e-9 * torch.native_layer_norm(logits(x), (3,), None, None, 0.1)[0].pow(3).mean(1)
        ),
        "functional.layer_norm for native",
    ),
    "dropout": (lambda x: F.dropout(Z @ unit(x), 0.5).square(), "switch dropout off"),
    "a small share of dropout": (
        lambda x: (Z @ unit(x)).square() * (1.0 + 1e-11 * F.dropout(torch.ones(6), 0.5)),
        "switch dropout off",
    ),
    "numbers of Python's": (lambda x: (Z @ unit(x)) * random.random(), "switch dropout off"),
    "random numbers": (lambda x: torch.randn(5, DIM, dtype=x.dtype) @ unit(x), "outside"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_losses_that_cannot_be_differentiated_are_refused_with_what_to_write(name: str) -> None:
    loss, way_out = REFUSED[name]
    with pytest.raises(errors.DifferentiationError) as caught:
        problem_of(loss)
    assert way_out in caught.value.remedy
    assert caught.value.received
    assert caught.value.expected


def test_a_loss_may_differ_by_rounding_from_call_to_call() -> None:
    """As linear algebra does, whose last digits depend on where its arguments lie in memory."""
    calls = itertools.count()

    def loss(x: Tensor) -> Tensor:
        return (Z @ unit(x)).square().mean() * (1.0 + 2e-15 * (next(calls) % 2))

    x = normal(DIM)
    want = torch.func.grad(lambda x: (Z @ unit(x)).square().mean())(x)
    torch.testing.assert_close(problem_of(loss).gradient(x), want, rtol=1e-14, atol=1e-14)


def test_a_derivative_that_is_infinite_is_refused() -> None:
    with pytest.raises(errors.NonFiniteError, match="second derivative"):
        problem_of(lambda x: (x[0] - x[0]).abs().pow(1.5) + (Z @ unit(x)).square().mean())


def test_derivative_errors_find_torchs_fault_where_it_is_still_there() -> None:
    plain = Loss(LOSSES["layer_norm"], DIM, 6)
    replaced = Loss(elementary(LOSSES["layer_norm"], POINTS[0]), DIM, 6)
    x = loss_checks.fixed_directions(DIM, 1)[0]
    assert loss_checks.derivative_errors(replaced, x)["third"][0] < 1e-8
    error, reliable = loss_checks.derivative_errors(plain, x)["third"]
    want = difference(lambda z: plain.hessian_product(z, A), x, B)
    torch_is_right = float((plain.third_derivative(x, A, B) - want).norm() / want.norm()) < 1e-6
    assert torch_is_right or (error > 1e-3 and reliable)


@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-4])
def test_a_wrong_derivative_shows_however_small_its_share_is(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences alone find torch's fault in ``slogdet``, where its call is not known as wrong."""
    monkeypatch.setattr(loss_checks, "wrong_operations", lambda *_: [])

    def function(x: Tensor) -> Tensor:
        matrix = 2.0 * torch.eye(3, dtype=x.dtype) + unit(x)[:9].reshape(3, 3)
        return (Z @ unit(x)).square() + share * torch.linalg.slogdet(matrix)[1]

    with pytest.raises(errors.DifferentiationError, match="third derivative"):
        loss_checks.require_derivatives(Loss(function, DIM, 6), function, "loss")
    replaced = elementary(function, POINTS[0])
    loss_checks.require_derivatives(Loss(replaced, DIM, 6), replaced, "loss")


def test_products_and_transposed_products_are_those_of_torch() -> None:
    """Without its compiler, alone, within each other and batched."""

    def f(x: Tensor) -> Tensor:
        return torch.tanh(Z @ unit(x))

    w, x = Z[:, 0], POINTS[0]

    def twice(z: Tensor) -> Tensor:
        return reverse_mode.product(lambda y: reverse_mode.product(f, y, A), z, B)

    def pulled(z: Tensor) -> Tensor:
        return reverse_mode.vjp(f, z)[1](w)

    def found() -> list[Tensor]:
        nothing = reverse_mode.vjp(lambda z: w, x)[1](w)
        parts = [reverse_mode.vjp(f, x)[0], pulled(x), twice(x), nothing]
        return [*parts, vmap(twice)(POINTS), reverse_mode.product(pulled, x, A)]

    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "torch._dynamo", raising=False)
        patch.setattr(torch.func, "vjp", None)
        alone = found()
    importlib.import_module("torch._dynamo")
    for one, two in zip(alone, found(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-14, atol=1e-14)
    slope = torch.func.jvp(lambda z: torch.func.jvp(f, (z,), (A,))[1], (POINTS[0],), (B,))[1]
    torch.testing.assert_close(alone[2], slope, rtol=1e-13, atol=1e-13)


def test_residuals_need_reverse_mode_alone() -> None:
    """Torch's ``huber_loss`` has no forward mode of its slope, and nothing here asks for one."""
    p = LeastSquaresProblem(
        lambda x: F.huber_loss(Z @ unit(x), Z[:, 0], reduction="none"), DIM, SphericalNoise(0.3)
    )
    x, f = POINTS[0], p.pointwise
    assert f.reverses
    assert not f.forwards
    assert_near(f.residual_product(x, A), difference(f.residuals, x, A), 1e-9)
    vectors = normal(len(Z), DIM)
    rows = [difference(lambda z, i=i: f.jacobian(z)[i], x, v) for i, v in enumerate(vectors)]
    assert_near(f.bend(x, 0, len(Z), vectors), torch.stack(rows).sum(0), 1e-9)
    f.reverses, f.forwards = False, True
    with pytest.raises(NotImplementedError):
        f.hessian_product(x, A)


def test_a_function_that_writes_on_its_argument_is_refused() -> None:
    with pytest.raises(errors.DifferentiationError, match="nothing written into a tensor"):
        LeastSquaresProblem(writes_on_its_argument, DIM, SphericalNoise(0.3))
    with pytest.raises(errors.DifferentiationError, match="nothing written into a tensor"):
        problem_of(lambda x: writes_on_its_argument(x).mean())


def test_a_loss_without_samples_needs_reverse_mode_alone() -> None:
    """Torch's ``huber_loss`` has no forward mode; a function of the user's is asked for it."""
    p = problem_of(lambda x: F.huber_loss(Z @ unit(x), Z[:, 0]))
    assert p.pointwise.reverses
    x, f = POINTS[0], p.pointwise
    want = difference(lambda z: f.hessian_product(z, A), x, B)
    assert_near(f.third_derivative(x, A, B), want, 1e-7)
    with pytest.raises(NotImplementedError):
        derivatives.third_derivative(f.function, x, A, B)
    assert not derivatives.has_custom_derivative(f.function, x)
    assert derivatives.has_custom_derivative(lambda x: NoForwardMode.apply(unit(x)).sum(), x)
    with pytest.raises(errors.DifferentiationError):
        problem_of(lambda x: NoForwardMode.apply(Z @ unit(x)).mean())


@pytest.mark.parametrize("loaded", [False, True])
def test_the_gradient_is_that_of_torch_with_its_compiler_loaded_or_not(
    loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loaded:
        importlib.import_module("torch._dynamo")
    else:
        monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
        # It would be loaded here.
        monkeypatch.setattr(torch.func, "grad", None)
    points = POINTS
    free = torch.ones(2, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return (Z @ unit(x)).pow(3).sum() + x[0].exp()

    def along(g: Any, x: Tensor) -> Tensor:
        return g(lambda z: g(f)(z) @ A)(x)

    found = [
        reverse_mode.grad(f)(points[0]),
        vmap(reverse_mode.grad(f))(points),
        along(reverse_mode.grad, points[0]),
        vmap(lambda x: along(reverse_mode.grad, x))(points),
        torch.func.jvp(reverse_mode.grad(f), (points[0],), (A,))[1],
        reverse_mode.grad(lambda x: x.new_ones(()))(points[0]),
        reverse_mode.grad(lambda x: free.sum())(points[0]),
    ]
    with torch.no_grad():
        assert torch.equal(reverse_mode.grad(f)(points[0]), found[0])
    monkeypatch.undo()
    grad = torch.func.grad
    want = [
        grad(f)(points[0]),
        vmap(grad(f))(points),
        along(grad, points[0]),
        vmap(lambda x: along(grad, x))(points),
        torch.func.jvp(grad(f), (points[0],), (A,))[1],
        torch.zeros_like(points[0]),
        torch.zeros_like(points[0]),
    ]
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)


def test_broken_twin_deviation_held_fixed() -> None:
    with pytest.raises(errors.DifferentiationError, match="first derivative"):
        problem_of(frozen_deviation)
    twin = Loss(frozen_deviation, DIM, 6)
    want = difference(twin.loss, POINTS[0], A)
    with pytest.raises(AssertionError):
        assert_near(twin.gradient(POINTS[0]) @ A, want, TOLERANCE)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: 1e6 + (Z @ unit(x)).square(),
        lambda x: 1e-12 * (Z @ unit(x)).square(),
        lambda x: 1e12 * (Z @ unit(x)).square(),
        lambda x: (Z.float() @ unit(x).float()).double(),
        lambda x: F.relu(Z @ unit(x)),
        lambda x: F.max_pool1d(logits(unit(x)), 3)[:, 0],
        lambda x: 0.0 * x.sum(),
        lambda x: (50.0 * Z @ unit(x)).sin(),
        lambda x: (Z[0] @ unit(x)).expand(3),
    ],
)
def test_no_false_alarm(loss: Callable[[Tensor], Tensor]) -> None:
    """Huge and tiny values, kinks, single precision inside, constants, fast oscillation."""
    problem_of(loss)


# Functions of one point, batched.


def test_reverse_mode_alone_does_the_same() -> None:
    x = POINTS[0]
    for name, function in LOSSES.items():
        loss = problem_of(function).pointwise
        assert loss.reverses, name
        forward = copy.copy(loss)
        forward.reverses = False
        for derivative, more in (("hessian_product", (A,)), ("third_derivative", (A, B))):
            found, wanted = (getattr(one, derivative) for one in (loss, forward))
            assert_near(found(x, *more), wanted(x, *more), 1e-12)


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_what_reverse_mode_does_not_do_is_left_to_forward_mode(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twins: a function that torch does not reverse three times, or reverses wrongly."""
    right = reverse_mode.third_derivative

    def broken(*arguments: Any) -> Tensor:
        if fault == "raises":
            raise RuntimeError("no third reverse mode")
        return right(*arguments) * (1.0 + 1e-9)

    monkeypatch.setattr(reverse_mode, "third_derivative", broken)
    samples = LOSSES["softplus"]
    least_squares = LeastSquaresProblem(samples, DIM, SphericalNoise(0.3))
    for p in (problem_of(samples), problem_of(lambda x: samples(x).mean()), least_squares):
        assert not p.pointwise.reverses
        assert p.pointwise.forwards
        want = difference(lambda z, f=p.pointwise: f.hessian_product(z, A), POINTS[0], B)
        assert_near(p.pointwise.third_derivative(POINTS[0], A, B), want, 1e-7)


def test_batched_keeps_batch_shapes() -> None:
    x = normal(2, 3, 4)

    def function(z: Tensor, m: Tensor) -> Tensor:
        return m @ z

    matrix = normal(5, 4)
    dims = (1, 2)
    assert derivatives.batched(function, x[0, 0], matrix, event_dims=dims).shape == (5,)
    assert derivatives.batched(function, x[0], matrix, event_dims=dims).shape == (3, 5)
    got = derivatives.batched(function, x, matrix, event_dims=dims)
    torch.testing.assert_close(got, x @ matrix.T)
    crossed = derivatives.batched(function, x[0, 0], normal(2, 1, 5, 4), event_dims=dims)
    assert crossed.shape == (2, 1, 5)
    for shape in ((0, 4), (2, 0, 4), (0, 3, 4)):
        empty = derivatives.batched(function, x.new_zeros(shape), matrix, event_dims=dims)
        assert empty.shape == (*shape[:-1], 5)


def test_batched_refuses_what_does_not_fit() -> None:
    def plus(a: Tensor, b: Tensor) -> Tensor:
        return a + b

    x = normal(3, 4)
    with pytest.raises(errors.ShapeError, match=r"\(3, 4\) and \(2, 4\)"):
        derivatives.batched(plus, x, x[:2], event_dims=(1, 1))
    with pytest.raises(errors.DTypeError, match="float64 on cpu and"):
        derivatives.batched(plus, x, x.float(), event_dims=(1, 1))
    with pytest.raises(errors.DTypeError, match="on meta"):
        derivatives.batched(plus, x, x.to("meta"), event_dims=(1, 1))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (["a", "b"], errors.DTypeError, "builtins.list"),
        ([1.0, 2.0], errors.ShapeError, r"\(2,\)"),
        (None, errors.DTypeError, "NoneType"),
        (torch.ones(4, dtype=torch.int64), errors.DTypeError, "torch.int64"),
        (torch.ones(4, dtype=torch.complex128), errors.DTypeError, "complex128"),
        (torch.ones(4, dtype=torch.float16), errors.DTypeError, "torch.float16"),
        (torch.ones(4, dtype=torch.bfloat16), errors.DTypeError, "bfloat16"),
        (torch.ones(3), errors.ShapeError, r"\(3,\)"),
        (torch.ones(4, 3), errors.ShapeError, r"\(4, 3\)"),
        (torch.tensor(1.0), errors.ShapeError, r"\(\)"),
        (torch.tensor([1, math.nan, 1, 1.0]), errors.NonFiniteError, "1 of 1 points"),
        (torch.tensor([[1, 1, 1, 1.0], [1, math.inf, 1, 1]]), errors.NonFiniteError, "1 of 2"),
        (torch.zeros(4), errors.ZeroVectorError, "1 of 1 points"),
        (torch.tensor([[0, 0, 0, 0.0], [1, 1, 1, 1]]), errors.ZeroVectorError, "1 of 2"),
    ],
)
def test_points_that_cannot_be_used(x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        arguments.check_point(x, 4, name="start")
    assert str(caught.value).startswith("start ")
    assert "hint" in str(caught.value)


def test_points_that_can_be_used_come_back_as_they_are() -> None:
    for x in (torch.ones(4), torch.ones(2, 0, 4), torch.ones(4, device="meta"), normal(2, 3, 4)):
        assert arguments.check_point(x, 4) is x
    zero = torch.zeros(4)
    assert arguments.check_point(zero, 4, allow_zero=True) is zero
    assert vmap(lambda x: arguments.check_point(x, 4) * 2.0)(torch.ones(3, 4)).shape == (3, 4)


@pytest.mark.parametrize("value", [3, 3.0, "3", None, True, torch.tensor(3)])
def test_integers_of_any_kind(value: object) -> None:
    import numpy as np

    assert arguments.integer(value) == (3 if type(value) is int else None)
    assert arguments.integer(np.int32(3)) == 3
    assert arguments.integer(np.True_) is None


def test_single_precision_stays_single() -> None:
    """Forward mode of torch 2.13 makes a number less a Python number double."""

    def loss(x: Tensor) -> Tensor:
        return (x[2] / x.norm() - 0.6) ** 2 * (1.0 + 0.5 * x[0] / x.norm())

    problem = Problem(loss, 3, SphericalNoise(0.1))
    x = torch.tensor([[0.3, -0.4, 0.9], [1.0, 0.2, 0.1]])
    for points in (x, x[0]):
        assert problem.hessian(points).dtype == torch.float32
    assert derivatives.third_derivative(loss, x[0], x[1], x[1]).dtype == torch.float32
    exact = problem.hessian(x.double())
    torch.testing.assert_close(problem.hessian(x).double(), exact, rtol=1e-4, atol=1e-5)
