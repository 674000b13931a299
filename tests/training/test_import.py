"""The training clock is light: what it costs to import beside torch."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, time
import torch
import torch.optim
start, before = time.process_time(), set(sys.modules)
import manifold_sde.training
print(time.process_time() - start, *(set(sys.modules) - before))
"""
HEAVY = ("sympy", "matplotlib", "sklearn", "typer", "rich", "manifold_sde.solvers")


def faults(program: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    seconds, *modules = run.stdout.split()
    heavy = [name for name in modules if name in HEAVY]
    return heavy + ([f"{seconds} s"] if float(seconds) >= 1.0 else [])


def test_training_costs_less_than_a_second_beside_torch() -> None:
    assert faults(PROGRAM) == []


def test_broken_twin_that_imports_the_solvers() -> None:
    assert "manifold_sde.solvers" in faults(
        PROGRAM.replace("import manifold_sde.training", "import manifold_sde.solvers")
    )
