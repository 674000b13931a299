"""What a problem is, measured: the answer of ``manifold-sde info``."""

from __future__ import annotations

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from manifold_sde.errors import ManifoldSDEError, printable
from manifold_sde.geometry import Geometry
from manifold_sde.geometry.tangent_noise import NO_PART, noise_along
from manifold_sde.problem import Problem
from manifold_sde.verification import Subject

#: Violations up to here are rounding.
_ROUNDING = 1e-9


def describe_problem(problem: Problem, seed: int = 0) -> list[tuple[str, str]]:
    """What a problem is: pairs of a name and what was found, in the order to be shown.

    Where the problem knows no minimiser, gradient flow from random directions looks for one.
    """
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
    return rows


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
    subject = Subject(problem, Geometry(problem), seed=seed)
    try:
        y = subject.find_minimizer()
    except ManifoldSDEError as error:
        return None, f"{error.problem}: {error.received}"
    if problem.facts is not None:
        return y, "known"
    return y, f"found by gradient flow, the lowest from {subject.tries} random directions"


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


def description_table(rows: list[tuple[str, str]]) -> Table:
    """The rows as a table."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, Text(printable(value)))
    return table
