"""Prepare the Python environment of this checkout; ``make`` calls it before anything else.

Usage: ``python3 tools/environment.py [EXTRA,...]`` (default: ``all``).

- An active virtual environment (``VIRTUAL_ENV``) is used; without one, ``.venv`` is made.
- A torch that is already there, and new enough, is kept.
- What was installed is written to a stamp in the environment, so that the next call returns at
  once unless the dependencies in ``pyproject.toml`` or ``constraints.txt`` have changed.

Only the standard library is used. Down to the line that says so, the file also has to run on
Pythons that are too old for the package, because it is what tells their users so.
"""

import os
import subprocess
import sys

OLDEST = (3, 11)
CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def stop(*lines):
    """Print the lines to stderr and exit with status 1."""
    print("\n".join(("",) + lines), file=sys.stderr)  # noqa: RUF005
    sys.exit(1)


def version_of(python):
    """(major, minor) of an interpreter; None if it does not run."""
    code = "import sys; print(*sys.version_info[:2])"
    try:
        words = subprocess.check_output([python, "-c", code], stderr=subprocess.DEVNULL).split()
        return tuple(int(word) for word in words)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


def continue_on_newer_python():
    """Start this file again on a newer Python of this machine, or say what to do."""
    for minor in (13, 12, 11, 14):
        python = "python3.{}".format(minor)  # noqa: UP032
        found = version_of(python)
        if found and found >= OLDEST:
            os.execvp(python, [python] + sys.argv)  # noqa: RUF005
    stop(
        "manifold_sde needs Python 3.11 or newer.",
        "  received: Python {}.{} ({})".format(*sys.version_info[:2], sys.executable),
        "  hint:     install a newer Python (from python.org, your system's packages, pyenv or",
        "            conda) and name it: make run PYTHON=/path/to/python3.12",
    )


if sys.version_info < OLDEST:
    continue_on_newer_python()

# From here on the Python is new enough.
import hashlib  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import sysconfig  # noqa: E402
import tomllib  # noqa: E402
from pathlib import Path  # noqa: E402

STAMP = "manifold_sde-installed.json"
# Packages built for one version of torch alone: their pins go when another torch is kept.
TIED_TO_TORCH = ("torch", "torchvision")


def oldest_torch(project: dict) -> tuple[int, ...]:
    """The lower bound on torch in the project's dependencies, as numbers."""
    for requirement in project["dependencies"]:
        if found := re.fullmatch(r"torch\s*>=\s*([\d.]+).*", requirement):
            return release(found[1])
    raise ValueError("pyproject.toml has no lower bound on torch")


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 9, 1) of "2.9.1+cu126"."""
    return tuple(int(word) for word in re.match(r"[\d.]*\d", version)[0].split("."))


def installed_torch(python: Path | str) -> str | None:
    """The version of the torch that this interpreter sees; None without one."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/")
    return done.stdout.strip() or None


def constraints_for(lines: list[str], kept_torch: str | None) -> list[str]:
    """The constraints to hand to pip: with a kept torch, exactly that one in place of ours."""
    if kept_torch is None:
        return lines
    names = [re.split(r"[=<>!~ ]", line, maxsplit=1)[0].lower() for line in lines]
    rest = [line for line, name in zip(lines, names, strict=True) if name not in TIED_TO_TORCH]
    return [*rest, f"torch=={kept_torch}"]


def fingerprint(pyproject: dict, constraints: str) -> str:
    """Digest of everything that decides what gets installed."""
    parts = [CHECKOUT, pyproject["project"], pyproject["build-system"], constraints]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_stamp(path: Path) -> dict:
    """What the stamp says; an absent or damaged one says nothing."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def make_environment(folder: Path, needed: tuple[int, ...]) -> None:
    """Make a virtual environment, which sees this Python's packages if a good torch is there."""
    torch = installed_torch(sys.executable)
    keep = torch is not None and release(torch) >= needed
    print(f"Making {folder.name} with Python {sys.version.split()[0]}", flush=True)
    options = ["--system-site-packages"] if keep else []
    done = subprocess.run([sys.executable, "-m", "venv", *options, folder])
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        stop(
            f"{sys.executable} could not make a virtual environment (its message is above).",
            "  hint:     Debian and Ubuntu have the module apart: apt install python3-venv;",
            "            or activate a virtual environment of your own, which is then used.",
        )
    if keep and sys.prefix != sys.base_prefix:
        # This Python is itself of a virtual environment, and venv looks only at the one below it.
        inside = Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        path = sysconfig.get_path("purelib")
        Path(folder, inside, "parent.pth").write_text(path + "\n", encoding="utf-8")


def environment(needed: tuple[int, ...]) -> Path:
    """The folder of the environment to use, with a Python that runs and is new enough."""
    active = os.environ.get("VIRTUAL_ENV")
    folder = Path(active) if active else Path(CHECKOUT, ".venv")
    if not active and not folder.exists():
        make_environment(folder, needed)
    found = version_of(str(folder / "bin" / "python"))
    if found is None or found < OLDEST:
        received = "no Python that runs" if found is None else "Python {}.{}".format(*found)
        way_out = "deactivate it, or activate another" if active else "remove it and run make again"
        stop(
            f"The virtual environment {folder} cannot be used: it needs Python 3.11 or newer.",
            f"  received: {received}",
            f"  hint:     {way_out}",
        )
    return folder


def torch_to_keep(folder: Path, needed: tuple[int, ...]) -> str | None:
    """The torch of the environment, if it has one; stops if that one is too old."""
    torch = installed_torch(folder / "bin" / "python")
    if torch is not None and release(torch) < needed:
        bound = ".".join(map(str, needed))
        stop(
            f"The torch in {folder} is too old, and is not replaced behind your back.",
            f"  received: torch {torch}",
            f"  expected: torch >= {bound}",
            f"  hint:     {folder}/bin/python -m pip install 'torch>={bound}', or deactivate",
            "            the environment, so that .venv is used",
        )
    return torch


def install(folder: Path, extras: list[str], constraints: list[str], torch: str | None) -> None:
    """Install the package, editable, with the extras."""
    python = folder / "bin" / "python"
    if torch is None:
        print(
            "Installing torch and the other packages: some minutes. On Linux torch may come as a\n"
            "CUDA build of several GB. For another build, activate an environment that has it:\n"
            "a torch that is there is kept.",
            flush=True,
        )
    else:
        print(f"Installing the packages; torch {torch} is kept.", flush=True)
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode:
        subprocess.run([python, "-m", "ensurepip"], check=True)
    chosen = folder / "manifold_sde-constraints.txt"
    chosen.write_text("".join(f"{line}\n" for line in constraints), encoding="utf-8")
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    target = f"{CHECKOUT}[{','.join(extras)}]"
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", *quiet]
    done = subprocess.run([*command, "--constraint", chosen, "--editable", target])
    if done.returncode:
        stop(
            "Installing failed: pip's message is above.",
            "  hint:     mend what it names and run make again. constraints.txt has the versions",
            "            that the project is tested with; pyproject.toml has the ranges.",
        )


def note_on_compiler() -> None:
    """Say, at install time only, when there is no C++ compiler."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        print("Note: there is no C++ compiler here. Everything works; what would be compiled runs")
        print("uncompiled, several times slower. (Debian and Ubuntu: apt install g++.)", flush=True)


def main(arguments: list[str]) -> None:
    """Bring the environment up to date with the checkout."""
    wanted = set((arguments[0] if arguments else "all").split(","))
    pyproject = tomllib.loads(Path(CHECKOUT, "pyproject.toml").read_text(encoding="utf-8"))
    constraints = Path(CHECKOUT, "constraints.txt").read_text(encoding="utf-8")
    needed = oldest_torch(pyproject["project"])
    folder = environment(needed)
    stamp = folder / STAMP
    before = read_stamp(stamp)
    digest = fingerprint(pyproject, constraints)
    there = set(before.get("extras", [])) if before.get("fingerprint") == digest else set()
    if wanted <= there:
        return
    extras = sorted(wanted | there)
    torch = torch_to_keep(folder, needed)
    lines = [line for line in constraints.splitlines() if line and not line.startswith("#")]
    install(folder, extras, constraints_for(lines, torch), torch)
    note_on_compiler()
    stamp.write_text(json.dumps({"fingerprint": digest, "extras": extras}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
