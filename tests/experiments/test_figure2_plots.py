"""The pictures: something is in every axes, labelled, and nothing is cut off."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from manifold_sde.errors import ArgumentError
from manifold_sde.experiments.figure2 import (
    Figure2,
    Settings,
    plot_angle_law,
    plot_boxes,
    plot_figure2,
    plot_variance_ratio,
)
from tests.experiments.test_figure2_comparison import drawn


@pytest.fixture(scope="module")
def figure() -> Figure2:
    return drawn(0)


@pytest.mark.paper("Figure 2")
def test_boxes_stand_where_learning_rate_times_steps_is(figure: Figure2) -> None:
    ax = plot_boxes(figure)
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert "60 a box" in ax.get_title()
    boxes = ax.child_axes
    assert len(boxes) == 36
    ax.figure.canvas.draw()
    to_data = ax.transData.inverted()
    for i, box in enumerate(boxes):
        x, y = to_data.transform(box.transAxes.transform((0.5, 0.5)))
        assert x == pytest.approx(figure.settings.column_products()[i % 12], abs=1e-6)
        assert y == pytest.approx(-2 - i // 12, abs=1e-6)
        drawn_here = box.collections
        assert len(drawn_here) == (1 if i < 28 else 0)
        if drawn_here:
            assert drawn_here[0].get_offsets().shape == (60, 2)
    assert any("not run in the quick form" in text.get_text() for text in ax.texts)


@pytest.mark.paper("Figure 2", "Equation (12)")
def test_dashed_curves_are_those_of_constant_time(figure: Figure2) -> None:
    ax = plot_boxes(figure)
    times = [0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 15.58]
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert len(dashed) == len(times)
    for line, T in zip(dashed, times, strict=True):
        product, level = (np.asarray(v, dtype=float) for v in line.get_data())
        lr = 10**level
        found = 0.5 * np.log(1 + np.expm1(4 * 0.05 * product) * lr / (2 * 0.05))
        assert np.allclose(found, T, atol=1e-9)
    labels = [text.get_text() for text in ax.texts]
    assert "15.58" in labels


@pytest.mark.parametrize("design", ["gaussian", "orthogonal"])
def test_angle_law_shows_sample_and_density(figure: Figure2, design: str) -> None:
    ax = plot_angle_law(figure, design, 1e-3, color="red")
    assert ax.get_xlabel() == "angle"
    assert "10^{-3}" in ax.get_title()
    area = sum(p.get_height() * p.get_width() for p in ax.patches)
    assert area == pytest.approx(1.0)
    (line,) = ax.lines
    x, y = (np.asarray(v, dtype=float) for v in line.get_data())
    assert np.trapezoid(y, x) == pytest.approx(1.0, abs=1e-6)
    assert "unwrapped variance" in ax.texts[0].get_text()
    assert ax.patches[0].get_facecolor()[:3] == (1.0, 0.0, 0.0)


def test_variance_ratio_has_a_curve_for_each_learning_rate(figure: Figure2) -> None:
    ax = plot_variance_ratio(figure, "orthogonal", linewidth=3)
    curves = [line for line in ax.lines if len(line.get_xdata()) == 20]
    assert len(curves) == 3
    assert {line.get_linewidth() for line in curves} == {3}
    assert len(ax.collections) == 3
    assert ax.get_xlabel()
    assert ax.get_ylabel()


def test_given_axes_are_used_and_kept(figure: Figure2) -> None:
    ax = Canvas().subplots()
    assert plot_boxes(figure, ax) is ax
    assert plot_angle_law(figure, "gaussian", 1e-2, Canvas().subplots()).lines
    with pytest.raises(ArgumentError, match="ax is not"):
        plot_boxes(figure, "axes")  # type: ignore[arg-type]


def test_whole_figure_has_every_part_and_cuts_nothing_off(figure: Figure2) -> None:
    canvas = plot_figure2(figure)
    agg = FigureCanvasAgg(canvas)
    agg.draw()
    renderer = agg.get_renderer()
    assert len(canvas.subfigs) == 3
    assert [len(part.axes) for part in canvas.subfigs] == [1, 4, 4]
    width, height = canvas.bbox.size
    assert len(canvas.subfigs[0].axes[0].child_axes) == 36
    for part in canvas.subfigs:
        for ax in part.axes:
            for text in (ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts):
                if not text.get_text():
                    continue
                box = text.get_window_extent(renderer)
                assert box.x0 >= 0, text
                assert box.y0 >= 0, text
                assert box.x1 <= width, text
                assert box.y1 <= height, text
    assert mpl.rcParams["figure.figsize"] == mpl.rcParamsDefault["figure.figsize"]


def test_what_was_not_run_is_said() -> None:
    figure = drawn(0)
    kept = tuple(run for run in figure.runs if run.plan.lr > 5e-4)
    partial = Figure2(figure.settings, kept, figure.laws, figure.conditions)
    ax = plot_angle_law(partial, "gaussian", 1e-4)
    assert "not run" in ax.texts[0].get_text()
    assert plot_figure2(partial).subfigs


@pytest.mark.parametrize("horizon", [1e-3, 1.0, 7.3, 1e6])
def test_one_learning_rate_and_other_times_are_drawn(horizon: float) -> None:
    figure = drawn(0)
    settings = Settings.quick(lrs=(1e-2,), horizon=horizon)
    only = Figure2(settings, (), figure.laws, figure.conditions)
    ax = plot_boxes(only)
    assert len(ax.child_axes) == 12
    assert 6 <= sum(line.get_linestyle() == "--" for line in ax.lines) <= 12
