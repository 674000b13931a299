"""Figures 1 and 3 of the paper: what a decay of the learning rate gains, and when.

SGD with weight decay trains a scale-invariant network. From times along the run it goes on with a
small learning rate, to where gradient flow would lead, and the test accuracy there is compared.
Both figures come from the same runs.
"""

from manifold_sde.experiments.settings.training import Settings
from manifold_sde.experiments.training.analysis import (
    Mean,
    NormCurves,
    Summary,
    after_decay,
    norm_curves,
    sentences,
    summarise,
)
from manifold_sde.experiments.training.plots import (
    plot_accuracies,
    plot_decay_and_norm,
    plot_figure1,
    plot_figure3,
    plot_limit_accuracy,
    plot_norm,
)
from manifold_sde.experiments.training.simulation import TrainingRun, train

__all__ = [
    "Mean",
    "NormCurves",
    "Settings",
    "Summary",
    "TrainingRun",
    "after_decay",
    "norm_curves",
    "plot_accuracies",
    "plot_decay_and_norm",
    "plot_figure1",
    "plot_figure3",
    "plot_limit_accuracy",
    "plot_norm",
    "sentences",
    "summarise",
    "train",
]
