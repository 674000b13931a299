"""``manifold-sde audit``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner, Result

from manifold_sde.experiments import cli
from manifold_sde.training import audit, expected_clock

RATES = ["--optimizer", "sgd", "--momentum", "0.9", "--weight-decay", "0.01"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["audit", *map(str, arguments)], env={"COLUMNS": "80"})


def log(path: Path, jump: float = 1.0) -> Path:
    """Norms, and beside them those of the gradients, which are none of the weights."""
    norms = expected_clock(0.02, 1000, weight_decay=0.01, momentum=0.9).norms[::50]
    rows = [f"{50 * i},{n * (jump if i > 8 else 1)},0.02,{1 + i % 3}" for i, n in enumerate(norms)]
    path.write_text("\n".join(["step,w.norm,lr,grad_norm", *rows]))
    return path


def test_table_numbers_and_picture(tmp_path: Path) -> None:
    path = log(tmp_path / "log.csv")
    done = call(path, *RATES, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    expected = audit(path, optimizer="sgd", momentum=0.9, weight_decay=0.01)
    assert str(expected) in done.output
    assert (tmp_path / "audit.txt").read_text() == f"{expected}\n"
    saved = json.loads((tmp_path / "audit.json").read_text())
    assert saved["groups"][0]["predicted"] == expected["w.norm"].predicted
    assert np.isclose(expected["w.norm"].predicted, expected["w.norm"].norm, rtol=0.01)
    assert (tmp_path / "audit.html").read_text(encoding="utf-8") == f"{expected.to_html()}\n"
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_a_norm_that_is_off_has_a_status(tmp_path: Path) -> None:
    path = log(tmp_path / "log.csv", jump=2.5)
    done = call(path, *RATES, "--lr", 0.02, "--norms", "w.norm", "--out", tmp_path)
    assert done.exit_code == 1
    assert "off: up to" in done.output


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    done = call(log(tmp_path / "log.csv"), *RATES, "--lr", "rate", "--out", tmp_path)
    assert done.exit_code == 1
    assert "no column 'rate'" in done.output
    assert call(tmp_path / "none.csv", *RATES).exit_code == 1
    assert call(log(tmp_path / "log.csv"), "--optimizer", "adagrad").exit_code == 2
