"""The options of ``manifold-sde figure 1`` and ``figure 3``, which are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from manifold_sde.experiments.terminal import Out, one_thread, resumable

_SHOWN = "that of the form"

Full = Annotated[bool, typer.Option("--full", help="More and longer runs on the digits.")]
Data = Annotated[str, typer.Option(metavar="digits|cifar10", help="What is trained on.")]
DataDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of CIFAR-10; nothing is downloaded."),
]
Count = Annotated[
    int | None, typer.Option(min=1, metavar="N", show_default=_SHOWN, help="Number of runs.")
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the first run.")]
Lr = Annotated[
    float | None,
    typer.Option(metavar="ETA", show_default=_SHOWN, help="Learning rate before the decay."),
]
WeightDecay = Annotated[
    float | None, typer.Option(metavar="LAMBDA", show_default=_SHOWN, help="Weight decay of (1).")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, metavar="B", show_default=_SHOWN, help="Samples of a step.")
]
Epochs = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", show_default=_SHOWN, help="Epochs of a run."),
]
Decays = Annotated[
    int | None,
    typer.Option(min=2, metavar="N", show_default=_SHOWN, help="Number of epochs of decay."),
]
DecayLr = Annotated[
    float | None,
    typer.Option(metavar="ETA", show_default=_SHOWN, help="Learning rate after the decay."),
]
DecayEpochs = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", show_default=_SHOWN, help="Epochs after the decay."),
]
TrainImages = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", show_default=_SHOWN, help="Number of training images."),
]
TestImages = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", show_default="all others", help="Number of test images."),
]
Shift = Annotated[
    int | None,
    typer.Option(
        min=0, metavar="N", show_default=_SHOWN, help="Pixels that images are shifted by."
    ),
]
Depth = Annotated[
    int | None,
    typer.Option(metavar="N", show_default=_SHOWN, help="Layers of the PreResNet, 6n + 2."),
]
Width = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", show_default=_SHOWN, help="Channels of its first stage."),
]
Norm = Annotated[
    str | None,
    typer.Option(
        metavar="layer|group|batch", show_default=_SHOWN, help="Its normalisation layers."
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="Where torch computes: cpu, cuda.")]
Jobs = Annotated[int, typer.Option(min=1, metavar="N", help="Processes, of one thread each.")]
Restart = Annotated[
    bool, typer.Option("--restart", help="Train anew, whatever is saved or was stopped.")
]


def add_training_figures(figure: typer.Typer) -> None:
    """Add the commands for Figures 1 and 3 to a group."""

    def add(number: int, text: str) -> None:
        def command(
            full: Full = False,
            out: Out = Path("results"),
            data: Data = "digits",
            data_dir: DataDir = None,
            runs: Count = None,
            seed: Seed = 0,
            lr: Lr = None,
            weight_decay: WeightDecay = None,
            batch_size: BatchSize = None,
            epochs: Epochs = None,
            decays: Decays = None,
            decay_lr: DecayLr = None,
            decay_epochs: DecayEpochs = None,
            train_images: TrainImages = None,
            test_images: TestImages = None,
            shift: Shift = None,
            depth: Depth = None,
            width: Width = None,
            norm: Norm = None,
            device: Device = "cpu",
            jobs: Jobs = 2,
            restart: Restart = False,
        ) -> None:
            changes = {
                "runs": runs,
                "lr": lr,
                "weight_decay": weight_decay,
                "batch_size": batch_size,
                "epochs": epochs,
                "decays": decays,
                "decay_lr": decay_lr,
                "decay_epochs": decay_epochs,
                "n_train": train_images,
                "n_test": test_images,
                "shift": shift,
                "depth": depth,
                "width": width,
                "norm": norm,
            }
            chosen = {name: value for name, value in changes.items() if value is not None}
            chosen |= {"seed": seed, "device": device}
            with resumable():
                _make(number, full, out, data, data_dir, chosen, jobs, restart)

        command.__doc__ = text
        figure.command(str(number))(command)

    add(1, _FIGURE_1)
    add(3, _FIGURE_3)


def _make(
    number: int,
    full: bool,
    out: Path,
    data: str,
    data_dir: Path | None,
    changes: dict[str, Any],
    jobs: int,
    restart: bool,
) -> None:
    from manifold_sde.experiments.training.command import make_figure
    from manifold_sde.experiments.training.settings import Settings

    folder = None if data_dir is None else str(data_dir)
    if data == "cifar10":
        settings = Settings.published(folder, **changes)
    else:
        form = Settings if full else Settings.quick
        settings = form(data=data, data_dir=folder, **changes)
    one_thread()
    make_figure(number, settings, out, Console(), jobs=jobs, restart=restart)


_FIGURE_1 = """Figure 1: accuracies over epochs, and test accuracy after decay, beside the norm.

Section 6.2 in small: SGD with weight decay trains a scale-invariant PreResNet on scikit-learn's
digits. With --data cifar10 --data-dir DIR, the paper's own setting. Writes PNG, PDF, a table, the
data and a description. A run that was stopped goes on where it was; Figure 3 uses the same runs.
"""
_FIGURE_3 = """Figure 3: test accuracy of Φ(x_t) over the time of the decay, and the norm with (10).

The runs are those of Figure 1, and are made if they are not there. After the decay, SGD at a small
learning rate stands for gradient flow, which leads to Φ(x_t). Writes PNG, PDF, a table, the data
and a description. A run that was stopped goes on where it was.
"""
