"""The clocks of the groups that share an optimizer's parameter group, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from manifold_sde.number_arrays import Array
from manifold_sde.training.expected import ADAM, LINEAR, RELATIVE
from manifold_sde.training.recursions import LinearStep, RunningClock, SecondMoments
from manifold_sde.training.rules import (
    NORMS,
    Options,
    long_run_rate,
    matrix,
    pure_alignment,
    turn,
    variance,
)

OLD_STATE = (
    "This state is of the first version of the clock, which held no size of Adam's gradients: the "
    "v = {:.3g} that it has counted can be off by a fifth, and stays; what follows is right after "
    "some 40 steps. A new clock that loads no state counts from 0 here."
)
_MEMORY = 0.97
#: Lengths of its memory after which a buffer has forgotten its start, and most steps gone through.
_FORGOTTEN, _MOST_BEFORE = 15.0, 3000
_KEPT = ("count", "age", "start", "square", "lag", "scale", "live", "share", "angle", "lost")
SIZED = (*LINEAR, *ADAM)
"""Rules whose clock goes by the size of the gradients."""
_MEANS = (
    "weight",
    "noise",
    "cosine",
    "injection",
    "growth",
    "alignment",
    "decay",
    "change",
    "turned",
    "expected",
    "gradient",
    "ratio",
    "pure",
    "rate",
    "applied",
    "even",
)


@dataclass(frozen=True)
class Details:
    """Inner products around one step, of each part: (parts,).

    Attributes:
        square: |x|^2 before the step.
        gradient: |g|^2, as the optimizer was given it.
        radial: <x, g>.
        moved: <x, x' - x>.
        length: |x' - x|^2.
        after: |x'|^2.
        age: Steps that Adam has made of a part; NaN if it is not known.
        second: Mean of Adam's v over the coordinates, corrected for its start; NaN if not known.
        live: What unequal coordinates make of the size of its noise.
        applied: Mean of g^2 / v over the coordinates.
        even: What it is where the gradients of all are as even as Gaussian ones.
    """

    square: Array
    gradient: Array
    radial: Array
    moved: Array
    length: Array
    after: Array
    age: Array | float = float("nan")
    second: Array | float = float("nan")
    live: Array | float = 1.0
    applied: Array | float = 0.0
    even: Array | float = 0.0


@dataclass
class Track:
    """Clock, norm and ledger of parts of weights under the same options.

    Attributes:
        rule: What the optimizer does.
        weights: Number of weights of each part, (parts,).
        count: Steps that each part has made.
        age: Steps that Adam has made of it, with those before the clock was there; of SGD, whether
            there was a buffer before.
        start: |x|^2 at the first of them.
        square: |x|^2 after the last.
        intrinsic: The clock u, of rules that are linear in the gradient.
        decay: What the same steps make of the weights without gradients.
        lag: Running average of |g|^2 under Adam, as its second moments are kept.
        scale: What Adam divides the gradient of a coordinate by, the noise of all together being
            that of coordinates alike.
        live: What unequal coordinates, and those that never had a gradient, make of its noise.
        share: The noise of its updates at rest, of what it is for coordinates alike without eps.
        angle: The clock v: by how much the gradients that were applied, if they were independent,
            add to the squared norm of the run without decay, relative to it.
        lost: The first step at which what was read of a part was not finite, about, or 0.
        predicted: Second moments of weights and buffer with such gradients.
        closing: The largest difference between the change of a norm and what the ledger says of
            it, relative to the norm.
        touched: The largest relative change of |x|^2 between two steps, by others.
        means: Running means over the steps that were looked at closely.
    """

    rule: str
    weights: Array
    count: Array = field(init=False)
    closing: float = 0.0
    touched: float = 0.0

    def __post_init__(self) -> None:
        parts = len(self.weights)
        self.count, self.age = np.zeros(parts), np.zeros(parts)
        self.start, self.square = np.full(parts, np.nan), np.full(parts, np.nan)
        self.lag, self.scale, self.angle = np.zeros(parts), np.zeros(parts), np.zeros(parts)
        self.live, self.share = np.ones(parts), np.ones(parts)
        self.lost = np.zeros(parts)
        self.intrinsic, self.decay = RunningClock(), RunningClock()
        for clock in (self.intrinsic, self.decay):
            clock.ratio = clock.log_factor = np.zeros(parts)
            clock.sums = SecondMoments(*np.zeros((3, parts)))
        self.predicted = SecondMoments(*np.zeros((3, parts)))
        self.means = {name: np.zeros(parts) for name in _MEANS}

    @property
    def clock(self) -> Array:
        """The angular clock v of each part."""
        return self.growth if self.rule == NORMS else self.angle

    @property
    def growth(self) -> Array:
        """How far the norms without decay have grown, ln(|x|^2 / (a^2 |x_0|^2)).

        It is v where the gradients are independent noise.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            grown = np.log(self.square / self.start) - 2.0 * self.decay.log_factor
        return np.where(self.count > 0, grown, 0.0)

    @property
    def trace(self) -> Array:
        """|x|^2 |g|^2 of each part, of steps looked at lately: V, where the gradient is noise."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.means["noise"] / self.means["weight"]

    def long_run_noise(self, now: Options) -> Array:
        """V of a batch at norm 1, of rules that are linear in the gradient; else U^2 of an update.

        NaN where nothing was looked at yet, or the rule makes steps of a share of the norm.
        """
        if self.rule in LINEAR:
            return self.trace
        if self.rule in RELATIVE or self.rule == NORMS:
            return np.full_like(self.square, np.nan)
        size = variance(self.rule, now) * self.share
        return size if self.rule == "normalised_sgd" else size * self.weights

    @property
    def evenness(self) -> Array:
        """The noise of Adam's updates over that of even gradients; NaN where it is not known.

        It is less than 1 where a coordinate's gradients are rare, or of heavy tails: the large ones
        raise the v that they are divided by.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.means["even"] > 0.0, self.means["applied"], np.nan) / np.where(
                self.means["even"] > 0.0, self.means["even"], 1.0
            )

    def mean(self, name: str) -> Array:
        """A running mean, NaN where nothing was looked at yet."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.means[name] / self.means["weight"]

    def begin(self, square: Array) -> None:
        """Take the norms before the first step."""
        fresh = self.count == 0
        self.start = np.where(fresh, square, self.start)
        self.square = np.where(fresh, square, self.square)
        xx = np.where(fresh, square, self.predicted.xx)
        self.predicted = SecondMoments(xx, self.predicted.xm, self.predicted.mm)

    def go_on(self, now: Options, radial: Array, length: Array) -> None:
        """Take the buffer m of an optimizer that has made steps before the clock was there.

        What decay has made of it, and the weights of the gradients in it, are those at rest; how
        they go with those in x is as it is with the gradients themselves.

        Args:
            now: The options in the first step.
            radial: <x, m> before it, NaN for parts without a buffer.
            length: |m|^2.

        Source: exact for the norms and for v; for u, if the norm was the same in its memory.
        """
        held = np.isfinite(length)
        rest, zeros = RunningClock(), np.zeros(len(held))
        rest.ratio, rest.sums = zeros, SecondMoments(zeros, zeros, zeros)
        step = matrix(self.rule, now, np.ones(len(held)))
        for _ in range(min(math.ceil(_FORGOTTEN / (1.0 - now.momentum)), _MOST_BEFORE)):
            rest.advance(step, self.square**-2.0)
            rest.sums = rest.sums._replace(xx=zeros)
        self.age = np.where(held, 1.0, self.age)
        self.predicted = _where(
            held, SecondMoments(self.predicted.xx, radial, length), self.predicted
        )
        across = radial - rest.ratio * self.square
        size = length - 2.0 * rest.ratio * radial + rest.ratio**2 * self.square
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(size > 0.0, across / size, 0.0)
        sums = SecondMoments(zeros, rest.sums.mm * share, rest.sums.mm)
        self.intrinsic.sums = _where(held, sums, self.intrinsic.sums)
        for clock in (self.intrinsic, self.decay):
            clock.ratio = np.where(held, rest.ratio, clock.ratio)

    @np.errstate(invalid="ignore")
    def look(
        self,
        step: int,
        active: Array,
        after: Array,
        gradient: Array | None,
        details: Details | None,
    ) -> None:
        """Remember the first step at which something that was read of it is not finite.

        Args:
            step: Its number.
            active: As of :meth:`advance`; what a step left out may have had any gradient.
            after: As of :meth:`advance`.
            gradient: As of :meth:`advance`.
            details: As of :meth:`advance`.
        """
        read = np.zeros_like(self.square) if gradient is None else gradient
        if details is not None:
            read = read + details.square + details.radial + details.moved + details.length
        bad = ~np.isfinite(np.where(active, read, 0.0) + after)
        self.lost = np.where(bad & (self.lost == 0), step, self.lost)

    @np.errstate(divide="ignore", invalid="ignore")  # a norm may be 0
    def advance(
        self,
        now: Options,
        active: Array,
        after: Array,
        gradient: Array | None,
        details: Details | None,
    ) -> None:
        """Count a step of the parts that had a gradient.

        Args:
            now: The options in it.
            active: Which parts the optimizer moved, (parts,), bool.
            after: |x|^2 after it.
            gradient: |g|^2 in it, which the clocks of SGD and Adam go by.
            details: Inner products, if it was looked at closely.
        """
        square = self.square
        step, noise = self._step(now, square, active, gradient, details)
        clocks = (self.intrinsic, self.decay) if self.rule in LINEAR else (self.decay,)
        before = [(c.ratio, c.log_factor, c.sums) for c in clocks]
        for clock in clocks:
            clock.advance(step, square**-2.0 if clock is self.intrinsic else 0.0)
        rho = np.exp(self.decay.log_factor - before[-1][1])
        moments = self.predicted.after(step, noise)
        turned_by = self._turned(now, step, noise)
        if self.rule in RELATIVE:
            turned = turn(self.rule, now, square)
        else:
            added = moments.xx / (rho * rho) - self.predicted.xx
            turned = np.log1p(np.maximum(added, 0.0) / square)
        self.angle = self.angle + np.where(active, turned, 0.0)
        if active.all():
            self.predicted = moments
        else:
            self.predicted = _where(active, moments, self.predicted)
            for clock, old in zip(clocks, before, strict=True):
                clock.ratio = np.where(active, clock.ratio, old[0])
                clock.log_factor = np.where(active, clock.log_factor, old[1])
                clock.sums = _where(active, clock.sums, old[2])
        if details is not None:
            self._enter(now, details, rho, active, turned_by)
        self.count = self.count + active
        self.square = np.where(active, after, square)

    def _step(
        self,
        now: Options,
        square: Array,
        active: Array,
        gradient: Array | None,
        details: Details | None,
    ) -> tuple[LinearStep, Array]:
        """The matrix of a step, and E|g|^2 of what enters it."""
        if self.rule not in SIZED:
            fixed = self.rule in ("normalised_sgd", *RELATIVE, NORMS)
            size = variance(self.rule, now) * (1.0 if fixed else self.weights)
            return matrix(self.rule, now, self.count), np.broadcast_to(size, square.shape)
        assert gradient is not None
        if self.rule in LINEAR:
            return matrix(self.rule, now, self.count + self.age), gradient
        second = now.betas[1]
        coupled = now.weight_decay if self.rule == "adam" else 0.0
        lag = second * self.lag + (1.0 - second) * gradient
        age = self.age + 1.0
        if details is not None:
            # As it is in the optimizer, which may have made steps before the clock was there.
            age = np.where(np.isfinite(details.age), details.age, age)
            kept = details.second * (1.0 - second**age) * self.weights
            lag = np.where(np.isfinite(kept), kept, lag)
            self.live = np.where(active, details.live, self.live)
        begun = 1.0 - second**age
        root = np.sqrt(lag / begun / self.weights)
        share = self.live * (root / (root + now.eps)) ** 2
        scale = root / np.sqrt(share)
        # Without any gradient yet there is nothing to divide by, and no step.
        there = np.isfinite(scale) & (scale > 0.0)
        inverse = np.where(there, 1.0 / scale, 0.0)
        # The buffer is in units of the scale, and shrinks as that grows.
        shrink = np.where(self.scale > 0.0, self.scale * inverse, 1.0)
        step = matrix(self.rule, now, age - 1.0, coupled=coupled * inverse)
        step = step._replace(xm=step.xm * shrink, mm=step.mm * shrink)
        drawn = variance(self.rule, now) * gradient * inverse**2
        late = there & active & (self.scale == 0.0) & (age > 1.5)
        if late.any():
            self.predicted = _where(late, self._at_rest(now, step, drawn, age), self.predicted)
        self.age = np.where(active, age, self.age)
        self.lag = np.where(active, lag, self.lag)
        self.scale = np.where(active & there, scale, self.scale)
        self.share = np.where(active & there, share, self.share)
        return step, drawn

    def _at_rest(self, now: Options, step: LinearStep, noise: Array, age: Array) -> SecondMoments:
        """The buffer of an optimizer whose steps before the clock saw gradients like this one."""
        moments, parts = self.predicted, np.zeros_like(self.square)
        moments = SecondMoments(moments.xx, parts, parts)
        forgotten = math.ceil(_FORGOTTEN / (1.0 - now.betas[0]))
        for _ in range(int(min(age.max() - 1.0, forgotten, _MOST_BEFORE))):
            moments = moments.after(step, noise)._replace(xx=moments.xx)
        return moments

    def _turned(self, now: Options, step: LinearStep, noise: Array) -> Array:
        """The squared length, across x, of an update of independent gradients."""
        if self.rule not in SIZED:
            return step.xg**2 * noise * (1.0 - pure_alignment(self.rule, now))
        moments = self.predicted
        buffer = moments.mm - moments.xm**2 / moments.xx
        return step.xm**2 * np.maximum(buffer, 0.0) + step.xg**2 * noise

    def _enter(
        self, now: Options, details: Details, rho: Array, active: Array, expected: Array
    ) -> None:
        """Enter a step in the ledger."""
        d, loss = details, rho - 1.0
        aligned = 2.0 * rho * (d.moved - loss * d.square)
        injected = d.length - 2.0 * loss * d.moved + loss * loss * d.square
        forward = d.square + d.moved
        with np.errstate(invalid="ignore", divide="ignore"):
            across = np.maximum(d.length - d.moved**2 / d.square, 0.0)
            entries = {
                "weight": np.ones_like(rho),
                "noise": d.gradient * d.square,
                "cosine": d.radial**2 / np.maximum(d.gradient * d.square, 1e-300),
                "injection": injected / d.square,
                "growth": (injected + aligned) / d.square,
                "alignment": aligned / d.square,
                "decay": (rho * rho - 1.0),
                "change": (d.after - d.square) / d.square,
                "turned": np.arctan2(np.sqrt(across * d.square), forward) ** 2,
                "expected": expected / d.square,
                "gradient": d.gradient,
                "ratio": np.sqrt(d.gradient / d.square),
                "pure": np.full_like(rho, pure_alignment(self.rule, now)),
                "rate": np.full_like(rho, long_run_rate(self.rule, now) ** 2),
                "applied": d.applied + np.zeros_like(rho),
                "even": d.even + np.zeros_like(rho),
            }
            off = np.abs(d.after - d.square - 2.0 * d.moved - d.length) / d.square
        if active.any():
            # NaN stays, but for weights that are 0.
            there = active & (d.square != 0.0) & (self.square != 0.0)
            drift = np.abs(d.square / self.square - 1.0)
            self.closing = float(np.max(off[there], initial=self.closing))
            self.touched = float(np.max(drift[there], initial=self.touched))
        for name, entry in entries.items():
            old = self.means[name]
            self.means[name] = np.where(active, _MEMORY * old + entry, old)

    def state(self) -> dict[str, Any]:
        """All of it, as nested dictionaries of lists and numbers."""
        arrays = {name: getattr(self, name) for name in _KEPT}
        for name in ("intrinsic", "decay"):
            clock = getattr(self, name)
            arrays |= {f"{name}.ratio": clock.ratio, f"{name}.log_factor": clock.log_factor}
            arrays |= {f"{name}.{k}": v for k, v in clock.sums._asdict().items()}
        arrays |= {f"predicted.{k}": v for k, v in self.predicted._asdict().items()}
        arrays |= {f"means.{k}": v for k, v in self.means.items()}
        return {
            "closing": self.closing,
            "touched": self.touched,
            **{k: np.asarray(v, dtype=np.float64).tolist() for k, v in arrays.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave, in this version or the first.

        The first held the last |g|^2 |x|^2 that was looked at, and under Adam the running average
        of 1/|x|^2: the next step is looked at closely. Running means are begun anew.
        """
        values = {
            k: np.asarray(v, dtype=np.float64) for k, v in state.items() if isinstance(v, list)
        }
        self.closing, self.touched = float(state["closing"]), float(state["touched"])
        parts = np.zeros(len(self.weights))
        values.setdefault("lost", parts)
        if "power" in values:
            values |= {"lag": values["power"] * values["lag"], "scale": parts}
            values |= {"live": parts + 1.0, "share": parts + 1.0, "age": values["count"]}
            values |= {f"means.{name}": parts for name in _MEANS}
        for name in _KEPT:
            setattr(self, name, values[name])
        for name in ("intrinsic", "decay"):
            clock = getattr(self, name)
            clock.ratio, clock.log_factor = values[f"{name}.ratio"], values[f"{name}.log_factor"]
            clock.sums = SecondMoments(*(values[f"{name}.{k}"] for k in SecondMoments._fields))
        self.predicted = SecondMoments(*(values[f"predicted.{k}"] for k in SecondMoments._fields))
        self.means = {name: values.get(f"means.{name}", parts) for name in _MEANS}


def _where(active: Array, new: SecondMoments, old: SecondMoments) -> SecondMoments:
    return SecondMoments(*(np.where(active, a, b) for a, b in zip(new, old, strict=True)))
