"""The time scale of SGD with weight decay: from steps to the time of the limiting diffusion.

With R and τ of Equations (11) and (12), SGD after floor(τ^{-1}(T)) steps, divided by R, has in
the limit the law of the diffusion (13) at T (Theorem 4.4). Everything here follows from two
quantities along the run,

    a, what weight decay leaves of the first norm,    and gained, in    R^4 = a^4 + gained,

by e^{2T} = R^4 / a^4 = 1 + 2 t0. In the paper's continuous time a = e^{-ηλt} and
gained = (1 - e^{-4ηλt}) η/(2λ), which is (11). In whole steps a_k is the product of the
1 - η_jλ_j, and t0 the sum of the squares of η_j / (a_j a_{j+1}), the learning rates with which SGD
without weight decay takes the same path up to the factor a_k: exact for every schedule.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from manifold_sde.errors import TimeScaleError
from manifold_sde.paper import implements
from manifold_sde.schedule_sums import (
    ConstantSums,
    StepSums,
    fourth_root_of_sum,
    intrinsic_time,
    log1p_ratio,
)
from manifold_sde.schedules import (
    LARGEST,
    SMALLEST,
    Array,
    Numbers,
    Schedule,
    ScheduleLike,
    broadcast,
    check_finite,
    check_norm,
    check_number,
    check_range,
    check_trace,
    check_whole,
    like,
)


class TimeScale:
    """The map between steps of SGD and the time T of the limiting diffusion.

    The update is (1) of the paper, x_{k+1} = (1 - η_kλ_k) x_k - η_k ∇L(x_k).

    Two numbers give the paper's continuous formulas (10) to (12), and beside them the exact sums
    over whole steps (``discrete_time``, ``accumulated``, ...). With a schedule, be it a list of
    equal numbers, ``radius``, ``tau``, ``steps``, ``norm`` and ``clock`` are the exact sums too,
    and take whole step counts. At the same T the two differ by O(ηλ).

    The theorems let ηλ go to 0 with η < 2λ, or η < 2Cλ for some constant C (Remark 4.2). The
    formulas hold for all η > 0 and λ >= 0 with ηλ < 1; λ = 0 is their limit.

    Numbers, sequences and arrays give ``numpy.float64`` or float64 arrays of their shape. A tensor
    gives a tensor of its dtype and device (float64 if it holds integers), without gradient.
    Everything is computed in float64.

    Args:
        lr: Learning rate η: a positive number; a sequence, array or tensor with one value a step;
            or a callable of the step k = 0, 1, 2, ... that depends on k alone. A schedule may be
            0 at some steps.
        weight_decay: Weight decay λ >= 0, in the same forms. It is decoupled: a step multiplies
            the weights by 1 - ηλ.

    Raises:
        TimeScaleError: A value is not a finite number, is out of range, or has ηλ >= 1. The
            values of a callable are checked at the steps that are asked for.

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
        self._sums: ConstantSums | StepSums
        if self._lr.constant is not None and self._weight_decay.constant is not None:
            self._sums = ConstantSums(self._lr.constant, self._weight_decay.constant)
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
        return isinstance(self._sums, ConstantSums)

    @property
    def within_theorem(self) -> bool:
        """Whether η < 2λ, as Theorems 4.1 and 4.4 ask, for two numbers.

        >>> TimeScale(0.01, 0.05).within_theorem, TimeScale(0.1, 0.0005).within_theorem
        (True, False)
        """
        sums = self._constants("within_theorem", "compare the values of the schedules")
        return sums.lr < 2 * sums.weight_decay

    def __repr__(self) -> str:
        return f"TimeScale(lr={self._lr!r}, weight_decay={self._weight_decay!r})"

    @implements("Equation (11)")
    def radius(self, t: Numbers) -> Any:
        """R(t), the norm of the weights if the noise has trace 1 and they start at norm 1.

        R(t)^4 = η/(2λ) + e^{-4ηλt} (1 - η/(2λ)). For λ = 0 it is 1 + 2η²t; for a schedule
        a_k^4 (1 + 2 t0).

        Args:
            t: Time in steps >= 0, any shape; whole steps for a schedule.

        Returns:
            R(t), the shape of ``t``.

        Raises:
            TimeScaleError: ``t`` is out of range.

        >>> print(f"{TimeScale(0.01, 0.05).radius(10_000):.6f}")
        0.562341
        """
        log_a, gained = self._state(t)
        return like(fourth_root_of_sum(np.exp(log_a), gained), t)

    @implements("Equation (12)")
    def tau(self, t: Numbers) -> Any:
        """T = τ(t), the time that the diffusion (13) has after t steps.

        τ(t) = ∫_0^t η²/R(s)^4 ds = ln(1 + (e^{4ηλt} - 1) η/(2λ)) / 2. For λ = 0 it is
        ln(1 + 2η²t) / 2; for a schedule ``discrete_time``.

        Args:
            t: Time in steps >= 0, any shape; whole steps for a schedule.

        Returns:
            T, the shape of ``t``.

        Raises:
            TimeScaleError: ``t`` is out of range.

        >>> print(f"{TimeScale(0.01, 0.05).tau(1e12):.4f}")
        999999998.8487
        """
        return like(intrinsic_time(*self._state(t)), t)

    @implements("Equation (12)")
    def tau_inverse(self, T: Numbers) -> Any:
        """Time in steps, a real number, after which the diffusion (13) is at T.

        τ^{-1}(T) = ln(1 + (e^{2T} - 1) 2λ/η) / (4ηλ). For λ = 0 it is (e^{2T} - 1) / (2η²); a
        schedule has none, for it is known at whole steps only.

        Args:
            T: Time of the diffusion >= 0, any shape.

        Returns:
            t, the shape of ``T``.

        Raises:
            TimeScaleError: ``T`` is out of range, t is too large for a float, or a schedule was
                given.

        >>> print(f"{TimeScale(0.01, 0.05).tau_inverse(1.0):.4f}")
        2086.3511
        """
        sums = self._constants("tau_inverse", "a schedule is known at whole steps: use steps(T)")
        return like(sums.inverse(check_range("T", T, "the diffusion starts at T = 0")), T)

    @implements("Theorem 4.4")
    def steps(self, T: Numbers, *, max_steps: int | None = None) -> Any:
        """Largest number k of steps with τ(k) <= T, the floor of τ^{-1}(T) in Theorem 4.4.

        It is that of τ as rounded, so steps(tau(k)) is k while float64 tells τ at k + 1 apart.

        Args:
            T: Time of the diffusion >= 0, any shape.
            max_steps: Where to give up; by default 10^9 steps of a schedule, and 2^53 for two
                numbers.

        Returns:
            ``int`` for a number; otherwise an int64 array or tensor of the shape of ``T``.

        Raises:
            TimeScaleError: ``T`` is out of range, is never reached, or takes too many steps.

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
        """Norm of the weights after t steps, for noise of constant trace.

        |X(t)|^4 = ηV/(2λ) + e^{-4ηλt} (|X(0)|^4 - ηV/(2λ)); for a schedule
        a_k^4 (|x_0|^4 + 2 V t0), to first order in the learning rate. V = tr Σ at norm 1 is the
        paper's σ̂² in (10), which is D - 1 times the σ̂² of (18).

        Args:
            t: Time in steps >= 0, any shape; whole steps for a schedule.
            initial_norm: |X(0)| > 0, broadcast against ``t``.
            noise_trace: V >= 0, broadcast against ``t``.

        Returns:
            |X(t)|, the broadcast shape.

        Raises:
            TimeScaleError: An argument is out of range.

        >>> scale = TimeScale(0.01, 0.05)
        >>> print(f"{scale.norm(100, 2.0, 0.81):.6f} {scale.norm(1e6, 2.0, 0.81):.6f}")
        1.902992 0.533484
        """
        log_a, gained, norm, trace = broadcast(
            *self._state(t), check_norm(initial_norm), check_trace(noise_trace)
        )
        result = fourth_root_of_sum(np.exp(log_a) * norm, gained * trace)
        return like(result, t, initial_norm, noise_trace)

    @implements("Equation (10)")
    def equilibrium_norm(self, noise_trace: Numbers) -> Any:
        """Norm that (10) tends to, (ηV/(2λ))^{1/4}, for two numbers.

        Args:
            noise_trace: V >= 0, the trace of the noise covariance at norm 1.

        Returns:
            The norm, the shape of ``noise_trace``.

        Raises:
            TimeScaleError: λ is 0 (the norm grows for ever), a schedule was given, or
                ``noise_trace`` is out of range.

        >>> print(f"{TimeScale(0.01, 0.05).equilibrium_norm(0.81):.6f}")
        0.533484
        """
        sums = self._constants("equilibrium_norm", "use norm(k, initial_norm, noise_trace)")
        trace = check_trace(noise_trace)
        if sums.weight_decay == 0:
            raise TimeScaleError(
                "Without weight decay the norm has no equilibrium: it grows for ever.",
                received="weight_decay = 0",
                expected="a positive weight decay",
                remedy="use norm(t, initial_norm, noise_trace)",
            )
        with np.errstate(over="ignore"):
            result = (np.float64(sums.lr) / 2 / sums.weight_decay * trace) ** 0.25
        check_finite(result, "The equilibrium norm", "use more weight decay")
        return like(result, noise_trace)

    def clock(self, t: Numbers, noise_trace: Numbers, initial_norm: Numbers) -> Any:
        """Intrinsic clock u of the direction after t steps, for noise of constant trace.

        u = ∫_0^T |Y|^{-4} dT' = ln(1 + V (e^{2T} - 1) / |Y(0)|^4) / (2V) at T = τ(t), and
        (e^{2T} - 1) / (2 |Y(0)|^4) for V = 0. In steps it is ∫_0^t η²/|X|^4 ds with the norm
        of (10). Where the trace varies on the unit sphere its extremes bound u.

        Args:
            t: Time in steps >= 0, any shape; whole steps for a schedule.
            noise_trace: V >= 0, the trace of the noise covariance at norm 1.
            initial_norm: |Y(0)| = |x_0| > 0.

        Returns:
            u, the broadcast shape.

        Raises:
            TimeScaleError: An argument is out of range, or u is too large for a float.

        >>> print(f"{TimeScale(0.01, 0.05).clock(2086, 0.81, 1.0):.6f}")
        1.123416
        """
        log_a, gained, norm, trace = broadcast(
            *self._state(t), check_norm(initial_norm), check_trace(noise_trace)
        )
        with np.errstate(divide="ignore", over="ignore", invalid="ignore", under="ignore"):
            start = gained / norm**4
            grown = start * np.exp(-4 * log_a)
            product = trace * grown
            direct = grown / 2 * log1p_ratio(product)
            # Where the product overflows, its logarithm does not.
            logarithm = np.log(trace) + np.log(start) - 4 * log_a
            long = np.logaddexp(0, logarithm) / (2 * trace)
            result = np.where(np.isfinite(product), direct, long)
        result = np.where(gained == 0, 0.0, result)
        check_finite(result, "The clock", "ask for fewer steps, or give a noise_trace above 0")
        return like(result, t, noise_trace, initial_norm)

    def discrete_time(self, k: Numbers) -> Any:
        """T = ln(1 + 2 t0) / 2 after k whole steps, with t0 = ``accumulated(k)``.

        For two numbers it has (1 - ηλ)^{-4k} where (12) has e^{4ηλk}: the two differ by O(ηλ) at
        the same T, and are equal for λ = 0.

        Args:
            k: Step counts 0, 1, 2, ..., any shape.

        Returns:
            T, the shape of ``k``.

        Raises:
            TimeScaleError: A step count is not whole, or the schedule ends or fails before it.

        >>> print(f"{TimeScale([0.1, 0.1, 0.01], 0.5).discrete_time(3):.6f}")
        0.024239
        """
        return like(intrinsic_time(*self._discrete_state(k)), k)

    def accumulated(self, k: Numbers) -> Any:
        """t0, the sum of the squares of the first k effective learning rates.

        SGD with weight decay is, path by path, a_k times SGD without it at the learning rates
        ``effective_lr``, so k steps give the direction the law of Y_0(t0) of (8). With C = λ/η
        and t = η²k it tends to the (e^{4Ct} - 1)/(4C) of Theorem 3.2.

        Args:
            k: Step counts 0, 1, 2, ..., any shape.

        Returns:
            t0, the shape of ``k``.

        Raises:
            TimeScaleError: As in ``discrete_time``; or t0 is too large for a float.

        >>> print(f"{TimeScale(0.1, 0.0).accumulated(200):.6f}")
        2.000000
        """
        log_a, gained = self._discrete_state(k)
        with np.errstate(over="ignore", invalid="ignore"):
            result = np.where(gained == 0, 0.0, gained / 2 * np.exp(-4 * log_a))
        check_finite(result, "t0", "use log_accumulated or discrete_time")
        return like(result, k)

    def log_accumulated(self, k: Numbers) -> Any:
        """Logarithm of ``accumulated``, which never overflows; -inf while no step was taken.

        >>> print(f"{TimeScale(0.1, 0.5).log_accumulated(10**6):.4f}")
        205170.1545
        """
        log_a, gained = self._discrete_state(k)
        with np.errstate(divide="ignore"):
            return like(np.log(gained / 2) - 4 * log_a, k)

    def effective_lr(self, k: Numbers) -> Any:
        """Learning rate η_k / (a_k a_{k+1}) of the same path without weight decay.

        Args:
            k: Steps 0, 1, 2, ..., any shape; step k leads from x_k to x_{k+1}.

        Returns:
            The effective learning rate of step k, the shape of ``k``.

        Raises:
            TimeScaleError: As in ``discrete_time``; or it is too large for a float.

        >>> TimeScale(0.1, 5.0).effective_lr([0, 1, 2])
        array([0.2, 0.8, 3.2])
        """
        with np.errstate(over="ignore"):
            result = np.exp(self._sums.log_effective_lr(check_whole("k", k)))
        check_finite(result, "The effective learning rate", "use log_effective_lr")
        return like(result, k)

    def log_effective_lr(self, k: Numbers) -> Any:
        """Logarithm of ``effective_lr``, which never overflows; -inf where η_k is 0.

        >>> print(f"{TimeScale(0.1, 5.0).log_effective_lr(10**4):.4f}")
        13861.3342
        """
        return like(self._sums.log_effective_lr(check_whole("k", k)), k)

    def shrinkage(self, k: Numbers) -> Any:
        """a_k, the product of 1 - η_jλ_j over the first k steps; 0 where it underflows.

        Args:
            k: Step counts 0, 1, 2, ..., any shape.

        Returns:
            a_k, the shape of ``k``.

        Raises:
            TimeScaleError: As in ``discrete_time``.

        >>> TimeScale(0.1, 5.0).shrinkage([0, 1, 2])
        array([1.  , 0.5 , 0.25])
        """
        with np.errstate(under="ignore"):
            return like(np.exp(self._discrete_state(k)[0]), k)

    def log_shrinkage(self, k: Numbers) -> Any:
        """Logarithm of ``shrinkage``, which never underflows.

        >>> print(f"{TimeScale(0.1, 5.0).log_shrinkage(10**4):.4f}")
        -6931.4718
        """
        return like(self._discrete_state(k)[0], k)

    @implements("Equation (9)")
    def reparametrised(self) -> tuple[TimeScale, float]:
        """The time scale with η = λ that gives the same directions, for two numbers.

        (η, λ, x) becomes (√(ηλ), √(ηλ), (λ/η)^{1/4} x). It is ``rescaled(lr / weight_decay)``.

        Returns:
            The time scale, and the factor (λ/η)^{1/4} of the norm.

        Raises:
            TimeScaleError: λ is 0, or a schedule was given.

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
        both = math.sqrt(sums.lr) * math.sqrt(sums.weight_decay)
        return TimeScale(both, both), (sums.weight_decay / sums.lr) ** 0.25

    @implements("Remark 4.2")
    def rescaled(self, C: float) -> tuple[TimeScale, float]:
        """The time scale at C^{-1/2} η and C^{1/2} λ, which gives the same directions.

        The paths are equal up to the factor C^{-1/4} if their starts are. It puts η/(2Cλ) for
        η/(2λ) in (11), and so takes η < 2Cλ to where the theorems hold. At the same step the two
        have different T, since R is 1 at the start of both: e^{2T} - 1 is divided by C.

        Args:
            C: Positive number.

        Returns:
            The time scale (a schedule for a schedule), and the factor C^{-1/4} of the norm.

        Raises:
            TimeScaleError: C is not a positive number, or takes η out of range.

        >>> TimeScale([0.2, 0.1], 0.01).rescaled(16.0)
        (TimeScale(lr=<2 values from 0.05 to 0.025>, weight_decay=0.04), 0.5)
        """
        way = "C is the factor by which lr / weight_decay is too large"
        ratio = check_number("C", C, way, least=SMALLEST, most=LARGEST)
        root = math.sqrt(ratio)
        return TimeScale(self._lr.scaled(1 / root), self._weight_decay.scaled(root)), ratio**-0.25

    def _constants(self, name: str, remedy: str) -> ConstantSums:
        if isinstance(self._sums, ConstantSums):
            return self._sums
        raise TimeScaleError(
            f"{name} needs a constant learning rate and weight decay.",
            received=repr(self),
            expected="two numbers",
            remedy=remedy,
        )

    def _state(self, t: Numbers) -> tuple[Array, Array]:
        """Log a and gained after t steps, in continuous time for two numbers."""
        if isinstance(self._sums, ConstantSums):
            return self._sums.continuous(check_range("t", t, "t counts in steps from the start"))
        return self._discrete_state(t)

    def _discrete_state(self, k: Numbers) -> tuple[Array, Array]:
        """Log a_k and gained_k after k whole steps."""
        return self._sums.states(check_whole("k", k))
