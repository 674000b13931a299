"""The training clock: how far the directions of scale-invariant weights have turned in a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manifold_sde.arguments import check_between, check_choice, check_count, kind_of
from manifold_sde.errors import (
    DTypeError,
    MixingClockError,
    MixingClockWarning,
    TimeScaleError,
)
from manifold_sde.number_arrays import Array
from manifold_sde.training.euler import Forward
from manifold_sde.training.expected import ADAM, LINEAR
from manifold_sde.training.freshness import BatchNoise, measure_noise, what_explores
from manifold_sde.training.group_audit import NOT_COME_BACK, NOT_FINITE
from manifold_sde.training.groups import ScaleGroups
from manifold_sde.training.lane import (
    Lane,
    Pending,
    count_steps,
    group_clocks,
    group_norms,
    look_at_others,
    lost_since,
    middle,
    split,
)
from manifold_sde.training.rules import matrix, options_of, rule_of, variance
from manifold_sde.training.scale_group import ScaleGroup
from manifold_sde.training.track import OLD_STATE, SIZED, Track
from manifold_sde.training.watch import Watch, dense
from manifold_sde.training.wiring import by_parameter_group, chosen_groups, has_stepped

SAMPLINGS = ("iid", "reshuffled")
_MOST_PENDING = 1000
_MOST_HISTORY = 2000
_MOST_SIZES = 50
_SLOW = 0.5


class MixingClock:
    r"""The angular clock v of a network's scale-invariant weights, while it is trained.

    One line beside the optimizer; then train as ever. By v, pure noise has turned a direction so
    that E cos = e^{-v/2}. It is not the rotation of single steps, and it is known from norms,
    learning rates and the size of the gradients: for a loss, what counts is how many relaxation
    times it holds.

    The order of the data decides what the noise does: where every sample comes once an epoch, the
    noise of an epoch sums to 0, and only what is fresh at each visit (augmentation, dropout)
    explores the minimisers. The norms do not show it. So there is a second clock, ``effective``,
    the share f of fresh noise times v: f is told by ``sampling``, or measured by :meth:`measure`.

    Norms are taken on the device and read only by :meth:`values`, or every thousand steps.

    Args:
        model: The module; ``DistributedDataParallel`` is looked through.
        optimizer: Its optimizer: SGD, Adam, AdamW or Muon of ``torch.optim``, or one with a rule.
        groups: Its scale-invariant groups, or names of tensors; measured if not given, with
            weights that are frozen and held by the optimizer, which count when they move.
        inputs: A batch of what the module is called with, to measure them.
        forward: How to call it, if not ``model(inputs)``.
        rule: What an optimizer does that is not torch's: ``"sgdw"``, ``"signsgd"``, ``"signum"``,
            ``"lion"``, ``"normalised_sgd"``, ``"lamb"``, ``"lars"`` (``lr`` times the group's
            ``trust_coefficient``, if any), ``"hyperball"``, or ``"norms"`` if only its decay is
            known, 1 - lr * weight_decay: then the growth of the norms is taken for the clock, and
            alignment with the gradient for noise.
        sampling: ``"iid"`` where batches are drawn independently (f = 1), ``"reshuffled"`` where
            every sample comes once an epoch and looks the same each time (f = 0), or the share f
            itself, such as ``SamplingNoise.lasting_share`` where a last batch is short.
        every: Norms of the weights are taken every so many steps, and each time in the first
            hundred; those of the gradients in each step, where the clock goes by them (SGD, Adam).
        details: Updates are looked at every so many steps, and in the first of them each time; for
            that step there is one more copy of the scale-invariant weights.

    Attributes:
        groups: The groups.
        steps: Number of steps counted.
        sizes: Norms of the last gradients of all parameters that were looked at, 50 at most.

    Raises:
        ArgumentError: If nothing is scale-invariant, or the optimizer is not known.

    Source: exact for pure noise, but for Adam to the second order in 1 - beta2; see the functions
    of :mod:`manifold_sde.training.recursions`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        >>> x = torch.randn(16, 4)
        >>> clock = MixingClock(model, optimizer, inputs=x, sampling="iid")
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        >>> clock.steps, sorted(clock.values(each_group=False))[:3]
        (20, ['clock/effective', 'clock/fresh', 'clock/growth'])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        groups: ScaleGroups | Sequence[ScaleGroup | str] | None = None,
        inputs: Any = None,
        *,
        forward: Forward | None = None,
        rule: str | None = None,
        sampling: str | float | None = None,
        every: int = 1,
        details: int = 20,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise DTypeError(
                "model is not a torch module",
                received=kind_of(model),
                expected="a torch.nn.Module",
                remedy="MixingClock(model, optimizer, inputs=inputs)",
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.rule = rule_of(optimizer, rule)
        self.every = check_count("every", every, "steps", "every=1")
        self.details = check_count("details", details, "steps", "details=20")
        if isinstance(sampling, str):
            check_choice("sampling", sampling, SAMPLINGS, 'sampling="reshuffled"')
        elif sampling is not None:
            above = math.nextafter(1.0, 2.0)
            sampling = check_between(sampling, 0.0, above, "the share of fresh noise", "sampling=1")
        self.sampling: str | float | None = sampling
        self.model, self.optimizer = model, optimizer
        chosen = chosen_groups(model, groups, inputs, forward, optimizer)
        self.noise: BatchNoise | None = None
        self.steps = 0
        self._asked, self._told = 0, False
        self._totals: list[Tensor] = []
        self.sizes: list[float] = []
        self._history: list[tuple[int, float, list[float]]] = []
        tensors = dict(model.named_parameters())
        self._lanes = [
            Lane(index, watch := Watch(own, tensors), Track(self.rule, watch.weights().numpy()))
            for index, own in by_parameter_group(optimizer, chosen, tensors).items()
        ]
        self.groups = [group for lane in self._lanes for group in lane.watch.groups]
        for lane in self._lanes:
            now = options_of(optimizer.param_groups[lane.index]).numbers()
            matrix(self.rule, now, np.ones(1))  # what has no clock is refused here
            variance(self.rule, now)
        self._new, self._stale = True, False
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def detach(self) -> None:
        """Stop to watch the optimizer."""
        for hook in self._hooks:
            hook.remove()

    # What the hooks do: nothing here waits for the device.

    @torch.no_grad()
    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # Looked at here, as the optimizer's state may be loaded after the clock is made.
        if self._new and has_stepped(self.optimizer):
            warnings.warn(
                "The optimizer has made steps before this clock was there: it starts at 0 here. "
                "Load the clock's state too: clock.load_state_dict(checkpoint['clock']).",
                MixingClockWarning,
                stacklevel=3,
            )
        close = self.steps < 2 * self.details or self.steps % self.details == 0 or self._stale
        self._new = self._stale = False
        # A fused optimizer is given scaled gradients by a GradScaler, and may leave out the step.
        scale = getattr(optimizer, "grad_scale", None)
        skipped = getattr(optimizer, "found_inf", None)
        closure = any(given is not None for given in (*args[1:], *kwargs.values()))
        if close and not closure:
            own = [dense(p.grad) for g in optimizer.param_groups for p in g["params"]]
            gradients = [g for g in own if g is not None]
            if gradients:
                norms = torch._foreach_norm(gradients)
                whole = torch.stack([n.to(norms[0]) for n in norms]).norm()
                self._totals.append(whole if scale is None else whole / scale)
        for lane in self._lanes:
            if lane.stopped:
                continue
            values = lane.watch.values()
            step = Pending(options_of(optimizer.param_groups[lane.index]))
            if lane.pending and not lane.pending[-1].active:
                step.begin = lane.pending.pop().begin  # a step that failed
            lane.pending.append(step)
            if not lane.started:
                lane.started = True
                step.begin = [lane.watch.squares(values)]
                if self.rule in LINEAR:
                    step.begin += lane.watch.buffers(values, optimizer.state)
            if skipped is not None:
                step.skipped = skipped.detach().clone().reshape(1).expand(sum(lane.watch.parts))
            if close:
                lane.before = {name: value.clone() for name, value in values.items()}
                lane.open = None if closure else lane.watch.gradient_products(values, scale)
            elif self.rule in SIZED and not closure:
                step.gradient = lane.watch.gradient_squares(scale)

    @torch.no_grad()
    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.steps += 1
        measured = self.steps <= 100 or self.steps % self.every == 0
        for lane in self._lanes:
            if lane.stopped:
                continue
            step = lane.pending[-1]
            step.active = lane.watch.active()
            values = lane.watch.values()
            if lane.before is not None:
                moved = {n: value - lane.before[n] for n, value in values.items()}
                step.details = [
                    lane.watch.products(lane.before, lane.before),
                    *(lane.open or lane.watch.gradient_products(lane.before)),
                    lane.watch.products(lane.before, moved),
                    lane.watch.products(moved, moved),
                    lane.watch.products(values, values),
                ]
                step.after = step.details[-1]
                if self.rule in ADAM:
                    scale = getattr(optimizer, "grad_scale", None)
                    step.details += lane.watch.second_moments(optimizer.state, step.options, scale)
                lane.before = lane.open = None
            else:
                if self.rule in SIZED and step.gradient is None:
                    step.gradient = lane.watch.gradient_squares()
                if measured:
                    step.after = lane.watch.squares(values)
        if measured and max(len(lane.pending) for lane in self._lanes) >= _MOST_PENDING:
            self._catch_up()

    # What is read off.

    def _catch_up(self) -> None:
        """Count the steps that are pending."""
        behind = [lane for lane in self._lanes if lane.pending]
        for lane in behind:
            if lane.pending[-1].after is None:
                with torch.no_grad():
                    lane.pending[-1].after = lane.watch.squares(lane.watch.values())
            try:
                count_steps(lane, self.steps)
            except TimeScaleError as error:
                # A run is not ended for its clock.
                lane.stopped = True
                lane.pending.clear()
                warnings.warn(
                    f"The clock of {lane.watch.groups[0].name} and others stands from here on: "
                    f"{error}",
                    MixingClockWarning,
                    stacklevel=3,
                )
        if behind:
            look_at_others(self._lanes, self.optimizer, self.steps)
        if self._totals:
            self.sizes = [*self.sizes, *torch.stack(self._totals).tolist()][-_MOST_SIZES:]
            self._totals.clear()
        if not self._history or self._history[-1][0] < self.steps:
            self._history.append((self.steps, self.time, group_norms(self._lanes)))
        if len(self._history) > _MOST_HISTORY:
            self._history = self._history[::2]
        if not self._told and (since := lost_since(self._lanes)):
            self._told = True
            what = f"Weights or gradients are {NOT_FINITE.format(since)}. {NOT_COME_BACK}"
            warnings.warn(what, MixingClockWarning, stacklevel=3)

    def each(self, quantity: Callable[[Track], Array]) -> dict[str, Array]:
        """A quantity of all parts, by the name of their group: each (parts,)."""
        self._catch_up()
        parts = [part for lane in self._lanes for part in split(lane, quantity(lane.track))]
        return dict(zip((group.name for group in self.groups), parts, strict=True))

    def _clocks(self) -> list[tuple[float, int, str]]:
        """Clock v (of the median of its parts), weights and name of each group that moves."""
        if any(lane.pending for lane in self._lanes):
            self._catch_up()
        return group_clocks(self._lanes)

    @property
    def time(self) -> float:
        """The angular clock v of the group in the middle, half of the weights having less.

        A small group with rates of its own, such as gains without weight decay, does not count.
        """
        return middle(self._clocks())[0]

    @property
    def slowest(self) -> float:
        """The angular clock v of the slowest group that moves."""
        return min(self._clocks(), default=(0.0, 0, ""))[0]

    def time_of(self, group: str) -> float:
        """The angular clock v of a group (of the median of its parts).

        Raises:
            ArgumentError: If there is no group of this name.
        """
        names = [g.name for g in self.groups]
        check_choice("group", group, names, f"group={names[0]!r}")
        return float(np.median(self.each(lambda track: track.clock)[group]))

    @property
    def clipped(self) -> float:
        """Share of the last gradients whose norm is the largest of all: they are clipped to it."""
        self._catch_up()
        sizes = np.array([size for size in self.sizes if math.isfinite(size)])
        return float(np.mean(sizes > 0.999 * sizes.max())) if len(sizes) >= 5 else 0.0

    @property
    def not_finite_since(self) -> int | None:
        """The first step, about, at which weights or gradients were not finite, or ``None``."""
        self._catch_up()
        return lost_since(self._lanes)

    @property
    def fresh(self) -> float | None:
        """The share f of the noise that is fresh at each visit, ``None`` where it is not known."""
        if self.sampling == "iid":
            return 1.0
        if isinstance(self.sampling, float):
            return self.sampling
        if self.noise is not None:
            return self.noise.fresh
        return 0.0 if self.sampling == "reshuffled" else None

    @property
    def effective(self) -> float | None:
        """The clock by which the minimisers are explored, or ``None`` if f is not known.

        It is f v, of which only the share of the noise in E |g|^2 is taken where it was measured.
        """
        return self._effective(self.fresh, self.time)

    def _effective(self, fresh: float | None, v: float) -> float | None:
        share = 1.0 if self.noise is None else self.noise.share
        return None if fresh is None else fresh * share * v

    @property
    def history(self) -> tuple[Array, Array, dict[str, Array]]:
        """Where it was read: steps (n,), clock v (n,), and root mean square norms of each group."""
        self._catch_up()
        steps, times, norms = zip(*self._history, strict=True)
        columns = dict(zip((g.name for g in self.groups), np.array(norms).T, strict=True))
        return np.array(steps), np.array(times), columns

    def measure(
        self,
        loss: Callable[[nn.Module, Any], Tensor],
        batch: Any,
        again: Any = None,
        *,
        seed: int = 0,
    ) -> BatchNoise:
        """Measure the noise of a batch: its trace, the signal beside it, and the fresh share f.

        Four backward passes: two over halves of the batch, whose gradients differ by the noise,
        and two over all of it, which differ by what is fresh at each visit. Gradients, buffers and
        random generators are left as they were. Measured again, it is averaged with what was
        before.

        Args:
            loss: ``loss(model, batch)``, the mean over the samples.
            batch: A tensor, or a tuple or mapping of tensors with the samples first.
            again: The same samples as they come at the next visit, if they are augmented before the
                model sees them.
            seed: Of what the model draws.

        Source: unbiased for independent batches; with data that is reshuffled, of N samples, off by
        a share of the order of 1/N.
        """
        lanes = [(lane.watch, lane.track.weights) for lane in self._lanes]
        found = measure_noise(self.model, lanes, loss, batch, again, seed)
        self.noise = found if self.noise is None else self.noise.merged(found)
        return self.noise

    def values(self, *, each_group: bool = True) -> dict[str, float]:
        """What to log: a dictionary of floats. The device is waited for here.

        Args:
            each_group: Whether each group has its own clock, norm and rotation.
        """
        self._catch_up()
        self._asked += 1
        if not self.steps and self._asked == 2:
            warnings.warn(
                "The clock has counted no step: the optimizer it watches was not stepped. Make the "
                "clock with the optimizer whose step() the loop calls.",
                MixingClockWarning,
                stacklevel=2,
            )
        clocks = self._clocks()
        v, name = middle(clocks)
        slowest = clocks[0][0] if clocks else 0.0
        found = {"clock/steps": float(self.steps), "clock/v": v, "clock/slowest": slowest}
        fresh = self.fresh
        if fresh is not None and (effective := self._effective(fresh, v)) is not None:
            found |= {"clock/fresh": fresh, "clock/effective": effective}
        if self.noise is not None:
            found["clock/noise_share"] = self.noise.share
        growth = self.each(lambda track: track.growth).get(name, np.zeros(1))
        found["clock/growth"] = float(np.median(growth))
        if (since := lost_since(self._lanes)) is not None:
            found["clock/not_finite_since"] = float(since)
        if not each_group:
            return found
        quantities: dict[str, Callable[[Track], Array]] = {
            "v": lambda t: t.clock,
            "norm": lambda t: np.sqrt(t.square),
            "rotation": lambda t: np.sqrt(t.mean("turned")),
            "gradient_ratio": lambda t: t.mean("ratio"),
        }
        if self.rule in LINEAR:
            quantities["V"] = lambda t: t.trace
            quantities["u"] = lambda t: np.asarray(t.intrinsic.value)
        for name, quantity in quantities.items():
            for group, part in self.each(quantity).items():
                found[f"{group}/{name}"] = float(np.median(part))
        return found

    def __str__(self) -> str:
        v, fresh = self.time, self.fresh
        line = f"{self.steps} steps, angular clock v = {v:.3g}"
        if (since := lost_since(self._lanes)) is not None:
            return f"{line}: {NOT_FINITE.format(since)}"
        slow = [name for t, _, name in self._clocks() if t < _SLOW * v]
        if slow:
            line += f" ({self.slowest:.3g} in {slow[0]}{' and others' * (len(slow) > 1)})"
        if fresh is None:
            return (
                f"{line}; exploration of minimisers: unknown\n"
                'until sampling="iid" or "reshuffled" is told, or clock.measure(loss, batch) called'
            )
        line = f"{line}, noise {fresh:.2g} fresh: effective clock {self.effective:.3g}"
        if fresh < 0.5:
            line += what_explores(self.sampling is not None)
        return line

    def __repr__(self) -> str:
        return f"<MixingClock of {len(self.groups)} groups, {self.rule}, {self.steps} steps>"

    def _own(self) -> list[tuple[str, int]]:
        return [(group.name, group.parts) for group in self.groups]

    def state_dict(self) -> dict[str, Any]:
        """The state, of plain lists and numbers."""
        self._catch_up()
        return {
            "version": 2,
            "rule": self.rule,
            "groups": self._own(),
            "steps": self.steps,
            "history": list(self._history),
            "noise": None if self.noise is None else self.noise.state(),
            "tracks": [lane.track.state() for lane in self._lanes],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            MixingClockError: If it is that of other groups, or of another optimizer.
        """
        own, theirs = self._own(), [tuple(pair) for pair in state.get("groups", [])]
        if state.get("rule") != self.rule or theirs != own:
            raise MixingClockError(
                "this is the state of another clock",
                received=f"{len(theirs)} groups under {state.get('rule')!r}",
                expected=f"{len(own)} groups under {self.rule!r}, of the same names and parts",
                remedy="pass the groups of the first run: MixingClock(model, optimizer, groups)",
            )
        self.steps = int(state["steps"])
        self._history = [(int(k), float(v), list(n)) for k, v, n in state["history"]]
        self.noise = None if state["noise"] is None else BatchNoise(**state["noise"])
        for lane, track in zip(self._lanes, state["tracks"], strict=True):
            lane.pending.clear()
            lane.track.load(track)
            lane.started = self.steps > 0
        self._stale = state.get("version") == 1 and self.rule in ADAM
        if self._stale:
            warnings.warn(OLD_STATE.format(self.time), MixingClockWarning, stacklevel=2)
        self._new = False
