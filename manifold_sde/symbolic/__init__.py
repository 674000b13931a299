"""Problems given by SymPy expressions: exact derivatives in torch, and proofs."""

from manifold_sde.symbolic.closed_form import ClosedForm
from manifold_sde.symbolic.pointwise import SymbolicPointwise
from manifold_sde.symbolic.problem import SymbolicProblem
from manifold_sde.symbolic.proofs import Proof

__all__ = ["ClosedForm", "Proof", "SymbolicPointwise", "SymbolicProblem"]
