"""The exact sums along a schedule: how far SGD has come on the intrinsic clock after k steps.

Along a run of SGD with learning rates η_k and weight decays λ_k, Equation (1),

    q_k = 1 - η_kλ_k,      a_k = q_0 q_1 ... q_{k-1},

the iterates x_k / a_k are those of SGD without weight decay at the learning rates
η_k / (a_k a_{k+1}). The sum of their squares, t0, grows like e^{4ηλk} and
overflows long before the run is over; what is computed here is therefore

    log a_k    and    gained_k = 2 a_k^4 t0 = 2 sum_{j<k} η_j^2 (a_k / a_j)^2 (a_k / a_{j+1})^2,

which obey log a_{k+1} = log a_k + log q_k and gained_{k+1} = q_k^4 gained_k + 2 q_k^2 η_k^2:
positive terms and factors of at most one, so nothing overflows and nothing cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manifold_sde.errors import TimeScaleError
from manifold_sde.schedules import LARGEST_STEP, Array, Schedule, check_finite

Steps = NDArray[np.int64]

STREAM_LIMIT = 10**9
"""Most steps of a schedule that are summed before a question is refused."""

_ROWS = 128
_BLOCK = _ROWS * _ROWS


def log1p_ratio(x: Array) -> Array:
    """ln(1 + x) / x, and its limit 1 at 0.

    >>> log1p_ratio(np.array([0.0, 1.0]))
    array([1.        , 0.69314718])
    """
    with np.errstate(invalid="ignore"):
        return np.where(x == 0, 1.0, np.log1p(x) / x)


def intrinsic_time(log_a: Array, gained: Array) -> Array:
    """T = ln(1 + 2 t0) / 2 from log a and gained = 2 a^4 t0, without overflow.

    >>> float(intrinsic_time(np.array(-1e6), np.array(1.0)))
    2000000.0
    """
    with np.errstate(over="ignore", divide="ignore", under="ignore", invalid="ignore"):
        doubled = gained * np.exp(-4 * log_a)
        logarithm = np.log(gained) - 4 * log_a
        time = np.where(np.isfinite(doubled), np.log1p(doubled), np.logaddexp(0, logarithm))
    return np.where(gained == 0, 0.0, time / 2)


def fourth_root_of_sum(length: Array, fourth: Array) -> Array:
    """(length^4 + fourth)^{1/4}, without overflow or underflow of the power.

    >>> float(fourth_root_of_sum(np.array(2e100), np.array(0.0)))
    2e+100
    """
    check_finite(fourth, "The norm", "use more weight decay, or fewer steps")
    other = fourth**0.25
    largest = np.maximum(length, other)
    scale = np.where(largest > 0, largest, 1.0)
    with np.errstate(under="ignore"):
        return scale * ((length / scale) ** 4 + (other / scale) ** 4) ** 0.25


class ConstantSums:
    """The same sums in closed form, for a constant learning rate and weight decay.

    In continuous time q becomes e^{-ηλ}, which gives the paper's formulas: R^4 of (11) is
    a^4 + gained, and (12) is ``intrinsic_time``.

    Args:
        lr: η > 0.
        weight_decay: λ >= 0, with ηλ < 1.

    Attributes:
        lr, weight_decay: The two numbers.

    Raises:
        TimeScaleError: ηλ >= 1.

    >>> log_a, gained = ConstantSums(0.1, 0.0).states(np.array([0.0, 50.0]))
    >>> gained
    array([0., 1.])
    """

    def __init__(self, lr: float, weight_decay: float) -> None:
        if lr * weight_decay >= 1:
            raise _decay_too_large(lr, weight_decay)
        self.lr = lr
        self.weight_decay = weight_decay
        self._decay = lr * weight_decay
        self._rate = -math.log1p(-self._decay)

    def continuous(self, t: Array) -> tuple[Array, Array]:
        """The two of (11) after the time t: log a = -ηλt, gained = (1 - e^{-4ηλt}) η/(2λ)."""
        return self._closed_form(t, self._decay)

    def states(self, k: Array) -> tuple[Array, Array]:
        """The sums after k steps: log a_k and gained_k.

        The sum is geometric: t0 = η^2 (q^{-4k} - 1) / (q^{-2} - q^2), and with q = e^{-r} its
        denominator is 2 sinh(2r), for 4r in continuous time.
        """
        log_a, gained = self._closed_form(k, self._rate)
        double = 2 * self._rate
        return log_a, gained if double == 0 else gained * (double / math.sinh(double))

    def log_effective_lr(self, k: Array) -> Array:
        """Logarithms of η / (a_k a_{k+1}) at the steps k."""
        return math.log(self.lr) + (2 * k + 1) * self._rate

    def inverse(self, T: Array) -> Array:
        """The t at which (12) is T: ln(1 + x) / (4ηλ), x = (e^{2T} - 1) 2λ/η."""
        lr, weight_decay = np.float64(self.lr), np.float64(self.weight_decay)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore", under="ignore"):
            grown = np.expm1(2 * T)
            x = 2 * weight_decay / lr * grown
            # Where e^{2T} overflows, its logarithm does not.
            log_grown = 2 * T + np.log1p(-np.exp(-2 * T))
            log_x = log_grown + np.log(weight_decay) + np.log(2 / lr)
            x = np.where(np.isfinite(grown), x, np.exp(log_x))
            free = np.where(
                np.isfinite(grown), grown / 2 / lr**2, np.exp(log_grown - np.log(2 * lr**2))
            )
            late = np.where(np.isfinite(x), np.log1p(x), np.logaddexp(0, log_x))
            t = np.where(x < 1, free * log1p_ratio(x), late / np.float64(4 * self._decay))
        check_finite(t, "The number of steps", "ask for a smaller T, or use more weight decay")
        return t

    def search(self, times: Array, max_steps: int | None) -> Steps:
        """The largest k whose rounded (12) does not exceed each of the times, shape (n,)."""
        most = LARGEST_STEP - 2 if max_steps is None else max_steps
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

    def _closed_form(self, t: Array, rate: float) -> tuple[Array, Array]:
        """Log a = -rate t, and gained = 2 η^2 (1 - e^{-4 rate t}) / (4 rate)."""
        square = self.lr**2
        with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
            exponent = 4 * rate * t
            part = -np.expm1(-exponent)
            early = 2 * square * t * np.where(exponent == 0, 1.0, part / exponent)
            late = square / np.float64(2 * rate) * part
            gained = np.where(exponent < 1, early, late)
        check_finite(exponent + gained, "What t steps add up to", "use a smaller t")
        return 0.0 - rate * t, gained


@dataclass(frozen=True)
class _Block:
    """The steps start, ..., start + size - 1, and the sums before and after each of them."""

    start: int
    size: int
    lr: Array  # (block,), zero after the last usable step
    log_q: Array  # (block,)
    log_a: Array  # (block + 1,)
    gained: Array  # (block + 1,)
    fault: TimeScaleError | None


@dataclass(frozen=True)
class _Carry:
    """log a and gained at the first step of a block, each as the sum of two floats."""

    log_a: tuple[float, float] = (0.0, 0.0)
    gained: tuple[float, float] = (0.0, 0.0)

    def advanced(self, log_factor: float, term: float) -> _Carry:
        """After steps that together do gained -> e^{log_factor} gained + term."""
        high, low = self.gained
        if log_factor > -1:
            # Rounding a factor close to 1 would add up over the blocks; expm1 does not.
            change = math.expm1(log_factor)
            gained = _two_floats(high, low, high * change, low * change, term)
        else:
            factor = math.exp(log_factor)
            gained = _two_floats(high * factor, low * factor, term)
        return _Carry(_two_floats(*self.log_a, log_factor / 4), gained)


def _two_floats(*parts: float) -> tuple[float, float]:
    total = math.fsum(parts)
    return total, math.fsum([*parts, -total])


class StepSums:
    """log a_k and gained_k along a schedule, in memory that does not grow with the steps.

    Steps are taken in blocks of 16384 by a prefix scan: the rounding error of a sum of n
    terms grows like log n within a block, and the sums at the blocks' starts are carried
    in twice the precision. Only each block's start and the latest block stay in memory.

    Args:
        lr: Learning rates η_k.
        weight_decay: Weight decays λ_k.

    Attributes:
        length: Number of steps of the shorter sequence, or ``None``.

    >>> sums = StepSums(Schedule("lr", 0.1), Schedule("weight_decay", 0.0))
    >>> log_a, gained = sums.states(np.array([0, 50]))
    >>> gained
    array([0., 1.])
    """

    def __init__(self, lr: Schedule, weight_decay: Schedule) -> None:
        self.lr = lr
        self.weight_decay = weight_decay
        lengths = [s.length for s in (lr, weight_decay) if s.length is not None]
        self.length = min(lengths) if lengths else None
        self._carries: dict[int, _Carry] = {0: _Carry()}
        self._latest: _Block | None = None
        if self.length is not None and not (lr.is_lazy or weight_decay.is_lazy):
            for start in range(0, self.length, _BLOCK):
                _, _, fault = self._read(start, min(start + _BLOCK, self.length))
                if fault is not None:
                    raise fault

    def states(self, k: Array) -> tuple[Array, Array]:
        """The sums after k steps: log a_k and gained_k.

        Args:
            k: Whole step counts, any shape.

        Returns:
            Two arrays of that shape.

        Raises:
            TimeScaleError: The schedule ends, or a value of it cannot be used, before k.
        """
        steps = k.astype(np.int64)
        self._check_reach(steps, 0)
        log_a, gained = np.empty(steps.shape), np.empty(steps.shape)
        index = np.maximum(steps - 1, 0) // _BLOCK
        for i in np.unique(index).tolist():
            chosen = index == i
            local = steps[chosen] - i * _BLOCK
            block = self._block(i, int(local.max()))
            log_a[chosen], gained[chosen] = block.log_a[local], block.gained[local]
        return log_a, gained

    def log_effective_lr(self, k: Array) -> Array:
        """Logarithms of η_k / (a_k a_{k+1}) at the steps k; the same errors as ``states``."""
        steps = k.astype(np.int64)
        self._check_reach(steps, 1)
        result = np.empty(steps.shape)
        index = steps // _BLOCK
        for i in np.unique(index).tolist():
            chosen = index == i
            local = steps[chosen] - i * _BLOCK
            block = self._block(i, int(local.max()) + 1)
            with np.errstate(divide="ignore"):
                log_lr = np.log(block.lr[local])
            result[chosen] = log_lr - 2 * block.log_a[local] - block.log_q[local]
        return result

    def search(self, times: Array, max_steps: int | None) -> Steps:
        """The largest k whose intrinsic time T_k does not exceed each of the times.

        Args:
            times: Intrinsic times, shape (n,).
            max_steps: Where to give up; ``None`` is STREAM_LIMIT.

        Returns:
            Step counts, shape (n,).

        Raises:
            TimeScaleError: A time is not reached before the schedule ends, before it has
                a value that cannot be used, or within ``max_steps`` steps.
        """
        found = np.zeros(times.shape, dtype=np.int64)
        order = np.argsort(times, kind="stable")
        limit = STREAM_LIMIT if max_steps is None else max_steps
        limit = limit if self.length is None else min(limit, self.length)
        done, i = 0, 0
        while done < times.size:
            wanted = times[order[done:]]
            size = min(_BLOCK, limit - i * _BLOCK)
            if size == _BLOCK and i + 1 not in self._carries:
                size = min(size, self._block(i, size, strict=False).size)
            if size == _BLOCK and self._start_time(i + 1) <= wanted[0]:
                i += 1
                continue
            block = self._block(i, size, strict=False)
            size = min(size, block.size)
            reach = np.maximum.accumulate(
                intrinsic_time(block.log_a[: size + 1], block.gained[: size + 1])
            )
            if size == _BLOCK:
                wanted = wanted[wanted < reach[-1]]
            elif wanted[-1] > reach[-1]:
                # The last time is an answer only where it is hit exactly.
                raise self._not_reached(float(wanted[-1]), float(reach[-1]), block, size, limit)
            local = np.searchsorted(reach, wanted, side="right") - 1
            found[order[done : done + wanted.size]] = block.start + local
            done += wanted.size
        return found

    def _not_reached(
        self, time: float, reached: float, block: _Block, size: int, limit: int
    ) -> TimeScaleError:
        steps = block.start + size
        if steps < limit and block.fault is not None:
            return block.fault
        if steps == self.length:
            return TimeScaleError(
                "The schedule ends before this intrinsic time.",
                received=f"T = {time:.6g}, and a schedule of {steps} steps",
                expected=f"T at most {reached:.6g}, where the schedule ends",
                remedy="make the schedule longer, or pass a callable of the step",
            )
        return TimeScaleError(
            f"The schedule does not reach this intrinsic time within {steps} steps.",
            received=f"T = {time:.6g}",
            expected=f"T at most {reached:.6g}, which it has after {steps} steps",
            remedy="ask for a smaller T or raise max_steps; with a learning rate that decays "
            "and no weight decay T may be bounded",
        )

    def _start_time(self, i: int) -> float:
        carry = self._carries[i]
        return float(intrinsic_time(np.array(carry.log_a[0]), np.array(carry.gained[0])))

    def _check_reach(self, steps: Steps, past: int) -> None:
        wanted = int(steps.max(initial=0))
        if self.length is not None and steps.size and wanted + past > self.length:
            shorter = self.lr if self.lr.length == self.length else self.weight_decay
            raise TimeScaleError(
                f"The schedule {shorter.name} ends before step {wanted}.",
                received=f"step {wanted}, and a schedule of length {self.length}",
                expected=f"a step of at most {self.length - past}",
                remedy="make the schedule longer, or pass a callable of the step",
            )
        if wanted > STREAM_LIMIT:
            raise TimeScaleError(
                "Too many steps of a schedule to sum.",
                received=f"step {wanted}",
                expected=f"at most {STREAM_LIMIT}",
                remedy="a constant learning rate and weight decay have closed forms: pass numbers",
            )

    def _read(self, start: int, stop: int) -> tuple[Array, Array, TimeScaleError | None]:
        lr, fault = self.lr.read(start, stop)
        weight_decay, other = self.weight_decay.read(start, stop)
        if weight_decay.size < lr.size:
            fault = other
        size = min(lr.size, weight_decay.size)
        lr, decay = lr[:size], lr[:size] * weight_decay[:size]
        if (decay >= 1).any():
            first = int(np.argmax(decay >= 1))
            fault = _decay_too_large(
                float(lr[first]), float(weight_decay[first]), f" at step {start + first}"
            )
            lr, decay = lr[:first], decay[:first]
        return lr, decay, fault

    def _block(self, i: int, size: int, *, strict: bool = True) -> _Block:
        """Block i with at least its first ``size`` steps; if not strict, as many as there are."""
        for j in range(max(self._carries), i):
            self._evaluate(j, _BLOCK, strict=True)
        return self._evaluate(i, size, strict=strict)

    def _evaluate(self, i: int, size: int, *, strict: bool) -> _Block:
        block = self._latest
        if block is None or block.start != i * _BLOCK or block.size < size:
            block = self._latest = self._compute(i, size)
        if strict and block.size < size and block.fault is not None:
            raise block.fault
        return block

    def _compute(self, i: int, size: int) -> _Block:
        start = i * _BLOCK
        read_lr, decay, fault = self._read(start, start + size)
        # Always a whole block, so that a sum does not depend on what else was asked for.
        lr, log_q = np.zeros(_BLOCK), np.zeros(_BLOCK)
        lr[: read_lr.size] = read_lr
        log_q[: decay.size] = np.log1p(-decay)
        with np.errstate(under="ignore"):
            log_factor, term = _prefix_scan(4 * log_q, 2 * (lr * np.exp(log_q)) ** 2)
            carry = self._carries[i]
            log_a = carry.log_a[0] + np.concatenate([[0.0], log_factor / 4])
            gained = np.concatenate([[1.0], np.exp(log_factor)]) * carry.gained[0]
        gained[1:] += term
        if not read_lr.all():
            # A step at learning rate 0 changes nothing, not even the order of the sum.
            last = np.maximum.accumulate(np.where(lr > 0, np.arange(1, _BLOCK + 1), 0))
            log_a[1:], gained[1:] = log_a[last], gained[last]
        if read_lr.size == _BLOCK:
            after = carry.advanced(float(log_factor[-1]), float(term[-1]))
            self._carries[i + 1] = after
            log_a[-1], gained[-1] = after.log_a[0], after.gained[0]
        return _Block(start, read_lr.size, lr, log_q, log_a, gained, fault)


def _prefix_scan(log_factor: Array, term: Array) -> tuple[Array, Array]:
    """Compositions of the first 1, 2, ... maps s -> e^{log_factor_k} s + term_k of a block."""
    log_factor, term = log_factor.reshape(_ROWS, -1), term.reshape(_ROWS, -1)
    _scan(log_factor, term)
    row_log_factor, row_term = log_factor[:, -1].copy(), term[:, -1].copy()
    _scan(row_log_factor, row_term)
    term[1:] += np.exp(log_factor[1:]) * row_term[:-1, None]
    log_factor[1:] += row_log_factor[:-1, None]
    return log_factor.reshape(-1), term.reshape(-1)


def _scan(log_factor: Array, term: Array) -> None:
    """The same along the last axis, in place: after each pass an entry spans twice the steps."""
    shift = 1
    while shift < term.shape[-1]:
        term[..., shift:] += np.exp(log_factor[..., shift:]) * term[..., :-shift]
        log_factor[..., shift:] = log_factor[..., shift:] + log_factor[..., :-shift]
        shift *= 2


def _decay_too_large(lr: float, weight_decay: float, where: str = "") -> TimeScaleError:
    """The error for ηλ >= 1, with which a step of (1) would reverse the weights."""
    return TimeScaleError(
        f"lr * weight_decay{where} is not below 1.",
        received=f"lr = {lr!r}, weight_decay = {weight_decay!r}, product {lr * weight_decay:.6g}",
        expected="lr * weight_decay < 1: a step multiplies the weights by 1 minus it",
        remedy="lower one of them; weight decay here is decoupled, as lr * weight_decay a step",
    )
