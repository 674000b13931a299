"""The first answer from a fresh process: ``solve`` with all defaults against a program in JAX.

Both are given the same problem as data, import what they need, compile, run 20,000 paths to T = 1
once, and end. The processor time is that of the whole process and of the compilers that it calls.
JAX takes 64 Euler-Maruyama steps (benchmarks/jax_cold.py); ours takes the steps that its default
accuracy of 1e-3 asks for. The two are run in turns, ours with an empty and with a filled folder of
kernels. A network has 200 paths, and no program in JAX. Bytecode of all modules is on disk, as pip
leaves it.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.rows import Row, installed
from manifold_sde import problems

TITLE = "The first answer, from a fresh process to its end"
PEERS = ("jax",)
PATHS, ROUNDS = 20_000, 3


def circle(amplitude: float, scale: float) -> dict[str, object]:
    """A circle in R^3, whose curvature varies 16-fold at the amplitude 0.6."""
    return {"start": np.array([1.0, 0.0, 0.0]), "scale": scale, "amplitude": amplitude}


def linear() -> dict[str, object]:
    """Section 6.1, as a plain loss in R^10."""
    model = problems.normalized_linear()
    tensors = {"start": model.minimizer, "inputs": model.inputs, "targets": model.targets}
    numbers = {name: value.numpy() for name, value in tensors.items()}
    return {**numbers, "scale": model.noise.scale, "amplitude": 0.0}


def least_squares() -> dict[str, object]:
    """The same, by its residuals."""
    return {**linear(), "squares": True}


def network() -> dict[str, object]:
    """Sixteen weights behind a normalisation, which fit six samples; a few paths of it."""
    inputs = np.random.default_rng(0).normal(size=(6, 4))
    sizes = {"widths": np.array([4, 4, 1]), "paths": 200}
    return {**sizes, "inputs": inputs, "scale": 0.2, "amplitude": 0.0}


def processor_time(module: str, file: Path, end: Path, cache: Path) -> float:
    """Seconds of a program and of what it starts."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment: Mapping[str, str] = {
        **_with_bytecode(file.parent),
        **threads,
        "MANIFOLD_SDE_CACHE": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", f"benchmarks.{module}", str(file), str(end)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows(*, quick: bool = False) -> list[Row]:
    """The rows: each problem with an empty folder of kernels, and with a filled one."""
    found = []
    paths, rounds = (200, 1) if quick else (PATHS, ROUNDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = (
            ("README's loss", circle(0.0, 0.3)),
            ("varying circle", circle(0.6, 1.0)),
            ("section 6.1, plain", linear()),
            ("section 6.1, squares", least_squares()),
            ("network", network()),
        )
        for title, problem in cases[:1] if quick else cases:
            file, end = folder / "problem.npz", folder / "end.npy"
            np.savez(file, **{"paths": paths, **problem})  # type: ignore[arg-type]
            peer = installed("jax") and "widths" not in problem
            if not quick:
                for module in ("cold_program", *(["jax_cold"] if peer else [])):
                    processor_time(module, file, end, folder / "once")  # writes bytecode
            times: dict[str, list[float]] = {"empty": [], "filled": [], "JAX": []}
            lost = 0.0
            for k in range(rounds):
                cache = folder / f"{title}-{k}"
                for kind in ("empty", "filled"):
                    times[kind].append(processor_time("cold_program", file, end, cache))
                assert np.isfinite(np.load(end)).all()
                if peer:
                    times["JAX"].append(processor_time("jax_cold", file, end, cache))
                    lost = float(np.isnan(np.load(end)).any(axis=1).mean())
            found += _compared(title, times, lost)
        found.append(_of_imports(folder, rounds))
    return found


def _of_imports(folder: Path, rounds: int) -> Row:
    """What the import costs beside that of torch, with bytecode on disk as pip leaves it."""
    environment = _with_bytecode(folder)
    ratios, ours, torch = [], [], []
    for k in range(rounds + 1):
        pair = [_import_time(name, environment) for name in ("manifold_sde", "torch")]
        if k:  # the first one wrote the bytecode
            ours.append(pair[0])
            torch.append(pair[1])
            ratios.append(pair[0] / pair[1])
    return Row(
        name="import",
        ours=statistics.median(ours),
        peer=statistics.median(torch),
        peer_name="torch",
        unit="s",
        ratio=statistics.median(ratios),
        target=1.2,
        note="both from bytecode; ours is torch and 87 modules of its own. scipy, sympy, "
        "matplotlib, solvers and verification are imported when they are used",
        low=min(ratios),
        high=max(ratios),
    )


def _with_bytecode(folder: Path) -> dict[str, str]:
    """The environment of programs that keep their bytecode in a folder."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}


def _import_time(name: str, environment: Mapping[str, str]) -> float:
    """Seconds of processor time of a process that imports a module."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {name}"], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _compared(title: str, times: Mapping[str, list[float]], lost: float) -> list[Row]:
    """Rows of a problem."""
    both = zip(times["filled"], times["empty"], strict=True)
    ratios = [filled / empty for filled, empty in both]
    ours = {kind: statistics.median(values) for kind, values in times.items() if values}
    result = [
        Row(
            name=f"{title}, filled",
            ours=ours["filled"],
            peer=ours["empty"],
            peer_name="ours, empty",
            unit="s",
            ratio=statistics.median(ratios),
            low=min(ratios),
            high=max(ratios),
        )
    ]
    if not times["JAX"]:
        return result
    for kind, target in (("empty", 1 / 3), ("filled", 1 / 5)):
        ratios = [a / b for a, b in zip(times[kind], times["JAX"], strict=True)]
        result.append(
            Row(
                name=f"{title}, {kind}",
                ours=statistics.median(times[kind]),
                peer=statistics.median(times["JAX"]),
                peer_name="JAX",
                unit="s",
                ratio=statistics.median(ratios),
                target=target,
                note=f"JAX takes 64 Euler steps and loses {lost:.2%} of the paths, ours none",
                low=min(ratios),
                high=max(ratios),
            )
        )
    return result
