"""What is kept of the runs behind Figures 1 and 3."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manifold_sde.experiments.training.settings import Settings
from manifold_sde.solvers.archive import complete, read_archive, versions, write_archive

Array = NDArray[np.float64]

_KIND = "training of figures 1 and 3"


@dataclass(frozen=True)
class TrainingRun:
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

    def arrays(self) -> dict[str, Array]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in array_names()}

    def save(self, path: str | Path) -> None:
        """Write everything to one file, with the versions that it was made with."""
        header = {
            "settings": dataclasses.asdict(self.settings),
            "key": self.settings.key(),
            "steps_per_epoch": self.steps_per_epoch,
            "versions": versions(),
        }
        write_archive(path, _KIND, header, self.arrays())

    @classmethod
    def load(cls, path: str | Path) -> TrainingRun:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: If the file is missing, corrupted, or holds something else.
        """
        header, arrays = read_archive(path, _KIND)
        with _complete(path):
            return cls(Settings(**header["settings"]), header["steps_per_epoch"], **arrays)

    @classmethod
    def saved(cls, path: Path, settings: Settings) -> TrainingRun | None:
        """The runs in a file, if they are those of these settings and versions."""
        if not path.is_file():
            return None
        header, _ = read_archive(path, _KIND)
        with _complete(path):
            same = header.get("key") == settings.key()
            if not same or Settings(**header["settings"]).seeds != settings.seeds:
                return None
        return cls.load(path)

    @classmethod
    def joined(cls, settings: Settings, parts: list[TrainingRun]) -> TrainingRun:
        """The runs of several groups as those of these settings."""
        arrays = [part.arrays() for part in parts]
        whole = {name: np.concatenate([part[name] for part in arrays]) for name in array_names()}
        return cls(settings, parts[0].steps_per_epoch, **whole)


def _complete(path: str | Path) -> AbstractContextManager[None]:
    what = "what TrainingRun.save of this version wrote"
    return complete(path, what, "make the figure anew, with --restart")


def array_names() -> tuple[str, ...]:
    """Names of the arrays of :class:`TrainingRun`."""
    fields: tuple[Any, ...] = dataclasses.fields(TrainingRun)
    return tuple(f.name for f in fields if f.name not in ("settings", "steps_per_epoch"))
