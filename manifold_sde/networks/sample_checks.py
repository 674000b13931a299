"""What every sample has to do before its loss is taken for a function of the weights.

Checks on a few samples miss what is wrong with the others: these look at all, in a few passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_sde import derivatives, loss_checks, remedies, reverse_mode
from manifold_sde.errors import (
    ArgumentError,
    DifferentiationError,
    ManifoldSDEError,
    NonFiniteError,
)
from manifold_sde.networks.function import NetworkFunction
from manifold_sde.networks.observation import layer_not_finite, observe
from manifold_sde.progress import Progress
from manifold_sde.torch_norms import ElementaryFunction

#: Relative change of a value that is no rounding.
SAME = 1e-9
#: Fewest blocks of samples that are looked at together, and into how many parts the data come.
_TOGETHER, _PARTS = 64, 16
#: Steps of the difference quotients, so small that next to no kink of relu lies within.
_STEPS = (1e-5, 1e-7)
#: Relative difference between a derivative and the quotients that is an error, with these steps.
_TOLERANCE = 1e-5
#: Distance of the test point from the module's weights, relative to their norm.
_SPREAD = 0.1


def check_places(network: NetworkFunction) -> None:
    """Refuse samples whose outputs or losses depend on their place or number in the batch.

    Args:
        network: The network; blocks of samples do not act on each other in it.

    Raises:
        ArgumentError: With a hint.
    """
    count = network.n_blocks
    if count < 2:
        return
    x = _test_point(network)
    outputs, losses = (ElementaryFunction(f)(x) for f in (network.outputs, network.losses))
    if not bool(torch.isfinite(losses).all()):
        return  # which check_all_samples tells
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    if bool((order == torch.arange(count)).all()):
        order = order.flip(0)
    trials = [(order.tolist(), "the place of a sample", "the samples are in another order")]
    alone = f"a {'sample' if network.block == 1 else 'ghost batch'} is alone"
    trials += [([i], "the number of samples", alone) for i in sorted({0, count // 2, count - 1})]
    for blocks, what, when in trials:
        part = network.of_blocks(blocks)
        rows = torch.arange(count * network.block).reshape(count, -1)[blocks].flatten()
        for who, function, whole, size in (
            ("outputs of the module", part.outputs, outputs[rows], outputs.abs().max()),
            (
                f"losses of the criterion {network.criterion.name}",
                part.losses,
                losses[blocks],
                losses.abs().max(),
            ),
        ):
            received = _difference(function, x, whole, float(size))
            if received is None:
                continue
            observe(network, x)  # rounding is another fault
            raise ArgumentError(
                f"the {who} depend on {what} in the batch",
                received=f"{received} when {when}",
                expected="an output and a loss for each sample that are the same in every batch",
                remedy="make what belongs to a sample an input, inputs=(X, mask), or a column of "
                "the targets; no len(x), no mask[:len(x)], no mean over the batch, and "
                "x.flatten(1) in place of x.view(32, -1)"
                + ("" if network.block > 1 else "; ghost_size=B for samples that belong together"),
            )


def _difference(
    function: Callable[[Tensor], Tensor], x: Tensor, whole: Tensor, size: float
) -> str | None:
    """In words, how a value differs from what it is in the whole, if it does."""
    try:
        value = ElementaryFunction(function)(x)
    except ManifoldSDEError:
        raise
    except Exception as error:
        return remedies.first_line(error)
    if value.shape != whole.shape:
        return f"shape {tuple(value.shape)} in place of {tuple(whole.shape)}"
    off = float((value - whole).abs().max())
    return None if off <= SAME * size else f"values that differ by {off / size:.2g} of their size"


def check_all_samples(
    network: NetworkFunction,
    progress: bool | str = False,
    alone: Callable[[], bool] = lambda: False,
) -> bool:
    """Refuse a network that is wrong on any of its samples.

    Looked at are what it computes, by :func:`~manifold_sde.networks.observation.observe`, and a
    fixed random sum of the losses, or residuals, of some samples after the other: whether it and
    three derivatives are finite, and whether the first two are those of what it computes.

    Args:
        network: The network.
        progress: Whether to show a progress bar, or its label.
        alone: Whether forward mode is not looked at, as long as reverse mode is right; asked once
            it is known what the first samples compute.

    Returns:
        Whether reverse mode alone was looked at, and is right on all samples.

    Raises:
        NonFiniteError, DTypeError, DifferentiationError, ArgumentError: With the sample or the
            layer at fault.
    """
    x = _test_point(network)
    with Progress(progress, "samples looked at", total=network.n_blocks) as bar:
        for blocks in _parts(network):
            if not _is_right(network, x, blocks, alone):
                break
            bar.update(len(blocks))
        else:
            return alone()
    return check_all_samples(network, progress)


def _is_right(
    network: NetworkFunction, x: Tensor, blocks: list[int], alone: Callable[[], bool]
) -> bool:
    """The same of some blocks of samples; not said by an error where reverse mode is alone."""
    part = network.of_blocks(blocks) if network.samples else network
    single = torch.promote_types(torch.float32, network.start.dtype)
    for dtype in dict.fromkeys((x.dtype, single)):
        with remedies.differentiating(1):
            observe(part, x.to(dtype))
    if alone():
        try:
            return _fault(part, x, alone=True) is None
        except ManifoldSDEError:
            return False
    fault = _fault(part, x)
    if fault is None:
        return True
    while len(blocks) > 1 and network.samples:
        halves = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
        found = [(half, _fault(network.of_blocks(half), x)) for half in halves]
        wrong = next(((half, fault) for half, fault in found if fault is not None), None)
        if wrong is None:
            break
        blocks, fault = wrong
    part = network.of_blocks(blocks) if network.samples else network
    raise _error(part, x, fault, _named(network, blocks))


def _parts(network: NetworkFunction) -> list[list[int]]:
    count = network.n_blocks
    size = max(_TOGETHER, -(-count // _PARTS)) if network.samples else count
    if network.per_pass:
        # A third derivative holds more than a gradient, for which passes are planned.
        size = min(size, max(1, network.per_pass // derivatives.THIRD_COPIES))
    return [list(range(i, min(i + size, count))) for i in range(0, count, size)]


def _named(network: NetworkFunction, blocks: list[int]) -> str:
    kind = "sample" if network.block == 1 else "ghost batch"
    if not network.samples or (len(blocks) == network.n_blocks > 1):
        return "the loss"
    return f"{kind} {blocks[0]}" + (f" to {blocks[-1]}" if len(blocks) > 1 else "")


def _test_point(network: NetworkFunction) -> Tensor:
    """A generic point near the module's weights, in double precision: (D,)."""
    start = network.start.to(device="cpu", dtype=torch.float64)
    size = float(start.norm())
    direction = loss_checks.fixed_directions(network.weights.dim, 1)[0]
    return start + _SPREAD * size * direction if 0.0 < size < torch.inf else direction


class _Fault(NamedTuple):
    """What is wrong with a function: the order of its derivative, and the error measured."""

    order: int
    error: float


def _fault(network: NetworkFunction, x: Tensor, *, alone: bool = False) -> _Fault | None:
    """What is wrong with a random sum of the losses or residuals of some samples, if anything.

    Reverse mode may be looked at alone.
    """
    function = ElementaryFunction(network)
    value = function(x)
    if not bool(torch.isfinite(value).all()):
        return _Fault(0, torch.nan)
    weights = loss_checks.fixed_directions(max(value.numel(), 2), 1)[0][: value.numel()]

    def total(z: Tensor) -> Tensor:
        return function(z).flatten() @ weights

    size = float(x.norm())
    along = loss_checks.fixed_directions(len(x), 2)[1] + x / size
    along = along / along.norm()
    steps = [h * size for h in _STEPS]
    points = [(x + h * along, x - h * along, 2.0 * h) for h in steps]
    gradient = _derivative(1, partial(reverse_mode.gradient, total, x))
    if not bool(torch.isfinite(gradient).all()):
        return _Fault(1, torch.nan)
    quotients = [(total(ahead) - total(behind)) / h for ahead, behind, h in points]
    first = loss_checks.compare(gradient @ along, quotients, float(value.norm()) / size)
    if _wrong(first):
        return _Fault(1, first[0])
    quotients = [
        (reverse_mode.gradient(total, ahead) - reverse_mode.gradient(total, behind)) / h
        for ahead, behind, h in points
    ]
    modes = (reverse_mode,) if alone else (derivatives, reverse_mode)
    for order_of_modes in (mode.hessian_product for mode in modes):
        product = _derivative(2, partial(order_of_modes, total, x, along))
        if not bool(torch.isfinite(product).all()):
            return _Fault(2, torch.nan)
        second = loss_checks.compare(product, quotients, float(gradient.norm()) / size)
        if _wrong(second):
            return _Fault(2, second[0])
    third = _derivative(3, partial(modes[0].third_derivative, total, x, along, along))
    return None if bool(torch.isfinite(third).all()) else _Fault(3, torch.nan)


def _derivative(order: int, compute: Callable[[], Tensor]) -> Tensor:
    with remedies.differentiating(order):
        return compute()


def _wrong(measured: tuple[float, bool]) -> bool:
    return measured[0] > _TOLERANCE and measured[1]


def _error(network: NetworkFunction, x: Tensor, fault: _Fault, who: str) -> ManifoldSDEError:
    order, off = fault
    what = "value" if order == 0 else f"{remedies.ordinal(order)} derivative"
    if off != off:
        return NonFiniteError(
            f"the {what} of {'' if who == 'the loss' else 'the loss of '}{who} is not finite",
            received=f"NaN or infinity, {layer_not_finite(network, x, order)}",
            expected="losses that are finite at all weights other than 0, with their derivatives",
            remedy="leave the sample out if it is blank; the layers of manifold_sde.networks map "
            "groups without variance to 0; a root or norm of 0 has no derivative: "
            "(s + eps).sqrt()",
        )
    return DifferentiationError(
        f"the {what} of the network's loss is not the derivative of what it computes",
        received=f"a relative difference of {off:.2g} between automatic differentiation and "
        f"differences, at {who}",
        expected=f"at most {_TOLERANCE:g}, without cutting a derivative",
        remedy=loss_checks.what_is_wrong(order, network, x),
    )
