"""How far a call of ``solve`` is from a step: the frames between, on the README's first example."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from manifold_sde import DirectionDiffusion, Problem, SphericalNoise
from manifold_sde.geometry.dense import DenseSpace
from manifold_sde.geometry.normal_space import Frame
from manifold_sde.solvers import solve
from manifold_sde.solvers.integrate import integrate
from manifold_sde.solvers.schemes import Weak2

README = Path(__file__).parents[2] / "README.md"
#: Frames from ``solve`` to a scheme's ``step``, both of them counted.
MOST_FRAMES = 3


def frames_since(frame: FrameType | None, outermost: Callable[..., Any]) -> list[str]:
    """Module and name of the frames up to one, from that of a function on."""
    names: list[str] = []
    while frame is not None:
        names.insert(0, f"{frame.f_globals['__name__']}.{frame.f_code.co_name}")
        if frame.f_code is outermost.__code__:
            return names
        frame = frame.f_back
    return []


def first_example(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The frames from ``solve`` to each step that the README's first example takes."""
    seen: list[list[str]] = []
    real = Weak2.step

    def step(*arguments: Any) -> tuple[Tensor, Tensor]:
        names = frames_since(sys._getframe(), solve)
        if not any("step_choice" in name for name in names):  # they choose dt, before the run
            seen.append(names)
        return real(*arguments)

    monkeypatch.setattr(Weak2, "step", step)
    text = README.read_text(encoding="utf-8")
    found = re.search(r"^from manifold_sde import.*?^law = .*?^\)$", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    exec(compile(found.group(0), "README.md", "exec"), {})
    return seen


def test_a_step_is_three_frames_below_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = first_example(monkeypatch)
    assert len(seen) >= 8
    assert {tuple(names) for names in seen if len(names) > MOST_FRAMES} == set()
    solving, integrating, _ = seen[0]
    assert solving == "manifold_sde.solvers.solver.solve"
    assert integrating == "manifold_sde.solvers.integrate.integrate"


def test_broken_twin_a_layer_that_only_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    def forwarding(*arguments: Any, **options: Any) -> Any:
        return integrate(*arguments, **options)

    monkeypatch.setattr("manifold_sde.solvers.solver.integrate", forwarding)
    assert min(map(len, first_example(monkeypatch))) == MOST_FRAMES + 1


#: Frames of the package between ``solve`` and the user's loss, neither of them counted: where the
#: drift looks at the Hessian, and at most, where it looks at third derivatives or the noise.
FRAMES, MOST = 8, 13


def frames_to_the_loss() -> list[list[str]]:
    """Frames of the package between ``solve`` and each call of the loss from a step."""
    found: list[list[str]] = []

    def loss(x: Tensor) -> Tensor:
        names = frames_since(sys._getframe(1), solve)
        # Reverse mode stands for torch's own, whose frames are not counted.
        ours = [n for n in names if n.startswith("manifold_sde.") and "reverse_mode" not in n]
        if any(".schemes." in name for name in ours):
            found.append(ours[1:])
        return 0.5 * (x[2] / x.norm()) ** 2

    problem = Problem(loss, 3, SphericalNoise(0.3))
    y = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    solve(DirectionDiffusion(problem), y, [0.0, 8.0], n_paths=50, dt=1.0, compile=False)
    return found


def test_the_loss_is_few_frames_below_solve() -> None:
    found = frames_to_the_loss()
    assert len(found[0]) <= FRAMES
    assert len({name.rpartition(".")[0] for name in found[0]}) <= FRAMES
    assert max(map(len, found)) <= MOST


def test_broken_twin_a_space_that_only_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    real = DenseSpace.frame

    def frame(self: DenseSpace, y: Tensor, basis: Tensor) -> Frame:
        return real(self, y, basis)

    monkeypatch.setattr(DenseSpace, "frame", frame)
    monkeypatch.setitem(frame.__globals__, "__name__", "manifold_sde.layer")
    assert len(frames_to_the_loss()[0]) == FRAMES + 1
