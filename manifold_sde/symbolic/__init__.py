"""Losses given by SymPy expressions: exact derivatives in torch, and proofs."""

from manifold_sde.symbolic.closed_form import ClosedForm
from manifold_sde.symbolic.expressed import expressed_loss
from manifold_sde.symbolic.loss import SymbolicLoss
from manifold_sde.symbolic.proofs import Proof

__all__ = ["ClosedForm", "Proof", "SymbolicLoss", "expressed_loss"]
