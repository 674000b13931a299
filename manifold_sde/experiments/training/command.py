"""What ``manifold-sde figure 1`` and ``3`` do: train, draw, say what was found and where it is."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from manifold_sde.errors import ArgumentError
from manifold_sde.experiments.files import discard, held_results, save_figure
from manifold_sde.experiments.printing import (
    GOING_ON,
    plain_table,
    print_findings,
    print_full_form,
)
from manifold_sde.experiments.processes import Note, Screen, run_in_processes
from manifold_sde.experiments.training.analysis import rows, sentences, summarise, write_table
from manifold_sde.experiments.training.plots import plot_figure1, plot_figure3
from manifold_sde.experiments.training.record import TrainingRun
from manifold_sde.experiments.training.settings import Settings
from manifold_sde.experiments.training.simulation import train, train_group
from manifold_sde.writing import write_text

_DRAW = {1: plot_figure1, 3: plot_figure3}


def make_figure(
    number: int,
    settings: Settings,
    out: Path,
    console: Console,
    *,
    jobs: int = 2,
    restart: bool = False,
) -> list[Path]:
    """Make Figure 1 or 3, from the saved runs if they are there, and print what was found.

    Args:
        number: 1 or 3.
        settings: What to train.
        out: Folder to write to; made if it is not there.
        console: Where to print.
        jobs: Number of processes; 1 trains one group of runs after the other in this process.
        restart: Whether to leave aside saved runs, and what an interrupted training left behind.

    Returns:
        The files written: PNG, PDF, table and description; and the data of both figures.

    Raises:
        ManifoldSDEError: If the data are not there or the runs fail.
    """
    suffix = ("_cifar10" if settings.data == "cifar10" else "") + (
        "_quick" if settings.form == "quick" else ""
    )
    data = out / f"training{suffix}.npz"
    run = None if restart else TrainingRun.saved(data, settings)
    if run is None:
        require(settings)
    with held_results(out, f"training{suffix}") as unfinished:
        _announce(number, settings, console)
        if restart:
            discard(unfinished)
        if run is not None:
            console.print("Both figures come from the same runs, which are there: drawn from")
            console.print(Text(f"{data} (--restart trains anew)."), soft_wrap=True)
        else:
            run = _trained(settings, unfinished, console, jobs)
            run.save(data)
            discard(unfinished)
        files = [*write(number, run, out, f"figure{number}{suffix}"), data]
        _conclude(number, run, files, console)
        return files


def require(settings: Settings) -> None:
    """Check that data, network and device are there, before anything is made.

    Raises:
        MissingDependencyError, DataFileError, ArgumentError: If one is not.
    """
    settings.images()
    settings.network(settings.seed)
    try:
        torch.zeros(1, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(
            "torch cannot compute on this device",
            received=f"{settings.device!r}: {str(error).splitlines()[0][:80]}",
            expected="a device of this machine's torch",
            remedy="--device cpu, or a torch that is built for the device",
        ) from error


def _trained(settings: Settings, unfinished: Path, console: Console, jobs: int) -> TrainingRun:
    keys = (settings.key(), settings.training_key())
    if any(any(unfinished.glob(f"*{key}*")) for key in keys):
        console.print(GOING_ON)
    if jobs == 1 or len(settings.groups) == 1:
        return train(settings, folder=unfinished, progress=console.is_terminal)
    tasks = {
        f"runs {seeds[0]}-{seeds[-1]}": functools.partial(_task, settings, seeds, unfinished)
        for seeds in settings.groups
    }
    with Screen(console, list(tasks)) as screen:
        parts = run_in_processes(tasks, screen, jobs=jobs)
    return TrainingRun.joined(settings, list(parts.values()))


def _task(settings: Settings, seeds: list[int], folder: Path, note: Note) -> TrainingRun:
    def done(what: str, seconds: float) -> None:
        note(f"{what}, {seconds:.0f} s")

    return train_group(settings, seeds, folder, progress=True, done=done)


def write(number: int, run: TrainingRun, out: Path, name: str) -> list[Path]:
    """Write the picture as PNG and PDF, the table, and the description in words."""
    files = [out / f"{name}.{kind}" for kind in ("png", "pdf", "csv", "txt")]
    canvas = _DRAW[number](run)
    save_figure(canvas, files[0], dpi=150)
    save_figure(canvas, files[1])
    write_table(run, files[2])
    words = [_setting(run.settings), *sentences(run)]
    write_text(files[3], "\n\n".join(words) + "\n")
    return files


def _setting(settings: Settings) -> str:
    """What is trained, in words."""
    data = (
        f"{settings.n_train or 'all'} images of CIFAR-10"
        if settings.data == "cifar10"
        else f"{settings.n_train or 1000} of scikit-learn's digits"
    )
    runs = f"{settings.runs} runs" if settings.runs > 1 else "One run"
    shift = f"shifted by up to {_pixels(settings.shift)}" if settings.shift else ""
    moved = " and ".join(filter(None, [shift, "mirrored" if settings.mirror else ""]))
    images = f"{data}, {moved} at random" if moved else data
    return (
        f"{runs} of SGD on a scale-invariant PreResNet-{settings.depth} of width "
        f"{settings.width} ({settings.norm} normalisation), {images}, batches of "
        f"{settings.batch_size}: {settings.epochs} epochs at learning rate {settings.lr:g} and "
        f"weight decay {settings.weight_decay:g}, decayed to {settings.decay_lr:g} for "
        f"{settings.decay_epochs} epochs from {len(settings.decay_times)} of them."
    )


def _pixels(count: int) -> str:
    return "1 pixel" if count == 1 else f"{count} pixels"


def _announce(number: int, settings: Settings, console: Console) -> None:
    setting = "the paper's setting" if settings.data == "cifar10" else f"{settings.form} form"
    console.print(f"[bold]Figure {number}[/bold], {setting}: section 6.2, decay of the rate")
    console.print(Text(_setting(settings)))


def _conclude(number: int, run: TrainingRun, files: Sequence[Path], console: Console) -> None:
    print_findings(console, decay_table(run), sentences(run), files)
    if run.settings.form == "quick":
        print_full_form(console, "The quick form has fewer and shorter runs.", f"figure {number}")


def decay_table(run: TrainingRun) -> Table:
    """Accuracies in per cent and norms at the times of decay, as a table of 80 columns."""
    mixing = summarise(run).mixing_epochs
    table = plain_table(
        "Test accuracy and norm by the epoch of the decay",
        f"ηλk: steps k in units of 1/(ηλ), which are {mixing:.3g} epochs\n"
        "before, after: test accuracy around the decay, in per cent\n"
        "(10): the norm with the trace's mean over the second half",
    )
    for name in ("epoch", "ηλk", "train", "before", "after", "norm", "(10)"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows(run):

        def per_cent(name: str, row: dict[str, float] = row) -> str:
            error = row[f"{name}_se"]
            text = f"{100 * row[name]:.1f}"
            return text if error != error else f"{text} ± {100 * error:.1f}"

        table.add_row(
            f"{row['epoch']:.0f}",
            f"{row['lr_wd_steps']:.2f}",
            per_cent("train_before"),
            per_cent("test_before"),
            per_cent("test_after"),
            f"{row['norm']:.2f}",
            f"{row['norm_equation10']:.2f}",
        )
    return table
