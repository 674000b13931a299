"""What a first ``solve`` loads: the seconds of a fresh process are imports and compiling."""

import subprocess
import sys
from pathlib import Path

import pytest

from manifold_sde.compile import c_compiler

PROGRAM = """
import sys
import torch
from manifold_sde import LimitingDiffusion, Problem, SphericalNoise
from manifold_sde.solvers import solve

def loss(x):
    y = x / x.norm()
    return 0.5 * ((1.0 + 0.6 * y[0]) * y[2]) ** 2

def loaded():
    names = ("torch._dynamo", "sympy", "scipy", "matplotlib", "torch.distributed.tensor")
    return [name for name in names if name in sys.modules]

problem = Problem(loss, dim=3, noise=SphericalNoise(1.0))
found = solve(LimitingDiffusion(problem), [1.0, 0.0, 0.0], [0.0, 0.3], n_paths=10)
assert found.stats["compiled"] and bool(found.ys.isfinite().all())
print(loaded())
torch.func.grad(loss)(torch.ones(3))
print(loaded())
"""


@pytest.mark.skipif(c_compiler() is None, reason="no C compiler")
def test_a_first_solve_loads_no_compiler_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin is the gradient of ``torch.func``, which loads a second of modules."""
    monkeypatch.setenv("MANIFOLD_SDE_CACHE", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    ours, twin = done.stdout.splitlines()
    assert ours == "[]"
    assert "torch._dynamo" in twin
