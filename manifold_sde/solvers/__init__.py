"""How it is solved: SGD itself, the diffusions, and what comes out of a run."""

from manifold_sde.solvers.brownian import BrownianPath
from manifold_sde.solvers.direction import DirectionSolution
from manifold_sde.solvers.extrapolation import Extrapolation, extrapolate
from manifold_sde.solvers.finite_lr import FiniteLrError, finite_lr_error
from manifold_sde.solvers.multilevel_estimate import MultilevelEstimate, multilevel
from manifold_sde.solvers.prediction import predict_sgd
from manifold_sde.solvers.schemes import SCHEMES
from manifold_sde.solvers.sgd import run_sgd
from manifold_sde.solvers.solution import Solution
from manifold_sde.solvers.solver import solve

__all__ = [
    "SCHEMES",
    "BrownianPath",
    "DirectionSolution",
    "Extrapolation",
    "FiniteLrError",
    "MultilevelEstimate",
    "Solution",
    "extrapolate",
    "finite_lr_error",
    "multilevel",
    "predict_sgd",
    "run_sgd",
    "solve",
]


def __dir__() -> list[str]:
    return sorted(__all__)
