"""Chunks of paths, and what is known of them at the end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifold_sde.solvers.fingerprint import Fingerprint
from manifold_sde.solvers.fixed import RestartState, SavedValues
from manifold_sde.solvers.moments import Moments

#: Paths of a chunk, all of them stepped together.
CHUNK = 4096


@dataclass(frozen=True)
class Chunk:
    """Paths that are stepped together.

    Attributes:
        paths: Indices of the paths (n,).
        start: States at the start, in the space of the given equation (D, n), paths last.
        checkpoint: File for the state on the way, or ``None``.
        fingerprint: What the file has to agree in with the run.
        restart: Where the paths are taken up again, instead of at the start; or ``None``.
        log_elapsed: Values of log E up to which they then go, (n,).
    """

    paths: Tensor
    start: Tensor
    checkpoint: Path | None = None
    fingerprint: Fingerprint | None = None
    restart: RestartState | None = None
    log_elapsed: Tensor | None = None


@dataclass
class ChunkResult:
    """What is known of paths at the K save times, NaN where there is nothing.

    Attributes:
        x: States (K, D, n).
        sums: Running integrals (K, k, n).
        time: The time of the equation that was simulated (K, n).
        restart: Where the last whole steps before ended, (K, ..., n); K = 0 where it is not kept.
        moments: Moments of the observables, by name.
        lost: Number of paths lost by these times (K,).
        steps: Number of accepted steps; of all paths, where each has its own.
        rejected: Number of rejected steps.
        merged: Number of paths of the chunks that are in it.
        flatness: How much flatter the manifold's surroundings are at a path than at most.
        uncompiled: Why kernels ran uncompiled that were to be compiled.
    """

    x: Tensor
    sums: Tensor
    time: Tensor
    restart: RestartState
    moments: dict[str, Moments] = field(default_factory=dict)
    lost: Tensor = field(default_factory=lambda: torch.zeros(0))
    steps: int = 0
    rejected: int = 0
    merged: int = 0
    flatness: float = 0.0
    uncompiled: frozenset[str] = frozenset()

    @classmethod
    def empty(cls, x: Tensor, sums: Tensor, times: int, restarts: int) -> ChunkResult:
        """Nothing yet, for states (D, n) and integrals (k, n) like these."""
        n = x.shape[1]
        numbers = torch.zeros(restarts, n, dtype=torch.int64, device=x.device)
        return cls(
            x.new_full((times, *x.shape), torch.nan),
            x.new_full((times, *sums.shape), torch.nan),
            torch.full((times, n), torch.nan, dtype=torch.float64, device=x.device),
            RestartState(
                x.new_full((restarts, *x.shape), torch.nan),
                x.new_full((restarts, *sums.shape), torch.nan),
                numbers,
                numbers.clone(),
            ),
        )

    def save(self, k: int, places: Tensor, values: SavedValues) -> None:
        """Write down what is known of some paths at save time k."""
        self.x[k, :, places] = values.x
        self.sums[k, :, places] = values.sums
        self.time[k, places] = values.time
        if len(self.restart.x):
            for name, value in values.restart.tensors().items():
                self.restart.tensors()[name][k, ..., places] = value

    def arrays(self) -> dict[str, Tensor]:
        """The tensors that belong to paths, by the names that files give them."""
        restart = {f"grid_{name}": value for name, value in self.restart.tensors().items()}
        return {"x": self.x, "sums": self.sums, "time": self.time, **restart}

    def with_arrays(self, arrays: dict[str, Tensor]) -> ChunkResult:
        """The same with other tensors, by these names."""
        known: dict[str, Any] = {name: arrays[name] for name in ("x", "sums", "time")}
        restart = RestartState(**{name: arrays[f"grid_{name}"] for name in self.restart.tensors()})
        return replace(self, **known, restart=restart)

    def without_paths(self) -> ChunkResult:
        """The moments alone."""
        return self.with_arrays({k: a[..., :0].clone() for k, a in self.arrays().items()})

    def merge(self, other: ChunkResult | None, n_paths: int) -> ChunkResult:
        """The result of this chunk and of those before it.

        Args:
            other: That of the chunks before, which is changed; ``None`` for the first chunk.
            n_paths: Number of paths whose tensors all chunks hold together.
        """
        parts = self.arrays()
        whole = other
        if whole is None:
            room = {name: v.new_empty(*v.shape[:-1], n_paths) for name, v in parts.items()}
            whole = replace(self.with_arrays(room), merged=0)
        else:
            whole.lost = whole.lost + self.lost
            whole.steps += self.steps
            whole.rejected += self.rejected
            whole.flatness = max(whole.flatness, self.flatness)
            whole.uncompiled |= self.uncompiled
            for name, moments in self.moments.items():
                whole.moments[name] = whole.moments[name].merge(moments)
        size = self.time.shape[-1]
        for name, value in whole.arrays().items():
            value[..., whole.merged : whole.merged + size] = parts[name]
        whole.merged += size
        return whole
