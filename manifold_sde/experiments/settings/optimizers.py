"""What is run for the collapse of other optimizers: digits with many labels, rates, schedules."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from manifold_sde.experiments.experiment import Array, ExperimentSettings, option
from manifold_sde.training import TrainingSettings
from manifold_sde.training.training_settings import SCHEDULES as SHAPES

MOMENTUM = 0.9
#: Learning rate and weight decay of each optimizer, which keep the axes apart: from norm 1 the
#: first stays, the second shrinks, the others grow at two speeds.
RATES: dict[str, tuple[tuple[float, float], ...]] = {
    "sgd": ((0.015, 0.015), (0.0045, 0.06), (0.015, 0.004), (0.0075, 0.004)),
    "momentum": ((0.0015, 0.015), (4.5e-4, 0.06), (0.0015, 0.004), (7.5e-4, 0.004)),
    "adamw": ((3e-4, 0.3), (9e-5, 1.2), (3e-4, 0.075), (1.5e-4, 0.075)),
}
OPTIMIZERS = tuple(RATES)
SCHEDULES = ("constant", "cosine", "step")
#: Cases in which SGD stays near weights that fit all images.
FITTED = ("independent", "reshuffled", "large")
#: What is changed in each case, in words.
CASES = {
    "independent": "independent batches",
    "reshuffled": "every sample once an epoch",
    "crowded": "more images than are fitted",
    "untrained": "from untrained weights",
    "large": "rates three times as large",
}
_LARGE = 3.0


def step_schedule(progress: Array) -> Array:
    """The learning rate, 1 in the first half of a run and 0.3 in the second."""
    return np.where(progress < 0.5, 1.0, 0.3)


@dataclass(frozen=True)
class Run:
    """Runs of one optimizer at one pair of rates.

    Attributes:
        case, optimizer, schedule: Which; names of the tables above.
        lr, weight_decay: Largest learning rate, and weight decay.
        index: Number of the run among all that could be, from which its seed is made.
    """

    case: str
    optimizer: str
    schedule: str
    lr: float
    weight_decay: float
    index: int

    @property
    def training(self) -> TrainingSettings:
        """The same as the planner has it; the batch is that of the noise."""
        return TrainingSettings(
            self.lr,
            self.weight_decay,
            momentum=MOMENTUM if self.optimizer == "momentum" else 0.0,
            schedule=step_schedule if self.schedule == "step" else self.schedule,
            optimizer="adamw" if self.optimizer == "adamw" else "sgd",
        )

    def learning_rates(self, steps: int) -> Array:
        """Those of a run of so many steps, (steps,)."""
        shape = SHAPES.get(self.schedule, step_schedule)
        return self.lr * np.asarray(shape(np.arange(steps) / steps))


@dataclass(frozen=True)
class Settings(ExperimentSettings):
    """What is run; the defaults are the full form.

    Args:
        seed: Seed of the batches.
        network_seed: Seed of the network and of its digits.
        paths: Runs at each pair of rates.
        horizon: Angular clock to reach.
        cases: What is run: names of ``CASES``. Independent batches have all schedules, the others a
            constant learning rate.
        schedules: Schedules with independent batches.
        n_rates: How many of the pairs of rates.
        faster: Factor on all learning rates and weight decays, which leaves the norms at rest.
        hidden: Units of the hidden layer.
        n_images: Images in all cases but one.
        n_labels: Labels of each image.
        wrong: Share of the labels that are drawn at random.
        crowd: Images in the case of more images than are fitted, of one label each.
        batch_size: Samples of a step.
        head_scale: Size of the rows of the frozen last layer.
        test_images: Images of the test functions.
        snapshots: Times at which the test functions are evaluated.

    Raises:
        ArgumentError: If a number is out of range.

    Example:
        >>> len(Settings().runs), len(Settings.quick().runs)
        (84, 9)
    """

    QUICK: ClassVar = {
        **{"paths": 3, "horizon": 0.3, "cases": ("independent",), "faster": 1.3},
        **{"schedules": ("constant",), "n_rates": 3, "snapshots": 8},
    }

    seed: int = option(0, "N", min=0)
    network_seed: int = option(0, "N", min=0)
    paths: int = option(8, "N", shown="3; 8 if full", min=2)
    horizon: float = option(0.9, "V", flag="--until", shown="0.3; 0.9 if full")
    cases: tuple[str, ...] = tuple(CASES)
    schedules: tuple[str, ...] = SCHEDULES
    n_rates: int = 4
    faster: float = 1.0
    hidden: int = 32
    n_images: int = 20
    n_labels: int = 10
    wrong: float = 0.3
    crowd: int = 300
    batch_size: int = 10
    head_scale: float = 0.3
    test_images: int = 500
    snapshots: int = 20

    def __post_init__(self) -> None:
        counts = (self.n_images, self.n_labels, self.crowd, self.batch_size, self.test_images)
        numbers = (self.horizon, self.faster, self.head_scale)
        self.require(
            all(isinstance(n, int) and n >= 1 for n in (*counts, self.snapshots))
            and all(math.isfinite(x) and x > 0 for x in numbers)
            and 0.0 < self.wrong < 1.0
            and self.paths >= 2
            and 2 <= self.n_rates <= 4
            and self.hidden > 10
            and bool(self.cases)
            and set(self.cases) <= set(CASES)
            and bool(self.schedules)
            and set(self.schedules) <= set(SCHEDULES)
            and (self.n_images * self.n_labels) % self.batch_size == 0,
            "these settings do not make a collapse of optimizers",
            expected=f"cases among {', '.join(CASES)}; schedules among {', '.join(SCHEDULES)}; "
            "two to four rates, two paths or more, more than 10 hidden units, positive numbers, "
            "and an epoch of whole batches",
            remedy="Settings() is the full form",
        )

    @property
    def runs(self) -> tuple[Run, ...]:
        """All that is run."""
        found = []
        names = itertools.product(CASES, OPTIMIZERS, SCHEDULES, range(4))
        for index, (case, optimizer, schedule, number) in enumerate(names):
            schedules = self.schedules if case == "independent" else ("constant",)
            if case in self.cases and schedule in schedules and number < self.n_rates:
                factor = self.faster * (_LARGE if case == "large" else 1.0)
                lr, decay = (factor * rate for rate in RATES[optimizer][number])
                found.append(Run(case, optimizer, schedule, lr, decay, index))
        return tuple(found)
