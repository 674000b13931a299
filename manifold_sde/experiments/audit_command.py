"""The command ``manifold-sde audit``."""

from __future__ import annotations

from matplotlib.figure import Figure
from rich.console import Console

from manifold_sde.experiments.run_folder import Run
from manifold_sde.experiments.settings.audit import Settings
from manifold_sde.training import AuditReport, audit
from manifold_sde.writing import replacing


def make_audit(settings: Settings, run: Run, console: Console) -> AuditReport:
    """Print an audit, and write audit.html, .json, .txt and .png.

    Args:
        settings: What is audited, and by which rates.
        run: The run, whose folder gets the files.
        console: Where to print.

    Raises:
        ArgumentError, TimeScaleError: If the rates do not go with the log, or an audit is there.
        DataFileError: If a file cannot be read.
        WriteError: If a file cannot be written.
    """
    run.require_free("audit")
    report = audit(
        settings.source,
        optimizer=settings.optimizer,
        lr=_number_or_name(settings.lr),
        weight_decay=_number_or_name(settings.weight_decay),
        norms=None if settings.norms is None else settings.norms.split(","),
        step=settings.step,
        momentum=settings.momentum,
        dampening=settings.dampening,
        nesterov=settings.nesterov,
        betas=(settings.beta1, settings.beta2),
    )
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    for ending in ("txt", "json", "html"):
        report.save(run.folder / f"audit.{ending}")
    figure = report.plot().figure
    assert isinstance(figure, Figure)
    with replacing(run.folder / "audit.png") as file:
        figure.savefig(file, format="png", dpi=150)
    run.note("audit", settings, finished=True)
    written = f"Written: {run.folder / 'audit.html'}, .json, .txt, .png, .toml"
    console.print(f"\n{written}", highlight=False, soft_wrap=True)
    return report


def _number_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
