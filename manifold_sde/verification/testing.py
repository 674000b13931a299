"""Every check of a problem as a test of pytest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from manifold_sde.deadline import OutOfTimeError
from manifold_sde.errors import ArgumentError
from manifold_sde.problem import Problem
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort, effort_of
from manifold_sde.verification.subject import Subject
from manifold_sde.verification.suite import all_checks


class VerificationTests:
    """A test class for a problem of yours: each check becomes a test.

    .. code-block:: python

        from manifold_sde.verification import VerificationTests

        class TestMyLoss(VerificationTests):
            problem = my_problem

    A check that fails fails its test, with what was measured and what it means. One that cannot
    tell, or does not apply to the problem, is skipped with its reason.

    Attributes:
        problem: The problem, or a function without arguments that makes it.
        effort: "quick" or "thorough".
        seed: Seed of all that is drawn.
        x_init: Where training starts (D,), or ``None``.
        seconds: Processor time that each check may take; one that takes longer is skipped.
    """

    problem: ClassVar[Problem | Callable[[], Problem] | None] = None
    effort: ClassVar[str | Effort] = "quick"
    seed: ClassVar[int] = 0
    x_init: ClassVar[Tensor | None] = None
    seconds: ClassVar[float] = math.inf

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Make a test of each check."""
        if "verification_check" in metafunc.fixturenames:
            checks = all_checks() if type(self).problem is not None else ()
            names = [check.name for check in checks]
            metafunc.parametrize("verification_check", checks, ids=names)

    def test_check(self, verification_check: Check) -> None:
        """One check."""
        import pytest

        effort, seconds = effort_of(type(self).effort), type(self).seconds
        try:
            results = verification_check(self._subject(), effort, seconds)
        except OutOfTimeError as error:
            pytest.skip(f"{verification_check.name}: it {error}")
        failed = [result for result in results if result.verdict == "fails"]
        told = [f"{r.name}: {r.detail} {r.meaning}".strip() for r in failed]
        assert not failed, "\n".join(told)
        undecided = [result for result in results if result.verdict == "undecided"]
        if undecided or not results:
            told = [f"{r.name}: {r.detail}" for r in undecided]
            pytest.skip("\n".join(told) or "the check does not apply to this problem")

    @classmethod
    def _subject(cls) -> Subject:
        """The system under test, made once for all tests: its simulations are shared."""
        if "_made" not in cls.__dict__:
            given = cls.__dict__.get("problem", cls.problem)
            made = given.__func__ if isinstance(given, staticmethod) else given
            problem = made if isinstance(made, Problem) else made() if callable(made) else made
            if not isinstance(problem, Problem):
                raise ArgumentError(
                    f"{cls.__name__} has no problem",
                    received=f"problem = {given!r}",
                    expected="a Problem, or a function without arguments that makes one",
                    remedy="class TestMyLoss(VerificationTests): problem = my_problem",
                )
            cls._made = Subject.of(problem, x_init=cls.x_init, seed=cls.seed)
        return cls._made

    _made: ClassVar[Subject]
