"""The command ``manifold-sde plan``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from manifold_sde.errors import ArgumentError, CheckpointError
from manifold_sde.experiments.run_folder import Run
from manifold_sde.experiments.settings.plan import Settings
from manifold_sde.training import Plan, TrainingSettings, plan
from manifold_sde.writing import replacing, write_text


def make_plan(settings: Settings, run: Run, console: Console) -> None:
    """Print a plan, and write plan.txt, plan.json and plan.png.

    Args:
        settings: What is planned.
        run: The run, whose folder gets the files.
        console: Where to print.

    Raises:
        ArgumentError, TimeScaleError: If it cannot be planned.
        CheckpointError: If the file of the relaxation time cannot be read.
        WriteError: If a file cannot be written.
    """
    run.require_free("plan")
    made = _planned(settings)
    text = str(made)
    if settings.budget is not None:
        text += "\n\n" + _within(made, settings.budget)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    write_text(run.folder / "plan.txt", text + "\n")
    write_text(run.folder / "plan.json", made.to_json() + "\n")
    figure = made.plot().figure
    assert isinstance(figure, Figure)
    with replacing(run.folder / "plan.png") as file:
        figure.savefig(file, format="png", dpi=150)
    run.note("plan", settings, finished=True)
    written = f"Written: {run.folder / 'plan.png'}, .json, .txt, .toml"
    console.print(f"\n{written}", highlight=False, soft_wrap=True)


def _planned(settings: Settings) -> Plan:
    lr, weight_decay, before = settings.lr, settings.weight_decay, None
    if lr is None or weight_decay is None:
        raise ArgumentError(
            "the planned run has no rates",
            received=f"--lr {lr}, --weight-decay {weight_decay}",
            expected="both",
            remedy="--lr 0.1 --weight-decay 5e-4",
        )
    if settings.before_lr is not None:
        decay = settings.before_weight_decay
        before = TrainingSettings(
            settings.before_lr,
            weight_decay if decay is None else decay,
            settings.before_batch_size or settings.batch_size,
            settings.momentum,
            settings.dampening,
            optimizer=settings.optimizer,
        )
    else:
        settings.require(
            settings.before_weight_decay is None and settings.before_batch_size is None,
            "the run before is only half said",
            received="--before-weight-decay or --before-batch-size without --before-lr",
            expected="the learning rate of the run at whose balance the norm starts",
            remedy="--before-lr 0.1, with the others where they differ",
        )
    return plan(
        _tau(settings),
        lr=lr,
        weight_decay=weight_decay,
        batch_size=settings.batch_size,
        momentum=settings.momentum,
        dampening=settings.dampening,
        schedule=settings.schedule,
        optimizer=settings.optimizer,
        relaxations=settings.relaxations,
        before=before,
        norm=settings.norm,
        noise=settings.noise,
        curvature=settings.curvature,
    )


def _tau(settings: Settings) -> tuple[float, float, float]:
    ends = (settings.tau_from, settings.tau, settings.tau_to)
    settings.require(
        (settings.tau is None) != (settings.relaxation is None)
        and (settings.relaxation is None or ends == (None, None, None)),
        "the relaxation time is not said once",
        received=", ".join(
            f"--{name.replace('_', '-')}"
            for name in ("tau", "tau_from", "tau_to", "relaxation")
            if getattr(settings, name) is not None
        )
        or "no relaxation time",
        expected="--tau, with or without its interval; or --relaxation",
        remedy="--tau 2.0 --tau-from 1.5 --tau-to 3.0",
    )
    if settings.relaxation is not None:
        return _saved(settings.relaxation)
    assert settings.tau is not None
    low = settings.tau if settings.tau_from is None else settings.tau_from
    high = settings.tau if settings.tau_to is None else settings.tau_to
    return low, settings.tau, high


def _saved(path: Path) -> tuple[float, float, float]:
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        low, high = data["interval"]
        middle, high = (
            math.inf if value is None else float(value) for value in (data["estimate"], high)
        )
        return float(low), middle, high
    except OSError as error:
        raise ArgumentError(
            "the file of the relaxation time cannot be read",
            received=f"{path}: {error.strerror}",
            expected="a file that Relaxation.to_json wrote",
            remedy="pathlib.Path(name).write_text(relaxation(records).to_json())",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "the file holds no relaxation time",
            received=f"{path}: {type(error).__name__}: {error}",
            expected="a file that Relaxation.to_json wrote",
            remedy="pathlib.Path(name).write_text(relaxation(records).to_json())",
        ) from error


def _within(made: Plan, budget: float) -> str:
    """Which rates do with a number of steps."""
    lines = [f"In {budget:,.0f} steps, all else equal:"]
    for name, inverse in (
        ("learning rate", made.lr_for),
        ("weight decay", made.weight_decay_for),
    ):
        try:
            low, middle, high = inverse(budget)
            told = f"{middle:.3g} ({low:.3g} to {high:.3g})"
            if math.isinf(made.tau[2]):
                told = f"unknown, at least {low:.3g}"
            lines.append(f"  {name} {told}")
        except ArgumentError:
            lines.append(f"  no {name} does it")
    return "\n".join(lines)
