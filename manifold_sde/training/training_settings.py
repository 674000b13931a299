"""What a run is trained with, and how many steps of it a clock takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from manifold_sde.arguments import check_between, check_choice, check_positive, kind_of, real
from manifold_sde.errors import ArgumentError
from manifold_sde.training.likelihood import Array
from manifold_sde.training.recursions import sgd_step

#: Optimizers whose updates are those of the gradient, and those of a size of their own.
GRADIENT = ("sgd", "sgdw")
FIXED = ("adamw", "lion", "signsgd", "signum", "normalised_sgd", "muon")
#: Learning rates at progress 0 to 1 of the run, over the largest one.
SCHEDULES: dict[str, Callable[[Array], Any]] = {
    "constant": np.ones_like,
    "cosine": lambda x: 0.5 * (1.0 + np.cos(math.pi * x)),
    "linear": lambda x: 1.0 - x,
}
#: Pieces of a schedule, in each of which the learning rate is taken as constant.
_PIECES = 2048
_MOST_STEPS = 1e15

Schedule = str | Callable[[Array], Any]


@dataclass(frozen=True)
class TrainingSettings:
    r"""Optimizer, rates, batch size and schedule of a run.

    With p = 4 for SGD and p = 2 for updates of fixed size, N the variance of a gradient at norm 1
    (of a batch) or of an update, and r the norm of the weights, the angular clock after K steps is

    .. math::

        v = \frac2p \ln\Bigl(1 + \frac p2 \frac{N t}{r_0^p}\Bigr), \qquad
        t = \sum_{k<K} \frac{s_k^2}{a_{k+1}^2 a_k^{p-2}}, \qquad a_{k+1} = a_k (1 - \kappa_k),

    with the step s = lr (1 - d)/(1 - momentum) and kappa = s lambda for SGD with coupled decay,
    kappa = lr lambda where decay is decoupled. The norm settles where r^p = N s^2 / (2 kappa), and
    the clock runs at 2 kappa a step there.

    Args:
        lr: Largest learning rate.
        weight_decay: Weight decay.
        batch_size: Samples of a step.
        momentum: Momentum; that of fixed-size updates is in N.
        dampening: Dampening of SGD's buffer.
        schedule: "constant", "cosine" or "linear" (both to 0), or a function of progress from 0 to
            1, arrays to arrays, that gives the learning rate over ``lr``.
        optimizer: "sgd" (coupled decay, as torch.optim.SGD), "sgdw" (decoupled), or an optimizer
            with updates of fixed size and decoupled decay: "adamw", "lion", "signsgd", "signum",
            "normalised_sgd", "muon".

    Raises:
        ArgumentError: If one is out of range.
        TimeScaleError: If the decay is too strong for the momentum.

    Source: exact for updates of fixed size at a constant rate; for SGD from the balance and, where
    the norm comes from elsewhere, but for a part of kappa in the time that it takes to settle; with
    momentum b but for its unfinished tail, of b/(1 - b) steps.
    """

    lr: float
    weight_decay: float
    batch_size: int = 1
    momentum: float = 0.0
    dampening: float = 0.0
    schedule: Schedule = "constant"
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, (*GRADIENT, *FIXED), 'optimizer="adamw"')
        object.__setattr__(self, "lr", check_positive("lr", self.lr, "lr=0.1"))
        decay = check_between(
            self.weight_decay, 0.0, math.inf, "the weight decay", "weight_decay=5e-4"
        )
        object.__setattr__(self, "weight_decay", decay)
        size = check_positive("batch_size", self.batch_size, "batch_size=128")
        object.__setattr__(self, "batch_size", size)
        check_between(self.momentum, 0.0, 1.0, "the momentum", "momentum=0.9")
        check_between(self.dampening, 0.0, 1.0, "the dampening", "dampening=0.0")
        if self.optimizer in GRADIENT:
            sgd_step(
                self.lr,
                decay,
                self.momentum,
                dampening=self.dampening,
                decoupled=self.optimizer == "sgdw",
            )
        if not 0.0 <= self.shrinkage < 1.0:
            raise ArgumentError(
                "a step would reverse the weights",
                received=f"lr * weight_decay of {self.shrinkage:.3g} a step",
                expected="less than 1",
                remedy="lower one of them",
            )
        if isinstance(self.schedule, str):
            check_choice("schedule", self.schedule, tuple(SCHEDULES), 'schedule="cosine"')
        _ = self._shape

    def __str__(self) -> str:
        name = self.optimizer.upper() if self.optimizer in GRADIENT else self.optimizer
        momentum = f", momentum {self.momentum:g}" if self.momentum else ""
        batch = f", batch {self.batch_size:g}" if self.batch_size != 1 else ""
        return (
            f"{name}, lr {self.lr:.4g}, weight decay {self.weight_decay:.4g}{momentum}{batch}, "
            f"{self.schedule_name}"
        )

    @property
    def schedule_name(self) -> str:
        """The schedule's name, or that of its function."""
        if isinstance(self.schedule, str):
            return self.schedule
        return f"schedule {getattr(self.schedule, '__name__', type(self.schedule).__name__)}"

    @property
    def power(self) -> int:
        """The power p of the norm by which a step turns the direction less."""
        return 4 if self.optimizer in GRADIENT else 2

    @property
    def step(self) -> float:
        """The step s at the largest learning rate."""
        if self.power == 2:
            return self.lr
        return self.lr * (1.0 - self.dampening) / (1.0 - self.momentum)

    @property
    def shrinkage(self) -> float:
        """What a step takes off the weights, kappa, at the largest learning rate."""
        return (self.step if self.optimizer == "sgd" else self.lr) * self.weight_decay

    def balance(self, noise: float) -> float:
        """The power p of the norm at its balance, for the noise N of a batch.

        Raises:
            ArgumentError: If there is no weight decay.
        """
        self.require_decay()
        return noise * self.step**2 / (2.0 * self.shrinkage)

    def noise_of(self, noise: float) -> float:
        """N, from the trace of a single sample's gradient at norm 1, or of an update."""
        return noise / self.batch_size if self.power == 4 else noise

    def require_decay(self) -> None:
        """Check that the norm has a balance.

        Raises:
            ArgumentError: If there is no weight decay.
        """
        if self.shrinkage == 0.0:
            raise ArgumentError(
                "without weight decay the norm has no balance",
                received="weight_decay=0",
                expected="a weight decay, or the norm at the start and the noise",
                remedy="norm=weight.norm().item(), noise=V: without decay the clock still runs, "
                "like the logarithm of the steps",
            )

    @cached_property
    def _shape(self) -> tuple[Array, Array]:
        """Learning rates of the pieces, over the largest, and their sums up to each."""
        middles = (np.arange(_PIECES) + 0.5) / _PIECES
        function = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        values, cause = None, None
        try:
            values = np.broadcast_to(np.asarray(function(middles), dtype=np.float64), (_PIECES,))
        except Exception as error:
            cause = error
        if values is None or not (np.isfinite(values).all() and values.min() >= 0 < values.max()):
            raise ArgumentError(
                "the schedule is no function of progress",
                received=f"{kind_of(self.schedule)}: "
                + (f"{type(cause).__name__}: {cause}" if cause else "values below 0 or not finite"),
                expected="an array of progress from 0 to 1 to learning rates over lr, 0 or more",
                remedy="schedule=lambda x: numpy.where(x < 0.9, 1.0, 0.1)",
            ) from cause
        return values, np.concatenate([[0.0], np.cumsum(values)])

    def clock(self, steps: float, ratio: float, gain: float | None = None) -> float:
        """The angular clock after some steps.

        Args:
            steps: Number of steps of the whole schedule.
            ratio: The power p of the norm at the start, over that at its balance.
            gain: Instead, where there is no weight decay: N s^2 over the power p of the norm.
        """
        p, kappa = self.power, self.shrinkage
        rates, sums = self._shape
        length = steps / _PIECES
        shrunk = -math.log1p(-kappa) * length  # of a piece at the largest rate
        if kappa == 0.0:
            assert gain is not None
            return 2.0 / p * math.log1p(0.5 * p * gain * length * float((rates**2).sum()))
        # p kappa / s^2 times the sum of squared steps; in each piece as a geometric sum.
        with np.errstate(divide="ignore", over="ignore"):
            grown = np.log(np.expm1(p * shrunk * rates)) if p * shrunk < 700 else None
            logs = p * shrunk * sums[:-1] + np.log(rates)
            logs = logs + (p * shrunk * rates if grown is None else grown)
        top = float(logs.max())
        total = top + math.log(float(np.exp(logs - top).sum())) - math.log(ratio)
        return 2.0 / p * float(np.logaddexp(0.0, total + math.log(self._discrete)))

    @property
    def _discrete(self) -> float:
        """What steps of a finite size add to the balance: near 1.

        At rest |x|^2 = (1 - kappa)^2 |x|^2 + N s^2 / |x|^{p-2}, and v grows by -2 ln(1 - kappa).
        """
        return 1.0 / (1.0 - 0.5 * self.shrinkage)

    def steps(self, clock: float, ratio: float, gain: float | None = None) -> float:
        """The number of steps after which the clock is there; a real number.

        Raises:
            ArgumentError: If no number of steps up to 1e15 reaches it.
        """
        p, kappa = self.power, self.shrinkage
        wanted = 0.5 * p * clock
        if self.schedule == "constant":
            if kappa == 0.0:
                assert gain is not None
                return _expm1(wanted) / (0.5 * p * gain)
            log = _log_expm1(wanted) + math.log(ratio / self._discrete)
            return float(np.logaddexp(0.0, log)) / (-p * math.log1p(-kappa))

        def lacks(log_steps: float) -> float:
            return self.clock(math.exp(log_steps), ratio, gain) - clock

        if clock == 0.0:
            return 0.0
        return math.exp(bisect(lacks, -30.0, math.log(_MOST_STEPS), "number of steps"))

    def changed(self, **changes: Any) -> TrainingSettings:
        """The same with changes."""
        return replace(self, **changes)


def bisect(f: Callable[[float], float], low: float, high: float, what: str) -> float:
    """Find where an increasing function is 0, to rounding.

    Raises:
        ArgumentError: If it is nowhere in [low, high].
    """
    if not f(low) <= 0.0 <= f(high):
        raise ArgumentError(
            f"no {what} does it",
            received=f"{what} from {math.exp(low):.3g} to {math.exp(high):.3g}",
            expected="a clock that is reached within that range",
            remedy="a larger weight decay or learning rate, fewer relaxation times, more steps",
        )
    while True:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            return middle
        low, high = (middle, high) if f(middle) < 0.0 else (low, middle)


def _expm1(x: float) -> float:
    return math.expm1(x) if x < 700.0 else math.inf


def _log_expm1(x: float) -> float:
    if x == 0.0:
        return -math.inf
    return x + math.log(-math.expm1(-x))


def check_settings(name: str, value: object) -> TrainingSettings:
    """Check settings.

    Raises:
        ArgumentError: If it is something else.
    """
    if isinstance(value, TrainingSettings):
        return value
    raise ArgumentError(
        f"{name} are no training settings",
        received=kind_of(value),
        expected="TrainingSettings",
        remedy=f"{name}=TrainingSettings(lr=0.1, weight_decay=5e-4)",
    )


def at_least_zero(value: object) -> float:
    """A real number of at least 0; NaN for all else."""
    number = real(value)
    return number if number >= 0.0 else math.nan
