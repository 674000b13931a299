"""Normalisation layers: torch's own layers, scale invariance, constant groups, derivatives."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp

from manifold_sde import errors
from manifold_sde.networks import GhostBatchNorm, GroupNorm, LayerNorm, WeightNorm

GENERATOR = torch.Generator().manual_seed(3)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


LAYERS: dict[str, tuple[nn.Module, nn.Module, Tensor]] = {
    # ours, torch's with an eps that is no more than rounding, and values
    "layer": (LayerNorm(6), nn.LayerNorm(6, eps=1e-30, elementwise_affine=False), normal(5, 6)),
    "layer of several": (
        LayerNorm((4, 6)),
        nn.LayerNorm((4, 6), eps=1e-30, elementwise_affine=False),
        normal(5, 4, 6),
    ),
    "group": (GroupNorm(2, 6), nn.GroupNorm(2, 6, eps=1e-30, affine=False), normal(5, 6, 3, 3)),
    "whole batch": (
        GhostBatchNorm(None, 6),
        nn.BatchNorm2d(6, eps=1e-30, affine=False, track_running_stats=False),
        normal(5, 6, 3, 3),
    ),
}


@pytest.mark.parametrize("which", LAYERS)
def test_values_are_those_of_torch_without_eps(which: str) -> None:
    ours, torchs, x = LAYERS[which]
    torch.testing.assert_close(ours(x), torchs(x), rtol=1e-12, atol=1e-13)


def test_ghost_batches_are_batches_by_themselves() -> None:
    x = normal(12, 5, 2, 2)
    blocks = [GhostBatchNorm(None)(part) for part in x.split(4)]
    torch.testing.assert_close(GhostBatchNorm(4, 5)(x), torch.cat(blocks), rtol=1e-13, atol=1e-14)


def test_weights_are_normalised_row_by_row() -> None:
    linear = nn.Linear(4, 3, bias=False).double()
    x = normal(5, 4)
    rows = linear.weight / torch.linalg.vector_norm(linear.weight, dim=1, keepdim=True)
    torch.testing.assert_close(WeightNorm(linear)(x), x @ rows.T)
    convolution = nn.Conv2d(2, 3, 3, padding=1, stride=2, bias=False).double()
    images = normal(5, 2, 6, 6)
    before = WeightNorm(convolution)(images)
    norms = convolution.weight.detach().flatten(1).norm(dim=1)
    want = convolution(images) / norms[:, None, None]
    torch.testing.assert_close(before, want)
    with torch.no_grad():
        convolution.weight *= torch.tensor([1e-3, 2.0, 1e3])[:, None, None, None]
    torch.testing.assert_close(WeightNorm(convolution)(images), before, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 1.7, 1e3])
@pytest.mark.parametrize("which", LAYERS)
def test_scale_invariant_at_every_scale(which: str, scale: float) -> None:
    ours, _, x = LAYERS[which]
    assert (ours(scale * x) - ours(x)).abs().max() < 1e-12


def test_broken_twin_eps_of_torch() -> None:
    x = 1e-2 * normal(5, 6)
    layer = nn.LayerNorm(6, elementwise_affine=False)
    assert (layer(0.5 * x) - layer(x)).abs().max() > 1e-3


def constant_group(which: str) -> Tensor:
    """Values of which the first group is constant up to rounding, and the others are not."""
    x = LAYERS[which][2].clone()
    match which:
        case "layer" | "layer of several":
            x[0] = 0.1
        case "group":
            x[0, :3] = 0.1
        case _:
            x[:, 0] = 0.1
    return x


@pytest.mark.parametrize("which", LAYERS)
def test_constant_groups_are_zero_with_their_derivatives(which: str) -> None:
    ours, x = LAYERS[which][0], constant_group(which)
    direction, weights = normal(*x.shape), normal(*x.shape)

    def function(z: Tensor) -> Tensor:
        return (weights * ours(z) ** 3).sum()

    def along(z: Tensor) -> Tensor:
        return jvp(grad(function), (z,), (direction,))[1]

    third = jvp(along, (x,), (direction,))[1]
    zero = (ours(x) == 0) & (x == 0.1)
    assert bool(zero.any())
    for values in (ours(x), grad(function)(x), along(x), third):
        assert bool(values.isfinite().all())
        assert float(values[zero].abs().max()) == 0.0
        assert float(values[~zero].abs().min()) > 0.0
    with_others = ours(LAYERS[which][2])[~zero]
    torch.testing.assert_close(ours(x)[~zero], with_others, rtol=1e-13, atol=1e-13)


def test_a_group_of_zeros_has_derivatives_of_zero() -> None:
    x, direction = normal(5, 6), normal(5, 6)
    x[0] = 0.0

    def along(z: Tensor) -> Tensor:
        return jvp(grad(lambda y: (LayerNorm(6)(y) ** 3).sum()), (z,), (direction,))[1]

    for values in (along(x), jvp(along, (x,), (direction,))[1]):
        assert bool((values[0] == 0).all())
        assert bool(values[1:].isfinite().all())


def test_a_filter_of_zeros_has_no_nan() -> None:
    layer = WeightNorm(nn.Linear(4, 3, bias=False).double())
    with torch.no_grad():
        layer.layer.weight[1] = 0.0
    layer(normal(5, 4)).square().sum().backward()
    assert layer.layer.weight.grad is not None
    assert bool(layer.layer.weight.grad.isfinite().all())
    assert float(layer.layer.weight.grad[1].abs().max()) == 0.0


@pytest.mark.parametrize("which", LAYERS)
def test_derivatives_of_four_orders_against_differences(which: str) -> None:
    ours, _, x = LAYERS[which]
    a, weights, h = normal(*x.shape), normal(*x.shape), 1e-4

    def along(order: int) -> Callable[[Tensor], Tensor]:
        def derivative(z: Tensor) -> Tensor:
            if order == 0:
                return (weights * torch.tanh(ours(z))).sum()
            return jvp(along(order - 1), (z,), (a,))[1]

        return derivative

    for order in range(1, 5):
        below = along(order - 1)
        quotient = (
            8 * (below(x + h * a) - below(x - h * a)) - below(x + 2 * h * a) + below(x - 2 * h * a)
        ) / (12 * h)
        torch.testing.assert_close(along(order)(x), quotient, rtol=1e-6, atol=1e-6)


def test_single_precision_and_batches_of_vmap() -> None:
    x = normal(3, 5, 6)
    for layer in (LayerNorm(6), GhostBatchNorm(5)):
        inside = torch.vmap(layer)(x)
        torch.testing.assert_close(inside, torch.stack([layer(z) for z in x]))
        assert layer(x[0].float()).dtype == torch.float32
    assert jacrev(LayerNorm(6))(x[0, 0]).shape == (6, 6)


NOT_NUMBERS = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", NOT_NUMBERS)
@pytest.mark.parametrize("which", LAYERS)
def test_what_is_not_finite_stays_so(which: str, bad: float) -> None:
    """NaN in its own group, whose values and derivatives it takes with it, and nowhere else."""
    ours, x = LAYERS[which][0], LAYERS[which][2].clone()
    group = ours(constant_group(which)) == 0
    x[(0,) * x.dim()] = bad
    for values in (ours(x), torch.vmap(ours)(x[None])[0], grad(lambda z: (ours(z) ** 3).sum())(x)):
        assert bool(values[group].isnan().all())
        assert bool(values[~group].isfinite().all())


@pytest.mark.parametrize("bad", NOT_NUMBERS)
def test_a_filter_that_is_not_finite_is_seen(bad: float) -> None:
    layer = WeightNorm(nn.Linear(4, 3, bias=False).double())
    with torch.no_grad():
        layer.layer.weight[1, 2] = bad
    out = layer(normal(5, 4))
    assert bool(out[:, 1].isnan().all())
    assert bool(out[:, [0, 2]].isfinite().all())


def test_broken_twin_nan_becomes_zero() -> None:
    """As it was: a comparison that NaN fails chose the branch of the constant groups."""
    x = normal(5, 6)
    x[0, 0] = math.nan
    centred = x - x.mean(-1, keepdim=True)
    square = (centred * centred).mean(-1, keepdim=True)
    twin = torch.where(square > 0, centred * square.rsqrt(), 0.0)
    assert bool((twin[0] == 0).all())
    assert bool(LayerNorm(6)(x)[0].isnan().all())


@pytest.mark.compile
def test_compiled_layers_do_the_same() -> None:
    layer = LayerNorm(6)
    x = normal(6, 6)
    x[0, 0], x[1], x[2, 3], x[3] = math.nan, 0.1, math.inf, 1e200 * x[3]
    compiled = torch.compile(layer)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-13, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
@pytest.mark.parametrize("which", LAYERS)
def test_values_whose_squares_are_out_of_range(which: str, scale: float) -> None:
    ours, x = LAYERS[which][0], LAYERS[which][2]
    torch.testing.assert_close(ours(scale * x), ours(x), rtol=1e-13, atol=1e-13)

    def function(z: Tensor) -> Tensor:
        return (ours(z) ** 3).sum()

    # Of degree -1.
    torch.testing.assert_close(
        scale * grad(function)(scale * x), grad(function)(x), rtol=1e-11, atol=1e-11
    )


def test_filters_and_single_precision_out_of_range() -> None:
    layer = WeightNorm(nn.Linear(4, 3, bias=False).double())
    x = normal(5, 4)
    before = layer(x)
    with torch.no_grad():
        layer.layer.weight *= torch.tensor([[1e-200], [1.0], [1e200]], dtype=torch.float64)
    torch.testing.assert_close(layer(x), before, rtol=1e-13, atol=1e-13)
    values = normal(5, 6).float()
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(
            LayerNorm(6)(scale * values), LayerNorm(6)(values), rtol=1e-5, atol=1e-5
        )


ERRORS: dict[str, tuple[type[Exception], Callable[[], object], str]] = {
    "size": (errors.ArgumentError, lambda: LayerNorm(0), "not an integer"),
    "shape": (errors.ShapeError, lambda: LayerNorm(5)(normal(2, 6)), "dimensions"),
    "groups": (errors.ArgumentError, lambda: GroupNorm(4, 6), "multiple"),
    "channels": (errors.ShapeError, lambda: GroupNorm(2, 6)(normal(2, 5)), "channels"),
    "one sample": (errors.ArgumentError, lambda: GhostBatchNorm(1), "statistics"),
    "blocks": (errors.ShapeError, lambda: GhostBatchNorm(4)(normal(6, 2)), "multiple of 4"),
    "two values": (errors.ShapeError, lambda: LayerNorm(2)(normal(5, 2)), "always -1 and 1"),
    "two samples": (errors.ShapeError, lambda: GhostBatchNorm(2)(normal(4, 5)), "ghost batches"),
    "bias": (errors.ArgumentError, lambda: WeightNorm(nn.Linear(2, 2)), "bias=False"),
    "layer": (errors.DTypeError, lambda: WeightNorm(nn.Tanh()), "Linear"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("which", ERRORS)
def test_errors_name_the_way_out(which: str) -> None:
    kind, call, words = ERRORS[which]
    with pytest.raises(kind, match=words):
        call()
