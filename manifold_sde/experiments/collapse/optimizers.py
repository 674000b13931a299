"""Runs of torch's optimizers on digits, each with its training clock, kept so that they go on."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde.experiments.collapse.labelled_digits import FUNCTIONS, Task, make_task
from manifold_sde.experiments.experiment import (
    Array,
    SavedData,
    SavedValues,
    joined_arrays,
    require_finite,
    restored,
    split_arrays,
)
from manifold_sde.experiments.settings.optimizers import FITTED, MOMENTUM, Run, Settings
from manifold_sde.progress import counted
from manifold_sde.training import MixingClock, expected_clock, plan

_PREFIX = "{}/"
#: Steps from one norm to the next that the clock takes.
_EVERY = 5
#: Axes on which the curves are laid out. The last two are clocks of which one thing is wrong.
AXES = ("steps", "lr_steps", "lr_decay_steps", "clock", "other_power", "no_momentum")


@dataclass(frozen=True)
class Curves(SavedValues):
    """What is kept of a run, at K snapshots of n paths.

    Attributes:
        run: What was run.
        steps: Step counts, (K,).
        lr_sums: Sums of the learning rates until then, (K,).
        clock: Clock of each path, (K, n): the intrinsic one of SGD, the angular one of AdamW.
        squares, fourths: Sums of lr^2 / |x|^2, and of lr^2 / |x|^4, (K, n).
        norms: Norms of the weights, (K, n).
        values: Test functions by name, (K, n) each.
    """

    KIND = "curves of an optimizer"
    NAMES = tuple(FUNCTIONS)

    run: Run
    steps: Array
    lr_sums: Array
    clock: Array
    squares: Array
    fourths: Array
    norms: Array
    values: dict[str, Array]

    def positions(self, axis: str) -> Array:
        """Positions of the snapshots on an axis, (K,), or (K, n) on a clock.

        The learning rate is that of all later steps together, lr / (1 - momentum).
        """
        adam, momentum = self.run.optimizer == "adamw", self.run.optimizer == "momentum"
        effective = 1.0 / (1.0 - MOMENTUM) if momentum else 1.0
        return {
            "steps": self.steps,
            "lr_steps": effective * self.lr_sums,
            "lr_decay_steps": effective * self.run.weight_decay * self.lr_sums,
            "clock": self.clock,
            "other_power": self.fourths if adam else effective**2 * self.squares,
            "no_momentum": self.squares if adam else self.fourths,
        }[axis]


@dataclass(frozen=True)
class OptimizerData(SavedData):
    """All that the figure is drawn from.

    Attributes:
        settings: What was run.
        curves: The runs, in the order of the settings.
    """

    KIND = "collapse of optimizers"

    settings: Settings
    curves: tuple[Curves, ...]

    def header(self) -> dict[str, Any]:
        """What is not an array."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "curves": [one.header() for one in self.curves],
        }

    def arrays(self) -> dict[str, Array]:
        """The arrays of all runs."""
        return joined_arrays(self.curves, _PREFIX)

    @classmethod
    def restored(cls, header: dict[str, Any], arrays: dict[str, Array]) -> OptimizerData:
        """The data of a header and arrays."""
        curves = tuple(
            Curves.restored(own, split_arrays(arrays, _PREFIX, i))
            for i, own in enumerate(header["curves"])
        )
        return cls(restored(Settings, header["settings"]), curves)


def simulate(
    settings: Settings | None = None,
    *,
    folder: str | Path | None = None,
    progress: bool = False,
    done: Callable[[str, float], None] | None = None,
) -> OptimizerData:
    """Run every optimizer at every pair of rates, in every case.

    Args:
        settings: What to run; by default the quick form.
        folder: Where finished runs are kept, so that what is stopped goes on from there.
        progress: Whether to show progress bars.
        done: Called with the name of each case and the seconds of processor time it took.

    Raises:
        NonFiniteError: If runs blew up.
        LimitMapError: If training finds no start.
        CheckpointError: If a file in the folder is corrupted.
    """
    settings = settings or Settings.quick()
    curves = []
    for case in settings.cases:
        begun = time.process_time()
        task = make_task(settings, case)
        noise = task.noise(settings.batch_size)
        for run in settings.runs:
            if run.case != case:
                continue
            path = None if folder is None else Path(folder) / _file(settings, run)
            make = functools.partial(_train, settings, task, noise, run, progress)
            curves.append(Curves.kept(path, make))
        if done is not None:
            done(case, time.process_time() - begun)
    return OptimizerData(settings, tuple(curves))


def _file(settings: Settings, run: Run) -> str:
    names = (run.case, run.optimizer, run.schedule, f"{run.lr:g}", f"{run.weight_decay:g}")
    return f"{'-'.join(names)}-{settings.key('cases')}.npz"


def planned_steps(settings: Settings, run: Run, noise: float, size: int) -> int:
    """Steps until the horizon, by the plan for noise of this trace at norm 1."""
    training = run.training
    planned = plan(
        settings.horizon,
        relaxations=1,
        lr=run.lr,
        weight_decay=run.weight_decay,
        momentum=training.momentum,
        schedule=training.schedule,
        optimizer=training.optimizer,
        norm=1.0,
        noise=size if run.optimizer == "adamw" else noise,
    )
    return max(settings.snapshots, round(planned.steps[1]))


def _train(
    settings: Settings, task: Task, noise: float, run: Run, progress: bool, _: Path | None
) -> Curves:
    """Train copies of the network side by side."""
    copies = task.copies(settings.paths)
    optimizer = _optimizer(run, copies.parameters())
    shown = task.images[:8].expand(settings.paths, -1, -1)
    clock = MixingClock(copies, optimizer, inputs=shown, every=_EVERY)
    steps = planned_steps(settings, run, noise, task.start.numel())
    rates = run.learning_rates(steps)
    generator = torch.Generator().manual_seed(1000 * settings.seed + run.index)
    epochs = run.case == "reshuffled"
    chosen = batches(len(task.images), settings.batch_size, settings.paths, generator, epochs)
    kept = _snapshots(settings, run, rates, noise, task.start.numel())
    sums = torch.zeros(2, settings.paths, dtype=torch.float64)
    rows: list[dict[str, Any]] = []
    label = f"{run.optimizer}, {run.schedule}, {run.lr:g}, {run.weight_decay:g}"
    for k in counted(range(steps + 1), progress, label):
        square = copies.weight.detach().flatten(1).square().sum(1)
        if k in kept:
            time_ = _clock(clock, run) if k else np.zeros(settings.paths)
            rows.append(
                {
                    "clock": time_,
                    "squares": sums[0].numpy().copy(),
                    "fourths": sums[1].numpy().copy(),
                    "norms": square.sqrt().numpy(),
                    **task.evaluate(task.fitted(copies) if run.case in FITTED else copies),
                }
            )
        if k == steps:
            break
        lr = optimizer.param_groups[0]["lr"] = float(rates[k])
        optimizer.zero_grad()
        task.loss(copies, next(chosen)).backward()
        optimizer.step()
        sums += lr**2 / torch.stack([square, square.square()])
    require_finite(
        int((~copies.weight.isfinite()).flatten(1).any(1).sum()),
        f"{settings.paths} runs, {label}",
        "smaller rates (faster=...)",
    )
    table = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    values = {name: table.pop(name) for name in FUNCTIONS}
    lr_sums = np.concatenate([[0.0], np.cumsum(rates)])[kept]
    return Curves(run, kept.astype(np.float64), lr_sums, values=values, **table)


def _snapshots(settings: Settings, run: Run, rates: Array, noise: float, size: int) -> Any:
    """Step counts equally spaced in the clock that is expected."""
    training = run.training
    expected = expected_clock(
        rates,
        optimizer=training.optimizer,
        weight_decay=run.weight_decay,
        momentum=training.momentum,
        noise=noise,
        size=size,
    )
    wanted = np.linspace(0.0, expected.total, settings.snapshots + 1)
    kept = np.searchsorted(expected.clock, wanted)
    return np.unique(np.append(kept[:-1], len(rates)))


def _optimizer(run: Run, parameters: Iterator[Tensor]) -> torch.optim.Optimizer:
    if run.optimizer == "adamw":
        return torch.optim.AdamW(parameters, run.lr, weight_decay=run.weight_decay)
    return torch.optim.SGD(
        parameters, run.lr, momentum=run.training.momentum, weight_decay=run.weight_decay
    )


def _clock(clock: MixingClock, run: Run) -> Array:
    """The clock of each copy, (n,)."""
    found = clock.each(
        lambda track: track.clock if run.optimizer == "adamw" else track.intrinsic.value
    )
    return np.array(found["weight"])


def batches(
    count: int, size: int, paths: int, generator: torch.Generator, epochs: bool
) -> Iterator[Tensor]:
    """Numbers of the samples (paths, size) of each batch, drawn independently or in epochs."""
    while True:
        if not epochs:
            yield torch.randint(count, (paths, size), generator=generator)
            continue
        order = torch.rand(paths, count, generator=generator).argsort(1)
        yield from order.split(size, dim=1)
