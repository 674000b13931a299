"""What ``manifold-sde collapse-optimizers`` does: run, measure, draw, say what was found."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table

from manifold_sde.drawing import COLORS, legend_below, new_figure
from manifold_sde.experiments.collapse.comparison import in_per_cent, measure_runs
from manifold_sde.experiments.collapse.curve_statistics import Collapse
from manifold_sde.experiments.collapse.labelled_digits import FUNCTIONS
from manifold_sde.experiments.collapse.optimizers import AXES, Curves, OptimizerData, simulate
from manifold_sde.experiments.experiment import GOING_ON, Findings, held_results, plain_table
from manifold_sde.experiments.run_folder import Run
from manifold_sde.experiments.settings.optimizers import CASES, OPTIMIZERS, SCHEDULES, Settings

#: The optimizers in words; the last is both together, which have one clock.
NAMES = {"sgd": "SGD", "momentum": "SGD + momentum", "adamw": "AdamW"}
BOTH = "sgd, momentum"
#: Batches in both orders of the samples, which the clock does not tell apart.
ORDERS = "independent, reshuffled"
_ALL = "all"
HEADS = dict(zip(AXES, ("k", "Ση", "Ση·λ", "clock", "power", "momentum"), strict=True))
_LABELS = {
    "steps": "steps $k$",
    "lr_steps": r"$\sum\eta$",
    "lr_decay_steps": r"$\lambda\sum\eta$",
    "clock": "clock",
}
_STYLES: dict[str, Literal["-", "--", ":"]] = {"constant": "-", "cosine": "--", "step": ":"}
_DRAWN = "cosine"


@dataclass(frozen=True)
class OptimizerRow:
    """One test function of several runs on one axis.

    Attributes:
        case, optimizer, schedules: Which runs.
        curves: How many pairs of rates and schedules.
        function, axis: Which.
        end: Where the common range of the axis ends.
        unexplained, standard_error, p_value: As in the measure of the collapse.
    """

    case: str
    optimizer: str
    schedules: str
    curves: int
    function: str
    axis: str
    end: float
    unexplained: float
    standard_error: float
    p_value: float

    @property
    def shown(self) -> str:
        """What is left, in per cent, with its standard error."""
        if math.isnan(self.unexplained):
            return "no signal"
        result = Collapse(self.unexplained, self.standard_error, self.p_value, math.nan, math.nan)
        return in_per_cent(result).replace(" ", "")


def measured(data: OptimizerData, **options: int) -> list[OptimizerRow]:
    """The measure of all test functions on all axes, of the runs that the theory says are alike.

    These are the runs of one optimizer, and those of SGD with and without momentum together; and
    where there are other cases, the runs of each case with a constant learning rate, and those of
    the two orders of the samples together. The options are those of the measure.
    """
    options = {"permutations": 199, **options}
    groups = []
    for case in data.settings.cases:
        if case == "independent":
            groups += [(case, optimizer, _ALL) for optimizer in (*OPTIMIZERS, BOTH)]
        if data.settings.cases != ("independent",):
            groups += [(case, optimizer, "constant") for optimizer in OPTIMIZERS]
        if case == "reshuffled" and "independent" in data.settings.cases:
            groups += [(ORDERS, optimizer, "constant") for optimizer in OPTIMIZERS]
    rows = []
    for case, optimizer, schedules in groups:
        chosen = selected(data, case, optimizer, schedules)
        for row in measure_runs(chosen, FUNCTIONS, AXES, **options):
            left = row.result
            rows.append(
                OptimizerRow(
                    *(case, optimizer, schedules, len(chosen), row.function, row.axis, row.end),
                    *(left.unexplained, left.standard_error, left.p_value),
                )
            )
    return rows


def selected(data: OptimizerData, case: str, optimizer: str, schedules: str) -> list[Curves]:
    """The runs of a case or two, and an optimizer or two, at one schedule or all."""
    return [
        one
        for one in data.curves
        if one.run.case in case.split(", ")
        and one.run.optimizer in optimizer.split(", ")
        and schedules in (_ALL, one.run.schedule)
    ]


def make_optimizers(
    settings: Settings, run: Run, console: Console, *, full: bool = False, restart: bool = False
) -> list[Path]:
    """Run the optimizers, write the files to a folder, and print what was found."""
    name = "collapse_optimizers" if full else "collapse_optimizers_quick"

    def done(case: str, seconds: float) -> None:
        console.print(f"{CASES[case]}: {seconds:.0f} s", highlight=False)

    with held_results(run, name, settings, restart=restart) as unfinished:
        console.print(
            f"[bold]Collapse of optimizers[/bold], {'full' if full else 'quick'} form: "
            "which axis do their curves share?"
        )
        if unfinished.is_dir() and any(unfinished.iterdir()):
            console.print(GOING_ON)
        data = simulate(settings, folder=unfinished, progress=console.is_terminal, done=done)
        console.print("Measuring and drawing ...")
        found = findings(data, full)
        files = found.write(run.folder / name, data)
    found.print(console, files)
    return files


def findings(data: OptimizerData, full: bool = False) -> Findings:
    """What the curves show, in a picture, numbers and words."""
    rows = measured(data)
    flat = [
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in vars(row).items()} for row in rows
    ]
    sentences = verdicts(rows)
    settings = data.settings
    description = (
        f"A normalised network of {settings.hidden} hidden units on {settings.n_images} digits "
        f"with {settings.n_labels} labels each, {settings.wrong:.0%} of them at random, in batches "
        f"of {settings.batch_size}; {settings.paths} runs of each optimizer at each pair of rates "
        f"and each schedule, to an angular clock of about {settings.horizon:g}."
    )
    return Findings(
        figure=plot_optimizers(data, rows),
        dpi=110,
        table=optimizer_table(rows),
        sentences=sentences,
        csv={".csv": (list(flat[0]), flat)},
        text="\n".join([description, "", *sentences, ""]),
        quick=""
        if full
        else "The quick form has constant learning rates and independent batches alone.",
        command="collapse-optimizers",
    )


def verdicts(rows: Sequence[OptimizerRow]) -> list[str]:
    """What is left of the cosine's variation on the clock, and on the best of the other axes."""
    sentences = []
    groups = dict.fromkeys((row.case, row.optimizer, row.schedules) for row in rows)
    for case, optimizer, schedules in groups:
        if case == "independent" and schedules != _ALL:
            continue
        found = {
            row.axis: row
            for row in rows
            if (row.case, row.optimizer, row.schedules, row.function)
            == (case, optimizer, schedules, _DRAWN)
        }
        left = found["clock"]
        rival = min(
            (found[axis] for axis in _LABELS if axis != "clock"),
            key=lambda row: math.inf if math.isnan(row.unexplained) else row.unexplained,
        )
        names = " and ".join(NAMES[name] for name in optimizer.split(", "))
        cases = " and ".join(CASES[name] for name in case.split(", "))
        sentences.append(
            f"{names}, {cases}: of the cosine's variation {left.shown} % is left on the "
            f"clock, {rival.shown} % on {HEADS[rival.axis]}."
        )
    return sentences


def optimizer_table(rows: Sequence[OptimizerRow]) -> Table:
    """The measure as a table of 80 columns: independent batches, all schedules together."""
    table = plain_table(
        "Per cent of the curves' variation that is left between them",
        "± standard error by bootstrap over paths",
        "power: the clock with the norm's power of the other kind of optimizer",
    )
    shown = [axis for axis in AXES if axis != "no_momentum"]
    table.add_column("", no_wrap=True)
    for axis in shown:
        table.add_column(HEADS[axis], justify="right", no_wrap=True)
    found = {
        (row.optimizer, row.function, row.axis): row
        for row in rows
        if (row.case, row.schedules) == ("independent", _ALL)
    }
    for optimizer in dict.fromkeys(key[0] for key in found):
        table.add_row(" and ".join(NAMES[name] for name in optimizer.split(", ")))
        for function, words in FUNCTIONS.items():
            cells = [found[optimizer, function, axis].shown for axis in shown]
            table.add_row(f"  {words}", *cells)
    return table


def plot_optimizers(
    data: OptimizerData, rows: Sequence[OptimizerRow] | None = None, **kwargs: Any
) -> Figure:
    """Draw the cosine with the start on four axes, and on the clock in all cases.

    ``rows`` is the measure, if it is known already.
    """
    found = {
        (row.case, row.optimizer, row.schedules, row.axis): row
        for row in (measured(data) if rows is None else rows)
        if row.function == _DRAWN
    }
    cases = [case for case in data.settings.cases if case != "independent"]
    first = "independent" in data.settings.cases
    canvas = new_figure((11.0, 6.0 * (first + bool(cases))), kwargs)
    parts = iter(canvas.subfigures(first + bool(cases), 1, squeeze=False).flat)
    if first:
        grid = next(parts).subplots(len(OPTIMIZERS), len(_LABELS), sharey="row", squeeze=False)
        for (optimizer, axis), ax in zip(
            itertools.product(OPTIMIZERS, _LABELS), grid.flat, strict=True
        ):
            runs = selected(data, "independent", optimizer, _ALL)
            _draw(ax, runs, axis, found["independent", optimizer, _ALL, axis])
            ax.set_xlabel(_LABELS[axis] if optimizer == OPTIMIZERS[-1] else "")
            ax.set_ylabel(NAMES[optimizer] if axis == AXES[0] else "")
    if cases:
        grid = next(parts).subplots(len(OPTIMIZERS), len(cases), squeeze=False)
        for (optimizer, case), ax in zip(
            itertools.product(OPTIMIZERS, cases), grid.flat, strict=True
        ):
            runs = selected(data, case, optimizer, "constant")
            _draw(ax, runs, "clock", found[case, optimizer, "constant", "clock"])
            if optimizer == OPTIMIZERS[0]:
                ax.set_title(f"{CASES[case]}\n{ax.get_title()}", fontsize="small")
            ax.set_xlabel("clock" if optimizer == OPTIMIZERS[-1] else "")
            ax.set_ylabel(NAMES[optimizer] if case == cases[0] else "")
    canvas.suptitle("Cosine of the weights with their start")
    handles = [
        Line2D([], [], color=color, label=f"rates, pair {number + 1}")
        for number, color in zip(range(data.settings.n_rates), COLORS, strict=False)
    ]
    handles += [
        Line2D([], [], color="0.3", linestyle=_STYLES[name], label=f"{name} learning rate")
        for name in SCHEDULES
        if name in data.settings.schedules
    ]
    legend_below(canvas, handles, 4)
    return canvas


def _draw(ax: Axes, runs: Sequence[Curves], axis: str, row: OptimizerRow) -> None:
    rates = list(dict.fromkeys((one.run.lr, one.run.weight_decay) for one in runs))
    for one in runs:
        where, values = one.positions(axis), one.values[_DRAWN]
        ax.plot(
            where.mean(1) if where.ndim == 2 else where,
            values.mean(1),
            color=COLORS[rates.index((one.run.lr, one.run.weight_decay)) % len(COLORS)],
            linestyle=_STYLES[one.run.schedule],
            linewidth=1.2,
        )
    left = row.shown
    ax.set_title(left if np.isnan(row.unexplained) else f"{left} % left", fontsize="small")
    ax.set_xlim(0.0, None)
