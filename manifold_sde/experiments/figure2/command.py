"""What ``manifold-sde figure 2`` does: run, compare, draw, say what was found and where it is."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from manifold_sde.compile import compiler_available
from manifold_sde.errors import CompilationWarning
from manifold_sde.experiments.figure2.comparison import (
    FALSE_ALARM,
    Comparison,
    compare,
    verdicts,
    write_table,
)
from manifold_sde.experiments.figure2.plots import plot_figure2
from manifold_sde.experiments.figure2.settings import DESIGNS, Settings
from manifold_sde.experiments.figure2.simulation import Figure2, simulate
from manifold_sde.experiments.figure2.workers import simulate_in_processes
from manifold_sde.experiments.files import discard, held_results, save_figure
from manifold_sde.experiments.printing import (
    GOING_ON,
    plain_table,
    print_findings,
    print_full_form,
)
from manifold_sde.experiments.processes import Screen


def make_figure2(
    settings: Settings,
    out: Path,
    console: Console,
    *,
    jobs: int = 2,
    restart: bool = False,
) -> list[Path]:
    """Run Figure 2, write its files, and print what was found.

    Args:
        settings: What to run.
        out: Folder to write to; made if it is not there.
        console: Where to print.
        jobs: 1 runs the designs one after the other in this process, more in two processes.
        restart: Whether to leave aside what an interrupted run left behind.

    Returns:
        The files written: PNG, PDF, data and table.

    Raises:
        ManifoldSDEError: If the runs fail.
    """
    if settings.compiled and not compiler_available():
        settings = settings.without_compiler()
    name = "figure2" if settings.step_limit is None else "figure2_quick"
    with held_results(out, name) as unfinished:
        if restart:
            discard(unfinished)
        _announce(settings, unfinished, console)
        if jobs == 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CompilationWarning)
                figure = simulate(settings, folder=unfinished, progress=console.is_terminal)
        else:
            with Screen(console, list(DESIGNS)) as screen:
                figure = simulate_in_processes(settings, unfinished, screen)
        if settings.compiled and not figure.settings.compiled:
            console.print(
                "The C++ compiler failed: the runs are uncompiled, and the quick form shorter."
            )
        console.print("Comparing and drawing ...")
        files = write(figure, out, name)
        discard(unfinished)
        _conclude(figure, files, console)
        return files


def write(figure: Figure2, out: Path, name: str) -> list[Path]:
    """Write the picture as PNG and PDF, the data, and the table of the comparison."""
    files = [out / f"{name}.{kind}" for kind in ("png", "pdf", "npz", "csv")]
    canvas = plot_figure2(figure)
    save_figure(canvas, files[0], dpi=150)
    save_figure(canvas, files[1])
    figure.save(files[2])
    write_table(compare(figure), files[3])
    return files


def _announce(settings: Settings, unfinished: Path, console: Console) -> None:
    form = "full" if settings.step_limit is None else "quick"
    console.print(
        f"[bold]Figure 2[/bold], {form} form: section 6.1, SGD on the normalised linear model"
    )
    lrs = ", ".join(f"{lr:g}" for lr in settings.lrs)
    console.print(
        f"D = {settings.dim}, N = {settings.n_samples}, noise {settings.noise_scale:g}, weight "
        f"decay {settings.weight_decay:g}, learning rates {lrs}; all runs start at x*, of norm 1 "
        "(the paper prints no start)."
    )
    if not settings.compiled:
        how = "no C++ compiler was found" if not compiler_available() else "not compiled"
        console.print(f"Uncompiled ({how}): a step takes some 50 times longer.")
    if unfinished.is_dir() and any(unfinished.iterdir()):
        console.print(GOING_ON)
    elif settings.compiled:
        console.print("The first progress is seen once the step is compiled, in some 20 seconds.")


def _conclude(figure: Figure2, files: Sequence[Path], console: Console) -> None:
    rows = compare(figure)
    print_findings(console, comparison_table(rows), verdicts(rows), files)
    settings = figure.settings
    if settings.step_limit is not None:
        what = (
            f"The quick form ends after {settings.step_limit:,} steps and compares "
            f"{settings.law_runs} runs."
        )
        print_full_form(console, what, "figure 2")


def comparison_table(rows: Sequence[Comparison]) -> Table:
    """The comparison as a table of 80 columns."""
    table = plain_table(
        "The angle of SGD against the exact law of the limit",
        "variance: of the unwrapped angle, divided by the limit's\n"
        "kurtosis: of the unwrapped angle, 3 in the limit\n"
        "> π: runs more than half a turn from the start, and as many in the limit\n"
        "p: Watson's test of the angle on the circle\n"
        f"differs: by variance or p, with a false alarm rate of {FALSE_ALARM:g} for the table",
    )
    table.add_column("inputs", no_wrap=True)
    for name in ("η", "T", "variance", "kurtosis", "> π", "limit", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("differs", no_wrap=True)
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1].design != row.design
        table.add_row(
            row.design,
            f"{row.lr:g}",
            f"{row.T:g}",
            f"{row.variance_ratio:.2f} ± {row.standard_error:.2f}",
            f"{row.kurtosis:.1f}",
            f"{row.beyond:.1%}",
            f"{row.limit_beyond:.1%}",
            f"{row.p_angle:.1g}" if row.p_angle < 0.01 else f"{row.p_angle:.2f}",
            "yes" if row.differs else "-",
            end_section=last,
        )
    return table
