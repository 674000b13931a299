"""What ``manifold-sde figure 1`` and ``3`` do: train, draw, say what was found and where it is."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from manifold_sde.errors import ArgumentError
from manifold_sde.experiments.experiment import GOING_ON, Findings, held_results
from manifold_sde.experiments.run_folder import RESULTS, Run
from manifold_sde.experiments.settings.training import Settings
from manifold_sde.experiments.training.analysis import decay_table, rows, sentences
from manifold_sde.experiments.training.plots import plot_figure1, plot_figure3
from manifold_sde.experiments.training.simulation import TrainingRun, train

_DRAW = {1: plot_figure1, 3: plot_figure3}


def make_figure(
    number: int,
    settings: Settings,
    run: Run,
    console: Console,
    *,
    jobs: int = 2,
    restart: bool = False,
) -> list[Path]:
    """Make Figure 1 or 3, from the saved runs if they are there, and print what was found."""
    suffix = "_cifar10" * (settings.data == "cifar10") + "_quick" * (settings.form == "quick")
    name, stem = f"training{suffix}", f"figure{number}{suffix}"
    data = run.folder / f"{name}.npz"
    # The other figure may have trained, in a folder of its own.
    places = [data, *sorted(RESULTS.glob(f"figure*/{name}.npz"), reverse=True)]
    found_in = ((place, TrainingRun.saved(place, settings)) for place in places)
    place, trained = (
        (data, None)
        if restart
        else next((pair for pair in found_in if pair[1] is not None), (data, None))
    )
    if trained is None:
        require(settings)
        if not restart:
            run.require_free(name)
    with held_results(run, name, settings, restart=restart, stem=stem) as unfinished:
        form = "the paper's setting" if settings.data == "cifar10" else f"{settings.form} form"
        console.print(f"[bold]Figure {number}[/bold], {form}: section 6.2, decay of the rate")
        console.print(Text(_setting(settings)))
        if trained is None:
            keys = (settings.key(), settings.training_key())
            if any(any(unfinished.glob(f"*{key}*")) for key in keys):
                console.print(GOING_ON)
            show = console.is_terminal
            trained = train(settings, folder=unfinished, progress=show, jobs=jobs, console=console)
            trained.save(data)
        else:
            console.print("Both figures come from the same runs, which are there: drawn from")
            console.print(Text(f"{place} (--restart trains anew)."), soft_wrap=True)
        found = findings(number, trained)
        files = [*found.write(run.folder / stem), place]
    found.print(console, files)
    return files


def require(settings: Settings) -> None:
    """Refuse settings whose data, network or device are not there, before anything is made."""
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


def findings(number: int, run: TrainingRun) -> Findings:
    """What Figure 1 or 3 shows, in a picture, numbers and words."""
    table, words = rows(run), sentences(run)
    quick = run.settings.form == "quick"
    return Findings(
        figure=_DRAW[number](run),
        dpi=150,
        table=decay_table(run),
        sentences=words,
        csv={".csv": (list(table[0]), table)},
        text="\n\n".join([_setting(run.settings), *words]) + "\n",
        quick="The quick form has fewer and shorter runs." if quick else "",
        command=f"figure {number}",
    )


def _setting(settings: Settings) -> str:
    """What is trained, in words."""
    data = (
        f"{settings.n_train or 'all'} images of CIFAR-10"
        if settings.data == "cifar10"
        else f"{settings.n_train or 1000} of scikit-learn's digits"
    )
    runs = f"{settings.runs} runs" if settings.runs > 1 else "One run"
    pixels = "1 pixel" if settings.shift == 1 else f"{settings.shift} pixels"
    shift = f"shifted by up to {pixels}" if settings.shift else ""
    moved = " and ".join(filter(None, [shift, "mirrored" if settings.mirror else ""]))
    images = f"{data}, {moved} at random" if moved else data
    return (
        f"{runs} of SGD on a scale-invariant PreResNet-{settings.depth} of width "
        f"{settings.width} ({settings.norm} normalisation), {images}, batches of "
        f"{settings.batch_size}: {settings.epochs} epochs at learning rate {settings.lr:g} and "
        f"weight decay {settings.weight_decay:g}, decayed to {settings.decay_lr:g} for "
        f"{settings.decay_epochs} epochs from {len(settings.decay_times)} of them."
    )
