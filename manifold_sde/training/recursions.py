r"""How optimizers that are linear in the gradients move a direction: exact recursions.

A step takes the weights x and the buffer m, each a block of coordinates, by the same 2 x 2 matrix:

.. math::

    (x, m)_{k+1} = M_k (x, m)_k + \beta_k g_k.

Let a_k be the weight that the same steps make of the number 1 without a gradient. For a loss that
is scale-invariant in x, :math:`\tilde x_k = x_k / a_k` has the directions of x and no decay, and

.. math::

    \tilde x_K = x_0 - \sum_k e_{k,K} \tilde g_k, \qquad
    u(K) = \sum_k e_{k,K}^2 / \|\tilde x_k\|^4, \qquad v(K) = \sum_k e_{k,K}^2
    \operatorname{E}\|\tilde g_k\|^2 / \|\tilde x_k\|^2,

exactly, where :math:`\tilde g_k = a_k g_k` is the gradient at :math:`\tilde x_k`: u is the
intrinsic clock, and v the angular one, by which pure noise turns a direction so that
E cos = e^{-v/2}. The learning rates after a step weigh its gradient, through the buffer.

Everything here takes and gives floats or NumPy arrays, and needs no network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from manifold_sde.errors import TimeScaleError
from manifold_sde.number_arrays import Array

Number = Any
"""A float, or an array with a value for each group of weights."""


class LinearStep(NamedTuple):
    """One step of a linear optimizer, (x, m) to (xx x + xm m + xg g, mx x + mm m + mg g)."""

    xx: Number
    xm: Number
    xg: Number
    mx: Number
    mm: Number
    mg: Number


def sgd_step(
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    *,
    dampening: float = 0.0,
    nesterov: bool = False,
    decoupled: bool = False,
    first: bool = False,
) -> LinearStep:
    """A step of ``torch.optim.SGD``, or of SGDW.

    Args:
        lr: Learning rate η.
        weight_decay: Weight decay λ.
        momentum: Momentum β.
        dampening: Dampening d of the buffer.
        nesterov: Whether the step looks ahead as ``nesterov=True`` does.
        decoupled: Whether the decay acts on the weights as 1 - ηλ, and not on the gradient (SGDW).
        first: Whether it is the first one. Its buffer is the gradient, which is not dampened.

    Raises:
        TimeScaleError: If the decay is so large that weights without gradient would change sign:
            ηλ >= 1, or with coupled decay ηλ(1 - d) >= (1 - sqrt β)^2.

    Source: exact, equal to PyTorch's steps to rounding.
    """
    decay = lr * weight_decay
    most = 1.0 if decoupled or nesterov else (1.0 - math.sqrt(momentum)) ** 2 / (1.0 - dampening)
    if decay >= most:
        raise TimeScaleError(
            "the weight decay is too strong for this momentum",
            received=f"lr * weight_decay = {decay:.3g} at momentum {momentum:g}",
            expected=f"less than {most:.3g}: beyond it, decay makes the weights oscillate about 0, "
            "and no run without decay has the same directions",
            remedy="lower the learning rate or the weight decay, or use decoupled decay",
        )
    new = 1.0 if first else 1.0 - dampening
    if decoupled:
        return LinearStep(1.0 - decay, -lr * momentum, -lr * new, 0.0, momentum, new)
    # The step is -lr (ahead of the buffer: once the gradient, and momentum times the buffer).
    own, past = (1.0 + momentum * new, momentum**2) if nesterov else (new, momentum)
    return LinearStep(1.0 - decay * own, -lr * past, -lr * own, new * weight_decay, momentum, new)


def averaging_step(
    lr: Number, decay: Number, average: float, count: int, *, coupled: Number = 0.0
) -> LinearStep:
    """A step along the running average of normalised gradients, as Adam and AdamW take it.

    Args:
        lr: Learning rate η.
        decay: What the weights lose, ηλ (AdamW).
        average: The first of the betas.
        count: Number of the step, 1, 2, ...: the average is divided by 1 - average^count.
        coupled: What is added to the normalised gradient for each unit of x (Adam with L2).
    """
    rate = lr / (1.0 - average**count) if average > 0.0 else lr
    new = 1.0 - average
    return LinearStep(
        1.0 - decay - rate * new * coupled,
        -rate * average,
        -rate * new,
        new * coupled,
        average,
        new,
    )


def sgd_twin(
    lr: Sequence[float] | Array,
    weight_decay: Sequence[float] | Array | float = 0.0,
    momentum: Sequence[float] | Array | float = 0.0,
    *,
    dampening: float = 0.0,
    decoupled: bool = False,
) -> tuple[Array, Array]:
    """The run without decay that has the directions of SGD with momentum and decay.

    x_k / a_k is the run of the same optimizer, of the same momentum and dampening, without decay,
    at the learning rates η_k / (a_k a_{k+1}). With decoupled decay (SGDW) its momentum is
    β_k (1 - η_{k-1} λ_{k-1}). Nesterov's steps have no such twin; see :func:`adjoint_weights`.

    Args:
        lr: Learning rates, (K,).
        weight_decay: Weight decays, (K,) or a number.
        momentum: Momenta, (K,) or a number.
        dampening: Dampening.
        decoupled: Whether the decay is decoupled.

    Returns:
        log a_k, (K + 1,), and the logarithms of the twin's learning rates, (K,).

    Raises:
        TimeScaleError: As :func:`sgd_step`.

    Source: exact (to 2e-14 against PyTorch under schedules of all three).

    >>> log_a, log_lr = sgd_twin([0.1, 0.1], 0.01, 0.9)
    >>> np.exp(log_a).round(6).tolist(), np.exp(log_lr).round(6).tolist()
    ([1.0, 0.999, 0.997101], [0.1001, 0.100391])
    """
    rates = np.atleast_1d(np.asarray(lr, dtype=np.float64))
    decays, momenta = (np.broadcast_to(z, rates.shape) for z in (weight_decay, momentum))
    clock = RunningClock()
    log_a = np.zeros(len(rates) + 1)
    for k, (eta, lam, beta) in enumerate(
        zip(rates.tolist(), decays.tolist(), momenta.tolist(), strict=True)
    ):
        clock.advance(
            sgd_step(eta, lam, beta, dampening=dampening, decoupled=decoupled, first=k == 0),
            0.0,
        )
        log_a[k + 1] = clock.log_factor
    with np.errstate(divide="ignore"):
        return log_a, np.log(rates) - log_a[:-1] - log_a[1:]


def adjoint_weights(steps: Sequence[LinearStep]) -> tuple[Array, Array]:
    """The weights of all gradients in the last point, by one pass backwards.

    x_K / a_K = x_0 - sum_k w_k g_k / a_k exactly, with w_k = e_{k,K} a_k^2, so that
    u(K) = sum_k w_k^2 / |x_k|^4 with the norms of the run itself.

    Args:
        steps: The K steps, with floats.

    Returns:
        w, (K,), and log a_k, (K + 1,).

    Raises:
        TimeScaleError: If an a_k is not positive.

    Source: exact, to 1e-14.
    """
    clock = RunningClock()
    log_a = np.zeros(len(steps) + 1)
    for k, step in enumerate(steps):
        clock.advance(step, 0.0)
        log_a[k + 1] = clock.log_factor
    weights = np.empty(len(steps))
    x, m = 1.0, 0.0
    for k in range(len(steps) - 1, -1, -1):
        s, shrunk = steps[k], math.exp(log_a[k] - log_a[k + 1])
        weights[k] = -shrunk * (x * s.xg + m * s.mg)
        x, m = shrunk * (x * s.xx + m * s.mx), shrunk * (x * s.xm + m * s.mm)
    return weights, log_a


class SecondMoments(NamedTuple):
    """Second moments of weights and buffer, each summed over the coordinates."""

    xx: Number
    xm: Number
    mm: Number

    def after(self, step: LinearStep, noise: Number) -> SecondMoments:
        """The moments after a step with a gradient of mean 0.

        Args:
            step: The step.
            noise: The mean square of the gradient's norm.

        Source: exact; with E|x|^2 for |x|^2 in the noise, to O(1/D).
        """
        s, (xx, xm, mm) = step, self
        return SecondMoments(
            s.xx * s.xx * xx + 2.0 * s.xx * s.xm * xm + s.xm * s.xm * mm + s.xg * s.xg * noise,
            s.xx * s.mx * xx
            + (s.xx * s.mm + s.xm * s.mx) * xm
            + s.xm * s.mm * mm
            + s.xg * s.mg * noise,
            s.mx * s.mx * xx + 2.0 * s.mx * s.mm * xm + s.mm * s.mm * mm + s.mg * s.mg * noise,
        )


class RunningClock:
    """The clock while a run goes on: three numbers a group, whatever the schedules.

    They are the sums over the gradients so far of the squared weights that each has in x and in m,
    relative to a_k, times its noise. The first of them is the clock. Nothing overflows, however
    strong the decay has been.

    Attributes:
        ratio: What the buffer is of the weights in the run without gradients, m / x.
        log_factor: log a_k.
        sums: The three numbers.

    Source: equal to the sum over all gradients by :func:`adjoint_weights` (to 2e-11).

    >>> clock = RunningClock()
    >>> for k in range(100):
    ...     clock.advance(sgd_step(0.1, momentum=0.9, first=k == 0), 1.0)
    >>> round(clock.value, 2), round(100 * (0.1 / (1 - 0.9)) ** 2, 2)  # all; with η/(1 - β)
    (86.26, 100.0)
    """

    def __init__(self) -> None:
        self.ratio: Number = 0.0
        self.log_factor: Number = 0.0
        self.sums = SecondMoments(0.0, 0.0, 0.0)

    @property
    def value(self) -> Number:
        """The clock: u if the noise of a step is 1/|x|^4, v if it is E|g|^2/|x|^2."""
        return self.sums.xx

    def advance(self, step: LinearStep, noise: Number) -> None:
        """Count a step.

        Args:
            step: The step.
            noise: Its 1/|x|^4, or E|g|^2/|x|^2, with x before the step.

        Raises:
            TimeScaleError: If the weights without gradient would change sign.
        """
        factor = step.xx + step.xm * self.ratio
        if not np.all(factor > 0.0):
            raise TimeScaleError(
                "weight decay alone would change the sign of the weights in this step",
                received=f"a factor of {float(np.min(factor)):.3g}",
                expected="a positive factor: no run without decay has the same directions",
                remedy="lower the learning rate or the weight decay; with momentum β, coupled "
                "decay needs lr * weight_decay < (1 - sqrt β)^2",
            )
        moments = self.sums.after(step, noise)
        square = factor * factor
        self.sums = SecondMoments(*(z / square for z in moments))
        self.ratio = (step.mx + step.mm * self.ratio) / factor
        self.log_factor = self.log_factor + np.log(factor)
