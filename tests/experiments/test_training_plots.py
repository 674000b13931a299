"""Figures 1 and 3 drawn: every curve is there and right, and nothing is cut off."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from manifold_sde.errors import ArgumentError
from manifold_sde.experiments.training import (
    TrainingRun,
    after_decay,
    norm_curves,
    plot_accuracies,
    plot_decay_and_norm,
    plot_figure1,
    plot_figure3,
    plot_limit_accuracy,
    plot_norm,
)
from tests.experiments.test_training_analysis import drawn


@pytest.fixture(scope="module")
def run() -> TrainingRun:
    return drawn()


def labelled(ax: object) -> dict[str, np.ndarray]:
    return {
        str(line.get_label()): np.asarray(line.get_ydata(), dtype=float)
        for line in ax.lines  # type: ignore[attr-defined]
    }


@pytest.mark.paper("Figure 1")
def test_accuracies_are_those_of_the_runs(run: TrainingRun) -> None:
    ax = plot_accuracies(run, linewidth=2)
    lines = labelled(ax)
    assert lines["training, before decay"] == pytest.approx(run.train_accuracy.mean(0))
    assert lines["test, before decay"] == pytest.approx(run.test_accuracy.mean(0))
    # Decays whose continuations, of 60 epochs, would cross are left to the other panel.
    times, length = run.settings.decay_times, run.settings.decay_epochs
    starts = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
    assert starts[-1] == times[-1]
    assert all(b - a >= length for a, b in itertools.pairwise(starts))
    first = times.index(starts[0])
    label = f"test, after a decay ({len(starts)} of {len(times)})"
    assert lines[label] == pytest.approx(run.branch_test[:, first].mean(0))


@pytest.mark.paper("Figure 1")
def test_decay_and_norm_have_an_axis_each(run: TrainingRun) -> None:
    ax = plot_decay_and_norm(run)
    (other,) = [axes for axes in ax.figure.axes if axes is not ax]
    (line,) = other.lines
    assert line.get_ydata() == pytest.approx(run.norm.mean(0))
    dots = ax.containers[0].lines[0]
    assert dots.get_xdata() == pytest.approx(run.settings.decay_times)
    assert ax.containers[0].has_yerr


@pytest.mark.paper("Figure 3", "Equation (10)")
def test_limit_accuracy_and_norm(run: TrainingRun) -> None:
    ax = plot_limit_accuracy(run)
    dots = ax.containers[0].lines[0]
    assert dots.get_ydata() == pytest.approx(after_decay(run).mean(0))
    assert ax.get_xscale() == "log"
    lines = labelled(plot_norm(run))
    assert lines["measured"] == pytest.approx(run.norm.mean(0)[1:])
    equation = next(v for k, v in lines.items() if k.startswith("(10)"))
    assert equation == pytest.approx(norm_curves(run).equation10.mean(0)[1:])


def test_given_axes_are_used(run: TrainingRun) -> None:
    for plot in (plot_accuracies, plot_decay_and_norm, plot_limit_accuracy, plot_norm):
        ax = Canvas().subplots()
        assert plot(run, ax) is ax
        assert ax.get_ylabel()
        with pytest.raises(ArgumentError, match="ax is not"):
            plot(run, "axes")  # type: ignore[arg-type]


@pytest.mark.parametrize("runs", [1, 6])
@pytest.mark.parametrize("plot", [plot_figure1, plot_figure3])
def test_whole_figures_cut_nothing_off(plot: object, runs: int) -> None:
    canvas = plot(drawn(runs=runs))  # type: ignore[operator]
    agg = FigureCanvasAgg(canvas)
    agg.draw()
    width, height = canvas.bbox.size
    for ax in canvas.axes:
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts, canvas._suptitle):
            if text.get_text():
                box = text.get_window_extent(agg.get_renderer())
                assert box.x0 >= 0, text
                assert box.y0 >= 0, text
                assert box.x1 <= width, text
                assert box.y1 <= height, text
