"""Check a CUDA machine in a few minutes: tests, bits, laws, and steps a second, as a table.

Usage: ``python tools/gpu_check.py [--device cuda] [--quick]``

The tests that are marked ``cuda`` are run; paths on the device are held against the processor's
(random numbers to the bit, paths to 1e-9) and against an exact law (4 standard errors, a false
alarm in 16,000); and path-steps a second stand side by side. ``--device cpu`` runs every line
without a GPU: the device's column is then the processor's own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from manifold_sde import DirectionDiffusion, problems, rng
from manifold_sde.solvers import run_sgd, solve
from manifold_sde.verification.exact import CircleDiffusion

PROBLEM = problems.varying_circle()
STEP = 0.25
#: Where the tests are that need a device.
MARKED = [f"tests/solvers/test_{name}.py" for name in ("devices", "devices_of_solve", "brownian")]


def paths(device: torch.device, n: int, steps: int) -> Tensor:
    """Where the direction diffusion is after some steps, (n, D)."""
    start = PROBLEM.minimizer.to(device)
    sde, end = DirectionDiffusion(PROBLEM), steps * STEP
    return solve(sde, start, [0.0, end], n_paths=n, dt=STEP, compile=False).ys[-1]


def sgd(device: torch.device, n: int, steps: int) -> Tensor:
    """Where SGD is after some steps, (n, D)."""
    start = PROBLEM.minimizer.to(device)
    return run_sgd(PROBLEM, start, 1e-2, 0.05, steps, n_paths=n, compile=False).ys[-1]


def same_numbers(device: torch.device) -> bool:
    """Whether uniforms have the same bits on the device and on the processor."""
    key, steps = rng.seed_key(7), torch.arange(64)

    def drawn(on: torch.device) -> Tensor:
        return rng.uniforms(key, 1, torch.arange(100, device=on), steps.to(on), 5, torch.float64)

    return torch.equal(drawn(device).cpu(), drawn(torch.device("cpu")))


def law_error(device: torch.device, n: int, steps: int) -> float:
    """Standard errors between E cos(angle) on the device and in the exact law."""
    assert PROBLEM.facts.circle is not None
    angle = PROBLEM.facts.circle.angle
    value = torch.cos(angle(paths(device, n, steps).cpu()))
    want = float(CircleDiffusion.reversible(PROBLEM).expectation(np.cos, steps * STEP))
    return abs(float(value.mean()) - want) / (float(value.std()) / n**0.5)


def rate(
    run: Callable[[torch.device, int, int], Tensor], device: torch.device, n: int, steps: int
) -> float:
    """Path-steps a second of wall time, after one run to warm up."""
    run(device, n, 2)
    began = time.perf_counter()
    float(run(device, n, steps).sum())  # waits for the device
    return n * steps / (time.perf_counter() - began)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; 0 if all of it holds."""
    parser = argparse.ArgumentParser(description="Check a CUDA machine.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a dry run")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: rates mean nothing")
    chosen = parser.parse_args(arguments)
    device, cpu = torch.device(chosen.device), torch.device("cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device. Way out: a build of torch for CUDA, or --device cpu")
        return 1
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", *MARKED]
    tests += ["--collect-only"] * (device.type != "cuda")
    passed = subprocess.run(tests, capture_output=chosen.quick).returncode == 0
    n, steps = (2000, 2) if chosen.quick else (20_000, 20)
    apart = float((paths(device, 64, 2).cpu() - paths(cpu, 64, 2)).abs().max())
    checks = {
        "tests marked cuda": passed,
        "random numbers: the same bits": same_numbers(device),
        f"paths: {apart:.1e} apart": apart < 1e-9,
        f"law: {(error := law_error(device, n, steps)):.1f} standard errors": error < 4.0,
    }
    for name, holds in checks.items():
        print(f"{'holds' if holds else 'FAILS'}  {name}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this processor"
    print(f"\n| float64, path-steps a second | {name} | the processor | ratio |\n|---|---|---|---|")
    sizes = ((64, 1),) if chosen.quick else ((4096, 20), (65_536, 20))
    for title, run in (("direction diffusion, weak2", paths), ("SGD", sgd)):
        for count, length in sizes:
            there, here = (rate(run, where, count, length) for where in (device, cpu))
            cells = f"{there:.3g} | {here:.3g} | {there / here:.2f}"
            print(f"| {title}, {count} paths | {cells} |")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
