"""The command line: ``manifold-sde``."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from manifold_sde import __version__
from manifold_sde.errors import ArgumentError, ManifoldSDEError
from manifold_sde.experiments.terminal import (
    FAILURE,
    INTERRUPTED,
    PARTIAL,
    USAGE,
    Compile,
    Out,
    Restart,
    errors,
    one_thread,
    print_in_any_encoding,
    resumable,
    stopping,
)
from manifold_sde.experiments.training_options import add_training_figures

_RESULTS = Path("results")

_Problem = Annotated[
    str, typer.Argument(metavar="FILE.py:NAME", help="The problem, or a function making it.")
]


class _Commands(TyperGroup):
    """A group whose commands report the toolkit's errors as a short message."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with stopping("Stopped."):
                return super().invoke(ctx)
        except ManifoldSDEError as error:
            errors().print(Text("Error: ", style="bold red") + Text(str(error)), soft_wrap=True)
            code = USAGE if isinstance(error, ArgumentError) else FAILURE
            raise typer.Exit(code) from error


app = typer.Typer(
    cls=_Commands,
    name="manifold-sde",
    help="SGD with normalisation and weight decay as a diffusion on its manifold of minimisers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
figure = typer.Typer(
    help="Make a figure of the paper, from simulation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(figure, name="figure")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"manifold-sde {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@figure.command("2")
def figure2(
    full: Annotated[
        bool, typer.Option("--full", help="All steps of every learning rate, more runs compared.")
    ] = False,
    out: Out = _RESULTS,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of SGD's noise.")] = 0,
    runs: Annotated[int, typer.Option(min=1, metavar="N", help="Runs in a box.")] = 60,
    law_runs: Annotated[
        int | None,
        typer.Option(
            min=8,
            metavar="N",
            show_default="120; 480 if full",
            help="Runs that are compared with the limit's law; the boxes show the first of them.",
        ),
    ] = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(
            metavar="ETA",
            show_default="0.01, 0.001, 0.0001",
            help="Learning rate; give it once for each.",
        ),
    ] = None,
    until: Annotated[
        float, typer.Option(metavar="T", help="Time T that the smallest learning rate is to reach.")
    ] = 15.58,
    problem_seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            show_default="a typical one",
            help="Seed of the model's inputs and minimiser.",
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, max=2, metavar="N", help="Processes: one, or one for each design.")
    ] = 2,
    restart: Restart = False,
    compile: Compile = True,
) -> None:
    """Figure 2: SGD on the normalised linear model follows the paper's time scale.

    Section 6.1 as printed, and below it the law of the angle against the exact law of the limit,
    at the paper's setting and at a well-conditioned one. Writes PNG, PDF, the data and a table.
    A run that was stopped goes on where it was.
    """
    from manifold_sde.experiments.figure2.command import make_figure2
    from manifold_sde.experiments.figure2.settings import Settings

    changes: dict[str, Any] = {
        "seed": seed,
        "runs": runs,
        "horizon": until,
        "problem_seed": problem_seed,
        "compiled": compile,
    }
    if law_runs is not None:
        changes["law_runs"] = law_runs
    if lr:
        changes["lrs"] = tuple(lr)
    settings = Settings(**changes) if full else Settings.quick(**changes)
    one_thread()
    with resumable():
        make_figure2(settings, out, Console(), jobs=jobs, restart=restart)


@app.command()
def collapse(
    full: Annotated[
        bool, typer.Option("--full", help="More runs and snapshots, twice the way.")
    ] = False,
    out: Out = _RESULTS,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the noise.")] = 0,
    network_seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of the network and of its digits.")
    ] = 0,
    rates: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ETA,LAMBDA",
            show_default="four",
            help="Learning rate and weight decay; give it once for each pair.",
        ),
    ] = None,
    paths: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            show_default="12; 40 if full",
            help="Runs at each pair, and paths of the diffusion.",
        ),
    ] = None,
    until: Annotated[
        float | None,
        typer.Option(metavar="U", show_default="0.25; 0.5 if full", help="Clock to reach."),
    ] = None,
    restart: Restart = False,
    compile: Compile = True,
) -> None:
    """Which axis collapses SGD's curves: steps, lr k, lr wd k, or the clock u.

    SGD on a network at several learning rates and weight decays, and the diffusion beside it.
    Writes a figure, the data, tables and a description. A run that was stopped goes on.
    """
    from manifold_sde.experiments.collapse.command import make_collapse
    from manifold_sde.experiments.collapse.settings import Settings, read_rates

    changes: dict[str, Any] = {"seed": seed, "network_seed": network_seed, "compiled": compile}
    if rates:
        changes["rates"] = read_rates(rates)
    if paths is not None:
        changes |= {"paths": paths, "diffusion_paths": paths}
    if until is not None:
        changes["horizon"] = until
    settings = Settings(**changes) if full else Settings.quick(**changes)
    one_thread()
    with resumable():
        make_collapse(settings, out, Console(), full=full, restart=restart)


@app.command()
def info(
    problem: _Problem,
    seed: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Seed of where a minimiser is sought."),
    ] = 0,
) -> None:
    """What a problem is: its size, its noise, its minimisers, and whether it is scale-invariant."""
    from manifold_sde.experiments.description import describe_problem, description_table
    from manifold_sde.experiments.loading import load_problem

    console = Console()
    console.print(description_table(describe_problem(load_problem(problem), seed)))


@app.command()
def simulate(
    problem: _Problem,
    lr: Annotated[
        float | None, typer.Option(metavar="ETA", help="Learning rate of SGD.", show_default=False)
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(metavar="LAMBDA", help="Its weight decay.", show_default=False)
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(metavar="K,K,...", help="Step counts of SGD.", show_default=False),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            metavar="C", help="Instead: (8) at this ratio; (13) is 0.5.", show_default=False
        ),
    ] = None,
    times: Annotated[
        str | None,
        typer.Option(metavar="T,T,...", help="Times of (8) or (13).", show_default=False),
    ] = None,
    x0: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights at step 0, .npy or .pt.",
            show_default="a minimiser, known or found",
        ),
    ] = None,
    norm: Annotated[
        float | None,
        typer.Option(metavar="R", help="Norm to scale them to.", show_default="their own"),
    ] = None,
    paths: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Paths.", show_default="1000")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="B", help="Samples of a step.", show_default="the noise's"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the paths.")] = 0,
    dt: Annotated[
        float | None,
        typer.Option(metavar="H", help="Step in T, or in t of (8).", show_default="chosen"),
    ] = None,
    rtol: Annotated[
        float | None,
        typer.Option(metavar="TOL", help="Tolerance of adaptive steps.", show_default="none"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes.", show_default="this one")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder from which a stopped run goes on."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The solution; the figure is beside it.",
            show_default="results/simulate_FILE_NAME.npz",
        ),
    ] = None,
    compare_sgd: Annotated[
        bool, typer.Option("--compare-sgd", help="Run SGD too, for the same steps and paths.")
    ] = False,
) -> None:
    """The law that the theory predicts for the weights of SGD, without running SGD.

    Prints norm, log pdet H and spread of the direction after each number of steps, and writes the
    paths and a figure.
    """
    from manifold_sde.experiments.simulate.command import Settings, simulate_law

    settings = Settings(
        target=problem,
        lr=lr,
        weight_decay=weight_decay,
        steps=steps,
        ratio=ratio,
        times=times,
        x0=x0,
        norm=norm,
        paths=paths,
        batch_size=batch_size,
        seed=seed,
        dt=dt,
        rtol=rtol,
        workers=workers,
        checkpoint=checkpoint,
        output=output,
        compare_sgd=compare_sgd,
    )
    one_thread()
    with contextlib.nullcontext() if checkpoint is None else resumable(""):
        simulate_law(settings, Console(), errors())


@app.command()
def verify(
    problem: _Problem,
    effort: Annotated[
        str, typer.Option(metavar="quick|thorough", help="About a minute, or several.")
    ] = "quick",
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Processor time for all checks; those that do not fit are undecided.",
            show_default="60; quick alone",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of all that is drawn.")] = 0,
    x0: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights where training starts, .npy or .pt.",
            show_default="a minimiser, known or found",
        ),
    ] = None,
    assumptions: Annotated[
        bool, typer.Option("--assumptions", help="The assumptions alone.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The page; the numbers are beside it as .json.",
            show_default="results/verify_FILE_NAME.html",
        ),
    ] = None,
) -> None:
    """Whether the theory holds for a problem: its assumptions, its statements, its laws.

    Prints a row for each check as it is made, and writes a page with the plots behind the
    verdicts. The exit status is 0 if nothing failed, 1 if something did, 3 if nothing did and the
    budget left out some checks, and 130 after Ctrl-C, which ends with the report of what is done.
    """
    from manifold_sde.experiments.verify import verify_problem

    one_thread()
    report = verify_problem(problem, effort, seed, budget, x0, assumptions, output)
    if report.partial == "interrupt":
        raise typer.Exit(INTERRUPTED)
    if not report.passed:
        raise typer.Exit(FAILURE)
    if report.partial:
        raise typer.Exit(PARTIAL)


add_training_figures(figure)


def main() -> None:
    """Entry point of the command ``manifold-sde``."""
    print_in_any_encoding()
    try:
        app()
    except BrokenPipeError:
        # The reader of the output has gone, as in `manifold-sde ... | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILURE)
