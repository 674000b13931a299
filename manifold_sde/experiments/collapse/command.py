"""What ``manifold-sde collapse`` does: run, measure, draw, say what was found and where it is."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

from rich.console import Console

from manifold_sde.compile import compiler_available
from manifold_sde.errors import CompilationWarning
from manifold_sde.experiments.collapse.comparison import (
    collapse_table,
    distances,
    flat,
    measure,
    verdicts,
)
from manifold_sde.experiments.collapse.plots import plot_collapse
from manifold_sde.experiments.collapse.simulation import CollapseData, simulate
from manifold_sde.experiments.experiment import GOING_ON, Findings, held_results
from manifold_sde.experiments.run_folder import Run
from manifold_sde.experiments.settings.collapse import Settings


def make_collapse(
    settings: Settings, run: Run, console: Console, *, full: bool = False, restart: bool = False
) -> list[Path]:
    """Run SGD and the diffusion, write the files to a folder, and print what was found."""
    if not compiler_available():
        settings = dataclasses.replace(settings, compiled=False)
    name = "collapse" if full else "collapse_quick"

    def done(label: str, seconds: float) -> None:
        console.print(f"{label}: {seconds:.0f} s", highlight=False)

    with held_results(run, name, settings, restart=restart) as unfinished:
        _announce(settings, unfinished, console, full)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompilationWarning)
            data = simulate(settings, folder=unfinished, progress=console.is_terminal, done=done)
        console.print("Measuring and drawing ...")
        found = findings(data, full)
        files = found.write(run.folder / name, data)
    found.print(console, files)
    return files


def findings(data: CollapseData, full: bool = False) -> Findings:
    """What the curves show, in a picture, numbers and words."""
    settings, rows, apart = data.settings, measure(data), distances(data)
    sentences = verdicts(data, rows, apart)
    layers = "-".join(map(str, settings.widths))
    rates = "; ".join(f"{lr:g}, {decay:g}" for lr, decay in settings.rates)
    description = (
        f"SGD on a normalised network {layers} (D = {data.dim}), least squares on "
        f"{settings.n_samples} digits (rank of H {data.rank}), noise (18) of trace 1, from one "
        f"minimiser of norm 1, up to u = {settings.horizon:g}. Learning rate and weight decay: "
        f"{rates}. {settings.paths} runs of each, {settings.diffusion_paths} paths of the "
        f"diffusion at steps of {settings.dt:g} in u. SGD is brought onto the manifold by gradient "
        f"flow. Test accuracy on {settings.test_images} other digits."
    )
    quick = f"The quick form has {settings.paths} runs and ends at u = {settings.horizon:g}."
    tables = {".csv": flat(rows), "_diffusion.csv": flat(apart)}
    return Findings(
        figure=plot_collapse(data, rows),
        dpi=130,
        table=collapse_table(rows),
        sentences=sentences,
        csv={end: (list(table[0]), table) for end, table in tables.items()},
        text="\n".join([description, "", *sentences, ""]),
        quick="" if full else quick,
        command="collapse",
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
