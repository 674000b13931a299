"""The clock of a run that is yet to be made, from its schedule alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from manifold_sde.arguments import check_between, check_choice, check_count, check_positive
from manifold_sde.errors import ArgumentError
from manifold_sde.number_arrays import Array, as_float64
from manifold_sde.paper import implements
from manifold_sde.schedules import Schedule, ScheduleLike
from manifold_sde.training.recursions import (
    LinearStep,
    RunningClock,
    SecondMoments,
    averaging_step,
    sgd_step,
)
from manifold_sde.training.update_variance import (
    adam_variance,
    averaged_variance,
    lion_variance,
    muon_variance,
    signum_variance,
)

LINEAR = ("sgd", "sgdw")
ADAM = ("adam", "adamw")
FIXED = ("signsgd", "signum", "lion", "normalised_sgd", "muon")
RELATIVE = ("lamb", "lars", "hyperball")
OPTIMIZERS = (*LINEAR, *ADAM, *FIXED, *RELATIVE)


@dataclass(frozen=True)
class ExpectedClock:
    """What a schedule makes of the norm and the direction of a scale-invariant group.

    Attributes:
        clock: The angular clock v after each step, (steps + 1,): pure noise has turned a direction
            so far that E cos = e^{-v/2}.
        norms: Root mean square of the norms, (steps + 1,); NaN where the optimizer leaves them
            to the loss (LAMB, LARS).
        intrinsic: The intrinsic clock u = v/V, (steps + 1,), of SGD with or without momentum;
            ``None`` for the others, and with clipping.
    """

    clock: Array
    norms: Array
    intrinsic: Array | None

    @property
    def total(self) -> float:
        """The angular clock at the end."""
        return float(self.clock[-1])


def _schedule(name: str, source: ScheduleLike, steps: int) -> Array:
    remedy = f"pass {steps} values, a number, or a callable of the step"
    return Schedule.of(name, source).every(0, steps, of="the run", remedy=remedy)


@implements("Equation (10)")
def expected_clock(
    lr: ScheduleLike,
    steps: int | None = None,
    *,
    optimizer: str = "sgd",
    weight_decay: ScheduleLike = 0.0,
    momentum: ScheduleLike = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 0.0,
    norm: float = 1.0,
    noise: float | Any = 1.0,
    size: int | tuple[int, int] | None = None,
    kurtosis: float = 3.0,
    clip: float | None = None,
    normalization_eps: float = 0.0,
) -> ExpectedClock:
    r"""The clock of a scale-invariant group under a schedule, before the run.

    The gradients are independent noise of norm \|x\|^{-1} sqrt(V); a loss on top of it leaves
    norms and clock as they are where the noise of a step is larger than the mean gradient, and
    slows what the direction does by the clock.

    Args:
        lr: Learning rate: a number, one value a step, or a callable of the step.
        steps: Number of steps; by default the length of ``lr``.
        optimizer: ``"sgd"`` (PyTorch's, momentum and coupled decay), ``"sgdw"``, ``"adam"`` (decay
            in the gradient), ``"adamw"``, ``"signsgd"``, ``"signum"``, ``"lion"``,
            ``"normalised_sgd"`` (the running average over its norm), ``"muon"``, ``"lamb"``,
            ``"lars"`` (rate inside the buffer, ``lr`` times the trust coefficient) or
            ``"hyperball"`` (norm held; ``lr`` is the length of a step). From the fourth on, decay
            is decoupled.
        weight_decay: Weight decay, in the forms of ``lr``.
        momentum: Momentum β, in the forms of ``lr``; a number except for SGD.
        dampening: Dampening of SGD's buffer.
        nesterov: Nesterov's form of SGD.
        betas: Of Adam, AdamW, Lion and LAMB.
        eps: Adam's.
        norm: Norm at the start.
        noise: V, the trace of the covariance of the gradient's noise at norm 1; for Adam it may be
            an array of the variances of all coordinates, which matter with ``eps`` alone.
        size: Number D of coordinates of the group (Adam, sign, Lion); the shape for Muon.
        kurtosis: Of a coordinate of the gradient (Adam).
        clip: Largest norm of the gradient that is applied (SGD).
        normalization_eps: eps of the layer that normalises the group, over its variance at norm 1.

    Returns:
        Clock and norms after each step.

    Raises:
        ArgumentError: For arguments that do not go together; in particular for Adam with decay in
            the gradient and unequal variances, where the direction depends on the decay.
        TimeScaleError: For a schedule that ends, or too strong a decay.

    Source: exact for SGD but for O(1/D); within 1 % for AdamW with the lag of v (38 % off without
    it at beta2 = .999); see the functions of each optimizer's update.

    >>> run = expected_clock(0.01, 9000, weight_decay=0.01, momentum=0.9, noise=4.0)
    >>> round(run.total, 2), round(float(run.norms[-1]), 2)  # 2 ηe λ steps, (ηe V / 2λ)^(1/4)
    (19.65, 2.11)
    """
    check_choice("optimizer", optimizer, OPTIMIZERS, 'optimizer="adamw"')
    if steps is None:
        length = Schedule.of("lr", lr).length
        if length is None:
            raise ArgumentError(
                "the number of steps is missing",
                received=f"lr = {lr!r}",
                expected="steps, or one learning rate a step",
                remedy="expected_clock(lr, steps=10_000)",
            )
        steps = length
    count = check_count("steps", steps, "steps", "steps=10_000")
    start = check_positive("norm", norm, "norm=weight.norm().item()")
    rates = _schedule("lr", lr, count).tolist()
    decays = _schedule("weight_decay", weight_decay, count).tolist()
    momenta = _schedule("momentum", momentum, count).tolist()
    for value in {*momenta, *betas, dampening}:
        check_between(value, 0.0, 1.0, "momentum, dampening or a beta", "a number below 1")
    if optimizer in LINEAR:
        trace = float(as_float64("noise", noise).sum())
        decoupled = optimizer == "sgdw"

        def step(k: int, _: float) -> LinearStep:
            return sgd_step(
                rates[k],
                decays[k],
                momenta[k],
                dampening=dampening,
                nesterov=nesterov,
                decoupled=decoupled,
                first=k == 0,
            )

        def square(k: int, norm_square: float) -> float:
            whole = trace / (norm_square + normalization_eps)
            return whole if clip is None else min(whole, clip * clip)

        clock, norms = _run(count, start, step, square)
        pure = clip is None and trace > 0.0
        return ExpectedClock(clock, norms, clock / trace if pure else None)
    if clip is not None or normalization_eps:
        raise ArgumentError(
            f"the update of {optimizer} does not have the size of the gradient",
            received="clip or normalization_eps",
            expected="neither: they have no effect on the clock beyond eps",
            remedy="leave them out",
        )
    if optimizer in ADAM:
        update = _Adam(optimizer, rates, decays, betas, eps, noise, size, kurtosis)
        return ExpectedClock(*_run(count, start, update.step, update.square), None)
    if optimizer in RELATIVE:
        return _relative(optimizer, rates, momenta, betas, start)
    if any(beta != momenta[0] for beta in momenta):
        raise ArgumentError(
            f"the momentum of {optimizer} is a schedule",
            received="different values of momentum",
            expected="a number",
            remedy="the clocks of stretches of one momentum each add up",
        )
    variance = _fixed_variance(optimizer, momenta[0], betas, size)
    return ExpectedClock(
        *_run(
            count,
            start,
            lambda k, _: averaging_step(rates[k], rates[k] * decays[k], 0.0, 1),
            lambda *_: variance,
        ),
        None,
    )


def _run(
    count: int,
    start: float,
    step: Callable[[int, float], LinearStep],
    square: Callable[[int, float], float],
) -> tuple[Array, Array]:
    """Clock and norms: of each step its matrix and E|g|^2, from k and E|x|^2.

    Without loss <x_K / a_K, x_0> stays |x_0|^2 in mean, so that E cos = e^{-v/2} with
    v = ln(|x_K|^2 / (a_K^2 |x_0|^2)), however large the first steps are.
    """
    factor, moments = RunningClock(), SecondMoments(start * start, 0.0, 0.0)
    clocks, squares = np.zeros(count + 1), np.full(count + 1, start * start)
    for k in range(count):
        power, matrix = square(k, moments.xx), step(k, moments.xx)
        factor.advance(matrix, 0.0)
        moments = moments.after(matrix, power)
        squares[k + 1] = moments.xx
        clocks[k + 1] = math.log(moments.xx / squares[0]) - 2.0 * factor.log_factor
    return clocks, np.sqrt(squares)


class _Adam:
    """The steps of Adam and AdamW: v follows 1/|x|^2 with a lag.

    v_i is s_i^2 y with y the running average of 1/|x|^2, corrected for its start, so that
    E d_i^2 = (s_i^2/|x|^2)/(s_i sqrt y + eps)^2 for an average of one gradient.
    """

    def __init__(
        self,
        optimizer: str,
        rates: list[float],
        decays: list[float],
        betas: tuple[float, float],
        eps: float,
        noise: Any,
        size: int | tuple[int, int] | None,
        kurtosis: float,
    ) -> None:
        self.rates, self.decays, self.betas, self.eps = rates, decays, betas, eps
        variances = as_float64("noise", noise)
        if variances.ndim == 0:
            size = check_count("size", size, "coordinates of the group", "size=weight.numel()")
            variances = variances / size
        self.scales = np.sqrt(variances)
        self.count = size if isinstance(size, int) else variances.size
        self.factor = adam_variance(betas, kurtosis=kurtosis)
        self.coupled = optimizer == "adam" and any(decays)
        if self.coupled and self.scales.max() > 1.001 * self.scales.min():
            raise ArgumentError(
                "Adam with decay in the gradient has no clock here",
                received="coordinates whose gradients differ in variance",
                expected="equal variances: otherwise the decay turns the direction too, by "
                "lr * weight_decay |x| / s_i for each coordinate, and no run without it is alike",
                remedy='optimizer="adamw" (decoupled decay), or a clock for each block',
            )
        self.total, self.inverse = 0.0, 0.0

    def step(self, k: int, _: float) -> LinearStep:
        """The matrix of step k; :meth:`square` is called first."""
        rate, decay = self.rates[k], self.decays[k]
        if not self.coupled:
            return averaging_step(rate, rate * decay, self.betas[0], k + 1)
        return averaging_step(rate, 0.0, self.betas[0], k + 1, coupled=decay * self.inverse)

    def square(self, k: int, norm_square: float) -> float:
        """E|d|^2 if d were of one gradient."""
        second = self.betas[1]
        self.total = second * self.total + (1.0 - second) / norm_square
        lagged = math.sqrt(self.total / (1.0 - second ** (k + 1)))
        if self.eps == 0.0:
            if self.coupled:
                self.inverse = 1.0 / (float(self.scales.max()) * lagged)
            return self.factor * self.count / (norm_square * lagged * lagged)
        roots = self.scales * lagged + self.eps
        self.inverse = 1.0 / float(roots.max())
        each = (self.scales / roots) ** 2
        whole = float(each.sum()) if each.ndim else self.count * float(each)
        return self.factor * whole / norm_square


def _fixed_variance(
    optimizer: str,
    momentum: float,
    betas: tuple[float, float],
    size: int | tuple[int, int] | None,
) -> float:
    if optimizer == "normalised_sgd":
        return averaged_variance(momentum)
    if optimizer == "muon":
        if not (isinstance(size, tuple) and len(size) == 2):
            raise ArgumentError(
                "the shape of the matrix is missing",
                received=f"size = {size!r}",
                expected="the shape of the matrix that Muon steps",
                remedy="size=tuple(weight.shape)",
            )
        return muon_variance((int(size[0]), int(size[1])), momentum)
    count = check_count("size", size, "coordinates of the group", "size=weight.numel()")
    if optimizer == "lion":
        return count * lion_variance(betas)
    return count * signum_variance(momentum if optimizer == "signum" else 0.0)


def _relative(
    optimizer: str,
    rates: list[float],
    momenta: list[float],
    betas: tuple[float, float],
    start: float,
) -> ExpectedClock:
    """Steps that are a part of the norm: no norm, and no decay, is in the clock."""
    momentum = np.array(momenta) if optimizer != "lamb" else np.full(len(rates), betas[0])
    turn = np.square(rates)
    if optimizer == "lars":
        turn = turn / (1.0 - momentum) ** 2
    else:
        turn = turn * (1.0 + momentum) / (1.0 - momentum)
    held = optimizer == "hyperball"
    if held:
        turn = turn / start**2
    norms = np.full(len(rates) + 1, start if held else math.nan)
    return ExpectedClock(np.concatenate([[0.0], np.cumsum(turn)]), norms, None)
