"""What a problem is, measured: the answer of ``Problem.describe`` and ``manifold-sde info``."""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde.arguments import check_integer
from manifold_sde.errors import ManifoldSDEError, printable
from manifold_sde.geometry import Geometry
from manifold_sde.geometry.minimizers import find_minimizer, tries
from manifold_sde.geometry.tangent_noise import NO_PART, noise_along
from manifold_sde.problem import Problem

#: Violations up to here are rounding.
_ROUNDING = 1e-9
_WIDTH = 80


@dataclass(frozen=True)
class Description:
    """What a problem is: pairs of a name and what was found, in the order to be shown.

    Attributes:
        rows: The pairs.
    """

    rows: tuple[tuple[str, str], ...]

    def __getitem__(self, name: str) -> str:
        """What was found under a name."""
        return dict(self.rows)[name]

    def __contains__(self, name: object) -> bool:
        return name in dict(self.rows)

    def __repr__(self) -> str:
        width = 2 + max(len(name) for name, _ in self.rows)
        indent = " " * width
        lines = []
        for name, text in self.rows:
            lines += textwrap.wrap(
                text, _WIDTH, initial_indent=f"{name:<{width}}", subsequent_indent=indent
            )
        return printable("\n".join(lines))

    def _repr_html_(self) -> str:
        cells = "".join(
            f'<tr><th style="text-align:left">{html.escape(name)}</th>'
            f'<td style="text-align:left">{html.escape(text)}</td></tr>'
            for name, text in self.rows
        )
        return f"<table>{cells}</table>"


def describe(problem: Problem, seed: int = 0) -> Description:
    """What a problem is, measured.

    Args:
        problem: The problem.
        seed: Seed of the directions from which gradient flow looks for a minimiser, where the
            problem knows none.
    """
    seed = check_integer("seed", seed, 0, 2**63 - 1)
    samples = "one loss, no samples" if problem.n_samples is None else str(problem.n_samples)
    rows = [
        ("problem", f"{problem.name} ({type(problem).__name__})"),
        ("dimension D", str(problem.dim)),
        ("sample losses", samples),
        ("noise", repr(problem.noise)),
    ]
    violation = float(problem.scale_invariance_violation())
    invariant, found = True, _holds(violation)
    try:
        problem.require_scale_invariance()
    except ManifoldSDEError as error:
        invariant, found = False, f"FAILS: {error.received}"
    rows += [("scale invariance", found), *_noise(problem)]
    y, where = _minimizer(problem, seed)
    rows.append(("minimiser", where))
    if y is not None:
        rows += _geometry(problem, y, invariant)
    if problem.facts is not None:
        rows.append(("known of it", problem.facts.statement))
    return Description(tuple(rows))


Problem.describer = staticmethod(describe)


def _holds(violation: float) -> str:
    return f"holds, to {violation:.1e}" if violation else "holds exactly"


def _noise(problem: Problem) -> list[tuple[str, str]]:
    try:
        violations = problem.noise_violations()
    except ManifoldSDEError as error:
        return [("noise, measured", f"FAILS: {error.problem}: {error.received}")]
    names = {"degree": "σ(ax) = σ(x)/a", "radial": "σ(x)ᵀx = 0"}

    def found(value: float) -> str:
        return _holds(value) if value <= _ROUNDING else f"FAILS: relative violation {value:.3g}"

    rows = [(names[kind], found(value)) for kind, value in violations.items()]
    share = problem.noise.lasting_share(problem.pointwise)
    if share != 1.0:
        said = f"FAILS: {share:.2g} of the noise outlasts an epoch, and no equation takes it"
        rows.append(("independent steps", said))
    return rows


def _minimizer(problem: Problem, seed: int) -> tuple[Tensor | None, str]:
    try:
        y = find_minimizer(Geometry(problem), seed)
    except ManifoldSDEError as error:
        return None, f"{error.problem}: {error.received}"
    if problem.facts is not None:
        return y, "known"
    number = tries(problem.dim)
    return y, f"found by gradient flow, the lowest from {number} random directions"


def _geometry(problem: Problem, y: Tensor, invariant: bool) -> list[tuple[str, str]]:
    rows = [("loss there", f"{float(problem.loss(y)):.4g}")]
    rank = None
    try:
        geometry = Geometry(problem)
        rank = int(geometry.rank(y))
        gap = float(geometry.spectral_gap(y))
    except ManifoldSDEError as error:
        rows.append(("rank of H", f"FAILS: {error.problem}: {error.received}"))
    else:
        values = torch.linalg.eigvalsh(problem.hessian(y))[problem.dim - rank :]
        condition = f", condition number {float(values[-1] / values[0]):.4g}" if rank else ""
        rows += [
            ("rank M of H", f"{rank}{condition}"),
            ("spectral gap", f"factor {gap:.3g} to the eigenvalues that count as 0"),
        ]
        # Without scale invariance the minimisers are no cone, and have no slice of unit norm.
        name = "dim of Γ₁" if invariant else "dim of Γ"
        rows.append((name, str(problem.dim - rank - invariant)))
    trace = float(problem.noise_trace(y)) * float(y.norm()) ** 2
    empty = ": no noise, so no drift and no diffusion" if trace < _ROUNDING else ""
    rows.append(("tr Σ at norm 1", f"{trace:.4g}{empty}"))
    if invariant and rank is not None and not empty:
        share = float(noise_along(problem, y[None] / y.norm(), rank))
        problem.noise_along = share
        none = "none: no diffusion, but a deterministic flow or a standstill"
        rows.append(("noise along Γ", none if share <= NO_PART else f"{share:.3g} of tr Σ"))
    return rows
