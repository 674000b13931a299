"""How it is solved: SGD itself, and what comes out of a run."""

from manifold_sde.solvers.runner import run_sgd
from manifold_sde.solvers.solution import Solution

__all__ = ["Solution", "run_sgd"]
