"""What Figures 1 and 3 train: section 6.2, in small on the digits or as published."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from manifold_sde.experiments.experiment import ExperimentSettings, option
from manifold_sde.networks import ScaleInvariantPreResNet
from manifold_sde.networks.data import Images, cifar10, digits
from manifold_sde.time_scale import TimeScale

DATA = ("digits", "cifar10")
#: Number of epochs at which accuracies are evaluated, besides those at which it is decayed.
_RECORDS = 30
#: Number of epochs after a decay at which accuracies are evaluated.
_BRANCH_RECORDS = 8
#: What the quick form and the paper's setting change.
_QUICK = {
    **{"epochs": 90, "decays": 7, "decay_lr": 0.1, "decay_epochs": 20, "runs": 4},
    **{"side_by_side": 2, "branches_side_by_side": 14, "form": "quick"},
}
_PUBLISHED = {
    **{"data": "cifar10", "n_train": None, "shift": 4, "mirror": True},
    **{"depth": 32, "width": 16, "norm": "batch"},
    **{"lr": 0.8, "weight_decay": 5e-4, "batch_size": 128, "epochs": 1000},
    **{"decay_lr": 1e-3, "decay_epochs": 1000},
    **{"runs": 1, "side_by_side": 1, "branches_side_by_side": 1},
}


def _by_form(name: str, full: Any, metavar: str, **options: Any) -> Any:
    """The option of a field with another default in each form; its help says all of them."""
    forms = {"": _QUICK, "full": {}, "cifar10": _PUBLISHED}
    values = {form: changes.get(name, full) for form, changes in forms.items()}
    shown = [f"{values['']}"]
    for value in dict.fromkeys(values.values()):
        where = [form for form in ("full", "cifar10") if values[form] == value]
        if value != values[""] and where:
            shown.append(f"{'all' if value is None else value} if {' or '.join(where)}")
    return option(full, metavar, shown="; ".join(shown), **options)


@dataclass(frozen=True)
class Settings(ExperimentSettings):
    """What is trained for Figures 1 and 3; the defaults are those of the digits.

    Args:
        data: What is trained on. "digits" (scikit-learn's) or "cifar10".
        data_dir: Folder of CIFAR-10; nothing is downloaded.
        runs: Number of runs. They differ in initial weights and order of the batches.
        seed: Seed of the first run. The others have the next ones.
        lr: Learning rate before the decay. There is no momentum.
        weight_decay: Weight decay of (1).
        batch_size: Samples of a step.
        epochs: Epochs of a run.
        decays: Number of epochs of decay. They are spaced geometrically.
        decay_lr: Learning rate after the decay.
        decay_epochs: Epochs after the decay.
        n_train: Number of training images. ``None`` is all, for the digits 1000.
        n_test: Number of test images. ``None`` is all others.
        shift: Pixels that images are shifted by. At most so many, at random, in training.
        depth: Layers of the PreResNet, 6n + 2.
        width: Channels of its first stage.
        norm: Its normalisation layers.
        device: Where torch computes: cpu, cuda.
        data_seed: Seed of the division of the digits, the same for all runs.
        mirror: Training images are mirrored at random.
        side_by_side: Number of runs that are trained in lockstep; rounding depends on it.
        branches_side_by_side: The same for the continuations after decays.
        form: "full" or "quick": what the files are called.

    Raises:
        ArgumentError: If a value is out of range.

    Example:
        >>> settings = Settings()
        >>> settings.decay_times[-1] == settings.epochs
        True

    Source: section 6.2.
    """

    QUICK: ClassVar = _QUICK

    # Of the folder only the images count; which of the runs it is, the files say.
    NOT_IN_KEY = ("runs", "seed", "data_dir", "form")

    data: str = option("digits", "digits|cifar10")
    data_dir: str | None = option(None, "DIR", convert=str, kind=Path | None)
    runs: int = _by_form("runs", 6, "N", min=1)
    seed: int = option(0, "N", min=0)
    lr: float = _by_form("lr", 0.5, "ETA")
    weight_decay: float = _by_form("weight_decay", 2e-3, "LAMBDA")
    batch_size: int = _by_form("batch_size", 10, "B", min=1)
    epochs: int = _by_form("epochs", 240, "N", min=1)
    decays: int = _by_form("decays", 12, "N", min=2)
    decay_lr: float = _by_form("decay_lr", 0.05, "ETA")
    decay_epochs: int = _by_form("decay_epochs", 60, "N", min=1)
    n_train: int | None = _by_form("n_train", 300, "N", flag="--train-images", min=1)
    n_test: int | None = option(None, "N", flag="--test-images", shown="all others", min=1)
    shift: int = _by_form("shift", 1, "N", min=0)
    depth: int = _by_form("depth", 8, "N")
    width: int = _by_form("width", 4, "N", min=1)
    norm: str = _by_form("norm", "layer", "layer|group|batch")
    device: str = option("cpu", "NAME")
    data_seed: int = 0
    mirror: bool = False
    side_by_side: int = 3
    branches_side_by_side: int = 18
    form: str = "full"

    def __post_init__(self) -> None:
        self.require(
            self.data in DATA,
            "there are no such data",
            received=repr(self.data),
            expected='"digits" or "cifar10"',
            remedy="digits come with scikit-learn; cifar10 needs its folder (--data-dir)",
        )
        self.require(
            self.data != "cifar10" or self.data_dir is not None,
            "the folder of CIFAR-10 is not named",
            received="data cifar10 without a folder",
            expected="the folder that its published archive was unpacked in",
            remedy="--data-dir DIR; nothing is downloaded",
        )
        counts = (self.batch_size, self.epochs, self.decay_epochs, self.runs)
        blocks = (self.side_by_side, self.branches_side_by_side, self.decays - 1)
        rates = (self.lr, self.decay_lr, self.weight_decay)
        self.require(
            all(isinstance(c, int) and c >= 1 for c in (*counts, *blocks))
            and all(math.isfinite(rate) and rate > 0 for rate in rates)
            and self.lr * self.weight_decay < 1
            and self.decay_lr < self.lr
            and isinstance(self.shift, int)
            and self.shift >= 0,
            "these settings do not make Figures 1 and 3",
            expected="positive counts, at least 2 decays, positive rates with lr * "
            "weight_decay < 1, and decay_lr < lr",
            remedy="Settings() is the digits' form, Settings.published(DIR) the paper's",
        )

    @classmethod
    def published(cls, data_dir: str | None, **changes: Any) -> Settings:
        """The paper's setting: PreResNet-32 of width 16 with batch normalisation on CIFAR-10.

        The paper prints learning rates, weight decay and the 1000 epochs after a decay. Batches of
        128, one run, and 1000 epochs before the last decay are chosen here.

        Args:
            data_dir: Folder of CIFAR-10.
            **changes: Other fields, as in the class.
        """
        return cls(**{**_PUBLISHED, "data_dir": data_dir, **changes})

    def images(self) -> Images:
        """The images, in single precision.

        Raises:
            MissingDependencyError: If scikit-learn is needed and not there.
            DataFileError: If the files of CIFAR-10 are not there.
            ArgumentError: If there are not so many images.
        """
        if self.data == "digits":
            number = self.n_train if self.n_train is not None else 1000
            images = digits(number, seed=self.data_seed, test=self.n_test, dtype=torch.float32)
        else:
            assert self.data_dir is not None
            images = cifar10(
                self.data_dir, n_train=self.n_train, n_test=self.n_test, seed=self.data_seed
            )
        self.require(
            len(images.inputs) >= self.batch_size and len(images.test_inputs) > 0,
            "there are too few images",
            received=f"{len(images.inputs)} for training, {len(images.test_inputs)} for "
            f"testing, batches of {self.batch_size}",
            expected="at least one batch, and images for testing",
            remedy="a smaller batch_size, or other numbers n_train and n_test",
        )
        return images

    def network(self, seed: int) -> nn.Module:
        """The network with initial weights of a seed."""
        channels = 1 if self.data == "digits" else 3
        return ScaleInvariantPreResNet(
            self.depth, self.width, in_channels=channels, norm=self.norm, seed=seed
        )

    @property
    def scale(self) -> TimeScale:
        """The time scale before the decay."""
        return TimeScale(self.lr, self.weight_decay)

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs."""
        return list(range(self.seed, self.seed + self.runs))

    @property
    def groups(self) -> list[list[int]]:
        """The seeds that are trained in lockstep."""
        seeds, size = self.seeds, self.side_by_side
        return [seeds[i : i + size] for i in range(0, len(seeds), size)]

    @property
    def decay_times(self) -> list[int]:
        """Epochs at which the learning rate is decayed, increasing."""
        first = max(1.0, self.epochs / 100)
        return sorted({round(e) for e in np.geomspace(first, self.epochs, self.decays)})

    @property
    def records(self) -> list[int]:
        """Epochs at which accuracies are evaluated before a decay; 0 is the start."""
        even = np.linspace(0, self.epochs, min(self.epochs, _RECORDS) + 1)
        return sorted({*(round(e) for e in even), *self.decay_times})

    @property
    def branch_records(self) -> list[int]:
        """Epochs after a decay at which accuracies are evaluated."""
        count = min(_BRANCH_RECORDS, self.decay_epochs)
        return sorted({0, *(round(e) for e in np.geomspace(1, self.decay_epochs, count))})

    def training_key(self) -> str:
        """The key of the numbers before a decay, which do not depend on what comes after."""
        return self.key("decay_lr", "decay_epochs", "branches_side_by_side")
