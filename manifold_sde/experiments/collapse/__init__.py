"""SGD of a network at several rates falls on one curve in the intrinsic clock, or does not.

What the paper could not draw: test functions of SGD's weights on four axes, steps k, lr k, lr times
weight decay times k, and the intrinsic clock u, with the diffusion simulated beside them, and a
measure of how far the curves are from one curve on each axis.
"""

from manifold_sde.experiments.collapse.comparison import distances, measure, verdicts
from manifold_sde.experiments.collapse.curve_statistics import (
    Collapse,
    Distance,
    collapse,
    distance,
)
from manifold_sde.experiments.collapse.plots import plot_collapse, plot_curves
from manifold_sde.experiments.collapse.simulation import CollapseData, Ensemble, simulate
from manifold_sde.experiments.settings.collapse import Settings

__all__ = [
    "Collapse",
    "CollapseData",
    "Distance",
    "Ensemble",
    "Settings",
    "collapse",
    "distance",
    "distances",
    "measure",
    "plot_collapse",
    "plot_curves",
    "simulate",
    "verdicts",
]
