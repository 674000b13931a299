"""What Figure 2 runs: the numbers of section 6.1, and how much of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from manifold_sde.experiments.experiment import ExperimentSettings, option
from manifold_sde.problems import NormalizedLinear, normalized_linear
from manifold_sde.time_scale import TimeScale

#: The paper's design, which has the boxes, and the well-conditioned one.
DESIGNS = ("gaussian", "orthogonal")

#: Where the quick form stops without a compiler, in steps.
_QUICK_STEPS_UNCOMPILED = 45_000
_QUICK_LAW_RUNS = 120
#: Runs of at most so many steps are recorded at every step.
_RECORD_ALL = 4000
#: Where not, the direction moves by this part of the circle's radius from record to record.
_RECORD_PART = 1 / 20
_CURVE_TIMES = 20


@dataclass(frozen=True)
class Plan:
    """One ensemble of runs of SGD.

    Attributes:
        design, lr: Which problem, and the learning rate.
        n_paths: Number of runs.
        box_steps: Step counts of the boxes, empty where there are none.
        law_steps: Step counts at which angles are kept.
        law_times: The times T that these steps stand for.
        spacing: The angle is unwrapped over records so many steps apart, up to the last of the
            law's steps.
    """

    design: str
    lr: float
    n_paths: int
    box_steps: tuple[int, ...]
    law_steps: tuple[int, ...]
    law_times: tuple[float, ...]
    spacing: int

    @property
    def records(self) -> list[int]:
        """Step counts between which the angle is unwrapped."""
        last = max(self.law_steps, default=0)
        return sorted({*range(0, last + 1, self.spacing), *self.law_steps})

    @property
    def kept(self) -> list[int]:
        """All step counts to keep."""
        return sorted({0, *self.records, *self.box_steps})

    @property
    def label(self) -> str:
        """A short name for progress bars."""
        return f"{self.design}, η={self.lr:g}"


@dataclass(frozen=True)
class Settings(ExperimentSettings):
    """What is run for Figure 2; the defaults are the paper's, in full.

    The two designs draw different noise, with ``seed`` and ``seed + 1``: with one seed they would
    nearly be one experiment, as the inputs of both span the same space.

    Args:
        seed: Seed of SGD's noise.
        runs: Runs in a box.
        law_runs: Runs that are compared with the limit's law; the boxes show the first of them.
        lrs: Learning rate; give it once for each.
        horizon: Time T that the smallest learning rate is to reach. The others take as many steps
            as have the same product of learning rate and steps.
        problem_seed: Seed of the model's inputs and minimiser.
        weight_decay: Weight decay.
        dim, n_samples, noise_scale: The model of section 6.1.
        columns: Boxes in a row.
        step_limit: Steps at which all runs end; ``None`` for the full form.
        compiled: Compile the step of SGD, where there is a compiler.

    Raises:
        ArgumentError: If a number is out of range.

    Example:
        >>> settings = Settings()
        >>> [plan.kept[-1] for plan in settings.plans("gaussian")]
        [19033, 190338, 1903387]
        >>> [plan.kept[-1] for plan in Settings.quick().plans("gaussian")]
        [19033, 190338, 544464]
    """

    QUICK: ClassVar = {"law_runs": _QUICK_LAW_RUNS, "step_limit": 560_000}

    seed: int = option(0, "N", min=0)
    runs: int = option(60, "N", min=1)
    law_runs: int = option(480, "N", shown="120; 480 if full", min=8)
    lrs: tuple[float, ...] = option(
        (1e-2, 1e-3, 1e-4),
        "ETA",
        flag="--lr",
        shown="0.01, 0.001, 0.0001",
        convert=tuple,
        kind=list[float],
    )
    horizon: float = option(15.58, "T", flag="--until")
    problem_seed: int | None = option(None, "N", shown="a typical one", min=0)
    weight_decay: float = 0.05
    dim: int = 10
    n_samples: int = 8
    noise_scale: float = 0.3
    columns: int = 12
    step_limit: int | None = None
    compiled: bool = option(True, flag="--compile/--no-compile")

    def __post_init__(self) -> None:
        counts = (self.runs, self.law_runs, self.columns - 1)
        self.require(
            len(self.lrs) > 0
            and all(math.isfinite(lr) and lr > 0 for lr in self.lrs)
            and len(set(self.lrs)) == len(self.lrs)
            and self.weight_decay > 0
            and all(isinstance(c, int) and c >= 1 for c in counts)
            and math.isfinite(self.horizon)
            and self.horizon > 0
            and self.dim == self.n_samples + 2,
            "these settings do not make a Figure 2",
            expected="different positive learning rates, positive counts and times, at least "
            "2 columns, and n_samples = dim - 2, which makes the minimisers a circle",
            remedy="Settings() is the paper's",
        )
        self.require(
            self.law_runs >= 8,
            "there are too few runs to compare with a law",
            received=f"law_runs={self.law_runs}",
            expected="at least 8",
            remedy=f"law_runs={_QUICK_LAW_RUNS} is the quick form's",
        )

    @classmethod
    def quick(cls, **changes: Any) -> Settings:
        """The quick form: fewer runs in the comparison, and an end after some steps.

        Args:
            **changes: Other fields, as in the class; ``compiled=False`` ends earlier.
        """
        settings = super().quick(**changes)
        return settings if settings.compiled else settings.without_compiler()

    def without_compiler(self) -> Settings:
        """The same uncompiled; the quick form then ends earlier."""
        limit = self.step_limit
        if limit is not None:
            limit = min(limit, _QUICK_STEPS_UNCOMPILED)
        return dataclasses.replace(self, compiled=False, step_limit=limit)

    @property
    def curve_times(self) -> tuple[float, ...]:
        """Times T at which angles are kept: well before mixing, where a law can be wrong."""
        last = min(2.0, self.horizon)
        return tuple(last * (i + 1) / _CURVE_TIMES for i in range(_CURVE_TIMES))

    @property
    def law_times(self) -> tuple[float, float]:
        """Times T of the comparison: half-way and last."""
        times = self.curve_times
        return times[_CURVE_TIMES // 2 - 1], times[-1]

    def scale(self, lr: float) -> TimeScale:
        """The time scale at a learning rate."""
        return TimeScale(lr, self.weight_decay)

    def problem(self, design: str) -> NormalizedLinear:
        """The model of section 6.1 with this design."""
        seed: dict[str, Any] = {} if self.problem_seed is None else {"seed": self.problem_seed}
        return normalized_linear(self.dim, self.n_samples, self.noise_scale, design=design, **seed)

    def noise_seed(self, design: str) -> int:
        """Seed of a design's noise."""
        return self.seed + DESIGNS.index(design)

    def column_products(self) -> list[float]:
        """Product of learning rate and steps of each column of boxes."""
        lr = min(self.lrs)
        largest = lr * float(self.scale(lr).tau_inverse(self.horizon))
        return np.linspace(0.0, largest, self.columns).tolist()

    def plans(self, design: str) -> list[Plan]:
        """What is run with a design, shortest first; learning rates cut off entirely are left out.

        The boxes are those of the paper's design alone.
        """
        plans = [self._plan(design, lr) for lr in sorted(self.lrs, reverse=True)]
        return [plan for plan in plans if plan.law_steps or len(plan.box_steps) > 1]

    def _plan(self, design: str, lr: float) -> Plan:
        limit = math.inf if self.step_limit is None else self.step_limit
        scale = self.scale(lr)
        boxes = [math.floor(product / lr) for product in self.column_products()]
        if design != "gaussian":
            boxes = []
        times = self.curve_times
        steps = [max(1, int(scale.steps(T))) for T in times]
        reached = [(k, T) for k, T in zip(steps, times, strict=True) if k <= limit]
        law_steps = tuple(k for k, _ in reached)
        # Without a time to compare at there is nothing to record for.
        if not any(T in self.law_times for _, T in reached):
            reached, law_steps = [], ()
        return Plan(
            design,
            lr,
            max(self.runs, self.law_runs),
            tuple(k for k in boxes if k <= limit),
            law_steps,
            tuple(T for _, T in reached),
            self._spacing(design, lr, law_steps),
        )

    def _spacing(self, design: str, lr: float, law_steps: tuple[int, ...]) -> int:
        if not law_steps or law_steps[-1] <= _RECORD_ALL:
            return 1
        # A step moves the direction by s lr / |x|^2 along each axis, most where |x| is least: at
        # equilibrium or at the start.
        trace = self.noise_scale**2 * (self.dim - 1)
        least = min(1.0, float(self.scale(lr).equilibrium_norm(trace)))
        step = self.noise_scale * lr / least**2
        radius = _radius(self, design)
        return max(1, int((_RECORD_PART * radius / step) ** 2))


@functools.lru_cache
def _radius(settings: Settings, design: str) -> float:
    """Radius of the circle; kept, because making a problem checks its derivatives."""
    return settings.problem(design).facts.circle.radius
