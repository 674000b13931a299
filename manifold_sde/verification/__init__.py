"""Is it true: checks of the assumptions and of the theory on a problem, and exact laws."""

from typing import TYPE_CHECKING, Any

from manifold_sde.verification import exact
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.pictures import plot_picture
from manifold_sde.verification.reference import Reference
from manifold_sde.verification.report import Report
from manifold_sde.verification.result import Design, Picture, Result, Series
from manifold_sde.verification.subject import Subject
from manifold_sde.verification.suite import check_assumptions, verify
from manifold_sde.verification.testing import VerificationTests

if TYPE_CHECKING:
    from manifold_sde.verification import strategies
    from manifold_sde.verification.level_set import MinimiserManifold

__all__ = [
    "Design",
    "Effort",
    "MinimiserManifold",
    "Picture",
    "Reference",
    "Report",
    "Result",
    "Series",
    "Subject",
    "VerificationTests",
    "check_assumptions",
    "exact",
    "plot_picture",
    "strategies",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Hypothesis and geomstats are optional dependencies, and slow to import.
    if name == "strategies":
        import importlib

        return importlib.import_module("manifold_sde.verification.strategies")
    if name == "MinimiserManifold":
        from manifold_sde.verification.level_set import MinimiserManifold

        return MinimiserManifold
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
