"""The outcome of a run: one frozen object."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manifold_sde.arguments import real
from manifold_sde.errors import (
    ArgumentError,
    DTypeError,
    LimitMapError,
    LostPathsWarning,
    ShapeError,
)
from manifold_sde.geometry import Geometry
from manifold_sde.paper import implements
from manifold_sde.solvers import exports
from manifold_sde.solvers.archive import complete, read_archive, versions, write_archive
from manifold_sde.solvers.citations import cited
from manifold_sde.solvers.equilibrium import EquilibriumAverage, average
from manifold_sde.solvers.lost_paths import check_average, remedy_of
from manifold_sde.solvers.moments import Observable, moments_of

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

_KIND = "solution"
#: The classes of solutions that a file may hold, by name.
_KINDS: dict[str, type[Solution]] = {}
#: States whose limit map is computed together.
_AT_ONCE = 4096


@dataclass(frozen=True, repr=False)
class Solution:
    """States at the save times, with the clock and what happened on the way.

    Attributes:
        ts: Times (K,): steps of SGD, or the SDE's own time.
        ys: States (K, D) of one path, or (K, n, D) of n; n = 0 where observables were kept
            instead of paths.
        clock: The intrinsic clock u at these times, (K,) or (K, n); that of the groups, s, for
            :class:`~manifold_sde.GroupDirectionDiffusion`.
        stats: Counts of what happened: steps, failures, and how the run was made.
        config: What was run: seed, learning rates, problem; with the versions.
        observed: Mean and standard error (K, ...) of the observables, by name.
    """

    ts: Tensor
    ys: Tensor
    clock: Tensor
    stats: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    observed: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __init_subclass__(cls) -> None:
        """Let files hold the class."""
        super().__init_subclass__()
        _KINDS[cls.__name__] = cls

    def __post_init__(self) -> None:
        tensors = {"ts": self.ts, "ys": self.ys, "clock": self.clock}
        for name, value in tensors.items():
            if not isinstance(value, Tensor) or value.layout is not torch.strided:
                raise DTypeError(
                    f"{name} of a solution is not a dense tensor",
                    received=type(value).__name__,
                    expected="tensors: ts (K,), ys (K, D) or (K, n, D), clock (K,) or (K, n)",
                    remedy="torch.as_tensor(array)",
                )
        ts, ys, clock = tensors.values()
        fit = ts.dim() == 1 and ys.dim() in (2, 3) and len(ts) == len(ys) > 0
        if not fit or clock.shape != ys.shape[:-1]:
            raise ShapeError(
                "times, states and clock of a solution do not fit together",
                received=", ".join(f"{name} {tuple(v.shape)}" for name, v in tensors.items()),
                expected="ts (K,), ys (K, D) and clock (K,), or ys (K, n, D) and clock (K, n)",
                remedy="solve and run_sgd make solutions",
            )
        if any(v.is_complex() for v in tensors.values()) or not ys.is_floating_point():
            raise DTypeError(
                "a solution holds real numbers",
                received=", ".join(f"{name} {v.dtype}" for name, v in tensors.items()),
                expected="states in floating point, real times and clock",
                remedy="ys.double()",
            )

    def __repr__(self) -> str:
        return exports.text_of(self)

    def _repr_html_(self) -> str:
        return exports.table_html(exports.headline(self), exports.rows_of(self))

    @property
    def norms(self) -> Tensor:
        """Norms of the states: (K,) or (K, n)."""
        return self.ys.norm(dim=-1)

    @property
    def directions(self) -> Tensor:
        """States divided by their norms: the shape of ``ys``."""
        return self.ys / self.ys.norm(dim=-1, keepdim=True)

    def limit(self, geometry: Geometry) -> Solution:
        """The same paths with Phi of every state in place of the state.

        It is Phi of SGD's weights that the theorems speak of, and that
        :func:`~manifold_sde.solvers.predict_sgd` and ``at_steps`` predict: compare them with
        ``run_sgd(...).limit(Geometry(problem))``. States from which gradient flow does not arrive
        at the manifold are NaN, as lost paths are.

        Args:
            geometry: The geometry of the problem.

        Returns:
            Solution with the same times and clock, whose ``stats["lost_paths"]`` counts paths with
            a state that has no limit.

        Warns:
            LostPathsWarning: If there are such paths.

        Raises:
            LimitMapError: If no state has a limit.

        Example:
            >>> from manifold_sde import Geometry, problems
            >>> from manifold_sde.solvers import run_sgd
            >>> problem = problems.great_circle()
            >>> run = run_sgd(problem, problem.minimizer, 0.01, 0.05, [50], n_paths=4)
            >>> problem.loss(run.limit(Geometry(problem)).ys).max() < 1e-20
            tensor(True)

        Source: Theorem 4.4.
        """
        self._require_paths()
        flat = self.ys.reshape(-1, self.ys.shape[-1])
        limits, why = torch.full_like(flat, torch.nan), ""
        for rows in torch.isfinite(flat).all(-1).nonzero()[:, 0].split(_AT_ONCE):
            try:
                limits[rows] = geometry.limit_map(flat[rows])
            except LimitMapError as error:
                if error.partial is None:
                    raise
                limits[rows] = error.partial
                why = why or error.received.split(", with ")[0]
        there, start = (
            torch.isfinite(x).all(-1) for x in (limits, flat[: len(flat) // len(self.ys)])
        )
        way = remedy_of(self.config)
        if float(self.ts[0]) == 0.0 and bool((start & ~there[: len(start)]).any()):
            way = "another start: gradient flow does not lead from this one to the manifold"
        if not bool(there.any()):
            raise LimitMapError(
                "no state has a limit of gradient flow",
                received=f"{len(flat)} states{why and f'; {why}'}",
                expected="states from which gradient flow leads to the manifold",
                remedy=way,
            )
        ys = limits.reshape(self.ys.shape)
        paths = ys.reshape(len(ys), -1, ys.shape[-1])
        lost = int((~torch.isfinite(paths).all(-1)).any(0).sum())
        if lost:
            warnings.warn(
                f"{lost} of {paths.shape[1]} paths have a state that is lost, or from which "
                f"gradient flow does not arrive at the manifold: it is NaN{why and f' ({why})'}. "
                f"Take {way}",
                LostPathsWarning,
                stacklevel=2,
            )
        return Solution(
            self.ts, ys, self.clock, {**self.stats, "lost_paths": lost}, self.config, {}
        )

    def expectation(
        self, function: Observable, *, until: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean of a function over the paths, with its standard error.

        Antithetic paths count by pairs, whose means are independent.

        Args:
            function: Function of states (n, D) that returns one value or tensor each, (n, ...). It
                is given a copy.
            until: Last time; by default that of the run. Paths that are lost
                later do not matter.

        Returns:
            Mean and standard error, (K, ...) each, at the K save times.

        Warns:
            LostPathsWarning: If one path in a hundred or fewer was lost, and is left out.

        Raises:
            ArgumentError: If there are fewer than two paths, or the function raises an error.
            ShapeError: If the function does not return a value for each state.
            LostPathsError: If more paths were lost; its ``partial`` is the result over the others.

        Example:
            >>> import torch
            >>> from manifold_sde.solvers import Solution
            >>> ys = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
            >>> solution = Solution(torch.tensor([0.0]), ys, torch.zeros(1, 2))
            >>> solution.expectation(lambda y: y[:, 0])
            (tensor([2.]), tensor([1.]))
        """
        self._require_paths()
        if self.ys.dim() < 3 or self.ys.shape[1] < 2:
            raise ArgumentError(
                "an expectation needs several paths",
                received=f"states of shape {tuple(self.ys.shape)}",
                expected="(K, n, D) with at least 2 paths",
                remedy="run with n_paths=...",
            )
        ys = self.ys if until is None else self.ys[: self._number_of_times(until)]
        pairs = bool(self.config.get("antithetic", False))
        moments = moments_of("the function", function, ys, antithetic=pairs)
        mean, error = (value.to(ys.dtype) for value in moments.result())
        lost = (~torch.isfinite(ys).all(-1)).sum(1)
        check_average(
            int(lost.max()),
            ys.shape[1],
            when=f" by {float(self.ts[int(lost.argmax())]):g}",
            partial=(mean, error),
            survivors="the error's attribute partial, or solution.ys, which is NaN for the lost; "
            "until=... asks for earlier times",
            remedy=remedy_of(self.config),
        )
        return mean, error

    def _number_of_times(self, until: float) -> int:
        """The number of kept times up to one."""
        count = int((self.ts <= real(until)).sum())
        if not count:
            raise ArgumentError(
                "until is not a time of the run",
                received=repr(until),
                expected=f"a number from {float(self.ts[0]):g} on, in the time of the solution",
                remedy="leave it out for all times",
            )
        return count

    @implements("Theorem 5.4")
    def equilibrium(self, function: Observable, burn_in: float | None = None) -> EquilibriumAverage:
        """Average of a function under the equilibrium pi, in time, that is in SGD steps.

        The states kept from the burn-in on count, over all paths. They are weighted by the norm's
        fourth power where they were kept in the clock u, which :class:`DirectionSolution` does;
        the equilibrium of the clock is another law. The standard error comes from the paths if
        they are 20 or more, otherwise from batches in time.

        What the paths still remember of their start is a bias beside it, bounded by how fast they
        forget (:mod:`manifold_sde.solvers.equilibrium`). Keep a dozen times or more, from the
        start to 16 relaxation times: the bias is then small, and ``interval()`` little wider than
        the standard error asks for.

        Args:
            function: Function of states (n, D) with a value for each, (n, ...). It is given a
                copy.
            burn_in: Time of the solution after which states count; by default half of the run.

        Returns:
            Mean, standard error, bound of the bias, interval and effective sample size.

        Warns:
            NotMixedWarning: If the bias may be larger than two standard errors.
            LostPathsWarning: If one path in a hundred or fewer was lost, and is left out.

        Raises:
            LostPathsError: If more paths were lost; its ``partial`` is the result over the others.
            ArgumentError: If there are too few states, or no equilibrium: without weight decay
                the norm grows for ever.

        Source: Theorem 5.4.
        """
        self._require_paths()
        if self.config.get("ratio") == 0.0:
            raise ArgumentError(
                "without weight decay the norm has no equilibrium",
                received="a solution at weight decay 0",
                expected="a positive ratio",
                remedy="the equilibrium of the direction is the same for every positive ratio",
            )
        return average(self, function, self._equilibrium_weights(burn_in), burn_in, self._extent)

    def _extent(self, function: Observable) -> tuple[Tensor, Tensor] | None:
        """Range of a function over the manifold, where it is known: not here."""
        return None

    def _equilibrium_weights(self, burn_in: float | None) -> Tensor | None:
        """What each kept state counts: equal weights here."""
        return None

    def _require_paths(self) -> None:
        if self.observed and self.ys.dim() == 3 and self.ys.shape[1] == 0:
            raise ArgumentError(
                "the paths were not kept",
                received=f"a run with the observables {', '.join(map(repr, self.observed))}",
                expected="a solution with its paths",
                remedy="solution.observed[name] is mean and standard error; for other functions "
                "solve again with observables={name: function}, or without observables",
            )

    # Pictures, whose module loads matplotlib.

    def plot(self, function: Observable | str, ax: Axes | None = None, **kwargs: Any) -> Axes:
        """Draw the mean of a function over the times, with a band of two standard errors.

        Args:
            function: Function of states (n, D) with a value or some values for each, or the name
                of an observable of the run.
            ax: Axes to draw in; by default new ones.
            **kwargs: Passed on to each of the curves.

        Returns:
            The axes; ``.figure.savefig("mean.png")`` writes them.

        Raises:
            ArgumentError, ShapeError, LostPathsError: As :meth:`expectation`.
        """
        from manifold_sde.solvers import solution_plots as plots

        if not isinstance(function, str):
            self._require_paths()
        return plots.plot_mean(self, function, ax, **kwargs)

    def plot_norm(self, ax: Axes | None = None, **kwargs: Any) -> Axes:
        """Draw the norm over the times: mean, two standard errors, and nine paths in ten."""
        from manifold_sde.solvers import solution_plots as plots

        self._require_paths()
        return plots.plot_norm(self, ax, **kwargs)

    def plot_directions(
        self, time: float | None = None, ax: Axes | None = None, **kwargs: Any
    ) -> Axes:
        """Draw the directions at a time: on their circle or sphere, or the plane of most spread.

        Args:
            time: The time, of which the nearest that was kept is drawn; by default the last.
            ax: Axes to draw in; by default new ones.
            **kwargs: Passed on to the points.
        """
        from manifold_sde.solvers import solution_plots as plots

        self._require_paths()
        return plots.plot_directions(self, time, ax, **kwargs)

    def plot_density(
        self,
        function: Observable | None = None,
        times: Sequence[float] | None = None,
        ax: Axes | None = None,
        **kwargs: Any,
    ) -> Axes:
        """Draw the density of a function over the paths, with two standard errors of each box.

        Args:
            function: Function of states (n, D) with a value for each; by default the angle where
                directions lie on a circle, and otherwise their first principal direction.
            times: Some of the times kept; by default three of them, spread over the run.
            ax: Axes to draw in; by default new ones.
            **kwargs: Passed on to each of the curves.
        """
        from manifold_sde.solvers import solution_plots as plots

        self._require_paths()
        return plots.plot_density(self, function, times, ax, **kwargs)

    # Files.

    def _arrays(self) -> dict[str, Tensor]:
        """The tensors that a file holds, by name."""
        return {"ts": self.ts, "ys": self.ys, "clock": self.clock}

    def _header(self) -> dict[str, Any]:
        """What a file holds beside them."""
        return {}

    def save(self, path: str | Path) -> None:
        """Write everything to one file, with the versions it was made with.

        Raises:
            WriteError: If it cannot be written; what stood there before is as it was.
        """
        arrays = dict(self._arrays())
        for number, (mean, error) in enumerate(self.observed.values()):
            arrays |= {f"observed_{number}_mean": mean, f"observed_{number}_error": error}
        header = {
            "class": type(self).__name__,
            "stats": dict(self.stats),
            "config": dict(self.config),
            "observed": list(self.observed),
            "versions": versions(),
            **self._header(),
        }
        write_archive(
            path,
            _KIND,
            header,
            {name: value.detach().cpu().numpy() for name, value in arrays.items()},
        )

    @classmethod
    def load(cls, path: str | Path) -> Solution:
        """Read what :meth:`save` wrote: a :class:`DirectionSolution` if it was one.

        Raises:
            CheckpointError: If the file is missing, corrupted, or holds something else.
        """
        header, arrays = read_archive(path, _KIND)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with complete(path, "ts, ys, clock, stats and config", "take an intact copy"):
            kind = _KINDS[header.get("class", "Solution")]
            observed = {
                name: (tensors[f"observed_{k}_mean"], tensors[f"observed_{k}_error"])
                for k, name in enumerate(header.get("observed", []))
            }
            common = {"stats": header["stats"], "config": header["config"], "observed": observed}
            return kind._restored(header, tensors, common)

    @classmethod
    def _restored(
        cls, header: dict[str, Any], tensors: dict[str, Tensor], common: dict[str, Any]
    ) -> Solution:
        """The solution from what its file holds."""
        return cls(tensors["ts"], tensors["ys"], tensors["clock"], **common)

    # Named dimensions.

    def to_xarray(self) -> xarray.Dataset:
        """The solution with named dimensions: time, path, component.

        Observables are ``mean_NAME`` and ``standard_error_NAME``; where they were kept in place of
        the paths there are no variables of these.

        Raises:
            MissingDependencyError: If xarray is not installed.
        """
        return exports.dataset(self, self._variables())

    def cite(self) -> str:
        """What to cite for these numbers: software, paper and the methods used, as BibTeX.

        Example:
            >>> from manifold_sde import problems
            >>> from manifold_sde.solvers import predict_sgd
            >>> problem = problems.great_circle()
            >>> law = predict_sgd(problem, problem.minimizer, 0.01, 0.05, [50], n_paths=2)
            >>> [line for line in law.cite().splitlines() if line.startswith("@")][:2]
            ['@software{manifold_sde,', '@inproceedings{LiWangYu2022,']
        """
        return cited(self.config)

    def to_inference_data(
        self, functions: Mapping[str, Observable] | None = None, *, burn_in: float | None = None
    ) -> xarray.DataTree:
        """The paths as chains and the times kept as draws, as ArviZ takes them.

        Of a :class:`DirectionSolution` the draws are even in the clock u: what chains then agree
        on is its equilibrium, and :meth:`equilibrium` weights it to that in time. Lost paths are
        left out.

        Args:
            functions: Functions of states (n, D) with a value (n, ...) for each, by name; by
                default the direction, and the norm where it varies.
            burn_in: First time that counts; by default all do.

        Returns:
            A tree whose group ``posterior`` has the dimensions chain and draw.

        Raises:
            MissingDependencyError: If xarray is not installed.
            ArgumentError: If the paths were not kept, or nothing is after the burn-in.
        """
        self._require_paths()
        return exports.inference_data(self, functions, burn_in)

    def _variables(self) -> dict[str, tuple[tuple[str, ...], Tensor]]:
        """The tensors with the names of their dimensions."""
        paths = ("path",) if self.ys.dim() == 3 else ()
        return {
            "state": (("time", *paths, "component"), self.ys),
            "norm": (("time", *paths), self.norms),
            "clock": (("time", *paths), self.clock),
        }


_KINDS["Solution"] = Solution
