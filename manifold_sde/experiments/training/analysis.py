"""What the runs of Figures 1 and 3 show, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.table import Table
from scipy import stats

from manifold_sde.experiments.experiment import Array, plain_table
from manifold_sde.experiments.training.simulation import TrainingRun
from manifold_sde.paper import implements

#: How near to its late mean an accuracy, and a norm, count as being on their plateau.
_ACCURACY_NEAR, _NORM_NEAR = 0.01, 0.05
#: Number of runs above which a saturation is looked for.
_ENOUGH = 3
#: Accuracy at which training counts as full.
_FULL = 1.0 - 1e-9


@dataclass(frozen=True)
class Mean:
    """A mean over runs with its standard error; NaN for one run.

    Attributes:
        value, standard_error: The two, as arrays or numbers.
    """

    value: Array
    standard_error: Array

    @classmethod
    def of(cls, values: Array) -> Mean:
        """Mean over the first dimension."""
        count = len(values)
        spread = values.std(0, ddof=1) if count > 1 else np.full(values.shape[1:], np.nan)
        return cls(values.mean(0), spread / np.sqrt(count))


@dataclass(frozen=True)
class NormCurves:
    """|x| at the start of each epoch and at the end, each (R, epochs + 1).

    Attributes:
        measured: Of the runs.
        equation10: By (10), with the trace's mean over the second half.
        varying: By the norm equation, with the trace as measured along the run.
        whole: The same with the square of a batch's whole gradient in place of the trace.
    """

    measured: Array
    equation10: Array
    varying: Array
    whole: Array


@implements("Equation (10)")
def norm_curves(run: TrainingRun) -> NormCurves:
    """The norm of the weights, and what the norm equation makes of it.

    Where <x, g> = 0, a step of SGD has

        |x'|^2 = (1 - lr wd)^2 |x|^2 + lr^2 |g|^2,    E |g|^2 = tr Sigma + |grad L|^2,

    and (10) is this without |grad L|^2, for |x|^2 tr Sigma = V constant. Here V is measured along
    the run: at some epochs, the trace of the covariance of a batch's gradient over all batches of
    an epoch, at fixed weights. ``equation10`` takes the mean over the second half of the epochs,
    ``varying`` the values interpolated linearly.

    Args:
        run: The runs.

    Returns:
        The curves.

    Source: equation (10) and the one before it.
    """
    settings, steps = run.settings, run.steps_per_epoch
    epochs = np.arange(settings.epochs + 1)
    start = run.norm[:, :1]
    trace = late_trace(run)[:, None]
    middle = epochs[:-1] + 0.5
    measured = np.stack([np.interp(middle, settings.records, row) for row in run.trace])
    return NormCurves(
        run.norm,
        np.asarray(settings.scale.norm(epochs * steps, start, trace)),
        _integrated(run, start[:, 0], measured),
        _integrated(run, start[:, 0], run.square),
    )


def _integrated(run: TrainingRun, start: Array, traces: Array) -> Array:
    """The norm with a trace for each epoch, by (10) from epoch to epoch."""
    scale, norms = run.settings.scale, [start]
    for trace in traces.T:
        norms.append(np.asarray(scale.norm(run.steps_per_epoch, norms[-1], trace)))
    return np.stack(norms, 1)


def late_trace(run: TrainingRun) -> Array:
    """V of each run (R,): the mean of the trace over the second half of the epochs."""
    return _late(run, run.trace, 0.5)


def _late(run: TrainingRun, values: Array, part: float) -> Array:
    """Mean over time of what was recorded in the last part of the epochs."""
    records = np.array(run.settings.records)
    chosen = records >= (1 - part) * run.settings.epochs
    return np.asarray(values[:, chosen].mean(1))


def after_decay(run: TrainingRun) -> Array:
    """Test accuracy at the end of each branch (R, times)."""
    return run.branch_test[:, :, -1]


def at_full_training_accuracy(run: TrainingRun) -> Array:
    """Test accuracy after a decay where training is first seen to be full, else at the end."""
    full = run.branch_train >= _FULL
    index = np.where(full.any(-1), full.argmax(-1), full.shape[-1] - 1)
    return np.take_along_axis(run.branch_test, index[..., None], -1)[..., 0]


@dataclass(frozen=True)
class Summary:
    """What the runs show. Epochs are counted from the start; times of decay likewise.

    Attributes:
        mixing_epochs: 1 / (lr wd), in epochs.
        train_plateau: First recorded epoch at which training accuracy is within 0.01 of its mean
            over the last quarter.
        norm_plateau: First epoch at which the norm is within 5 % of its mean there.
        first_decay: First time of decay on the plateau of training accuracy, and
            ``settled_decay`` on both.
        gain: Test accuracy after decays in the second half of training, less that after
            ``first_decay``: mean and standard error over runs, paired.
        gain_before: The same for the test accuracy before the decay.
        settled_gain: The gain since ``settled_decay``.
        better: Number of runs whose gain is positive.
        saturation: First time of decay from which on none of the later ones is better on average,
            as far as the runs can tell (paired t-test at 5 %); ``None`` if that is the last one.
        later_gain: What the decays later than ``saturation`` give over it; ``None`` with it.
        branches_full: Share of branches that reach full training accuracy.
        norm_ratio: Norm over the last quarter, divided by the equilibrium of (10).
        varying_error: Largest relative deviation of the norm from the norm equation with the trace
            along the run, and ``whole_error`` from that with the whole gradient.
        gradient_share: Part of the full gradient in |g|^2, in the second half.
        trace_range: Smallest and largest trace in the second half, divided by its mean.
    """

    mixing_epochs: float
    train_plateau: int
    norm_plateau: int
    first_decay: int
    settled_decay: int
    gain: Mean
    gain_before: Mean
    settled_gain: Mean
    better: int
    saturation: int | None
    later_gain: Mean | None
    branches_full: float
    norm_ratio: Mean
    varying_error: float
    whole_error: float
    gradient_share: float
    trace_range: tuple[float, float]


def summarise(run: TrainingRun) -> Summary:
    """What the runs show, in numbers."""
    settings = run.settings
    times = np.array(settings.decay_times)
    records = np.array(settings.records)
    train = run.train_accuracy.mean(0)
    near = train >= _late(run, run.train_accuracy, 0.25).mean() - _ACCURACY_NEAR
    train_plateau = int(records[near.argmax()])
    norm = run.norm.mean(0)
    late_norm = norm[round(0.75 * settings.epochs) :].mean()
    norm_plateau = int((np.abs(norm / late_norm - 1) <= _NORM_NEAR).argmax())
    first = int(np.argmax(times >= train_plateau))
    settled = int(np.argmax(times >= max(train_plateau, norm_plateau)))
    after = after_decay(run)
    before = run.test_accuracy[:, np.searchsorted(records, times)]
    late = times >= settings.epochs / 2

    def gain(values: Array, since: int) -> Array:
        return np.asarray(values[:, late].mean(1) - values[:, since])

    gains = gain(after, first)
    saturation, later_gain = _saturation(times, after)
    curves = norm_curves(run)
    trace, share = late_trace(run), run.mean_square / (run.mean_square + run.trace)
    equilibrium = (settings.lr * trace / (2 * settings.weight_decay)) ** 0.25
    relative = run.trace[:, records >= settings.epochs / 2].mean(0) / trace.mean()
    return Summary(
        mixing_epochs=1 / (settings.lr * settings.weight_decay * run.steps_per_epoch),
        train_plateau=train_plateau,
        norm_plateau=norm_plateau,
        first_decay=int(times[first]),
        settled_decay=int(times[settled]),
        gain=Mean.of(gains),
        gain_before=Mean.of(gain(before, first)),
        settled_gain=Mean.of(gain(after, settled)),
        better=int((gains > 0).sum()),
        saturation=saturation,
        later_gain=later_gain,
        branches_full=float((run.branch_train >= _FULL).any(-1).mean()),
        norm_ratio=Mean.of(run.norm[:, round(0.75 * settings.epochs) :].mean(1) / equilibrium),
        varying_error=_largest(curves.varying, curves.measured),
        whole_error=_largest(curves.whole, curves.measured),
        gradient_share=float(_late(run, share, 0.5).mean()),
        trace_range=(float(relative.min()), float(relative.max())),
    )


def _largest(curve: Array, measured: Array) -> float:
    return float(np.abs(curve.mean(0) / measured.mean(0) - 1).max())


def _saturation(times: Array, after: Array) -> tuple[int | None, Mean | None]:
    """See :class:`Summary`; with one or two runs there is no answer."""
    count = len(after)
    if count < _ENOUGH:
        return None, None
    quantile = float(stats.t.ppf(0.95, count - 1))
    for i, time in enumerate(times[:-1]):
        later = Mean.of(after[:, i + 1 :].mean(1) - after[:, i])
        if later.value <= quantile * later.standard_error:
            return int(time), later
    return None, None


def sentences(run: TrainingRun) -> list[str]:
    """What the runs show, in words with numbers."""
    found, settings = summarise(run), run.settings
    mixing = f"1/(ηλ) is {found.mixing_epochs:.3g} epochs"
    return [
        f"Before the decay, training accuracy is on its plateau from epoch {found.train_plateau} "
        f"on, the norm from epoch {found.norm_plateau} on (within 0.01 and 5 % of their means over "
        f"the last quarter). {mixing}.",
        _about_gain(found, settings.epochs, settings.runs),
        _about_saturation(found, settings.epochs, settings.runs),
        _about_norm(found),
        f"{found.branches_full:.0%} of the continuations reach full training accuracy within "
        f"{settings.decay_epochs} epochs at learning rate {settings.decay_lr:g}. That is how near "
        "they come to Φ(x).",
    ]


def _points(mean: Mean) -> str:
    error = "" if np.isnan(mean.standard_error) else f" ± {100 * mean.standard_error:.2f}"
    return f"{100 * mean.value:+.2f}{error} points"


def _about_gain(found: Summary, epochs: int, runs: int) -> str:
    if found.first_decay >= epochs / 2:
        return (
            "Training accuracy reaches its plateau in the second half of training only: whether "
            "longer training before the decay helps needs more epochs."
        )
    says = (
        f"a decay in the second half of training gives {_points(found.gain)} of test accuracy over "
        f"one at epoch {found.first_decay}, the first on the plateau of training accuracy (more in "
        f"{found.better} of {runs} runs). Without decay the difference is "
        f"{_points(found.gain_before)}. Over a decay at epoch {found.settled_decay}, the first on "
        f"the norm's plateau too, it gives {_points(found.settled_gain)}."
    )
    error = found.gain.standard_error
    if np.isnan(error):
        return f"One run cannot tell chance from effect: {says}"
    if found.gain.value > 2 * error:
        return f"As in the paper, longer training before the decay helps: {says}"
    if found.gain.value < -2 * error:
        return f"Unlike in the paper, longer training before the decay harms: {says}"
    return f"No effect like the paper's is seen, beyond two standard errors: {says}"


def _about_saturation(found: Summary, epochs: int, runs: int) -> str:
    if runs < _ENOUGH:
        return f"When test accuracy after the decay saturates needs at least {_ENOUGH} runs."
    if found.saturation is None or found.later_gain is None:
        return f"Test accuracy after the decay does not saturate within the {epochs} epochs."
    times = found.saturation / found.mixing_epochs
    return (
        f"Test accuracy after the decay saturates at epoch {found.saturation}, {times:.2g} × "
        f"1/(ηλ): later decays give {_points(found.later_gain)}, which a paired t-test at 5 % does "
        "not tell from none."
    )


def _about_norm(found: Summary) -> str:
    ratio = found.norm_ratio
    error = "" if np.isnan(ratio.standard_error) else f" ± {ratio.standard_error:.3f}"
    low, high = found.trace_range
    at = "at" if abs(ratio.value - 1) <= _NORM_NEAR else "not at"
    return (
        f"The norm is {at} the equilibrium of (10): over the last quarter it is "
        f"{ratio.value:.3f}{error} of it. In the second "
        f"half the trace of the noise varies from {low:.2f} to {high:.2f} of its mean; with the "
        f"trace along the run the norm equation is off by at most {found.varying_error:.1%}. Of "
        f"|g|² {found.gradient_share:.0%} is the full gradient, which (10) leaves out; with it the "
        f"error is at most {found.whole_error:.1%}."
    )


def rows(run: TrainingRun) -> list[dict[str, float]]:
    """The figures as a table: a row for each time of decay."""
    settings = run.settings
    at = np.searchsorted(settings.records, settings.decay_times)
    times = np.array(settings.decay_times)
    curves = norm_curves(run)
    columns = {
        "train_before": Mean.of(run.train_accuracy[:, at]),
        "test_before": Mean.of(run.test_accuracy[:, at]),
        "train_after": Mean.of(run.branch_train[:, :, -1]),
        "test_at_full": Mean.of(at_full_training_accuracy(run)),
        "test_after": Mean.of(after_decay(run)),
        "norm": Mean.of(run.norm[:, times]),
        "norm_equation10": Mean.of(curves.equation10[:, times]),
        "norm_varying_trace": Mean.of(curves.varying[:, times]),
        "trace": Mean.of(run.trace[:, at]),
    }
    table = []
    for i, epoch in enumerate(settings.decay_times):
        steps = epoch * run.steps_per_epoch
        time = settings.lr * settings.weight_decay * steps
        row: dict[str, float] = {"epoch": epoch, "steps": steps, "lr_wd_steps": time}
        for name, mean in columns.items():
            row[name] = float(mean.value[i])
            row[f"{name}_se"] = float(mean.standard_error[i])
        table.append(row)
    return table


def decay_table(run: TrainingRun) -> Table:
    """Accuracies in per cent and norms at the times of decay, as a table of 80 columns."""
    mixing = summarise(run).mixing_epochs
    table = plain_table(
        "Test accuracy and norm by the epoch of the decay",
        f"ηλk: steps k in units of 1/(ηλ), which are {mixing:.3g} epochs",
        "before, after: test accuracy around the decay, in per cent",
        "(10): the norm with the trace's mean over the second half",
    )
    for name in ("epoch", "ηλk", "train", "before", "after", "norm", "(10)"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows(run):
        cells = [f"{row['epoch']:.0f}", f"{row['lr_wd_steps']:.2f}"]
        for name in ("train_before", "test_before", "test_after"):
            error = row[f"{name}_se"]
            spread = "" if np.isnan(error) else f" ± {100 * error:.1f}"
            cells.append(f"{100 * row[name]:.1f}{spread}")
        table.add_row(*cells, f"{row['norm']:.2f}", f"{row['norm_equation10']:.2f}")
    return table
