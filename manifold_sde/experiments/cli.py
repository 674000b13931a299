"""The command line: ``manifold-sde``."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from manifold_sde import Description, __version__
from manifold_sde.errors import ArgumentError, ManifoldSDEError
from manifold_sde.experiments.cli_options import (
    Config,
    Full,
    Out,
    Overwrite,
    PlainHelp,
    Problem,
    Restart,
    Resume,
    epilog,
    examples,
    run_of,
)
from manifold_sde.experiments.problem_file import subject_of
from manifold_sde.experiments.settings.audit import Settings as AuditSettings
from manifold_sde.experiments.settings.collapse import Settings as CollapseSettings
from manifold_sde.experiments.settings.figure2 import Settings as Figure2Settings
from manifold_sde.experiments.settings.optimizers import Settings as OptimizerSettings
from manifold_sde.experiments.settings.plan import Settings as PlanSettings
from manifold_sde.experiments.settings.simulate import Settings as SimulationSettings
from manifold_sde.experiments.settings.training import Settings as TrainingSettings
from manifold_sde.experiments.terminal import (
    FAILURE,
    INTERRUPTED,
    PARTIAL,
    USAGE,
    SpellingConsole,
    errors,
    one_thread,
    print_in_any_encoding,
    resumable,
    spelled,
    stopping,
    with_options,
)


class _Figures(PlainHelp, TyperGroup):
    """The figures, by their numbers."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The numbers in their order."""
        return sorted(super().list_commands(ctx))


class _Commands(PlainHelp, TyperGroup):
    """A group whose commands report the toolkit's errors as a short message."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands on a problem first, then those on a run, then the studies."""
        first = ["info", "simulate", "verify", "audit", "plan", "reference", "figure"]
        return [*first, *(name for name in super().list_commands(ctx) if name not in first)]

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with stopping("Stopped."):
                return super().invoke(ctx)
        except ManifoldSDEError as error:
            errors().print(Text("Error: ", style="bold red") + Text(str(error)), soft_wrap=True)
            code = USAGE if isinstance(error, ArgumentError) else FAILURE
            raise typer.Exit(code) from error


_SHARED: dict[str, Any] = {
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": "markdown",
}
app = typer.Typer(
    cls=_Commands,
    name="manifold-sde",
    help="SGD with normalisation and weight decay as a diffusion on its manifold of minimisers.",
    epilog=epilog("figure 2", "simulate my_loss.py:problem --help"),
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    **_SHARED,
)
figure = typer.Typer(
    cls=_Figures,
    help="Make a figure of the paper, from simulation.",
    epilog=epilog("figure 2", "figure 1 --full"),
    **_SHARED,
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


@figure.command("2", **examples("figure 2", "figure 2 --full --out results/paper --jobs 2"))
@with_options(Figure2Settings, after="full")
def figure2(
    ctx: typer.Context,
    full: Full = False,
    jobs: Annotated[
        int, typer.Option(min=1, max=2, metavar="N", help="Processes: one, or one for each design.")
    ] = 2,
    out: Out = None,
    resume: Resume = False,
    restart: Restart = False,
    overwrite: Overwrite = False,
    config: Config = None,
    **changes: Any,
) -> None:
    """Figure 2: SGD on the normalised linear model follows the paper's time scale.

    Section 6.1 as printed, and below it the law of the angle against the exact law of the limit,
    at the paper's setting and at a well-conditioned one. Writes PNG, PDF, the data and a table.
    """
    from manifold_sde.experiments.figure2.command import make_figure2

    form = Figure2Settings if full else Figure2Settings.quick
    run = run_of(ctx, "", out, resume, overwrite or restart)
    one_thread()
    with resumable():
        make_figure2(form(**changes), run, SpellingConsole(), jobs=jobs, restart=restart)


def _add_training_figure(number: int, text: str) -> None:
    """Add Figure 1 or 3, whose options are the same, with a text for its help."""

    @with_options(TrainingSettings, after="full")
    def command(
        ctx: typer.Context,
        full: Full = False,
        jobs: Annotated[
            int, typer.Option(min=1, metavar="N", help="Processes, of one thread each.")
        ] = 2,
        out: Out = None,
        resume: Resume = False,
        restart: Restart = False,
        overwrite: Overwrite = False,
        config: Config = None,
        **changes: Any,
    ) -> None:
        from manifold_sde.experiments.training.command import make_figure

        form: Any = TrainingSettings if full else TrainingSettings.quick
        if changes["data"] == "cifar10":
            form, changes = TrainingSettings.published, {"data_dir": None} | changes
        run = run_of(ctx, "", out, resume, overwrite or restart)
        one_thread()
        with resumable():
            make_figure(number, form(**changes), run, SpellingConsole(), jobs=jobs, restart=restart)

    command.__doc__ = text
    shown = examples(
        f"figure {number} --runs 2 --epochs 60",
        f"figure {number} --data cifar10 --data-dir cifar-10-batches-py --device cuda",
    )
    figure.command(str(number), **shown)(command)


_add_training_figure(
    1,
    """Figure 1: accuracies over epochs, and test accuracy after decay, beside the norm.

Section 6.2 in small: SGD with weight decay trains a scale-invariant PreResNet on scikit-learn's
digits. With --data cifar10 --data-dir DIR, the paper's own setting. Writes PNG, PDF, a table, the
data and a description. Figure 3 uses the same runs.
""",
)
_add_training_figure(
    3,
    """Figure 3: test accuracy of Φ(x_t) over the time of the decay, and the norm with (10).

The runs are those of Figure 1, and are made if they are not there. After the decay, SGD at a small
learning rate stands for gradient flow, which leads to Φ(x_t). Writes PNG, PDF, a table, the data
and a description.
""",
)


@app.command(**examples("collapse", "collapse --rates 0.02,0.1 --rates 0.01,0.2 --paths 8"))
@with_options(CollapseSettings, after="full")
def collapse(
    ctx: typer.Context,
    full: Full = False,
    out: Out = None,
    resume: Resume = False,
    restart: Restart = False,
    overwrite: Overwrite = False,
    config: Config = None,
    **changes: Any,
) -> None:
    """Which axis collapses SGD's curves: steps, lr k, lr wd k, or the clock u.

    SGD on a network at several learning rates and weight decays, and the diffusion beside it.
    Writes a figure, the data, tables and a description.
    """
    from manifold_sde.experiments.collapse.command import make_collapse

    form = CollapseSettings if full else CollapseSettings.quick
    if "paths" in changes:
        changes["diffusion_paths"] = changes["paths"]
    run = run_of(ctx, "", out, resume, overwrite or restart)
    one_thread()
    with resumable():
        make_collapse(form(**changes), run, SpellingConsole(), full=full, restart=restart)


@app.command(**examples("collapse-optimizers", "collapse-optimizers --full --out results/all"))
@with_options(OptimizerSettings, after="full")
def collapse_optimizers(
    ctx: typer.Context,
    full: Full = False,
    out: Out = None,
    resume: Resume = False,
    restart: Restart = False,
    overwrite: Overwrite = False,
    config: Config = None,
    **changes: Any,
) -> None:
    """Which axis collapses the curves of SGD, SGD with momentum, and AdamW?

    A network on digits at several learning rates, weight decays and schedules, also where the
    theory does not hold. Writes a figure, the data, a table and a description.
    """
    from manifold_sde.experiments.collapse.optimizer_command import make_optimizers

    form = OptimizerSettings if full else OptimizerSettings.quick
    run = run_of(ctx, "", out, resume, overwrite or restart)
    one_thread()
    with resumable():
        make_optimizers(form(**changes), run, SpellingConsole(), full=full, restart=restart)


@app.command(**examples("info my_loss.py:problem", "info my_loss.py:problem --seed 1"))
def info(
    problem: Problem,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of where a minimiser is sought.")
    ] = 0,
) -> None:
    """What a problem is: its size, its noise, its minimisers, and whether it is scale-invariant."""
    from manifold_sde.experiments.problem_file import load_problem

    rows = load_problem(problem).describe(seed).rows
    print(Description(tuple((spelled(name), spelled(text)) for name, text in rows)))


@app.command(
    **examples(
        "simulate loss.py:problem --lr 0.01 --weight-decay 0.05 --steps 1000,5000",
        "simulate loss.py:problem --ratio 0.5 --times 0.5,1,2 --x0 start.npy",
    )
)
@with_options(SimulationSettings, after="problem")
def simulate(
    ctx: typer.Context,
    problem: Problem,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
    **changes: Any,
) -> None:
    """The law that the theory predicts for the weights of SGD, without running SGD.

    Prints norm, log pdet H and spread of the direction after each number of steps, and writes the
    paths and a figure.
    """
    from manifold_sde.experiments.simulate.command import simulate_law

    run = run_of(ctx, subject_of(problem), out, resume, overwrite)
    settings = SimulationSettings(problem, **changes)
    one_thread()
    with resumable():
        simulate_law(settings, run, SpellingConsole(), errors())


@app.command(
    **examples(
        "audit log.csv --optimizer sgd --momentum 0.9 --weight-decay 5e-4",
        "audit checkpoints/ --lr 3e-4 --weight-decay 0.1",
    )
)
@with_options(AuditSettings, after="source")
def audit(
    ctx: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="LOG", help="CSV, JSON lines, or a folder of checkpoints.")
    ],
    out: Out = None,
    overwrite: Overwrite = False,
    config: Config = None,
    **changes: Any,
) -> None:
    """Whether the norms of a training run are what its rates make of them.

    Of each norm in a log, or tensor in a folder of checkpoints: measured and predicted, where it is
    at rest, and the steps until it is there. Prints a table, and writes it with a picture and all
    numbers. The exit status is 1 if something is off.
    """
    from manifold_sde.experiments.audit_command import make_audit

    run = run_of(ctx, Path(source).stem, out, False, overwrite)
    if not make_audit(AuditSettings(source, **changes), run, SpellingConsole()).passed:
        raise typer.Exit(FAILURE)


@app.command(
    **examples(
        "verify my_loss.py:problem", "verify my_loss.py:problem --assumptions --x0 weights.pt"
    )
)
def verify(
    ctx: typer.Context,
    problem: Problem,
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
        bool,
        typer.Option(
            "--assumptions/--no-assumptions",
            help="The assumptions alone.",
            show_default=False,
        ),
    ] = False,
    out: Out = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The page, .html; the numbers are beside it as .json.",
            show_default="in the folder",
        ),
    ] = None,
    overwrite: Overwrite = False,
    config: Config = None,
) -> None:
    """Whether the theory holds for a problem: its assumptions, its statements, its laws.

    Prints a row for each check as it is made, and writes a page with the plots behind the
    verdicts. The exit status is 0 if nothing failed, 1 if something did, 3 if nothing did and the
    budget left out some checks, and 130 after Ctrl-C, which ends with the report of what is done.
    """
    from manifold_sde.experiments.problem_file import load_problem, output_of, read_array
    from manifold_sde.verification import Report, check_assumptions
    from manifold_sde.verification.report import Rows
    from manifold_sde.verification.suite import verify as check_all

    one_thread()
    loaded = load_problem(problem)
    run = run_of(ctx, subject_of(problem), out, False, overwrite)
    page = output_of(output, run.folder, "verify", problem, ".html")
    run = dataclasses.replace(run, folder=page.parent)
    run.require_free(page.stem)
    x_init = None if x0 is None else read_array(x0)
    make = check_assumptions if assumptions else check_all
    title = "Assumptions" if assumptions else "Verification"
    rows = Rows(sys.stdout, Report(repr(loaded), (), title, seed, effort).head)
    report = make(loaded, x_init=x_init, seed=seed, effort=effort, budget=budget, progress=rows)
    report.save(page)
    report.save(page.with_suffix(".json"))
    run.note(page.stem, finished=report.partial != "interrupt")
    print(f"\n{report.foot}\n\nWith the plots behind the verdicts:\n{page}")
    if report.partial == "interrupt":
        raise typer.Exit(INTERRUPTED)
    if not report.passed:
        raise typer.Exit(FAILURE)
    if report.partial:
        raise typer.Exit(PARTIAL)


@app.command(
    **examples("reference", "reference varying_circle --check mine.npz", "reference --draws 1000")
)
def reference(
    ctx: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="One entry.", show_default="all of them"),
    ] = None,
    draws: Annotated[
        int, typer.Option(min=8, metavar="N", help="Paths that are drawn of each.")
    ] = 10_000,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the draws.")] = 0,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Instead: hold the states in this .npz or .npy, (times, paths, D), against it.",
        ),
    ] = None,
    bias: Annotated[
        float, typer.Option(min=0.0, metavar="B", help="Error of a mean that --check allows.")
    ] = 1e-3,
    out: Out = None,
    overwrite: Overwrite = False,
    config: Config = None,
) -> None:
    """Problems with their exact laws, against which any solver can be run.

    Of each: loss, noise and start as formulas, exact means and densities at three times, and draws
    with their diagnostics, as .json and .npz. With --check the exit status is 1 where the states
    have another law.
    """
    from manifold_sde.experiments.reference_command import check_states, write_references

    one_thread()
    console = SpellingConsole()
    if check is not None:
        if not check_states(name, check, bias, console).passed:
            raise typer.Exit(FAILURE)
        return
    run = run_of(ctx, "", out, False, overwrite)
    if not write_references(name, draws, seed, run, console):
        raise typer.Exit(FAILURE)


@app.command(
    **examples(
        "plan --tau 2 --lr 0.1 --weight-decay 5e-4 --momentum 0.9",
        "plan --relaxation tau.json --lr 0.05 --weight-decay 1e-3 --budget 50000",
    )
)
@with_options(PlanSettings, after="ctx")
def plan(
    ctx: typer.Context,
    out: Out = None,
    overwrite: Overwrite = False,
    config: Config = None,
    **changes: Any,
) -> None:
    """How many steps of training it takes until a run is mixed, at other rates than measured.

    From a relaxation time, measured once: steps with their interval, what changes of the learning
    rate, weight decay, batch size and schedule would cost, and how long the cooldown is to be.
    Prints a table, and writes it with a picture and all numbers.
    """
    from manifold_sde.experiments.plan_command import make_plan

    make_plan(PlanSettings(**changes), run_of(ctx, "", out, False, overwrite), SpellingConsole())


def main() -> None:
    """Entry point of the command ``manifold-sde``."""
    print_in_any_encoding()
    try:
        app(prog_name="manifold-sde")  # also as python -m manifold_sde, for the completion
    except BrokenPipeError:
        # The reader of the output has gone, as in `manifold-sde ... | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILURE)
