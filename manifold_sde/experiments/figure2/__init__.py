"""Figure 2 of the paper: SGD on the normalised linear model follows the time scale (12).

The boxes of the paper come from SGD itself, and below them stands what the paper does not have:
the law of the angle along the circle of minimisers beside the exact law of the limit, at the
paper's setting and at a well-conditioned one.
"""

from manifold_sde.experiments.figure2.comparison import Comparison, compare
from manifold_sde.experiments.figure2.plots import (
    plot_angle_law,
    plot_boxes,
    plot_figure2,
    plot_variance_ratio,
)
from manifold_sde.experiments.figure2.simulation import Figure2, Run, simulate
from manifold_sde.experiments.settings.figure2 import Settings

__all__ = [
    "Comparison",
    "Figure2",
    "Run",
    "Settings",
    "compare",
    "plot_angle_law",
    "plot_boxes",
    "plot_figure2",
    "plot_variance_ratio",
    "simulate",
]
