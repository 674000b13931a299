"""What is run for the collapse: a network, digits, and rates of SGD far from each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from manifold_sde.errors import ArgumentError
from manifold_sde.experiments.experiment import ExperimentSettings, option
from manifold_sde.time_scale import TimeScale

#: Pixels and classes of the digits.
PIXELS, CLASSES = 64, 10
#: Learning rates and weight decays that keep the four axes apart: by the clock the first is at its
#: equilibrium norm from the start, the second shrinks, the others grow at two speeds.
_RATES = ((0.02, 0.01), (0.006, 0.04), (0.02, 0.0025), (0.01, 0.0025))


def read_rates(texts: Sequence[str]) -> tuple[tuple[float, float], ...]:
    """Pairs of a learning rate and a weight decay, each written as "ETA,LAMBDA".

    Raises:
        ArgumentError: If one is no pair of numbers.

    Example:
        >>> read_rates(["0.01,0.02"])
        ((0.01, 0.02),)
    """
    pairs = []
    for text in texts:
        try:
            lr, weight_decay = (float(part) for part in text.split(","))
        except ValueError:
            raise ArgumentError(
                "these are not rates of SGD",
                received=f"--rates {text}",
                expected="a learning rate and a weight decay with a comma between them",
                remedy="--rates 0.02,0.01 --rates 0.01,0.0025",
            ) from None
        pairs.append((lr, weight_decay))
    return tuple(pairs)


@dataclass(frozen=True)
class Settings(ExperimentSettings):
    """What is run; the defaults are the full form.

    All runs start at one minimiser of norm 1, and the noise is that of (18) with trace 1 there, so
    that the intrinsic clock u after k steps is the time T = tau(k) of (12).

    Args:
        seed: Seed of the noise.
        network_seed: Seed of the network and of its digits.
        rates: Learning rate and weight decay; give it once for each pair.
        paths: Runs at each pair, and paths of the diffusion. The field is of the runs alone.
        diffusion_paths: Paths of the diffusion.
        horizon: Clock to reach.
        widths: Sizes of the network: 64 pixels, hidden layers, 10 classes.
        n_samples: Training images. Few, so that the network has more weights than residuals.
        head_scale: Size of the rows of the frozen last layer, which are orthogonal: the curvature
            of the loss grows with its square.
        test_images: Images of the test accuracy.
        snapshots: Times, equally spaced in u, at which the test functions are evaluated.
        dt: Step of the diffusion in u.
        limit_points: Runs of each ensemble whose last point of the manifold is compared with the
            limit map to ten digits.
        compiled: Compile the step of SGD, where there is a compiler.

    Raises:
        ArgumentError: If a number is out of range.

    Example:
        >>> Settings().steps(0.02, 0.01)[-1]
        1250
    """

    QUICK: ClassVar = {
        **{"paths": 12, "diffusion_paths": 16, "horizon": 0.25},
        **{"snapshots": 5, "dt": 0.01, "limit_points": 1},
    }

    seed: int = option(0, "N", min=0)
    network_seed: int = option(0, "N", min=0)
    rates: tuple[tuple[float, float], ...] = option(
        _RATES, "ETA,LAMBDA", shown="four", convert=read_rates, kind=list[str]
    )
    paths: int = option(40, "N", shown="12; 40 if full", min=2)
    diffusion_paths: int = 40
    horizon: float = option(0.5, "U", flag="--until", shown="0.25; 0.5 if full")
    widths: tuple[int, ...] = (PIXELS, 24, 24, CLASSES)
    n_samples: int = 10
    head_scale: float = 0.5
    test_images: int = 500
    snapshots: int = 10
    dt: float = 0.005
    limit_points: int = 4
    compiled: bool = option(True, flag="--compile/--no-compile")

    def __post_init__(self) -> None:
        positive = (*(x for pair in self.rates for x in pair), self.horizon, self.dt)
        counts = (self.n_samples, self.test_images, self.snapshots)
        self.require(
            len(self.rates) >= 2
            and len(set(self.rates)) == len(self.rates)
            and all(math.isfinite(x) and x > 0 for x in (*positive, self.head_scale))
            and all(isinstance(n, int) and n >= 1 for n in counts)
            and min(self.paths, self.diffusion_paths) >= 2
            and self.limit_points >= 0,
            "these settings do not make a collapse",
            expected="two or more different pairs of positive rates, positive numbers and "
            "counts, and two or more paths",
            remedy="Settings() is the full form",
        )
        shape = (self.widths[0], self.widths[-1], len(self.widths) >= 3)
        self.require(
            shape == (PIXELS, CLASSES, True) and self.widths[-2] > CLASSES,
            "the network does not fit the digits",
            received=f"widths={self.widths}",
            expected=f"{PIXELS} pixels first, {CLASSES} classes last, and more than {CLASSES} "
            "units before them, whose outputs can then be anything",
            remedy=f"widths=({PIXELS}, 24, {CLASSES})",
        )
        for pair in self.rates:
            steps = self.steps(*pair)
            self.require(
                len(steps) > self.snapshots,
                "the steps of SGD are too large for the snapshots",
                received=f"learning rate {pair[0]:g}, which reaches u = {self.horizon:g} in "
                f"{steps[-1]} steps",
                expected=f"a step at least between {self.snapshots} snapshots",
                remedy="a smaller learning rate, or a larger horizon",
            )

    @property
    def clocks(self) -> tuple[float, ...]:
        """Clocks u at which the diffusion is looked at, and SGD should be; 0 is the first."""
        return tuple(self.horizon * i / self.snapshots for i in range(self.snapshots + 1))

    def steps(self, lr: float, weight_decay: float) -> list[int]:
        """Step counts of the snapshots: the last ones before the clock reaches ``clocks``."""
        scale = TimeScale(lr, weight_decay)
        counts = {0, *(int(scale.steps(u)) for u in self.clocks[1:])}
        return sorted(counts)

    @property
    def largest_step(self) -> float:
        """Largest eta / |x|^2 of all runs: at the start, or where the norm settles."""
        return max(max(lr, math.sqrt(2.0 * lr * decay)) for lr, decay in self.rates)

    def noise_seed(self, index: int) -> int:
        """Seed of SGD at a pair of rates: different ones, or the runs would not be independent."""
        return 1000 * self.seed + index
