"""The time scale of SGD with weight decay: from steps to the time of the limiting diffusion.

With R and τ of Equations (11) and (12), SGD after floor(τ^{-1}(T)) steps, divided by R, has in
the limit the law of the diffusion (13) at T (Theorem 4.4). Everything here follows from two
quantities along the run,

    a, what weight decay leaves of the first norm,    and gained, in    R^4 = a^4 + gained,

by e^{2T} = R^4 / a^4 = 1 + 2 t0. In the paper's continuous time a = e^{-ηλt} and
gained = (1 - e^{-4ηλt}) η/(2λ), which is (11). In whole steps, with q_k = 1 - η_kλ_k, a_k is the
product q_0 ... q_{k-1}, and t0 the sum of the squares of η_j / (a_j a_{j+1}), the learning rates
with which SGD without weight decay takes the same path up to the factor a_k: exact for every
schedule. Of t0, which overflows early, gained_k = 2 a_k^4 t0 and log a_k are kept:

    log a_{k+1} = log a_k + log q_k,    gained_{k+1} = q_k^4 gained_k + 2 q_k^2 η_k^2.

They are summed in long double, with no more than 256 + k/16384 sums one on another. Where it has
64 bits what is left is the rounding of the result; where it is no longer than double the relative
error of T and R is at most (256 + k/16384) 2^{-50}, and some 1e-14 as a rule.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from manifold_sde.errors import TimeScaleError
from manifold_sde.number_arrays import (
    LARGEST,
    LARGEST_STEP,
    SMALLEST,
    Array,
    Numbers,
    broadcast,
    check_number,
    check_range,
    check_whole,
    finite,
    like,
)
from manifold_sde.paper import implements
from manifold_sde.schedules import (
    WIDE,
    Schedule,
    ScheduleLike,
    Steps,
    StepSums,
    decay_too_large,
    growth,
    intrinsic_time,
)


class TimeScale:
    """The map between steps of SGD and the time T of the limiting diffusion.

    The update is (1) of the paper, x_{k+1} = (1 - η_kλ_k) x_k - η_k ∇L(x_k).

    Two numbers give the paper's continuous formulas (10) to (12) at real times t >= 0 in steps,
    and beside them the exact sums over whole steps (``discrete_time``, ``accumulated``, ...). With
    a schedule, be it a list of equal numbers, ``radius``, ``tau``, ``steps``, ``norm`` and
    ``clock`` are the exact sums too, and t is a whole step count. At the same T the two differ by
    O(ηλ).

    The theorems let ηλ go to 0 with η < 2λ, or η < 2Cλ for some constant C (Remark 4.2). The
    formulas hold for all η > 0 and λ >= 0 with ηλ < 1; λ = 0 is their limit.

    Methods take numbers, sequences, arrays or tensors of any shape, and give ``numpy.float64`` or
    float64 arrays of the (broadcast) shape; where they take a tensor, a tensor of its dtype and
    device (float64 if it holds integers), without gradient. They raise ``TimeScaleError`` where an
    argument is out of range, the schedule ends or fails before a step that is needed, or a result
    is too large for a float.

    Args:
        lr: Learning rate η: a positive number; a sequence, array or tensor with one value a step;
            a callable of the step k = 0, 1, 2, ... that depends on k alone; or a scheduler of
            ``torch.optim``, stepped once a step. A schedule may be 0 at some steps.
        weight_decay: Weight decay λ >= 0, in the same forms. It is decoupled: a step multiplies
            the weights by 1 - ηλ.

    Raises:
        TimeScaleError: A value is not a finite number, is out of range, or has ηλ >= 1. The
            values of a callable are checked at the steps that are needed.

    References:
        Li, Wang, Yu, Fast Mixing of SGD with Normalization and Weight Decay, NeurIPS 2022,
        Sections 3 and 4.

    >>> from manifold_sde import TimeScale
    >>> scale = TimeScale(0.01, 0.05)
    >>> scale.steps(1.0)
    2086
    >>> print(f"{scale.tau(2086):.6f} {scale.discrete_time(2086):.6f}")
    0.999692 1.000042
    >>> warm_up = TimeScale(lambda k: 0.01 * np.minimum(k / 1000, 1.0), 0.05)
    >>> warm_up.steps([0.5, 1.0])
    array([1963, 2590])
    """

    def __init__(self, lr: ScheduleLike, weight_decay: ScheduleLike) -> None:
        self._lr = Schedule.of("lr", lr, smallest=SMALLEST)
        self._weight_decay = Schedule.of("weight_decay", weight_decay)
        self._sums: _ConstantSums | StepSums
        if self._lr.constant is not None and self._weight_decay.constant is not None:
            self._sums = _ConstantSums(self._lr.constant, self._weight_decay.constant)
        else:
            self._sums = StepSums(self._lr, self._weight_decay)

    @property
    def lr(self) -> float | Schedule:
        """The learning rate η, a number if it is one."""
        return self._lr if self._lr.constant is None else self._lr.constant

    @property
    def weight_decay(self) -> float | Schedule:
        """The weight decay λ, a number if it is one."""
        constant = self._weight_decay.constant
        return self._weight_decay if constant is None else constant

    @property
    def is_constant(self) -> bool:
        """Whether both are numbers, and not schedules."""
        return isinstance(self._sums, _ConstantSums)

    @property
    def within_theorem(self) -> bool:
        """Whether η < 2λ, as Theorems 4.1 and 4.4 ask, for two numbers.

        >>> TimeScale(0.01, 0.05).within_theorem, TimeScale(0.1, 0.0005).within_theorem
        (True, False)
        """
        sums = self._constants("within_theorem", "compare the values of the schedules")
        return bool(sums.lr < 2 * sums.weight_decay)

    def __repr__(self) -> str:
        return f"TimeScale(lr={self._lr!r}, weight_decay={self._weight_decay!r})"

    @implements("Equation (11)")
    def radius(self, t: Numbers) -> Any:
        """Compute R(t), the norm after t steps from norm 1 for noise of trace 1.

        R(t)^4 = η/(2λ) + e^{-4ηλt} (1 - η/(2λ)). For λ = 0 it is 1 + 2η²t; for a schedule
        a_k^4 (1 + 2 t0).

        >>> print(f"{TimeScale(0.01, 0.05).radius(10_000):.6f}")
        0.562341
        """
        return like(_norm(*self._state(t), 1.0, 1.0), t)

    @implements("Equation (12)")
    def tau(self, t: Numbers) -> Any:
        """Compute T = τ(t), the time of the diffusion (13) after t steps.

        τ(t) = ∫_0^t η²/R(s)^4 ds = ln(1 + (e^{4ηλt} - 1) η/(2λ)) / 2. For λ = 0 it is
        ln(1 + 2η²t) / 2; for a schedule ``discrete_time``.

        >>> print(f"{TimeScale(0.01, 0.05).tau(1e12):.4f}")
        999999998.8487
        """
        return like(intrinsic_time(*self._state(t)), t)

    @implements("Equation (12)")
    def tau_inverse(self, T: Numbers) -> Any:
        """Compute the real number of steps t with τ(t) = T >= 0, for two numbers.

        τ^{-1}(T) = ln(1 + (e^{2T} - 1) 2λ/η) / (4ηλ). For λ = 0 it is (e^{2T} - 1) / (2η²).

        >>> print(f"{TimeScale(0.01, 0.05).tau_inverse(1.0):.4f}")
        2086.3511
        """
        sums = self._constants("tau_inverse", "a schedule is known at whole steps: use steps(T)")
        return like(sums.inverse(check_range("T", T, "the diffusion starts at T = 0")), T)

    @implements("Theorem 4.4")
    def steps(self, T: Numbers, *, max_steps: int | None = None) -> Any:
        """Find the largest number k of steps with τ(k) <= T, the floor of τ^{-1}(T).

        It is that of τ as rounded, so steps(tau(k)) is k while float64 tells τ at k + 1 apart.

        Args:
            T: Time of the diffusion >= 0, any shape.
            max_steps: Where to give up; by default 10^9 steps of a schedule, and 2^53 for two
                numbers.

        Returns:
            ``int`` for a number; otherwise an int64 array or tensor of the shape of ``T``.

        >>> [TimeScale(lr, 0.05).steps(1.0) for lr in (1e-2, 1e-3, 1e-4)]
        [2086, 32306, 438124]
        """
        times = check_range("T", T, "the diffusion starts at T = 0")
        if max_steps is not None:
            max_steps = int(check_number("max_steps", max_steps, "it is one number of steps"))
        found = self._sums.search(times.reshape(-1), max_steps).reshape(times.shape)
        if isinstance(T, torch.Tensor):
            return torch.from_numpy(found).to(T.device)
        return int(found) if found.ndim == 0 else found

    @implements("Equation (10)")
    def norm(self, t: Numbers, initial_norm: Numbers, noise_trace: Numbers) -> Any:
        """Compute the norm after t steps from |X(0)| > 0 for noise of constant trace V >= 0.

        |X(t)|^4 = ηV/(2λ) + e^{-4ηλt} (|X(0)|^4 - ηV/(2λ)); for a schedule
        a_k^4 (|x_0|^4 + 2 V t0), to first order in the learning rate. V = tr Σ at norm 1 is the
        paper's σ̂² in (10), which is D - 1 times the σ̂² of (18).

        >>> scale = TimeScale(0.01, 0.05)
        >>> print(f"{scale.norm(100, 2.0, 0.81):.6f} {scale.norm(1e6, 2.0, 0.81):.6f}")
        1.902992 0.533484
        """
        state = broadcast(*self._state(t), _initial(initial_norm), _trace(noise_trace))
        return like(_norm(*state), t, initial_norm, noise_trace)

    @implements("Equation (10)")
    def equilibrium_norm(self, noise_trace: Numbers) -> Any:
        """Compute the norm that (10) tends to, (ηV/(2λ))^{1/4}, for two numbers with λ > 0.

        >>> print(f"{TimeScale(0.01, 0.05).equilibrium_norm(0.81):.6f}")
        0.533484
        """
        sums = self._constants("equilibrium_norm", "use norm(k, initial_norm, noise_trace)")
        trace = _trace(noise_trace)
        if sums.weight_decay == 0:
            raise TimeScaleError(
                "Without weight decay the norm has no equilibrium: it grows for ever.",
                received="weight_decay = 0",
                expected="a positive weight decay",
                remedy="use norm(t, initial_norm, noise_trace)",
            )
        with np.errstate(over="ignore", under="ignore"):
            fourth = sums.lr / (2 * sums.weight_decay) * trace
        return like(
            finite(fourth, "The equilibrium norm", "use more weight decay") ** 0.25, noise_trace
        )

    def clock(self, t: Numbers, noise_trace: Numbers, initial_norm: Numbers) -> Any:
        """Compute the intrinsic clock u of the direction after t steps, for constant trace V >= 0.

        u = ∫_0^T |Y|^{-4} dT' = ln(1 + V (e^{2T} - 1) / |Y(0)|^4) / (2V) at T = τ(t), and
        (e^{2T} - 1) / (2 |Y(0)|^4) for V = 0. In steps it is ∫_0^t η²/|X|^4 ds with the norm
        of (10), from |X(0)| = |Y(0)| > 0. Where the trace varies on the unit sphere its extremes
        bound u.

        >>> print(f"{TimeScale(0.01, 0.05).clock(2086, 0.81, 1.0):.6f}")
        1.123416
        """
        state = broadcast(*self._state(t), _initial(initial_norm), _trace(noise_trace))
        return like(_clock(*state), t, noise_trace, initial_norm)

    def discrete_time(self, k: Numbers) -> Any:
        """Compute T = ln(1 + 2 t0) / 2 after k whole steps, with t0 = ``accumulated(k)``.

        For two numbers it has (1 - ηλ)^{-4k} where (12) has e^{4ηλk}: the two differ by O(ηλ) at
        the same T, and are equal for λ = 0.

        >>> print(f"{TimeScale([0.1, 0.1, 0.01], 0.5).discrete_time(3):.6f}")
        0.024239
        """
        return like(intrinsic_time(*self._discrete_state(k)), k)

    def accumulated(self, k: Numbers) -> Any:
        """Compute t0, the sum of the squares of the first k effective learning rates.

        SGD with weight decay is, path by path, a_k times SGD without it at the learning rates
        ``effective_lr``, so k steps give the direction the law of Y_0(t0) of (8). With C = λ/η
        and t = η²k it tends to the (e^{4Ct} - 1)/(4C) of Theorem 3.2.

        >>> print(f"{TimeScale(0.1, 0.0).accumulated(200):.6f}")
        2.000000
        """
        grown = growth(*self._discrete_state(k))
        return like(finite(grown / 2, "t0", "use log_accumulated or discrete_time"), k)

    def log_accumulated(self, k: Numbers) -> Any:
        """Compute the logarithm of ``accumulated``, which never overflows; -inf before a step.

        >>> print(f"{TimeScale(0.1, 0.5).log_accumulated(10**6):.4f}")
        205170.1545
        """
        log_a, gained = self._discrete_state(k)
        with np.errstate(divide="ignore"):
            return like(np.log(gained / 2) - 4 * log_a, k)

    def effective_lr(self, k: Numbers) -> Any:
        """Compute η_k / (a_k a_{k+1}) at step k, the learning rate without weight decay.

        Step k leads from x_k to x_{k+1}, and takes the same path up to the factor a_k.

        >>> TimeScale(0.1, 5.0).effective_lr([0, 1, 2])
        array([0.2, 0.8, 3.2])
        """
        with np.errstate(over="ignore", under="ignore"):
            result = np.exp(self._sums.log_effective_lr(check_whole("k", k)))
        return like(finite(result, "The effective learning rate", "use log_effective_lr"), k)

    def log_effective_lr(self, k: Numbers) -> Any:
        """Compute the logarithm of ``effective_lr``, which never overflows; -inf where η_k is 0.

        >>> print(f"{TimeScale(0.1, 5.0).log_effective_lr(10**4):.4f}")
        13861.3342
        """
        return like(self._sums.log_effective_lr(check_whole("k", k)), k)

    def shrinkage(self, k: Numbers) -> Any:
        """Compute a_k, the product of 1 - η_jλ_j over the first k steps; 0 where it underflows.

        >>> TimeScale(0.1, 5.0).shrinkage([0, 1, 2])
        array([1.  , 0.5 , 0.25])
        """
        log_a, _ = self._discrete_state(k)
        with np.errstate(under="ignore"):
            return like(np.exp(log_a), k)

    def log_shrinkage(self, k: Numbers) -> Any:
        """Compute the logarithm of ``shrinkage``, which never underflows.

        >>> print(f"{TimeScale(0.1, 5.0).log_shrinkage(10**4):.4f}")
        -6931.4718
        """
        return like(self._discrete_state(k)[0], k)

    @implements("Equation (9)")
    def reparametrised(self) -> tuple[TimeScale, float]:
        """Find the time scale with η = λ that gives the same directions, for two numbers, λ > 0.

        (η, λ, x) becomes (√(ηλ), √(ηλ), (λ/η)^{1/4} x). It is ``rescaled(lr / weight_decay)``.

        Returns:
            The time scale, and the factor (λ/η)^{1/4} of the norm.

        >>> TimeScale(0.0625, 1.0).reparametrised()
        (TimeScale(lr=0.25, weight_decay=0.25), 2.0)
        """
        sums = self._constants("reparametrised", "use rescaled(C), which takes schedules")
        if sums.weight_decay == 0:
            raise TimeScaleError(
                "Without weight decay no run with lr = weight_decay gives the same directions.",
                received="weight_decay = 0",
                expected="a positive weight decay",
                remedy="use rescaled(C) to change the learning rate and the norm",
            )
        lr, weight_decay = float(sums.lr), float(sums.weight_decay)
        both = math.sqrt(lr) * math.sqrt(weight_decay)
        return TimeScale(both, both), (weight_decay / lr) ** 0.25

    @implements("Remark 4.2")
    def rescaled(self, C: float) -> tuple[TimeScale, float]:
        """Find the time scale at C^{-1/2} η and C^{1/2} λ, which gives the same directions.

        The paths are equal up to the factor C^{-1/4} if their starts are. It puts η/(2Cλ) for
        η/(2λ) in (11), and so takes η < 2Cλ to where the theorems hold. At the same step the two
        have different T, since R is 1 at the start of both: e^{2T} - 1 is divided by C.

        Args:
            C: Positive number.

        Returns:
            The time scale (a schedule for a schedule), and the factor C^{-1/4} of the norm.

        >>> TimeScale([0.2, 0.1], 0.01).rescaled(16.0)
        (TimeScale(lr=<2 values from 0.05 to 0.025>, weight_decay=0.04), 0.5)
        """
        hint = "C is the factor by which lr / weight_decay is too large"
        ratio = check_number("C", C, hint, least=SMALLEST, most=LARGEST)
        root = math.sqrt(ratio)
        return TimeScale(self._lr.scaled(1 / root), self._weight_decay.scaled(root)), ratio**-0.25

    def _constants(self, name: str, hint: str) -> _ConstantSums:
        if isinstance(self._sums, _ConstantSums):
            return self._sums
        raise TimeScaleError(
            f"{name} needs a constant learning rate and weight decay.",
            received=repr(self),
            expected="two numbers",
            remedy=hint,
        )

    def _state(self, t: Numbers) -> tuple[Array, Array]:
        """Log a and gained after t steps, in continuous time for two numbers."""
        if isinstance(self._sums, _ConstantSums):
            return self._sums.continuous(check_range("t", t, "t counts in steps from the start"))
        return self._discrete_state(t)

    def _discrete_state(self, k: Numbers) -> tuple[Array, Array]:
        return self._sums.states(check_whole("k", k))


def _initial(initial_norm: Numbers) -> Array:
    hint = "initial_norm is the norm of the weights before the first step"
    return check_range("initial_norm", initial_norm, hint, least=SMALLEST, most=LARGEST)


def _trace(noise_trace: Numbers) -> Array:
    hint = "noise_trace is the trace of the noise covariance at a point of norm 1"
    return check_range("noise_trace", noise_trace, hint, most=LARGEST)


# From log a and gained to what is asked for.


@np.errstate(all="ignore")
def _norm(log_a: Array, gained: Array, norm: Any, trace: Any) -> Array:
    """The fourth root of a^4 norm^4 + gained trace, without underflow of the powers."""
    square = (np.exp(log_a.astype(WIDE)) * norm) ** 2
    fourth = gained.astype(WIDE) * trace
    hint = "use more weight decay, or fewer steps"
    return finite(np.sqrt(np.hypot(square, np.sqrt(fourth))), "The norm", hint)


@np.errstate(all="ignore")
def _clock(log_a: Array, gained: Array, norm: Array, trace: Array) -> Array:
    """The clock; where the product with e^{2T} overflows its logarithm does not."""
    grown = growth(log_a, gained / norm**4)
    product = trace * grown
    logarithm = np.log(trace) + np.log(gained) - 4 * (np.log(norm) + log_a)
    late = np.logaddexp(0, logarithm) / (2 * trace)
    clock = np.where(np.isfinite(product), grown / 2 * _log1p_ratio(product), late)
    return finite(clock, "The clock", "ask for fewer steps, or give a noise_trace above 0")


def _log1p_ratio(x: Array) -> Array:
    """ln(1 + x) / x, and its limit 1 at 0."""
    return np.where(x == 0, 1.0, np.log1p(x) / x)


class _ConstantSums:
    """Log a and gained in closed form, for two numbers."""

    def __init__(self, lr: float, weight_decay: float) -> None:
        self.lr, self.weight_decay = WIDE(lr), WIDE(weight_decay)
        if lr * weight_decay >= 1:
            raise decay_too_large(lr, weight_decay)
        self._decay = self.lr * self.weight_decay
        self._rate = -np.log1p(-self._decay)

    def continuous(self, t: Array) -> tuple[Array, Array]:
        """After the time t: log a = -ηλt, gained = (1 - e^{-4ηλt}) η/(2λ)."""
        return self._after(t, self._decay)

    def states(self, k: Array) -> tuple[Array, Array]:
        """After k steps, by t0 = η^2 (q^{-4k} - 1) / (q^{-2} - q^2): 2 sinh(2r) for q = e^{-r}."""
        log_a, gained = self._after(k, self._rate)
        double = 2 * self._rate
        return log_a, gained if double == 0 else gained * (double / np.sinh(double))

    @np.errstate(all="ignore")
    def _after(self, t: Array, rate: Any) -> tuple[Array, Array]:
        """Log a = -rate t, and gained = 2 η^2 (1 - e^{-4 rate t}) / (4 rate)."""
        wide = t.astype(WIDE)
        exponent = 4 * rate * wide
        part = np.where(exponent == 0, 1.0, -np.expm1(-exponent) / exponent)
        gained = 2 * self.lr**2 * wide * part
        finite(exponent + gained, "What t steps add up to", "use a smaller t")
        return 0.0 - rate * wide, gained

    def log_effective_lr(self, k: Array) -> Array:
        """Logarithms of η / (a_k a_{k+1}) at the steps k."""
        return np.log(self.lr) + (2 * k + 1) * self._rate

    @np.errstate(all="ignore")
    def inverse(self, T: Array) -> Array:
        """The t at which (12) is T: ln(1 + x) / (4ηλ), x = (e^{2T} - 1) 2λ/η."""
        lr, decay, double = self.lr, self.weight_decay, 2 * T.astype(WIDE)
        grown = np.expm1(double)
        # Where e^{2T} or x overflows, its logarithm does not.
        over = np.isinf(grown)
        log_x = double + np.log(decay) + np.log(2 / lr)
        x = np.where(over, np.exp(log_x), 2 * decay / lr * grown)
        free = np.where(over, np.exp(double - np.log(2 * lr**2)), grown / 2 / lr**2)
        late = np.where(np.isinf(x), log_x, np.log1p(x)) / (4 * self._decay)
        t = np.where(x < 1, free * _log1p_ratio(x), late)
        hint = "ask for a smaller T, or use more weight decay"
        return finite(t, "The number of steps", hint)

    def search(self, times: Array, max_steps: int | None) -> Steps:
        """The largest k whose rounded (12) does not exceed each of the times, shape (n,)."""
        most = LARGEST_STEP - 2 if max_steps is None else min(max_steps, LARGEST_STEP - 2)
        k = np.floor(self.inverse(times))
        if (k > most).any():
            raise TimeScaleError(
                "This time takes too many steps.",
                received=f"T = {float(times.max()):.6g}, which takes {float(k.max()):.6g} steps",
                expected=f"at most {most} steps",
                remedy="ask for a smaller T, raise max_steps, or use tau_inverse, which need "
                "not tell whole steps apart",
            )
        k = k + (intrinsic_time(*self.continuous(k + 1)) <= times)
        k = k - ((intrinsic_time(*self.continuous(k)) > times) & (k > 0))
        return k.astype(np.int64)
