"""``manifold-sde plan``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from manifold_sde.experiments import cli
from manifold_sde.training import TrainingSettings, plan, relaxation

RATES = ["--lr", "0.1", "--weight-decay", "5e-4"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["plan", *map(str, arguments)], env={"COLUMNS": "80"})


def test_table_numbers_and_picture(tmp_path: Path) -> None:
    done = call("--tau", 2, "--tau-to", 3, *RATES, "--momentum", 0.9, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    expected = plan((2.0, 2.0, 3.0), lr=0.1, weight_decay=5e-4, momentum=0.9)
    assert (tmp_path / "plan.txt").read_text() == f"{expected}\n"
    assert str(expected) in done.output
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(expected.to_json())
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_saved_relaxation_time(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal(60)
    found = relaxation(noise.cumsum(), np.arange(60.0))
    path = tmp_path / "relaxation.json"
    path.write_text(found.to_json())
    done = call("--relaxation", path, *RATES, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made == json.loads(plan(found, lr=0.1, weight_decay=5e-4).to_json())
    path.write_text("{}")
    assert "holds no relaxation time" in call("--relaxation", path, *RATES).output
    path.unlink()
    assert "cannot be read" in call("--relaxation", path, *RATES).output


def test_a_budget_and_a_run_before(tmp_path: Path) -> None:
    given = ["--tau", 2, *RATES, "--before-lr", 1, "--budget", 50_000, "--out", tmp_path]
    done = call(*given)
    assert done.exit_code == 0, done.output
    expected = plan(2.0, lr=0.1, weight_decay=5e-4, before=TrainingSettings(1.0, 5e-4))
    assert f"learning rate {expected.lr_for(50_000)[1]:.3g}" in done.output
    assert f"weight decay {expected.weight_decay_for(50_000)[1]:.3g}" in done.output
    none = call("--tau", 4, *RATES, "--budget", 1, "--out", tmp_path, "--overwrite")
    assert "no learning rate does it" in none.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (RATES, "the relaxation time is not said once"),
        (["--tau", 1, "--relaxation", "x.json", *RATES], "the relaxation time is not said once"),
        (["--tau", 1, "--lr", 0.1], "the planned run has no rates"),
        (["--tau", 1, *RATES, "--before-batch-size", 2], "the run before is only half said"),
        (["--tau", 1, *RATES, "--schedule", "step"], "schedule is not one of its choices"),
    ],
)
def test_what_is_refused(arguments: list[object], said: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2
    assert said in done.output
