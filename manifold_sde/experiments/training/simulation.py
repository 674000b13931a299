"""The runs of SGD behind Figures 1 and 3, kept on the way so that a run that is stopped goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from manifold_sde.errors import NonFiniteError
from manifold_sde.experiments.training.fleet import Fleet, augmented, batches, step
from manifold_sde.experiments.training.record import TrainingRun
from manifold_sde.experiments.training.settings import Settings
from manifold_sde.paper import implements
from manifold_sde.solvers.archive import complete, read_archive, write_archive

_KIND = "checkpoint of figures 1 and 3"
_CHECKPOINT_SECONDS = 20.0
#: Name of the part before the decay.
_PART = "training"
#: What the order of batches is drawn for: training, a branch after a decay, a measurement.
_TRAINING, _BRANCH, _MEASUREMENT = 0, 1, 2


@implements("Figure 1", "Figure 3")
def train(
    settings: Settings | None = None,
    *,
    folder: str | Path | None = None,
    progress: bool = False,
) -> TrainingRun:
    """Train for Figures 1 and 3, one group of runs after the other in this process.

    Args:
        settings: What to train; by default the quick form.
        folder: Where finished parts and checkpoints are kept, so that a run that is stopped goes on
            from there with the same bits; ``None`` keeps nothing.
        progress: Whether to show progress bars.

    Returns:
        The data of the figures.

    Raises:
        NonFiniteError: If runs blew up.
        CheckpointError: If a file in the folder is corrupted.
        MissingDependencyError, DataFileError: If the data are not there.

    Source: section 6.2.
    """
    settings = settings or Settings.quick()
    where = None if folder is None else Path(folder)
    parts = [train_group(settings, seeds, where, progress) for seeds in settings.groups]
    return TrainingRun.joined(settings, parts)


def train_group(
    settings: Settings,
    seeds: Sequence[int],
    folder: Path | None,
    progress: bool = False,
    done: Callable[[str, float], None] | None = None,
) -> TrainingRun:
    """Train the runs of some seeds in lockstep, and continue each from its times of decay.

    Args:
        settings: What to train.
        seeds: Seeds of the runs.
        folder: Where finished parts and checkpoints are kept, or ``None``.
        progress: Whether to show progress bars.
        done: Called with what was done, in words, and the seconds that it took.

    Returns:
        The data of these runs.
    """
    label = f"{seeds[0]}-{seeds[-1]}"
    group = _Group(settings, seeds, folder, progress, f"runs {label}")
    begun = time.monotonic()
    whole = None if folder is None else folder / f"runs-{label}-{settings.key()}.npz"
    if whole is not None and whole.exists():
        return TrainingRun.load(whole)
    trained = group.training()
    if done is not None:
        done(f"runs {label}: {settings.epochs} epochs", time.monotonic() - begun)
        begun = time.monotonic()
    branches = group.branches(trained["decayed"])
    if done is not None:
        times = len(settings.decay_times)
        done(f"runs {label}: continued from {times} epochs of decay", time.monotonic() - begun)
    part = TrainingRun(
        settings,
        group.per_epoch,
        **{name: value for name, value in trained.items() if name != "decayed"},
        **branches,
    )
    if whole is not None:
        part.save(whole)
        group.forget()
    return part


@dataclass
class _State:
    """Where a stretch of SGD is: all that its continuation depends on."""

    x: Tensor
    step: int = 0
    kept: dict[str, NDArray[np.float64]] = field(default_factory=dict)


class _Group:
    """Some runs in lockstep: their training, and the branches after it."""

    def __init__(
        self,
        settings: Settings,
        seeds: Sequence[int],
        folder: Path | None,
        progress: bool,
        label: str,
    ) -> None:
        self.settings = settings
        self.seeds = list(seeds)
        self.folder = folder
        self.progress = progress
        self.label = label
        self.fleet = Fleet(settings.network, seeds, settings.images(), settings.device)
        # Black, which images are shifted over.
        self.fill = self.fleet.images.inputs.amin((0, 2, 3))
        self.per_epoch = len(self.fleet.images.inputs) // settings.batch_size

    # Before the decay.

    def training(self) -> dict[str, NDArray[np.float64]]:
        """Train with the large learning rate; weights at the times of decay are ``decayed``."""
        settings = self.settings
        runs, epochs, times = len(self.seeds), settings.epochs, settings.decay_times
        records = settings.records
        state = _State(self.fleet.start)
        sizes = {
            "train_accuracy": (runs, len(records)),
            "test_accuracy": (runs, len(records)),
            "train_loss": (runs, len(records)),
            "norm": (runs, epochs + 1),
            "square": (runs, epochs),
            "trace": (runs, len(records)),
            "mean_square": (runs, len(records)),
            "decayed": (len(times), *self.fleet.start.shape),
        }
        state.kept = {name: np.full(size, np.nan) for name, size in sizes.items()}
        state.kept["square"][:] = 0.0
        keys = [(seed, _TRAINING, 0) for seed in self.seeds]

        def before(epoch: int) -> None:
            kept, x = state.kept, state.x
            kept["norm"][:, epoch] = _numbers(x.norm(dim=-1))
            if epoch in records:
                row = records.index(epoch)
                train, test, loss = self._accuracies(self.fleet, x)
                kept["train_accuracy"][:, row], kept["test_accuracy"][:, row] = train, test
                kept["train_loss"][:, row] = loss
                kept["trace"][:, row], kept["mean_square"][:, row] = self._noise(x, epoch)
            if epoch in times:
                kept["decayed"][times.index(epoch)] = _numbers(x)

        def after(gradient: Tensor, epoch: int) -> None:
            square = _numbers(gradient.square().sum(-1) * state.x.square().sum(-1))
            state.kept["square"][:, epoch] += square / self.per_epoch

        self._run(self.fleet, state, settings.lr, epochs, keys, _PART, before, after)
        return state.kept

    def _noise(self, x: Tensor, epoch: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
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
            moved = None if shift is None else shift[:, index]
            gradient = self._gradient(self.fleet, x, order[:, index], moved).double()
            total += gradient / self.per_epoch
            square = square + gradient.square().sum(-1) / self.per_epoch
        mean = total.square().sum(-1)
        size = x.double().square().sum(-1)
        return _numbers(size * (square - mean)), _numbers(size * mean)

    # After it.

    def branches(self, decayed: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Continue with the small learning rate from the weights ``decayed`` (times, runs, D)."""
        settings = self.settings
        times, runs = len(settings.decay_times), len(self.seeds)
        members = [(row, run) for row in range(times) for run in range(runs)]
        size = settings.branches_side_by_side
        found: dict[str, list[NDArray[np.float64]]] = {}
        for first in range(0, len(members), size):
            chosen = members[first : first + size]
            start = np.stack([decayed[member] for member in chosen])
            part = f"decays {first + 1}-{first + len(chosen)} of {len(members)}"
            for name, value in self._branch(chosen, start, part).items():
                found.setdefault(name, []).append(value)

        def ordered(values: list[NDArray[np.float64]]) -> NDArray[np.float64]:
            joined = np.concatenate(values)
            return joined.reshape(times, runs, *joined.shape[1:]).swapaxes(0, 1)

        return {name: ordered(values) for name, values in found.items()}

    def _branch(
        self, members: list[tuple[int, int]], start: NDArray[np.float64], part: str
    ) -> dict[str, NDArray[np.float64]]:
        settings = self.settings
        fleet = self.fleet.subset([run for _, run in members])
        records = settings.branch_records
        state = _State(torch.from_numpy(start).to(self.fleet.start))
        shape = (len(members), len(records))
        state.kept = {
            "branch_train": np.full(shape, np.nan),
            "branch_test": np.full(shape, np.nan),
            "branch_norm": np.full(len(members), np.nan),
        }
        times = settings.decay_times
        keys = [(self.seeds[run], _BRANCH, times[row]) for row, run in members]

        def before(epoch: int) -> None:
            state.kept["branch_norm"][:] = _numbers(state.x.norm(dim=-1))
            if epoch in records:
                row = records.index(epoch)
                train, test, _ = self._accuracies(fleet, state.x)
                state.kept["branch_train"][:, row], state.kept["branch_test"][:, row] = train, test

        self._run(fleet, state, settings.decay_lr, settings.decay_epochs, keys, part, before)
        return state.kept

    # Both.

    def _run(
        self,
        fleet: Fleet,
        state: _State,
        lr: float,
        epochs: int,
        keys: list[tuple[int, int, int]],
        part: str,
        before: Callable[[int], None],
        after: Callable[[Tensor, int], None] | None = None,
    ) -> None:
        """Steps of SGD from a state on, or from its checkpoint, which is left behind."""
        path = self._checkpoint(part)
        if path is not None and path.exists():
            self._resume(path, state, epochs * self.per_epoch)
        last = epochs * self.per_epoch
        saved = time.monotonic()
        with tqdm(
            total=last,
            initial=state.step,
            desc=f"{self.label}, {part}",
            unit="step",
            disable=not self.progress,
        ) as bar:
            for number, epoch, order, shift in self._steps(keys, state.step, last):
                if number % self.per_epoch == 0:
                    before(epoch)
                gradient = self._gradient(fleet, state.x, order, shift)
                if after is not None:
                    after(gradient, epoch)
                state.x = step(state.x, gradient, lr, self.settings.weight_decay)
                state.step = number + 1
                bar.update()
                if path is not None and time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    self._save(path, state)
                    saved = time.monotonic()
            if state.step == last:
                before(epochs)
        self._require_finite(state.x, lr, state.step)
        if path is not None:
            state.step = last + 1  # what comes before the end is done
            self._save(path, state)

    def _resume(self, path: Path, state: _State, last: int) -> None:
        """Take up what :meth:`_save` wrote; a step past the last says that all is done."""
        header, arrays = read_archive(path, _KIND)
        with complete(path, "a checkpoint of these runs", "--restart starts anew"):
            step, x = header["step"], torch.from_numpy(arrays.pop("x"))
            if type(step) is not int or not 0 <= step <= last + 1 or x.shape != state.x.shape:
                raise ValueError(f"step {step!r} of {last}, weights {tuple(x.shape)}")
            state.step, state.x = step, x.to(state.x)
            state.kept.update({name: arrays[name] for name in state.kept})

    def _steps(
        self, keys: list[tuple[int, int, int]], first: int, last: int
    ) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
        """Number, epoch, samples (K, B) and augmentation of each step to be taken."""
        order, shift, at = None, None, -1
        for number in range(first, last):
            epoch, index = divmod(number, self.per_epoch)
            if order is None or epoch != at:
                order, at = self._order(keys, epoch), epoch
                shift = self._shifts(keys, epoch)
            yield number, epoch, order[:, index], None if shift is None else shift[:, index]

    def _order(self, keys: list[tuple[int, int, int]], epoch: int) -> Tensor:
        """The batches of an epoch, (K, batches, B)."""
        count, size = len(self.fleet.images.inputs), self.settings.batch_size
        return torch.stack([batches(count, size, *key, epoch) for key in keys])

    def _shifts(self, keys: list[tuple[int, int, int]], epoch: int) -> Tensor | None:
        """Shift and mirroring of each sample (K, batches, B, 3), or ``None`` for neither."""
        settings = self.settings
        if not settings.shift and not settings.mirror:
            return None
        size = (self.per_epoch, settings.batch_size, 3)
        values = (2 * settings.shift + 1, 2 * settings.shift + 1, 1 + settings.mirror)
        drawn = [np.random.default_rng((*key, epoch, 1)).integers(0, values, size) for key in keys]
        return torch.from_numpy(np.stack(drawn))

    def _gradient(self, fleet: Fleet, x: Tensor, order: Tensor, shift: Tensor | None) -> Tensor:
        order = order.to(x.device)
        inputs = fleet.images.inputs[order]
        if shift is not None:
            inputs = augmented(inputs, shift.to(x.device), self.settings.shift, self.fill)
        return fleet.gradients(x, inputs, fleet.images.targets[order])[1]

    def _accuracies(self, fleet: Fleet, x: Tensor) -> tuple[NDArray[np.float64], ...]:
        """Accuracy in training and testing, and loss in training."""
        images = fleet.images
        train, loss = fleet.evaluate(x, images.inputs, images.targets)
        test, _ = fleet.evaluate(x, images.test_inputs, images.test_targets)
        return _numbers(train), _numbers(test), _numbers(loss)

    def _require_finite(self, x: Tensor, lr: float, steps: int) -> None:
        blown = int((~torch.isfinite(x).all(-1)).sum())
        if blown:
            raise NonFiniteError(
                "runs of SGD blew up",
                received=f"{blown} of {len(x)} runs at learning rate {lr:g}, in {steps} steps",
                expected="finite weights",
                remedy="a smaller learning rate",
            )

    def _checkpoint(self, part: str) -> Path | None:
        if self.folder is None:
            return None
        name = f"{self.label}-{part.replace(' ', '-')}".replace(" ", "-")
        key = self.settings.training_key() if part == _PART else self.settings.key()
        return self.folder / f"{name}-{key}.ckpt"

    def _save(self, path: Path, state: _State) -> None:
        write_archive(path, _KIND, {"step": state.step}, {"x": state.x.cpu().numpy(), **state.kept})

    def forget(self) -> None:
        """Remove the checkpoints of these runs, which are done."""
        assert self.folder is not None
        name = self.label.replace(" ", "-")
        for key in (self.settings.key(), self.settings.training_key()):
            for path in self.folder.glob(f"{name}-*-{key}.ckpt"):
                path.unlink(missing_ok=True)


def _numbers(value: Tensor) -> NDArray[np.float64]:
    return value.detach().double().cpu().numpy()
