"""Assumption 5.3: analyticity of the trace of the noise and of the manifold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from manifold_sde.noise import CustomNoise
from manifold_sde.verification.assumptions.verdict import assumption
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.result import Result
from manifold_sde.verification.subject import Subject

_NAME = "analyticity"
_STATEMENTS = ("Assumption 5.3",)
_result = partial(assumption, _STATEMENTS, _NAME)
_WHAT_IT_MEANS = (
    "Theorem 5.4 uses it where the trace of the noise varies on Gamma_1, and nothing else does. "
    "Compositions of analytic functions (exp, tanh, softplus, normalisation without eps) are "
    "analytic; ReLU and absolute values are not."
)


def check_analyticity(subject: Subject, effort: Effort) -> Sequence[Result]:
    """The sample losses are analytic, by SymPy where it sees their expressions."""
    problem = subject.problem
    proof = problem.analyticity
    if proof is None:
        detail = "the loss is a torch function, of which SymPy does not see the inside"
        return [_result("undecided", detail, meaning=_WHAT_IT_MEANS)]
    if not proof:
        return [_result("undecided", f"no proof: {proof.detail}", meaning=_WHAT_IT_MEANS)]
    if isinstance(problem.noise, CustomNoise):
        detail = "the losses are analytic, and so is Gamma; of sigma SymPy does not see the inside"
        return [_result("undecided", detail, meaning=_WHAT_IT_MEANS)]
    return [
        _result("holds", f"{proof.verdict} for each loss, by its {proof.method}: {proof.detail}")
    ]


CHECKS = (Check(_NAME, "assumption", _STATEMENTS, check_analyticity),)
