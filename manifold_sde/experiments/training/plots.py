"""Figures 1 and 3 drawn.

Every ``plot_*`` draws in ``ax``, by default in new axes, and returns it; keyword arguments go to
the function of matplotlib that is named. Bands and bars are a standard error over runs wide on
either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from manifold_sde.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILION,
    axes_of,
    new_figure,
    plot_band,
)
from manifold_sde.experiments.experiment import Array
from manifold_sde.experiments.training.analysis import (
    Mean,
    after_decay,
    at_full_training_accuracy,
    norm_curves,
)
from manifold_sde.experiments.training.simulation import TrainingRun

_TRAIN, _TEST, _DECAYED, _NORM = ORANGE, BLUE, VERMILION, GREEN
_SIZE = (5.5, 4.0)


def plot_accuracies(run: TrainingRun, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Figure 1a: accuracies over epochs before a decay (``plot``), and how decays change them.

    Of the decays as many are drawn as do not overlap; Figure 1b has all of them.
    """
    ax = axes_of(ax, _SIZE)
    settings = run.settings
    records = np.array(settings.records)
    for values, color, label in (
        (run.train_accuracy, _TRAIN, "training, before decay"),
        (run.test_accuracy, _TEST, "test, before decay"),
    ):
        _curve(ax, records, values, **{"color": color, "label": label, **kwargs})
    shown = _apart(settings.decay_times, settings.decay_epochs)
    label = "test, after a decay"
    if len(shown) < len(settings.decay_times):
        label += f" ({len(shown)} of {len(settings.decay_times)})"
    for i in shown:
        after, time = Mean.of(run.branch_test[:, i]), settings.decay_times[i]
        epochs = time + np.array(settings.branch_records)
        ax.plot(epochs, after.value, "--", color=_DECAYED, linewidth=1.3, label=label)
        ax.plot(time, after.value[0], "o", color=_DECAYED, markersize=4)
        label = ""
    ax.set(xlabel="epoch", xlim=(0, settings.epochs + settings.decay_epochs))
    ax.set(ylabel="accuracy", ylim=(_least(run), 1.005))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.legend(loc="lower right", frameon=False, fontsize="small")
    ax.set_title(
        rf"SGD at $\eta={settings.lr:g}$, $\lambda={settings.weight_decay:g}$, "
        rf"decayed to {settings.decay_lr:g}",
        fontsize="medium",
    )
    return ax


def plot_decay_and_norm(run: TrainingRun, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Figure 1b: test accuracy after decay (``errorbar``), and the norm before it, by its time.

    The test accuracy is that at full training accuracy, where it is reached. Returns the axes of
    the accuracy; those of the norm share its epochs.
    """
    ax = axes_of(ax, _SIZE)
    settings = run.settings
    right = ax.twinx()
    _curve(right, np.arange(settings.epochs + 1), run.norm, color=_NORM)
    right.set_ylabel("norm of the weights before decay", color=_NORM)
    right.tick_params(axis="y", colors=_NORM)
    right.set_ylim(0, 1.25 * float(run.norm.mean(0).max()))
    _dots(ax, settings.decay_times, at_full_training_accuracy(run), **kwargs)
    ax.set_zorder(right.get_zorder() + 1)
    ax.patch.set_visible(False)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("epoch of the decay")
    ax.set_ylabel("test accuracy after decay", color=_DECAYED)
    ax.tick_params(axis="y", colors=_DECAYED)
    ax.set_title("at full training accuracy after the decay", fontsize="medium")
    return ax


def plot_limit_accuracy(run: TrainingRun, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Figure 3: test accuracy at the end of each branch (``errorbar``), for that of Phi(x)."""
    ax = axes_of(ax, _SIZE)
    settings = run.settings
    times = np.array(settings.decay_times)
    at = np.searchsorted(settings.records, times)
    label = rf"before decay, $x_t$ at $\eta={settings.lr:g}$"
    _curve(ax, times, run.test_accuracy[:, at], color=_TEST, label=label)
    label = rf"after {settings.decay_epochs} epochs at {settings.decay_lr:g}, for $\Phi(x_t)$"
    _dots(ax, times, after_decay(run), **{"label": label, "linestyle": "-", **kwargs})
    _show_log_epochs(run, ax)
    ax.set(xlabel="epoch of the decay", ylabel="test accuracy", ylim=(_least(run), None))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.legend(loc="lower right", frameon=False, fontsize="small")
    return ax


def plot_norm(run: TrainingRun, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """The norm before the decay (``plot``), beside equation (10)."""
    ax = axes_of(ax, _SIZE)
    epochs = np.arange(run.settings.epochs + 1)[1:]
    curves = norm_curves(run)
    options = {"color": _NORM, "label": "measured", **kwargs}
    _curve(ax, epochs, curves.measured[:, 1:], **options)
    for curve, style, label in (
        (curves.equation10, "--", "(10), trace: its mean over the second half"),
        (curves.varying, ":", "norm equation, trace measured along the run"),
    ):
        ax.plot(epochs, curve.mean(0)[1:], style, color="black", linewidth=1.2, label=label)
    _show_log_epochs(run, ax)
    means = np.stack([curves.measured.mean(0), curves.varying.mean(0)])
    low, high = float(means.min()), float(means.max())
    ax.set(xlabel="epoch of the decay", ylabel=r"$\Vert x\Vert$ before decay")
    ax.set_ylim(low - 0.6 * (high - low), high + 0.15 * (high - low))
    ax.legend(loc="lower left", frameon=False, fontsize="small")
    return ax


def _apart(times: Sequence[int], length: int) -> list[int]:
    """Numbers of those times whose intervals of a length do not overlap, from the last one on."""
    chosen: list[int] = []
    for i in reversed(range(len(times))):
        if not chosen or times[i] + length <= times[chosen[-1]]:
            chosen.append(i)
    return chosen[::-1]


def _show_log_epochs(run: TrainingRun, ax: Axes) -> None:
    """Show epochs on a logarithmic scale, with a mark at 1 / (lr wd)."""
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    settings = run.settings
    mixing = 1 / (settings.lr * settings.weight_decay * run.steps_per_epoch)
    ax.axvline(mixing, color=GREY, linewidth=0.8, zorder=0.5)
    left = mixing > 0.5 * settings.epochs  # of its line, where there is room
    style: dict[str, Any] = {"va": "top", "color": GREY, "fontsize": "small"}
    style["ha"] = "right" if left else "left"
    where: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    ax.annotate(r"$1/\eta\lambda$", (mixing, 1.0), xytext=(-3 if left else 3, -3), **where, **style)


def plot_figure1(run: TrainingRun, **kwargs: Any) -> Figure:
    """Figure 1: accuracies over epochs; test accuracy after decay, and norm."""
    canvas = new_figure((10.5, 4.2), kwargs)
    left, right = canvas.subplots(1, 2)
    plot_accuracies(run, left)
    plot_decay_and_norm(run, right)
    canvas.suptitle(_title(run), fontsize="large")
    return canvas


def plot_figure3(run: TrainingRun, **kwargs: Any) -> Figure:
    """Figure 3: test accuracy of Phi(x_t) over time, and the norm with equation (10)."""
    canvas = new_figure((7.5, 7.2), kwargs)
    above, below = canvas.subplots(2, 1, sharex=True)
    plot_limit_accuracy(run, above).set_xlabel("")
    plot_norm(run, below)
    canvas.suptitle(_title(run), fontsize="large")
    return canvas


def _title(run: TrainingRun) -> str:
    settings = run.settings
    data = "CIFAR-10" if settings.data == "cifar10" else f"{settings.n_train or 1000} digits"
    runs = f"mean and standard error of {settings.runs} runs" if settings.runs > 1 else "one run"
    return f"PreResNet-{settings.depth} of width {settings.width} on {data}, {runs}"


def _least(run: TrainingRun) -> float:
    """Lower end of the accuracies shown: the first epochs, near chance, are cut off."""
    settled = run.test_accuracy.mean(0)[len(run.settings.records) // 6 :]
    lowest = min(float(settled.min()), float(after_decay(run).mean(0).min()))
    return max(0.0, lowest - 0.05)


def _curve(ax: Axes, x: Any, values: Array, **options: Any) -> None:
    """Mean over runs, with a band of a standard error."""
    mean, style = Mean.of(values), {"linewidth": 1.3, **options}
    if len(values) > 1:
        plot_band(ax, x, mean.value, mean.standard_error, style, alpha=0.2)
    else:
        ax.plot(x, mean.value, **style)


def _dots(ax: Axes, times: Any, values: Array, **options: Any) -> None:
    """Mean over runs, with bars of a standard error."""
    mean = Mean.of(values)
    error = mean.standard_error if len(values) > 1 else None
    style = {"fmt": "o", "color": _DECAYED, "markersize": 4.5, "capsize": 2.5, "linewidth": 1.0}
    ax.errorbar(times, mean.value, error, **{**style, **options})
