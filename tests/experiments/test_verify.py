"""``manifold-sde verify``: what it prints, writes and refuses, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from manifold_sde.deadline import consult
from manifold_sde.experiments import cli
from manifold_sde.verification import Effort, Result, Subject, suite
from manifold_sde.verification.check import Check
from tests.verification.reports import FAILS, HOLDS

FILE = """
import torch
from manifold_sde import Problem, SphericalNoise, problems

def loss(x):
    return 0.5 * (x[2] / (x * x).sum().sqrt()) ** 2

def broken(x):
    return 0.5 * (x[2] / (1e-3 + (x * x).sum()).sqrt()) ** 2

good = Problem(loss, 3, SphericalNoise(0.3), rank=1)
bad = Problem(broken, 3, SphericalNoise(0.3), rank=1)
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(FILE)
    return tmp_path


def call(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["verify", *arguments])


def only_one(folder: Path, name: str) -> Path:
    (path,) = folder.glob(f"results/*/{name}")
    return path


def only(monkeypatch: pytest.MonkeyPatch, *results: Result) -> list[tuple[Subject, Effort]]:
    """Put one check in place of all."""
    seen: list[tuple[Subject, Effort]] = []

    def run(subject: Subject, effort: Effort) -> tuple[Result, ...]:
        seen.append((subject, effort))
        return results

    monkeypatch.setattr(suite, "all_checks", lambda: (Check("one", "property", (), run),))
    return seen


def test_what_holds(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    seen = only(monkeypatch, HOLDS)
    np.save("x0.npy", np.array([2.0, 0.0, 0.1]))
    done = call("my.py:good", "--seed", "7", "--x0", "x0.npy", "--effort", "thorough")
    assert done.exit_code == 0, done.output
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert HOLDS.name in done.stdout
    assert "verify_my_good.html" in done.stdout
    subject, effort = seen[0]
    assert (subject.seed, effort.name) == (7, "thorough")
    assert subject.x_init is not None
    assert subject.x_init.tolist() == [2.0, 0.0, 0.1]
    assert HOLDS.detail in only_one(folder, "verify_my_good.html").read_text(encoding="utf-8")
    assert json.loads(only_one(folder, "verify_my_good.json").read_text())["seed"] == 7


def test_what_fails_ends_with_1(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    only(monkeypatch, HOLDS, FAILS)
    done = call("my.py:good", "--output", "out/page.html")
    assert done.exit_code == 1
    assert FAILS.detail[:40] in done.stdout
    assert (folder / "out/page.html").exists()
    assert (folder / "out/page.json").exists()


def test_what_the_budget_leaves_out_ends_with_3(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def endless(*_: Any) -> list[Result]:
        while True:
            consult()

    several = (
        Check("endless", "property", (), endless),
        Check("one", "property", (), lambda *_: [HOLDS]),
    )
    monkeypatch.setattr(suite, "all_checks", lambda: several)
    done = call("my.py:good", "--budget", "0.2")
    assert done.exit_code == 3, done.output
    # The row of what is cheap comes first, and in the page each has its place.
    assert done.stdout.index(HOLDS.name) < done.stdout.index("endless")
    assert "the budget was not enough" in " ".join(done.stdout.split())
    saved = json.loads(only_one(folder, "verify_my_good.json").read_text(encoding="utf-8"))
    assert [result["name"] for result in saved["results"]] == ["endless", HOLDS.name]
    assert saved["partial"] == "budget"
    fails = (*several, Check("two", "property", (), lambda *_: [FAILS]))
    monkeypatch.setattr(suite, "all_checks", lambda: fails)
    assert call("my.py:good", "--budget", "0.2").exit_code == 1
    assert call("my.py:good", "--budget", "0").exit_code == 2


def test_an_interrupt_ends_with_130_and_what_is_done(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def stop(*_: Any) -> list[Result]:
        raise KeyboardInterrupt

    several = (
        Check("one", "property", (), lambda *_: [HOLDS]),
        Check("two", "property", (), stop),
    )
    monkeypatch.setattr(suite, "all_checks", lambda: several)
    done = call("my.py:good", "--output", "out/page.html")
    assert done.exit_code == 130
    assert HOLDS.name in done.stdout
    assert "it was stopped" in " ".join(done.stdout.split())
    assert HOLDS.detail in (folder / "out/page.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_loss_that_is_not_scale_invariant_is_told(folder: Path) -> None:
    """The assumptions for real."""
    done = call("my.py:bad", "--assumptions")
    assert done.exit_code == 1, done.output
    assert "scale" in done.stdout
    assert "FAILS" in done.stdout
    done = call("my.py:good", "--assumptions")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my.py:nothing"], "nothing"),
        (["my.py:good", "--effort", "lazy"], "no such effort"),
        (["my.py:good", "--x0", "nowhere.npy"], "no such file"),
        (["my.py:good", "--output", "page.pdf"], "cannot be written"),
        (["my.py:good", "--budget", "-1"], "not a time"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2
    assert message in done.output
