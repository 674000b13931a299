"""The settings of ``manifold-sde simulate``."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifold_sde.errors import ArgumentError
from manifold_sde.experiments.experiment import ExperimentSettings, option


@dataclass(frozen=True)
class Settings(ExperimentSettings):
    """What is simulated.

    Args:
        target: The problem, "FILE.py:NAME".
        lr: Learning rate of SGD.
        weight_decay: Its weight decay.
        steps: Step counts of SGD.
        ratio: Instead: (8) at this ratio; (13) is 0.5.
        times: Times of (8) or (13).
        x0: Weights at step 0, .npy or .pt.
        norm: Norm to scale them to.
        paths: Paths.
        batch_size: Samples of a step.
        seed: Seed of the paths.
        dt: Step in T, or in t of (8).
        rtol: Tolerance of adaptive steps.
        workers: Processes.
        checkpoint: Folder from which a stopped run goes on.
        output: The solution; the figure is beside it.
        compare_sgd: Run SGD too, for the same steps and paths.
    """

    target: str
    lr: float | None = option(None, "ETA", shown=False)
    weight_decay: float | None = option(None, "LAMBDA", shown=False)
    steps: str | None = option(None, "K,K,...", shown=False)
    ratio: float | None = option(None, "C", shown=False)
    times: str | None = option(None, "T,T,...", shown=False)
    x0: Path | None = option(None, "FILE", shown="a minimiser, known or found")
    norm: float | None = option(None, "R", shown="their own")
    paths: int | None = option(None, "N", shown="1000", min=1)
    batch_size: int | None = option(None, "B", shown="the noise's", min=1)
    seed: int = option(0, "N", min=0)
    dt: float | None = option(None, "H", shown="chosen")
    rtol: float | None = option(None, "TOL", shown="none")
    workers: int | None = option(None, "N", shown="this one", min=1)
    checkpoint: Path | None = option(None, "DIR")
    output: Path | None = option(None, "FILE", shown="simulate_FILE_NAME.npz in the folder")
    compare_sgd: bool = option(False, flag="--compare-sgd/--no-compare-sgd")

    @property
    def in_steps(self) -> bool:
        """Whether moments are steps of SGD, and not times of (8).

        Raises:
            ArgumentError: If it is neither or both.
        """
        sgd = (self.lr, self.weight_decay, self.steps)
        own = (self.ratio, self.times)
        by_steps = None not in sgd and own == (None, None)
        by_times = None not in own and sgd == (None, None, None) and not self.compare_sgd
        names = ("lr", "weight_decay", "steps", "ratio", "times")
        given = [f"--{n.replace('_', '-')}" for n in names if getattr(self, n) is not None]
        given += ["--compare-sgd"] if self.compare_sgd else []
        self.require(
            by_steps or by_times,
            "what to simulate is not clear",
            received=", ".join(given) or "none of the options below",
            expected="--lr, --weight-decay and --steps for the weights of SGD; or --ratio and "
            "--times for (8) in its own time, where there is no SGD to compare with",
            remedy="--lr 0.01 --weight-decay 0.05 --steps 1000,5000, or --ratio 0.5 --times "
            "0.5,1 for (13)",
        )
        return by_steps

    @property
    def moments(self) -> list[Any]:
        """The step counts or times.

        Raises:
            ArgumentError: If they are none.
        """
        if self.in_steps:
            return numbers("--steps", self.steps or "", int)
        return numbers("--times", self.times or "", float)

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rate and weight decay, where moments are steps."""
        assert self.lr is not None
        assert self.weight_decay is not None
        return self.lr, self.weight_decay


def numbers(option: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    """Read increasing numbers with commas between them, such as "1000,5000", of an option.

    Raises:
        ArgumentError: If they are none, do not increase, or are below 0.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    increasing = all(a < b for a, b in itertools.pairwise(found))
    if not found or not increasing or not 0 <= found[0] < float("inf") or found[-1] == 0:
        whole = "whole numbers" if kind is int else "numbers"
        raise ArgumentError(
            f"{option} is not a list that can be used",
            received=repr(text),
            expected=f"increasing {whole}, 0 or more, with commas between them",
            remedy=f"{option} " + ("1000,5000" if kind is int else "0.1,0.5"),
        )
    return found
