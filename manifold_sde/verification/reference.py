r"""A reference set: problems with the exact law of (13), against which any solver can be run.

Each entry has a loss, a noise and a start as formulas, and at three times T the exact mean and
standard deviation of functions of the state, and the exact density of a coordinate of the
direction. It can be written down with draws and their diagnostics, for solvers that know nothing of
this toolkit; the manner is that of posteriordb.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from manifold_sde.arguments import check_choice, check_count, check_point
from manifold_sde.errors import ArgumentError
from manifold_sde.number_arrays import check_number
from manifold_sde.problem import Problem
from manifold_sde.problems import (
    NormalizedLinear,
    great_circle,
    great_sphere,
    mixed_noise_circle,
    normalized_linear,
    varying_circle,
)
from manifold_sde.sdes import LimitingDiffusion
from manifold_sde.solvers import solve
from manifold_sde.solvers.archive import versions
from manifold_sde.verification.exact import CircleDiffusion, SphereLaw
from manifold_sde.verification.reference_laws import Law, LawOnCircle, LawOnSphere
from manifold_sde.writing import plain, replacing, write_text

Array = NDArray[np.float64]

#: Times T of (13) at which the laws are given.
TIMES = (0.5, 1.0, 3.0)
#: Paths of the draws, their groups of which R-hat is made, and the fewest that are compared.
DRAWS, _GROUPS, _FEWEST = 10_000, 4, 8
#: Rate at which a solver with the right law is refused.
FALSE_ALARM = 1e-4
#: Weak error of the solver that makes the draws: a tenth of their standard errors.
_ACCURACY = 5e-4
#: Points of the densities that are written, and nodes of the circle.
_POINTS, _NODES = 128, 81
#: Standard deviation that counts as none, relative to the mean.
_FIXED = 1e-9

_SPHERICAL = "sigma(x) = s/|x| (I - u u^T)"
_SDE = "(13): dY = (1/2 d^2Phi(Y)[Sigma(Y)] - 1/2 Y) dT + P(Y) sigma(Y) dW, in Ito's sense"


@dataclass(frozen=True)
class Row:
    """A function of the state at a time: what it is, and what a solver found.

    Attributes:
        time: The time T.
        name: The function.
        exact, found: Its exact mean, and that of the draws.
        error: Standard error of the draws, from the larger of the exact standard deviation and
            theirs.
        allowed: Largest difference that passes.
    """

    time: float
    name: str
    exact: float
    found: float
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the mean is what it has to be."""
        return abs(self.found - self.exact) <= self.allowed

    @property
    def z(self) -> float:
        """The difference in standard errors; infinite where a fixed number is another one."""
        difference = self.found - self.exact
        return difference / self.error if self.error else math.copysign(math.inf, difference)


@dataclass(frozen=True)
class Comparison:
    """What a solver makes of an entry.

    Attributes:
        name: The entry.
        rows: The means, function by function and time by time.
        p_values: P-values of the law of the coordinate, by time.
        least: P-value below which the law is refused.
        lost: Number of paths that are not finite at the last time.
        off_manifold: Largest norm of the gradient at the directions: 0 on the manifold.
    """

    name: str
    rows: tuple[Row, ...]
    p_values: Mapping[float, float]
    least: float
    lost: int
    off_manifold: float

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the solver."""
        laws = all(p >= self.least for p in self.p_values.values())
        return laws and not self.lost and all(row.passed for row in self.rows)

    @property
    def largest_z(self) -> float:
        """The largest deviation of a mean that is random, in standard errors."""
        return max(abs(row.z) for row in self.rows if row.error)

    def __str__(self) -> str:
        lines = [f"{self.name}: {'passed' if self.passed else 'NOT PASSED'}"]
        lines.append(f"{'T':>5}  {'mean of':<16}{'exact':>11}{'found':>11}{'s.e.':>10}")
        for row in self.rows:
            exact, found = (round(x, 6) + 0.0 for x in (row.exact, row.found))  # no -0
            numbers = f"{exact:>11.6f}{found:>11.6f}{row.error:>10.6f}"
            wrong = "" if row.passed else "  FAILS"
            lines.append(f"{row.time:>5g}  {row.name:<16}{numbers}{wrong}")
        for time, p in self.p_values.items():
            wrong = "" if p >= self.least else "  FAILS"
            lines.append(f"{time:>5g}  p-value of the law of the coordinate: {p:.3g}{wrong}")
        lines.append(f"Lost: {self.lost} paths. Off the manifold by {self.off_manifold:.2g}.")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Reference:
    """An entry of the reference set.

    Paths of (13) start at ``start``, of norm 1, at T = 0.

    Attributes:
        name: Its name.
        problem: The problem.
        formulas: Loss and noise, for who writes them anew.
        parameters: The numbers in them.

    Example:
        >>> from manifold_sde.verification import Reference
        >>> entry = Reference.of("varying_circle")
        >>> round(entry.moments(1.0)["cos(angle)"][0], 6)
        0.905926
        >>> entry.compare(entry.draws(200, seed=1)).passed
        True
    """

    name: str
    problem: Problem
    formulas: Mapping[str, str]
    parameters: Mapping[str, Any]

    @staticmethod
    def names() -> tuple[str, ...]:
        """The names of the set."""
        return tuple(_ENTRIES)

    @classmethod
    def of(cls, name: str) -> Reference:
        """An entry by its name.

        Raises:
            ArgumentError: If there is none of this name.
        """
        check_choice("name", name, tuple(_ENTRIES), 'Reference.of("varying_circle")')
        return cls(name, *_ENTRIES[name]())

    @property
    def start(self) -> Array:
        """The start (D,)."""
        return self.problem.minimizer.numpy()

    @cached_property
    def law(self) -> Law:
        """The exact law."""
        facts = self.problem.facts
        if facts is None or facts.circle is None:
            return LawOnSphere(SphereLaw.of(self.problem))
        if self.name == "mixed_noise_circle":
            # By differences of gradient flow, which knows none of the formulas of the drift.
            return LawOnCircle(self.problem, CircleDiffusion.of(self.problem, nodes=_NODES))
        return LawOnCircle(self.problem, CircleDiffusion.reversible(self.problem, nodes=_NODES))

    def moments(self, T: float) -> dict[str, tuple[float, float]]:
        """The exact mean and standard deviation of each function at a time of (13)."""
        return self.law.moments(T)

    def draws(self, n: int = DRAWS, seed: int = 0) -> Array:
        """Paths of (13) at the times of the set, by :func:`~manifold_sde.solvers.solve`.

        Args:
            n: Number of independent paths.
            seed: Their seed.

        Returns:
            States (K, n, D).

        Raises:
            ArgumentError: If there is no such number or seed.
        """
        count = check_count("n", n, "paths", f"n={DRAWS}")
        sde, accuracy = LimitingDiffusion(self.problem), _ACCURACY
        times = [0.0, *TIMES]
        start = self.problem.minimizer
        run = solve(sde, start, times, n_paths=count, seed=seed, accuracy=accuracy)
        found: Array = run.ys[1:].numpy()
        return found

    def compare(self, states: Any, *, bias: float = 1e-3) -> Comparison:
        """Hold the paths of a solver against the exact law.

        A solver with the right law is refused at a rate of 1e-4, whatever the number of paths.

        Args:
            states: States at the times ``reference.TIMES`` (K, n, D) of independent paths: an
                array, a tensor, or lists.
            bias: Error of a mean that is allowed beside the statistical one.

        Returns:
            What was found, of each function and of the law.

        Raises:
            ArgumentError: If these are not such states.
        """
        x = check_point(states, self.problem.dim, name="states", allow_nan=True, values=True)
        y = x.detach().cpu().double().numpy()
        allowed = check_number("bias", bias, "bias=1e-3, the weak error that is no fault")
        if y.ndim != 3 or y.shape[0] != len(TIMES) or y.shape[1] < _FEWEST:
            raise ArgumentError(
                "these are not states of the entry",
                received=f"shape {y.shape}",
                expected=f"({len(TIMES)}, n, {self.problem.dim}): the states at T = "
                f"{', '.join(f'{t:g}' for t in TIMES)} of n paths, at least {_FEWEST}",
                remedy="Reference.of(name).draws() has the shape",
            )
        alive = np.isfinite(y).all((0, 2))
        kept = y[:, alive]
        if kept.shape[1] < _FEWEST:
            raise ArgumentError(
                "hardly a path is finite",
                received=f"{kept.shape[1]} of {y.shape[1]}",
                expected="states of paths that were not lost",
                remedy="a smaller step of the solver",
            )
        tests = len(TIMES) * (len(self.law.functions()) + 1)
        factor = float(stats.norm.isf(0.5 * FALSE_ALARM / tests))
        rows, p_values = [], {}
        for T, states_then in zip(TIMES, kept, strict=True):
            values = self.law.values(states_then)
            for name, (mean, deviation) in self.moments(T).items():
                fixed = deviation <= _FIXED * max(abs(mean), 1.0)
                # Paths of a solver may differ where those of the exact law do not.
                spread = max(0.0 if fixed else deviation, float(values[name].std()))
                error, found = spread / math.sqrt(kept.shape[1]), float(values[name].mean())
                rows.append(Row(T, name, mean, found, error, allowed + factor * error))
            p_values[T] = self.law.p_value(T, states_then)
        unit = torch.from_numpy(kept / np.linalg.norm(kept, axis=2, keepdims=True))
        off = float(self.problem.gradient(unit).norm(dim=-1).max())
        lost = int((~alive).sum())
        return Comparison(self.name, tuple(rows), p_values, FALSE_ALARM / tests, lost, off)

    def _record(
        self, draws: Array, comparison: Comparison, seed: int, file: str, digest: str
    ) -> dict[str, Any]:
        """What is written of it, as JSON has it."""
        low, high = self.law.ends
        points = low + (high - low) * (np.arange(_POINTS) + 0.5) / _POINTS
        moments = [self.moments(T) for T in TIMES]
        return {
            "name": self.name,
            "equation": _SDE,
            "where": "u = x/|x|, indices from 0; Phi is the limit of gradient flow of L, P its "
            "derivative at the minimisers, Sigma = sigma sigma^T",
            **self.formulas,
            "parameters": self.parameters,
            "dim": self.problem.dim,
            "rank": self.problem.rank,
            "start": self.start.tolist(),
            "times": list(TIMES),
            "functions": {
                name: {
                    "is": text,
                    "mean": [float(m[name][0]) for m in moments],
                    "standard_deviation": [float(m[name][1]) for m in moments],
                }
                for name, text in self.law.functions().items()
            },
            "density": {
                "of": self.law.coordinate,
                "points": points.tolist(),
                "values": [self.law.density(T, points).tolist() for T in TIMES],
            },
            "draws": {
                "file": file,
                "array": "states, (times, paths, dim)",
                "sha256": digest,
                "paths": draws.shape[1],
                "seed": seed,
                "solver": f"manifold_sde.solvers.solve of (13), weak error {_ACCURACY:g}",
                "diagnostics": {
                    "passed": comparison.passed,
                    "effective_sample_size": draws.shape[1] - comparison.lost,
                    "r_hat": _r_hat(self.law, draws),
                    "largest_z": comparison.largest_z,
                    "p_values": list(comparison.p_values.values()),
                    "lost": comparison.lost,
                    "off_manifold": comparison.off_manifold,
                },
            },
            "versions": versions(),
        }

    def write(self, folder: Path, n: int = DRAWS, seed: int = 0) -> tuple[list[Path], Comparison]:
        """Write NAME.json and NAME.npz; and what the draws give against the exact law.

        Raises:
            WriteError: If they cannot be written.
        """
        draws = self.draws(n, seed)
        packed = io.BytesIO()
        np.savez_compressed(packed, states=draws, times=np.array(TIMES))
        data, paths = packed.getvalue(), [folder / f"{self.name}.npz", folder / f"{self.name}.json"]
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(paths[0]) as file:
            file.write(data)
        digest = hashlib.sha256(data).hexdigest()
        comparison = self.compare(draws)
        record = plain(self._record(draws, comparison, seed, paths[0].name, digest))
        write_text(paths[1], json.dumps(record, indent=1) + "\n")
        return paths, comparison


def _r_hat(law: Law, draws: Array) -> float:
    """The largest R-hat of a random function at the last time, over groups of paths."""
    parts: Sequence[Array] = np.array_split(draws[-1], _GROUPS)
    values = [law.values(part) for part in parts]
    found = []
    for name in values[0]:
        groups = np.array([v[name][: min(map(len, parts))] for v in values])
        within, between = groups.var(1, ddof=1).mean(), groups.mean(1).var(ddof=1)
        if within > _FIXED**2:
            found.append(math.sqrt((groups.shape[1] - 1) / groups.shape[1] + between / within))
    return max(found)


# The entries.

Entry = tuple[Problem, Mapping[str, str], Mapping[str, Any]]


def _circle_of(a: float, s: float, problem: Problem) -> Entry:
    formulas = {"loss": "L(x) = 1/2 ((1 + a u[0]) u[2])^2", "noise": _SPHERICAL}
    return problem, formulas, {"a": a, "s": s}


def _sphere() -> Entry:
    formulas = {"loss": "L(x) = 1/2 u[3]^2", "noise": _SPHERICAL}
    return great_sphere(4, 0.3), formulas, {"s": 0.3}


def _linear() -> Entry:
    problem: NormalizedLinear = normalized_linear(noise_scale=0.3, design="orthogonal")
    formulas = {"loss": "L(x) = 1/2 mean_i (z_i . u - t_i)^2", "noise": _SPHERICAL}
    numbers = {"s": 0.3, "z": problem.inputs.tolist(), "t": problem.targets.tolist()}
    return problem, formulas, numbers


def _mixed() -> Entry:
    formulas = {
        "loss": "L(x) = mean of the four L_i(x) = 1/2 ((1 + a u[0]) (u[2] - h))^2 + g_i(x), with "
        "g = b u[0], b (u[1] + u[0] u[2]), -b u[0], -b (u[1] + u[0] u[2])",
        "noise": "sampling: Sigma(x) = mean of (grad L_i - grad L) (grad L_i - grad L)^T",
    }
    return mixed_noise_circle(0.5, 0.3, 0.6), formulas, {"a": 0.5, "b": 0.3, "h": 0.6}


_ENTRIES: dict[str, Callable[[], Entry]] = {
    "great_circle": lambda: _circle_of(0.0, 0.3, great_circle(0.3)),
    "great_sphere": _sphere,
    "varying_circle": lambda: _circle_of(0.5, 0.3, varying_circle(0.5, 0.3)),
    "normalized_linear": _linear,
    "mixed_noise_circle": _mixed,
}
