"""The outcome of a run: one frozen object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde.errors import ArgumentError, CheckpointError, MissingDependencyError
from manifold_sde.solvers.archive import read_archive, versions, write_archive

if TYPE_CHECKING:
    import xarray

_KIND = "solution"


@dataclass(frozen=True)
class Solution:
    """States at the times asked for, with the clock and what happened on the way.

    Attributes:
        ts: Times (K,): steps of SGD, or the SDE's own time.
        ys: States (K, D) of one path, or (K, n, D) of n.
        clock: The intrinsic clock u at these times, (K,) or (K, n).
        stats: Counts of what happened: steps, failures, and how the run was made.
        config: What was run: seed, learning rates, problem; with the versions.
        observed: Mean and standard error (K, ...) of the observables asked for, by name.
    """

    ts: Tensor
    ys: Tensor
    clock: Tensor
    stats: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    observed: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __repr__(self) -> str:
        paths = "one path" if self.ys.dim() == 2 else f"{self.ys.shape[1]} paths"
        span = f"from {self.ts[0].item():g} to {self.ts[-1].item():g}"
        return (
            f"{type(self).__name__}({paths}, {len(self.ts)} times {span}, dim={self.ys.shape[-1]})"
        )

    @property
    def norms(self) -> Tensor:
        """Norms of the states: (K,) or (K, n)."""
        return self.ys.norm(dim=-1)

    @property
    def directions(self) -> Tensor:
        """States divided by their norms: the shape of ``ys``."""
        return self.ys / self.ys.norm(dim=-1, keepdim=True)

    def expectation(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Mean of a function over the paths, with its standard error.

        Args:
            function: Function of states (n, D) that returns one value or tensor each, (n, ...).

        Returns:
            Mean and standard error, (K, ...) each.

        Raises:
            ArgumentError: If there are fewer than two paths.

        Example:
            >>> import torch
            >>> from manifold_sde.solvers import Solution
            >>> ys = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
            >>> solution = Solution(torch.tensor([0.0]), ys, torch.zeros(1, 2))
            >>> solution.expectation(lambda y: y[:, 0])
            (tensor([2.]), tensor([1.]))
        """
        if self.ys.dim() < 3 or self.ys.shape[1] < 2:
            raise ArgumentError(
                "an expectation needs several paths",
                received=f"states of shape {tuple(self.ys.shape)}",
                expected="(K, n, D) with at least 2 paths",
                remedy="run with n_paths=...",
            )
        values = torch.stack([function(y) for y in self.ys])
        return values.mean(1), values.std(1) / values.shape[1] ** 0.5

    def save(self, path: str | Path) -> None:
        """Write everything to one file, with the versions it was made with."""
        arrays = {"ts": self.ts, "ys": self.ys, "clock": self.clock}
        write_archive(
            path,
            _KIND,
            {"stats": dict(self.stats), "config": dict(self.config), "versions": versions()},
            {name: value.detach().cpu().numpy() for name, value in arrays.items()},
        )

    @classmethod
    def load(cls, path: str | Path) -> Solution:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: If the file is missing, corrupted, or holds something else.
        """
        header, arrays = read_archive(path, _KIND)
        try:
            ts, ys, clock = (torch.from_numpy(arrays[name]) for name in ("ts", "ys", "clock"))
            return cls(ts, ys, clock, stats=header["stats"], config=header["config"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                "the solution's file is incomplete",
                received=f"{path} without {error}",
                expected="ts, ys, clock, stats and config",
                remedy="take an intact copy",
            ) from error

    def to_xarray(self) -> xarray.Dataset:
        """The solution with named dimensions: time, path, component.

        Raises:
            MissingDependencyError: If xarray is not installed.
        """
        try:
            import xarray
        except ImportError as error:
            raise MissingDependencyError(
                "to_xarray needs xarray",
                received="no module xarray",
                expected="xarray, an optional dependency",
                remedy='pip install "manifold_sde[io]"',
            ) from error
        paths = ("path",) if self.ys.dim() == 3 else ()
        plain = {k: v for k, v in {**self.config, **self.stats}.items() if _is_attribute(v)}
        return xarray.Dataset(
            {
                "state": (("time", *paths, "component"), self.ys.detach().cpu().numpy()),
                "norm": (("time", *paths), self.norms.detach().cpu().numpy()),
                "clock": (("time", *paths), self.clock.detach().cpu().numpy()),
            },
            coords={"time": self.ts.detach().cpu().numpy()},
            attrs=plain,
        )


def _is_attribute(value: object) -> bool:
    return isinstance(value, (str, int, float, np.number)) and not isinstance(value, bool)
