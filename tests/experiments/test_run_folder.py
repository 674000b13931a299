"""Folders of runs: nothing is overwritten, what was run can be run again, and taken up again."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from manifold_sde.errors import ArgumentError, CheckpointError, ManifoldSDEError
from manifold_sde.experiments import cli
from manifold_sde.experiments.run_folder import Run, options_of

PLAN = ["plan", "--tau", "2", "--lr", "0.1", "--weight-decay", "5e-4"]


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


def record(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def test_each_run_has_a_folder_with_what_was_run() -> None:
    for _ in range(2):
        assert call(*PLAN).exit_code == 0
    first, second = sorted(Path("results").iterdir())
    assert {path.name for path in first.iterdir()} == {
        *("plan.json", "plan.png", "plan.txt", "plan.toml")
    }
    found = record(second / "plan.toml")
    assert found["command"] == "plan"
    assert found["finished"] is True
    assert found["options"]["tau"] == 2.0
    assert found["resolved"]["momentum"] == 0.0
    assert found["versions"]["manifold_sde"]


def test_a_configuration_is_taken_back_and_options_come_first() -> None:
    call(*PLAN, "--out", "a")
    assert call("plan", "--config", "a/plan.toml", "--out", "b").exit_code == 0
    assert Path("a/plan.txt").read_bytes() == Path("b/plan.txt").read_bytes()
    call("plan", "--config", "a/plan.toml", "--out", "c", "--tau", "3")
    assert record(Path("c/plan.toml"))["options"]["tau"] == 3.0
    assert record(Path("c/plan.toml"))["options"]["lr"] == 0.1


def test_results_are_overwritten_only_if_it_is_said() -> None:
    assert call(*PLAN, "--out", "here").exit_code == 0
    before = Path("here/plan.txt").read_bytes()
    refused = call(*PLAN, "--tau", "5", "--out", "here")
    assert refused.exit_code == 2
    assert "there are results of this name" in refused.stderr
    assert Path("here/plan.txt").read_bytes() == before
    assert call(*PLAN, "--tau", "5", "--out", "here", "--overwrite").exit_code == 0
    assert Path("here/plan.txt").read_bytes() != before


def test_a_configuration_of_another_command_or_none_is_named() -> None:
    call(*PLAN, "--out", "a")
    wrong = call("audit", "log.csv", "--config", "a/plan.toml")
    assert wrong.exit_code == 2
    assert "that of another command" in wrong.stderr
    assert "there is no such file" in call("plan", "--config", "none.toml").stderr
    Path("broken.toml").write_text("a = [")
    with pytest.raises(CheckpointError, match="cannot be read"):
        options_of(Path("broken.toml"), "plan")


def started(**parameters: Any) -> Run:
    return Run.of("figure 2", "", parameters)


def test_a_run_that_was_stopped_is_found_again_by_its_options() -> None:
    stopped = started(seed=1)
    with pytest.raises(KeyboardInterrupt), stopped.noted("figure2"):
        raise KeyboardInterrupt
    finished = started(seed=2)
    with finished.noted("figure2"):
        pass
    assert Run.of("figure 2", "", {"seed": 1}, resume=True).folder == stopped.folder
    for seed in (2, 3):  # finished, and never run
        with pytest.raises(ArgumentError, match="no stopped run"):
            Run.of("figure 2", "", {"seed": seed}, resume=True)
    assert call("figure", "2", "--resume").exit_code == 2


def test_what_is_refused_leaves_nothing_behind() -> None:
    run = started()
    with pytest.raises(ManifoldSDEError), run.noted("figure2"):
        raise ManifoldSDEError("no")
    assert not run.folder.exists()


def test_configurations_of_any_values_are_read_back(folder: Path) -> None:
    values = {"name": 'a "b" \\ η\n', "rate": 1e-5, "many": [1, 2], "on": True, "far": float("inf")}
    Run(folder, "plan", values).note("it", finished=True)
    assert options_of(folder / "it.toml", "plan") == values


@pytest.mark.parametrize(
    "command", ["figure 1", "figure 2", "collapse", "info", "simulate", "audit", "verify", "plan"]
)
def test_helps_end_with_two_examples_and_name_no_types(command: str) -> None:
    shown = call(*command.split(), "-h").output
    examples = shown.partition("Examples:")[2]
    assert examples.count(f"manifold-sde {command}") == 2
    options = [line for line in shown.splitlines() if "<bool>" in line]
    assert all("--help" in line for line in options)
