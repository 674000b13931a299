"""The runs of SGD behind Figures 1 and 3, kept on the way so that a run that is stopped goes on."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from manifold_sde.experiments.experiment import (
    Array,
    SavedData,
    discard,
    require_finite,
)
from manifold_sde.experiments.processes import Note, run_tasks
from manifold_sde.experiments.settings.training import Settings
from manifold_sde.experiments.training.model_ensemble import ModelEnsemble, augmented, batches, step
from manifold_sde.paper import implements
from manifold_sde.progress import Progress
from manifold_sde.solvers.archive import complete, read_archive, write_archive

_KIND = "checkpoint of figures 1 and 3"
_CHECKPOINT_SECONDS = 20.0
#: Name of the part before the decay.
_PART = "training"
#: What the order of batches is drawn for: training, a branch after a decay, a measurement.
_TRAINING, _BRANCH, _MEASUREMENT = 0, 1, 2

#: What the batches of a run are drawn from: its seed, what they are for, and the time of decay.
Key = tuple[int, int, int]


@dataclass(frozen=True)
class TrainingRun(SavedData):
    """All that Figures 1 and 3 are drawn from; R runs.

    Traces are those at norm 1: |x|^2 times what is measured at x.

    Attributes:
        settings: What was trained.
        steps_per_epoch: Number of steps of an epoch.
        train_accuracy, test_accuracy, train_loss: Before a decay, at the epochs
            ``settings.records`` (R, records).
        trace: Trace of the covariance of the gradient of a batch at these epochs (R, records).
        mean_square: |x|^2 times the square of the full gradient there (R, records).
        norm: |x| at the start of each epoch and at the end (R, epochs + 1).
        square: Mean of |x|^2 |g|^2 over the steps of each epoch, g the gradient of the step's batch
            (R, epochs).
        branch_train, branch_test: Accuracies after a decay at the epochs ``settings.decay_times``,
            at the epochs ``settings.branch_records`` after it (R, times, branch records).
        branch_norm: |x| at the end of each branch (R, times).
    """

    KIND = "training of figures 1 and 3"

    settings: Settings
    steps_per_epoch: int
    train_accuracy: Array
    test_accuracy: Array
    train_loss: Array
    norm: Array
    square: Array
    trace: Array
    mean_square: Array
    branch_train: Array
    branch_test: Array
    branch_norm: Array

    def header(self) -> dict[str, Any]:
        """What is not an array, and the key of the settings."""
        return {**super().header(), "key": self.settings.key()}

    @classmethod
    def saved(cls, path: Path, settings: Settings) -> TrainingRun | None:
        """The runs in a file, if they are those of these settings and versions."""
        if not path.is_file():
            return None
        header, _ = read_archive(path, cls.KIND)
        if header.get("key") != settings.key():
            return None
        run = cls.load(path)
        return run if run.settings.seeds == settings.seeds else None


@implements("Figure 1", "Figure 3")
def train(
    settings: Settings | None = None,
    *,
    folder: str | Path | None = None,
    progress: bool = False,
    jobs: int = 1,
    console: Console | None = None,
) -> TrainingRun:
    """Train for Figures 1 and 3, in groups of runs.

    Args:
        settings: What to train; by default the quick form.
        folder: Where finished parts and checkpoints are kept, so that a run that is stopped goes on
            from there with the same bits; ``None`` keeps nothing.
        progress: Whether to show progress bars.
        jobs: 1 trains in this process, more train in so many worker processes, with a folder.
        console: Where worker processes show their progress.

    Raises:
        NonFiniteError: If runs blew up.
        CheckpointError: If a file in the folder is corrupted.
        MissingDependencyError, DataFileError: If the data are not there.

    Source: section 6.2.
    """
    settings = settings or Settings.quick()
    where = None if folder is None else Path(folder)
    if jobs > 1 and len(settings.groups) > 1:
        tasks = {
            _label(seeds): functools.partial(train_group, settings, seeds, where, True)
            for seeds in settings.groups
        }
        parts = list(run_tasks(tasks, console or Console(), jobs=jobs).values())
    else:
        parts = [train_group(settings, seeds, where, progress) for seeds in settings.groups]
    arrays = [part.arrays() for part in parts]
    whole = {name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]}
    return TrainingRun(settings, parts[0].steps_per_epoch, **whole)


def _label(seeds: Sequence[int]) -> str:
    return f"runs {seeds[0]}-{seeds[-1]}"


def train_group(
    settings: Settings,
    seeds: Sequence[int],
    folder: Path | None,
    progress: bool = False,
    note: Note | None = None,
) -> TrainingRun:
    """Train the runs of some seeds in lockstep, and continue each from its times of decay."""
    group = _Group(settings, seeds, folder, progress)
    label = group.label

    def timed(part: Callable[[], dict[str, Array]], words: str) -> dict[str, Array]:
        begun = time.monotonic()
        found = part()
        if note is not None:
            note(f"{label}: {words}, {time.monotonic() - begun:.0f} s")
        return found

    def make(_: Path | None) -> TrainingRun:
        trained = timed(group.training, f"{settings.epochs} epochs")
        decayed = trained.pop("decayed")
        words = f"continued from {len(settings.decay_times)} epochs of decay"
        branches = timed(lambda: group.branches(decayed), words)
        return TrainingRun(settings, group.per_epoch, **trained, **branches)

    name = f"{label.replace(' ', '-')}-{settings.key()}.npz"
    run = TrainingRun.kept(None if folder is None else folder / name, make)
    group.forget()
    return run


@dataclass
class _State:
    """The state of a stretch of SGD: all that its continuation depends on."""

    x: Tensor
    step: int = 0
    kept: dict[str, Array] = field(default_factory=dict)


@dataclass
class _Group:
    """Some runs in lockstep: their training, and the branches after it."""

    settings: Settings
    seeds: Sequence[int]
    folder: Path | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        settings = self.settings
        self.label = _label(self.seeds)
        images = settings.images()
        self.models = ModelEnsemble(settings.network, self.seeds, images, settings.device)
        self.per_epoch = len(images.inputs) // settings.batch_size
        # Black, which images are shifted over.
        self.fill = self.models.images.inputs.amin((0, 2, 3))

    # Before the decay.

    def training(self) -> dict[str, Array]:
        """Train with the large learning rate; weights at the times of decay are ``decayed``."""
        settings = self.settings
        runs, epochs, times = len(self.seeds), settings.epochs, settings.decay_times
        records = settings.records
        state = _State(self.models.start)
        at_records = ("train_accuracy", "test_accuracy", "train_loss", "trace", "mean_square")
        state.kept = {name: np.full((runs, len(records)), np.nan) for name in at_records}
        state.kept |= {
            "norm": np.full((runs, epochs + 1), np.nan),
            "square": np.zeros((runs, epochs)),
            "decayed": np.full((len(times), *self.models.start.shape), np.nan),
        }
        keys = [(seed, _TRAINING, 0) for seed in self.seeds]

        def before(epoch: int) -> None:
            kept, x = state.kept, state.x
            kept["norm"][:, epoch] = _numbers(x.norm(dim=-1))
            if epoch in records:
                found = (*self._accuracies(self.models, x), *self._noise(x, epoch))
                for name, values in zip(at_records, found, strict=True):
                    kept[name][:, records.index(epoch)] = values
            if epoch in times:
                kept["decayed"][times.index(epoch)] = _numbers(x)

        def after(gradient: Tensor, epoch: int) -> None:
            square = _numbers(gradient.square().sum(-1) * state.x.square().sum(-1))
            state.kept["square"][:, epoch] += square / self.per_epoch

        self._run(self.models, state, settings.lr, epochs, keys, _PART, before, after)
        return state.kept

    def _noise(self, x: Tensor, epoch: int) -> tuple[Array, Array]:
        """Trace of the covariance of a batch's gradient, and the square of its mean, at norm 1.

        Over the batches of one epoch at fixed x, which divide the data: their mean is the full
        gradient. (Where images are shifted, to about one part in the number of batches, by which
        the trace comes out too small.)
        """
        keys = [(seed, _MEASUREMENT, 0) for seed in self.seeds]
        order, shift = self._order(keys, epoch), self._shifts(keys, epoch)
        total = torch.zeros_like(x, dtype=torch.float64)
        square = total.sum(-1)
        for index in range(self.per_epoch):
            gradient = self._gradient(self.models, x, order, shift, index).double()
            total += gradient / self.per_epoch
            square = square + gradient.square().sum(-1) / self.per_epoch
        mean = total.square().sum(-1)
        size = x.double().square().sum(-1)
        return _numbers(size * (square - mean)), _numbers(size * mean)

    # After it.

    def branches(self, decayed: Array) -> dict[str, Array]:
        """Continue with the small learning rate from the weights ``decayed`` (times, runs, D)."""
        settings = self.settings
        times, runs = len(settings.decay_times), len(self.seeds)
        members = [(row, run) for row in range(times) for run in range(runs)]
        size = settings.branches_side_by_side
        found = []
        for first in range(0, len(members), size):
            chosen = members[first : first + size]
            start = np.stack([decayed[member] for member in chosen])
            part = f"decays {first + 1}-{first + len(chosen)} of {len(members)}"
            found.append(self._branch(chosen, start, part))

        def ordered(name: str) -> Array:
            joined = np.concatenate([part[name] for part in found])
            return joined.reshape(times, runs, *joined.shape[1:]).swapaxes(0, 1)

        return {name: ordered(name) for name in found[0]}

    def _branch(self, members: list[tuple[int, int]], start: Array, part: str) -> dict[str, Array]:
        settings = self.settings
        models = self.models.subset([run for _, run in members])
        records, times = settings.branch_records, settings.decay_times
        state = _State(torch.from_numpy(start).to(self.models.start))
        shape = (len(members), len(records))
        state.kept = {
            "branch_train": np.full(shape, np.nan),
            "branch_test": np.full(shape, np.nan),
            "branch_norm": np.full(len(members), np.nan),
        }
        keys = [(self.seeds[run], _BRANCH, times[row]) for row, run in members]

        def before(epoch: int) -> None:
            state.kept["branch_norm"][:] = _numbers(state.x.norm(dim=-1))
            if epoch in records:
                row = records.index(epoch)
                train, test, _ = self._accuracies(models, state.x)
                state.kept["branch_train"][:, row], state.kept["branch_test"][:, row] = train, test

        self._run(models, state, settings.decay_lr, settings.decay_epochs, keys, part, before)
        return state.kept

    # Both.

    def _run(
        self,
        models: ModelEnsemble,
        state: _State,
        lr: float,
        epochs: int,
        keys: list[Key],
        part: str,
        before: Callable[[int], None],
        after: Callable[[Tensor, int], None] = lambda *_: None,
    ) -> None:
        """Steps of SGD from a state on, or from its checkpoint, which is left behind."""
        path = self._checkpoint(part)
        last = epochs * self.per_epoch
        if path is not None and path.exists():
            _resume(path, state, last)
        saved = time.monotonic()
        label = f"{self.label}, {part}"
        with Progress(self.progress and label, "", total=last, unit="step") as bar:
            bar.skip(state.step)
            order = shift = None
            for number in range(state.step, last):
                epoch, index = divmod(number, self.per_epoch)
                if order is None or index == 0:
                    order, shift = self._order(keys, epoch), self._shifts(keys, epoch)
                if index == 0:
                    before(epoch)
                gradient = self._gradient(models, state.x, order, shift, index)
                after(gradient, epoch)
                state.x = step(state.x, gradient, lr, self.settings.weight_decay)
                state.step = number + 1
                bar.update()
                if path is not None and time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    _save(path, state)
                    saved = time.monotonic()
            if state.step == last:
                before(epochs)
        blown = int((~torch.isfinite(state.x).all(-1)).sum())
        runs = f"{len(state.x)} runs at learning rate {lr:g}, in {state.step} steps"
        require_finite(blown, runs, "a smaller learning rate")
        if path is not None:
            state.step = last + 1  # what comes before the end is done
            _save(path, state)

    def _order(self, keys: list[Key], epoch: int) -> Tensor:
        """The batches of an epoch, (K, batches, B)."""
        count, size = len(self.models.images.inputs), self.settings.batch_size
        return torch.stack([batches(count, size, *key, epoch) for key in keys])

    def _shifts(self, keys: list[Key], epoch: int) -> Tensor | None:
        """Shift and mirroring of each sample (K, batches, B, 3), or ``None`` for neither."""
        settings = self.settings
        if not settings.shift and not settings.mirror:
            return None
        size = (self.per_epoch, settings.batch_size, 3)
        values = (2 * settings.shift + 1, 2 * settings.shift + 1, 1 + settings.mirror)
        drawn = [np.random.default_rng((*key, epoch, 1)).integers(0, values, size) for key in keys]
        return torch.from_numpy(np.stack(drawn))

    def _gradient(
        self, models: ModelEnsemble, x: Tensor, order: Tensor, shift: Tensor | None, index: int
    ) -> Tensor:
        """The gradients on one of the batches of an epoch."""
        chosen = order[:, index].to(x.device)
        inputs = models.images.inputs[chosen]
        if shift is not None:
            moved = shift[:, index].to(x.device)
            inputs = augmented(inputs, moved, self.settings.shift, self.fill)
        return models.gradients(x, inputs, models.images.targets[chosen])[1]

    def _accuracies(self, models: ModelEnsemble, x: Tensor) -> tuple[Array, Array, Array]:
        """Accuracy in training and testing, and loss in training."""
        images = models.images
        train, loss = models.evaluate(x, images.inputs, images.targets)
        test, _ = models.evaluate(x, images.test_inputs, images.test_targets)
        return _numbers(train), _numbers(test), _numbers(loss)

    def _checkpoint(self, part: str) -> Path | None:
        if self.folder is None:
            return None
        key = self.settings.training_key() if part == _PART else self.settings.key()
        return self.folder / f"{self.label}-{part}-{key}.ckpt".replace(" ", "-")

    def forget(self) -> None:
        """Remove the checkpoints of these runs, which are done."""
        name = self.label.replace(" ", "-")
        for key in (self.settings.key(), self.settings.training_key()):
            for path in [] if self.folder is None else self.folder.glob(f"{name}-*-{key}.ckpt"):
                discard(path)


def _save(path: Path, state: _State) -> None:
    write_archive(path, _KIND, {"step": state.step}, {"x": state.x.cpu().numpy(), **state.kept})


def _resume(path: Path, state: _State, last: int) -> None:
    """Take up what :func:`_save` wrote; a step past the last says that all is done."""
    header, arrays = read_archive(path, _KIND)
    with complete(path, "a checkpoint of these runs", "--restart starts anew"):
        step, x = header["step"], torch.from_numpy(arrays.pop("x"))
        if type(step) is not int or not 0 <= step <= last + 1 or x.shape != state.x.shape:
            raise ValueError(f"step {step!r} of {last}, weights {tuple(x.shape)}")
        state.step, state.x = step, x.to(state.x)
        state.kept.update({name: arrays[name] for name in state.kept})


def _numbers(value: Tensor) -> Array:
    return value.detach().double().cpu().numpy()
