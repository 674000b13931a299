"""What a run of ``solve`` does, as plain data that any process can be given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from manifold_sde.equations import StochasticEquation
from manifold_sde.solvers.adaptive_march import AdaptiveMarch
from manifold_sde.solvers.bookkeeping import Book, GrowthBook, log_time_at_zero_ratio
from manifold_sde.solvers.brownian import BrownianPath
from manifold_sde.solvers.fingerprint import Fingerprint
from manifold_sde.solvers.limits import MAX_STEPS
from manifold_sde.solvers.march import Grid, March
from manifold_sde.solvers.moments import Observable
from manifold_sde.solvers.schemes import SCHEMES
from manifold_sde.solvers.step_control import StepControl
from manifold_sde.solvers.torchsde_bridge import TORCHSDE, TorchsdeMarch


@dataclass(frozen=True)
class Plan:
    """What all chunks of a run share.

    Attributes:
        sde: The equation that is simulated, in the calculus of the scheme.
        method: Name of the scheme.
        grid: The grid.
        book: What is added up.
        seed: Seed of the Brownian paths.
        antithetic: Whether paths come in pairs of opposite noise.
        compiled: Whether kernels are compiled.
        times: Times asked for (K,), in the time of the equation asked for.
        ratio: Where the direction is simulated for (8): its ratio C; else ``None``.
        observables: Functions whose moments are kept instead of the paths, or ``None``.
        control: Tolerance and range of adaptive steps, or ``None``.
        max_steps: Largest number of steps of a path.
    """

    sde: StochasticEquation
    method: str
    grid: Grid
    book: Book
    seed: int
    antithetic: bool
    compiled: bool
    times: tuple[float, ...]
    ratio: float | None = None
    observables: Mapping[str, Observable] | None = None
    control: StepControl | None = None
    max_steps: int = MAX_STEPS

    @property
    def keeps_grid(self) -> bool:
        """Whether grid points are kept from which a direction can be taken up again."""
        return isinstance(self.book, GrowthBook) and self.ratio is None and not self.observables

    def march(self, paths: Tensor, like: Tensor) -> March:
        """The march of the paths with these indices (n,), in the dtype of a tensor."""

        def brownian(some: Tensor) -> BrownianPath:
            return BrownianPath(
                self.seed,
                self.sde.n_noise,
                some,
                cell=self.grid.cell,
                start=self.grid.start,
                dtype=like.dtype,
                device=like.device,
                antithetic=self.antithetic,
                # Some of the paths are another number each time.
                compiled=self.compiled and some is paths,
            )

        sde = self.sde.prepare(compiled=self.compiled)
        if self.method in TORCHSDE:
            return TorchsdeMarch(sde, self.method, self.grid, self.book, brownian, paths)
        scheme = SCHEMES[self.method]
        if self.control is None:
            return March(sde, scheme, self.grid, self.book, brownian, paths)
        return AdaptiveMarch(sde, scheme, self.grid, self.book, brownian, paths, self.control)


@dataclass(frozen=True)
class Task:
    """One chunk of a run.

    Attributes:
        first: Index of its first path.
        start: States at the start, in the space of the equation asked for (D, n), paths last.
        checkpoint: File for the state on the way, or ``None``.
        fingerprint: What the file has to agree in with the run.
    """

    first: int
    start: Tensor
    checkpoint: Path | None = None
    fingerprint: Fingerprint | None = None

    @property
    def n_paths(self) -> int:
        """Number n of its paths."""
        return self.start.shape[1]

    def begin(self, plan: Plan) -> Tensor:
        """States at which the march begins: directions where only these are simulated."""
        start = self.start.contiguous()
        return start if plan.ratio is None else start / start.norm(dim=0)

    def log_elapsed(self, plan: Plan) -> Tensor | None:
        """Values of log E at which the direction is asked for, (K, n), or ``None``."""
        if plan.ratio is None:
            return None
        norms = self.start.norm(dim=0)
        elapsed = torch.tensor(plan.times, dtype=norms.dtype, device=norms.device) - plan.times[0]
        return log_time_at_zero_ratio(elapsed, plan.ratio)[:, None] - 4.0 * norms.log()

    def states(self, plan: Plan, x: Tensor, sums: Tensor) -> Tensor:
        """States of the equation asked for, from those that were simulated: (K, D, n)."""
        if plan.ratio is None:
            return x
        norms = self.start.norm(dim=0)
        elapsed = torch.tensor(plan.times, dtype=x.dtype, device=x.device) - plan.times[0]
        growth = sums[:, 0] - 4.0 * plan.ratio * elapsed[:, None]
        return x * (norms * torch.exp(0.25 * growth))[:, None]
