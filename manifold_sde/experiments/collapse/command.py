"""What ``manifold-sde collapse`` does: run, measure, draw, say what was found and where it is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from manifold_sde.errors import CompilationWarning
from manifold_sde.experiments.collapse.comparison import (
    AXIS_NAMES,
    DistanceRow,
    Row,
    distances,
    in_per_cent,
    measure,
    verdicts,
    write_tables,
)
from manifold_sde.experiments.collapse.network import FUNCTIONS
from manifold_sde.experiments.collapse.plots import plot_collapse
from manifold_sde.experiments.collapse.settings import Settings
from manifold_sde.experiments.collapse.simulation import AXES, CollapseData, simulate
from manifold_sde.experiments.files import discard, held_results, save_figure
from manifold_sde.experiments.printing import (
    GOING_ON,
    plain_table,
    print_findings,
    print_full_form,
)
from manifold_sde.writing import write_text


def make_collapse(
    settings: Settings,
    out: Path,
    console: Console,
    *,
    full: bool = False,
    restart: bool = False,
) -> list[Path]:
    """Run SGD and the diffusion, write the files, and print what was found.

    Args:
        settings: What to run.
        out: Folder to write to; made if it is not there.
        console: Where to print.
        full: Whether this is the full form, which names the files.
        restart: Whether to leave aside what an interrupted run left behind.

    Returns:
        The files written: PNG, PDF, data, two tables and a description.

    Raises:
        ManifoldSDEError: If the runs fail.
    """
    settings = settings.where_possible()
    name = "collapse" if full else "collapse_quick"

    def done(label: str, seconds: float) -> None:
        console.print(f"{label}: {seconds:.0f} s", highlight=False)

    with held_results(out, name) as unfinished:
        if restart:
            discard(unfinished)
        _announce(settings, unfinished, console, full)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompilationWarning)
            data = simulate(settings, folder=unfinished, progress=console.is_terminal, done=done)
        console.print("Measuring and drawing ...")
        rows, apart = measure(data), distances(data)
        sentences = verdicts(data, rows, apart)
        files = write(data, rows, apart, sentences, out, name)
        discard(unfinished)
        _conclude(data, rows, sentences, files, console, full)
        return files


def write(
    data: CollapseData,
    rows: list[Row],
    apart: list[DistanceRow],
    sentences: Sequence[str],
    out: Path,
    name: str,
) -> list[Path]:
    """Write picture, data, tables and description."""
    files = [out / f"{name}.{kind}" for kind in ("png", "pdf", "npz", "csv")]
    files += [out / f"{name}_diffusion.csv", out / f"{name}.txt"]
    canvas = plot_collapse(data, rows)
    save_figure(canvas, files[0], dpi=130)
    save_figure(canvas, files[1])
    data.save(files[2])
    write_tables(rows, apart, (files[3], files[4]))
    text = [_description(data.settings, data.dim, data.rank), "", *sentences, ""]
    write_text(files[5], "\n".join(text))
    return files


def _description(settings: Settings, dim: int, rank: int) -> str:
    layers = "-".join(map(str, settings.widths))
    rates = "; ".join(f"{lr:g}, {decay:g}" for lr, decay in settings.rates)
    return (
        f"SGD on a normalised network {layers} (D = {dim}), least squares on "
        f"{settings.n_samples} digits (rank of H {rank}), noise (18) of trace 1, from one "
        f"minimiser of norm 1, up to u = {settings.horizon:g}. Learning rate and weight decay: "
        f"{rates}. {settings.paths} runs of each, {settings.diffusion_paths} paths of the "
        f"diffusion at steps of {settings.dt:g} in u. SGD is brought onto the manifold by gradient "
        f"flow. Test accuracy on {settings.test_images} other digits."
    )


def _announce(settings: Settings, unfinished: Path, console: Console, full: bool) -> None:
    form = "full" if full else "quick"
    console.print(f"[bold]Collapse[/bold], {form} form: which axis do the curves of SGD share?")
    layers = "-".join(map(str, settings.widths))
    console.print(
        f"A network {layers} on {settings.n_samples} digits, noise (18) of trace 1, from one "
        f"minimiser of norm 1 to u = {settings.horizon:g}; {settings.paths} runs each:",
        highlight=False,
    )
    for lr, decay in settings.rates:
        last = settings.steps(lr, decay)[-1]
        console.print(f"  η = {lr:<6g} λ = {decay:<7g} {last:>7,} steps", highlight=False)
    if not settings.compiled:
        console.print("Uncompiled: a step of SGD takes some 5 times longer.")
    if unfinished.is_dir() and any(unfinished.iterdir()):
        console.print(GOING_ON)


def _conclude(
    data: CollapseData,
    rows: Sequence[Row],
    sentences: Sequence[str],
    files: Sequence[Path],
    console: Console,
    full: bool,
) -> None:
    print_findings(console, collapse_table(rows), sentences, files)
    if not full:
        settings = data.settings
        what = f"The quick form has {settings.paths} runs and ends at u = {settings.horizon:g}."
        print_full_form(console, what, "collapse")


def collapse_table(rows: Sequence[Row]) -> Table:
    """The measure as a table of 80 columns."""
    table = plain_table(
        "Unexplained: per cent of the curves' variation that is between the curves",
        "0 is a collapse onto one curve; what chance adds is subtracted\n"
        "± standard error by bootstrap over paths\n"
        "smallest share: of the norm of the weights, that one of the layers has\n"
        "chance: p-value that all runs have one law on the axis u",
    )
    table.add_column("test function", no_wrap=True)
    for axis in AXES:
        table.add_column(AXIS_NAMES[axis], justify="right", no_wrap=True)
    table.add_column("chance", justify="right", no_wrap=True)
    for function, words in FUNCTIONS.items():
        found = {row.axis: row.result for row in rows if row.function == function}
        cells = []
        for axis in AXES:
            lost = math.isnan(found[axis].unexplained)
            cells.append("no signal" if lost else in_per_cent(found[axis]).replace(" ", ""))
        p = found["clock"].p_value
        shown = "-" if math.isnan(p) else f"{p:.2g}"
        table.add_row(words.removesuffix(" of a layer's norm"), *cells, shown)
    return table
