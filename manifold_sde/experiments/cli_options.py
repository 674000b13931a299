"""Options that commands share, and what they make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from manifold_sde.experiments.run_folder import Run, options_of


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take options from the file that a run has written; those of the command line come first."""
    if path is not None and not ctx.resilient_parsing:
        ctx.default_map = options_of(path, _command(ctx))
    return path


def _command(ctx: typer.Context) -> str:
    """The name of a command, such as "figure 2"."""
    above = ctx.parent
    whole = "" if above is None or above.parent is None else f"{above.info_name} "
    return f"{whole}{ctx.info_name}"


Problem = Annotated[
    str, typer.Argument(metavar="FILE.py:NAME", help="The problem, or a function making it.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder for the files.",
        show_default="a new one in results",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume",
        help="Go on with the last such run that was stopped.",
        show_default=False,
    ),
]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart/--no-restart",
        help="Start anew, whatever is saved or was stopped.",
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite/--no-overwrite",
        help="Write over results that are in the folder.",
        show_default=False,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Options from the .toml of an earlier run; those given here come first.",
        callback=read_config,
        is_eager=True,
    ),
]
Full = Annotated[
    bool,
    typer.Option("--full/--quick", help="All of it, in some minutes."),
]


class PlainHelp:
    """Part of a command or a group, in whose help a switch has no type, such as "<bool>"."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The arguments and options, with the one for help."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class _Command(PlainHelp, TyperCommand):
    pass


def examples(*commands: str) -> dict[str, Any]:
    """How a command is listed, with the end of its help: commands to copy."""
    return {"cls": _Command, "epilog": epilog(*commands)}


def epilog(*commands: str) -> str:
    """The end of a help: commands to copy."""
    return "Examples:\n\n" + "\n\n".join(f"manifold-sde {c}" for c in commands)


def run_of(
    ctx: typer.Context, subject: str, out: Path | None, resume: bool, overwrite: bool
) -> Run:
    """The run of a command."""
    return Run.of(_command(ctx), subject, ctx.params, out=out, resume=resume, overwrite=overwrite)
