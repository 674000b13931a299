"""The checks in more dimensions than matrices fit into: each by products, or undecided with why.

A check that is in none of the three lists below is one of the user's own, and is made as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from manifold_sde.verification.assumptions import by_products as assumed
from manifold_sde.verification.assumptions.scale_invariance import check_cone, check_noise
from manifold_sde.verification.assumptions.smoothness import check_smoothness
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.laws import by_products as laws
from manifold_sde.verification.result import Result
from manifold_sde.verification.subject import Subject

#: Checks that take no matrix of D x D, with fewer points at this size.
AS_THEY_ARE = frozenset(
    {
        "scale invariance",
        "analyticity",
        "scale invariance of the losses",
        "degrees of the derivatives",
        "Euler's theorem",
        "degrees of the noise",
        "noise orthogonal to the weights",
        "the attraction set is a cone and Phi 1-homogeneous",
        "Phi fixes the manifold and keeps the norm",
        "the derivative of Phi is the orthogonal projector",
        "the second derivative of Phi",
        "the norm in the drift of (8) and (13)",
        "Ito and Stratonovich forms of (13)",
        "SGD at the rates of (9) and of Remark 4.2",
        "SGD with weight decay as SGD without it",
    }
)
#: Checks that have a form of their own at this size.
FORMS: dict[str, Callable[[Subject, Effort], Any]] = {
    "cone of minimisers": assumed.sized(check_cone),
    "properties of the noise": assumed.sized(check_noise),
    "four derivatives": assumed.sized(check_smoothness),
    "constant rank of the Hessian": assumed.sized(assumed.check_rank),
    "local minimality": assumed.sized(assumed.check_minimality),
    "one scaling group": assumed.sized(assumed.check_groups),
    "compactness": assumed.sized(assumed.check_compactness),
    "diffusion along the manifold": assumed.sized(assumed.check_diffusion),
    "controllability": assumed.sized(assumed.check_controllability),
    "attraction set around the start": assumed.sized(assumed.check_attraction),
    "integrators of (7)": laws.lemma_3_1,
    "integrators of (15) to (17)": laws.lemma_4_3,
    "SGD at a fixed ratio tends to (8)": laws.FIXED_RATIO,
    "SGD in the time tau tends to (13)": laws.IN_GENERAL,
    "the SDE of SGD in the time tau tends to (13)": laws.SDE_IN_GENERAL,
    "SGD without weight decay comes later": laws.WITHOUT_DECAY,
    "SGD at two pairs of rates has one law": laws.TWO_RATES,
    "norm of SGD's weights": laws.NORM_LAW,
    "equilibrium norm of SGD's weights": laws.EQUILIBRIUM_NORM,
    "one equilibrium from every start": laws.one_equilibrium,
}
#: Checks that are not made at this size, and why.
_TO_EQUILIBRIUM = (
    "it takes hundreds of runs of the diffusion to its equilibrium, of which a step takes seconds "
    "at this size"
)
REASONS = {
    "connectedness": "it follows paths between the ends of independent starts, and a flow, or a "
    "step back to Gamma, takes seconds to minutes at this size",
    "Phi against SciPy's gradient flow": "SciPy's stiff integrators take matrices of D x D, and "
    "explicit steps are as many as H's condition number",
    "weight decay changes time and norm of (8)": "it takes hundreds of runs of (8), of which a "
    "step takes seconds at this size",
    "laws of the direction against the exact law": "no exact law is looked for at this size",
    "independence of the runs": _TO_EQUILIBRIUM,
    "chains that have mixed": _TO_EQUILIBRIUM,
    "time averages under the equilibrium": _TO_EQUILIBRIUM,
    "equilibrium and the volume of the Hessian": _TO_EQUILIBRIUM,
    "norm in equilibrium": _TO_EQUILIBRIUM,
    "SGD in equilibrium": _TO_EQUILIBRIUM,
    "equilibrium of several groups": _TO_EQUILIBRIUM,
}
#: What is left out of a check that is made, and is said in its row.
NOTES = {
    "the norm in the drift of (8) and (13)": "Of the Stratonovich form alone: Ito's cannot be had "
    "by products",
    "Ito and Stratonovich forms of (13)": "The Stratonovich form alone: Ito's cannot be had by "
    "products",
    "cone of minimisers": "At the start and the points of a short walk",
    "properties of the noise": "By products with fixed vectors",
    "degrees of the derivatives": "H along fixed vectors",
    "degrees of the noise": "Along fixed vectors",
    "the derivative of Phi is the orthogonal projector": "At the start, along the eigenvector "
    "of the smallest nonzero eigenvalue and a random vector",
    "the second derivative of Phi": "At the start, along fixed vectors",
}
#: What is said of them.
_SMALLER = (
    "Not looked at: it neither holds nor fails. A narrower network of the same kind, of at most "
    "1000 weights, can be asked."
)


def by_products(check: Check) -> Check:
    """A check as it is made where matrices of D x D do not fit."""
    if check.name in REASONS:
        undecided = check.not_made(REASONS[check.name], _SMALLER)
        return replace(check, run=lambda subject, effort: undecided)
    form = FORMS.get(check.name, check.run)
    note = NOTES.get(check.name, "")

    def run(subject: Subject, effort: Effort) -> list[Result]:
        seen = form(subject, effort)
        results = [seen] if isinstance(seen, Result) else list(seen or ())
        return [replace(r, detail=f"{r.detail.rstrip('.')}. {note}".rstrip(". ")) for r in results]

    return replace(check, run=run)
