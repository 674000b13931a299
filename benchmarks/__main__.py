"""``python -m benchmarks [NAME ...]``: run the benchmarks, print the table, write it as JSON."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib
import json
import os
import platform
import sys
import textwrap
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, installed

NAMES = (
    "sgd",
    "second_derivative",
    "bound",
    "symbolic",
    "limit_map",
    "brownian",
    "diffusion",
    "network",
    "peers",
    "verify",
    "limits",
    "multilevel",
    "cold",
    "training",
    "one_path",
    "sampling",
    "reference",
)
PACKAGES = (
    "manifold_sde",
    "torch",
    "torchsde",
    "numpy",
    "scipy",
    "sympy",
    "jax",
    "jaxlib",
    "diffrax",
    "torchdiffeq",
    "curvlinops-for-pytorch",
    "hessian-eigenthings",
)
OUTPUT = Path("results/benchmarks.json")
WIDTH = 80


def machine() -> dict[str, Any]:
    """Processor, its cores, and the system."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.system()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def head() -> str:
    """The line over the columns."""
    return f"{'':<26}{'ours':>7}{'peer':>7} {'':<3}{'peer is':<12}{'ratio':>7}{'target':>8}"


def line(row: Row) -> str:
    """A row of the table."""
    text = f"{row.name:<26}{number(row.ours):>7}{number(row.peer):>7} {row.unit:<3}"
    text += f"{row.peer_name:<12}{number(row.ratio):>7}"
    if row.target is not None:
        text += f"{row.target:>8.3g} {'met' if row.met else 'MISSED'}"
    return text


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def notes(rows: Sequence[Row]) -> list[str]:
    """What is said of the rows under the table, the same thing once, wrapped."""
    found: list[str] = []
    for row in rows:
        if not row.note:
            continue
        text = f"{row.name}, {row.peer_name}: {row.note}"
        if row.low is not None and row.high is not None:
            text += f"; ratio in single rounds {number(row.low)} to {number(row.high)}"
        found += textwrap.wrap(text, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return found


def table(title: str, rows: Sequence[Row]) -> list[str]:
    """The part of the table that belongs to one benchmark."""
    return [title, *map(line, rows)]


def missing(package: str) -> str:
    """What is said of a peer that is not there."""
    return f"{package} is not installed, and its rows are left out. Way out: make bench-environment"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks named, or all.

    Returns:
        0, also where a target is missed; 1 if a benchmark failed to run.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: figures mean nothing")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.names if name not in NAMES]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    tables: list[str] = []
    remarks: list[str] = []
    kept: dict[str, list[dict[str, Any]]] = {}
    left_out: dict[str, str] = {}
    failed = False
    for name in chosen.names or NAMES:
        module = importlib.import_module(f"benchmarks.bench_{name}")
        left_out |= {peer: missing(peer) for peer in module.PEERS if not installed(peer)}
        print(f"{module.TITLE} ...", file=sys.stderr, flush=True)
        try:
            rows: list[Row] = module.rows(quick=chosen.quick)
        except Exception:
            traceback.print_exc()
            failed = True
            tables += [module.TITLE, "FAILED: see the error above", ""]
            continue
        tables += [*table(module.TITLE, rows), ""]
        remarks += [module.TITLE, *notes(rows), ""]
        kept[name] = [{**dataclasses.asdict(row), "met": row.met} for row in rows]
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "threads": 1,
        "quick": chosen.quick,
        "rows": kept,
    }
    output = OUTPUT.with_stem("benchmarks_quick") if chosen.quick else OUTPUT
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join([head(), *tables]))
    print("\n".join(textwrap.wrap(EXPLANATION, WIDTH)), end="\n\n")
    print("\n".join(remarks))
    for text in left_out.values():
        print("\n".join(textwrap.wrap(text, WIDTH)))
    where = result["machine"]
    print(f"{where['cpu']}, {where['cores']} cores; written to {output}")
    print("\n".join(textwrap.wrap(", ".join(f"{k} {v}" for k, v in versions().items()), WIDTH)))
    return int(failed)


EXPLANATION = (
    "ratio: ours divided by the peer's, so that less is better; where the two were timed in turns "
    "it is the median over the rounds. target: the largest ratio aimed at. Times are processor "
    "time, of one thread each."
)

if __name__ == "__main__":
    sys.exit(main())
