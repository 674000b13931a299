"""What a first ``solve`` loads: the seconds of a fresh process are imports and compiling."""

import subprocess
import sys
from pathlib import Path

import pytest

from manifold_sde.compile import c_compiler

LOSS = """
problem = Problem(lambda x: 0.5 * residuals(x)[0] ** 2, dim=3, noise=SphericalNoise(1.0))
start = [1.0, 0.0, 0.0]
"""
LEAST_SQUARES = """
problem = LeastSquaresProblem(residuals, dim=3, noise=SphericalNoise(1.0))
start = [1.0, 0.0, 0.0]
"""
NETWORK = """
module, inputs = NormalizedMLP((2, 3, 1)).double(), torch.eye(2, dtype=torch.float64)
targets = module(inputs).detach()
problem = Problem.from_module(module, nn.MSELoss(), inputs, targets, SphericalNoise(0.3))
start = problem.vector() / problem.vector().norm()
"""
PROGRAM = """
import sys
import torch
from torch import nn
from manifold_sde import LeastSquaresProblem, LimitingDiffusion, Problem, SphericalNoise
from manifold_sde.networks import NormalizedMLP
from manifold_sde.solvers import solve

def residuals(x):
    y = x / x.norm()
    return ((1.0 + 0.6 * y[0]) * y[2])[None]

def loaded():
    names = ("torch._dynamo", "sympy", "scipy", "matplotlib", "torch.distributed.tensor")
    return [name for name in names if name in sys.modules]
{problem}
found = solve(LimitingDiffusion(problem), start, [0.0, 0.3], n_paths=10)
assert found.stats["compiled"] and bool(found.ys.isfinite().all())
print(loaded())
{twin}
print(loaded())
"""
TWINS = {
    "gradient": (LOSS, "torch.func.grad(problem.pointwise.loss)(torch.ones(3))"),
    "transposed": (LEAST_SQUARES, "torch.func.vjp(residuals, torch.ones(3))[1](torch.ones(1))"),
    "forward": (
        NETWORK,
        "torch.func.jvp(problem.pointwise.gradient, (problem.vector(),), (problem.vector(),))",
    ),
}


@pytest.mark.skipif(c_compiler() is None, reason="no C compiler")
@pytest.mark.parametrize("name", TWINS)
def test_a_first_solve_loads_no_compiler_of_torch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twins are derivatives of ``torch.func``, which load a second of modules."""
    problem, twin = TWINS[name]
    monkeypatch.setenv("MANIFOLD_SDE_CACHE", str(tmp_path))
    program = PROGRAM.format(problem=problem, twin=twin)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    ours, after = done.stdout.splitlines()
    assert ours == "[]"
    assert "torch._dynamo" in after
