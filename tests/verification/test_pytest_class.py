"""The three lines that turn the checks of a problem into tests of pytest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECKS = """
import pytest
from manifold_sde import errors, problems
from manifold_sde.deadline import consult

from manifold_sde.verification import Result, VerificationTests, testing
from manifold_sde.verification.check import Check

def stops(subject, effort):
    raise errors.RankError("the rank jumps")

def seen(subject, effort):
    assert subject.seed == 5
    assert effort.name == "thorough"
    seen.subjects.append(subject)
    return [Result("good", "holds", "zero")]

def endless(subject, effort):
    while True:
        consult()

seen.subjects = []
BAD = Result("bad", "fails", "seven", meaning="Mend it.")
testing.all_checks = lambda: (
    Check("good", "property", (), seen),
    Check("good again", "property", (), seen),
    Check("bad", "property", (), lambda s, e: [BAD]),
    Check("unknown", "property", (), stops),
    Check("nothing", "property", (), lambda s, e: []),
    Check("endless", "property", (), endless),
)
"""

THREE_LINES = """
class TestMine(VerificationTests):
    problem = problems.great_circle()
    effort, seed, seconds = "thorough", 5, 0.2

class TestMade(VerificationTests):
    problem = problems.great_circle
    effort, seed, seconds = "thorough", 5, 0.2

def test_the_subject_is_shared():
    first, again, other, too = map(id, seen.subjects)
    assert first == again != other == too
"""


def outcome(folder: Path, text: str) -> str:
    """What pytest says of a test file."""
    file = folder / "test_mine.py"
    file.write_text(CHECKS + text)
    command = [sys.executable, "-m", "pytest", "-q", "-rfs", "-p", "no:cacheprovider", str(file)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    return found.stdout + found.stderr


def test_each_check_is_a_test(tmp_path: Path) -> None:
    """Of a problem, and of a function that makes one."""
    said = outcome(tmp_path, THREE_LINES)
    assert "2 failed, 5 passed, 6 skipped" in said
    assert "endless: it takes more than 0.2 s" in said
    for name in ("TestMine", "TestMade"):
        assert f"FAILED test_mine.py::{name}::test_check[bad]" in said
    assert "bad: seven Mend it." in said
    assert "the rank jumps" in said
    assert "does not apply to this problem" in said


def test_a_class_without_a_problem(tmp_path: Path) -> None:
    said = outcome(tmp_path, "\nclass TestMine(VerificationTests):\n    problem = 3\n")
    assert "TestMine has no problem" in said
