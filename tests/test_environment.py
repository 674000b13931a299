"""What ``make`` does before anything else: the environment, and the torch that is kept."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import environment

ROOT = Path(__file__).parents[1]
PINS = ["numpy==2.3.5", "torch==2.13.0", "torchsde==0.2.6", "torchvision==0.28.0"]


def test_the_pins_are_used_where_there_is_no_torch() -> None:
    assert environment.constraints_for(PINS, None) == PINS


def test_a_torch_that_is_there_is_pinned_in_place_of_ours() -> None:
    kept = environment.constraints_for(PINS, "2.9.1+cu126")
    assert kept == ["numpy==2.3.5", "torchsde==0.2.6", "torch==2.9.1+cu126"]


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.9.1+cu126", (2, 9, 1)), ("2.10.0a0+git1", (2, 10, 0))]
)
def test_release(version: str, numbers: tuple[int, ...]) -> None:
    assert environment.release(version) == numbers


def test_torch_that_is_too_old_is_neither_used_nor_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = environment.oldest_torch({"dependencies": ["torchsde>=0.2", "torch>=2.8"]})
    monkeypatch.setattr(environment, "installed_torch", lambda python: "2.7.1")
    with pytest.raises(SystemExit):
        environment.torch_to_keep(Path("env"), needed)
    message = capsys.readouterr().err
    assert "received: torch 2.7.1" in message
    assert "expected: torch >= 2.8" in message


def test_missing_compiler_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    environment.note_on_compiler()
    assert "no C++ compiler" in capsys.readouterr().out


def test_an_up_to_date_environment_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call installs nothing; another set of extras, or new pins, does."""
    installed: list[list[str]] = []
    digests = iter(["one", "one", "one", "two"])
    monkeypatch.setattr(environment, "environment", lambda needed: tmp_path)
    monkeypatch.setattr(environment, "torch_to_keep", lambda folder, needed: None)
    monkeypatch.setattr(environment, "fingerprint", lambda *parts: next(digests))
    monkeypatch.setattr(environment, "install", lambda _, extras, *rest: installed.append(extras))
    for extras in ("all", "all", "all,bench", "all"):
        environment.main([extras])
    assert installed == [["all"], ["all", "bench"], ["all"]]


def test_ranges_are_met_by_what_is_installed() -> None:
    """The ranges in pyproject.toml are met by what is installed."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False
    )
    assert "manifold-sde" not in done.stdout
    assert "manifold_sde" not in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_help_lists_every_command_in_80_columns() -> None:
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True)
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    commands = {line.split()[0] for line in lines if line.startswith("  ")}
    wanted = {"run", "test", "lint", "format", "docs", "bench", "clean", "help", "pages"}
    assert wanted | {"verify-thorough"} == commands
