"""Assumption 5.3: analyticity of the trace of the noise and of the manifold."""

from __future__ import annotations

from manifold_sde.noise import CustomNoise
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.result import Result, found
from manifold_sde.verification.subject import Subject

_NAME = "analyticity"
_STATEMENTS = ("Assumption 5.3",)
_WHAT_IT_MEANS = (
    "Theorem 5.4 uses it where the trace of the noise varies on Gamma_1, and nothing else does. "
    "Compositions of analytic functions (exp, tanh, softplus, normalisation without eps) are "
    "analytic; ReLU and absolute values are not."
)


def check_analyticity(subject: Subject, effort: Effort) -> Result:
    """The sample losses are analytic, by SymPy where it sees their expressions."""
    problem = subject.problem
    proof = problem.analyticity
    if proof is None:
        detail = "the loss is a torch function, of which SymPy does not see the inside"
        return found("undecided", detail, meaning=_WHAT_IT_MEANS)
    if not proof:
        return found("undecided", f"no proof: {proof.detail}", meaning=_WHAT_IT_MEANS)
    if isinstance(problem.noise, CustomNoise):
        detail = "the losses are analytic, and so is Gamma; of sigma SymPy does not see the inside"
        return found("undecided", detail, meaning=_WHAT_IT_MEANS)
    return found("holds", f"{proof.verdict} for each loss, by its {proof.method}: {proof.detail}")


CHECKS = (Check(_NAME, "assumption", _STATEMENTS, check_analyticity),)
