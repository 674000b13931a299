"""Problems of the user's own, named FILE.py:NAME, their starts, and where results are written."""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde.errors import ArgumentError, ManifoldSDEError, MissingDependencyError
from manifold_sde.problem import Problem


def load_problem(target: str) -> Problem:
    """Load the problem "FILE.py:NAME".

    The file is run as a module, with its folder on the path, so that it may import what lies
    beside it.

    Raises:
        ArgumentError: If there is no such file or name, the file cannot be run, or the name is
            not a problem.
    """
    file, colon, name = target.rpartition(":")
    if not colon or not file or not name.isidentifier():
        problem = "the problem is not named by a file and a name in it"
        raise _unusable(problem, repr(target), "for example my_problem.py:problem")
    path = Path(file)
    if not path.is_file():
        received = f"{file}, a folder" if path.is_dir() else file
        raise _unusable("there is no such file", received, _beside(path))
    if path.suffix != ".py":
        raise _unusable("the file is not a Python file", file, "give the file the ending .py")
    module = _run(path)
    if not hasattr(module, name):
        raise _unusable(f"the file has no {name!r}", target, _names(module, name))
    value = getattr(module, name)
    if callable(value) and not isinstance(value, (Problem, type)):
        try:
            value = value()
        except Exception as error:
            remedy = "a function that makes a problem is called without arguments"
            raise _failed(error, path, f"the function {target} raised", remedy) from error
    if not isinstance(value, Problem):
        received = repr(value) if isinstance(value, type) else type(value).__name__
        raise _unusable(f"{target} is not a problem", received, _names(module, ""))
    return value


def _unusable(problem: str, received: str, remedy: str) -> ArgumentError:
    expected = "FILE.py:NAME, where NAME is a Problem or a function that makes one"
    return ArgumentError(problem, received=received, expected=expected, remedy=remedy)


def make_known_to_workers(target: str) -> None:
    """Let processes that are started from now on have the problem of a file that was loaded.

    The file's own functions travel by value; what lies beside it is imported by its name.

    Raises:
        MissingDependencyError: If cloudpickle is not installed.
    """
    try:
        cloudpickle = importlib.import_module("cloudpickle")
    except ImportError as error:
        raise MissingDependencyError(
            "runs in several processes need joblib and cloudpickle",
            received="no module cloudpickle",
            expected="cloudpickle, an optional dependency",
            remedy='pip install "manifold_sde[cluster]", or leave --workers out',
        ) from error
    path = Path(target.rpartition(":")[0])
    cloudpickle.register_pickle_by_value(sys.modules[_module_name(path)])
    folders = [str(path.resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)


def _module_name(path: Path) -> str:
    return f"manifold_sde_user_{path.stem}"


def _run(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_module_name(path), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        remedy = f"python {path} shows the whole traceback"
        raise _failed(error, path, "the file cannot be run", remedy) from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _failed(error: Exception, path: Path, what: str, remedy: str) -> ManifoldSDEError:
    """The error of a user's file, with the line in it."""
    here = path.resolve()
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == here]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    where = f"line {lines[-1]} of {path}" if lines else str(path)
    if isinstance(error, ManifoldSDEError):
        what, remedy, expected = f"{what}: {error.problem}", error.remedy, error.expected
        received = f"{error.received}, in {where}"
    else:
        first = str(error).splitlines()[0] if str(error) else ""
        received = f"{type(error).__name__} in {where}: {first}"
        expected = "a file that Python can run by itself"
    return ArgumentError(what, received=received, expected=expected, remedy=remedy)


def _names(module: ModuleType, wanted: str) -> str:
    problems = [n for n, v in vars(module).items() if isinstance(v, Problem)]
    close = difflib.get_close_matches(wanted, problems or vars(module))
    if close:
        return f"did you mean {close[0]}?"
    if problems:
        return f"the problems in it: {', '.join(problems)}"
    return "there is no Problem among its names: assign one, as in problem = Problem(...)"


def _beside(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either; paths start where the command is run"
    close = difflib.get_close_matches(path.name, sorted(p.name for p in path.parent.glob("*.py")))
    if close:
        return f"did you mean {path.parent / close[0]}?"
    return "paths start where the command is run"


def read_array(file: Path) -> Tensor:
    """The weights of the option --x0, a file .npy or .pt, in double precision.

    Raises:
        ArgumentError: If it is not there or cannot be read.
    """
    way = {
        "expected": "a file .npy or .pt with one array of numbers",
        "remedy": "numpy.save(FILE, x0) or torch.save(x0, FILE), with x0 the weights as one vector",
    }
    if not file.is_file():
        raise ArgumentError("there is no such file", received=f"--x0 {file}", **way)
    try:
        if file.suffix == ".npy":
            found: Any = torch.from_numpy(np.load(file, allow_pickle=False))
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
        return torch.as_tensor(found).detach().to(torch.float64)
    except Exception as error:
        # Whatever a damaged or a foreign file makes the readers raise.
        first = (str(error).splitlines() or [""])[0][:80]
        received = f"--x0 {file}: {type(error).__name__}: {first}"
        raise ArgumentError("the start cannot be read", received=received, **way) from error


def subject_of(target: str) -> str:
    """What a problem is called in names of files and folders.

    >>> subject_of("my/loss.py:problem")
    'loss_problem'
    """
    path, _, name = target.rpartition(":")
    return f"{Path(path).stem}_{name}"


def output_of(file: Path | None, folder: Path, command: str, target: str, suffix: str) -> Path:
    """Where a command writes, checked before anything is computed; no folder is made yet.

    Without --output, a file that bears the names of command and problem, in the run's folder.

    Raises:
        ArgumentError: If it cannot be written there.
    """
    own = folder / f"{command}_{subject_of(target)}{suffix}"
    file = own if file is None else file
    folder = next(f for f in (file.parent, *file.parent.parents) if f.exists())
    what = ""
    if file.suffix != suffix:
        what = f"a file that does not end in {suffix}"
    elif file.is_dir():
        what = "a folder"
    elif not folder.is_dir():
        what = f"of which {folder} is a file"
    else:
        try:
            probe = folder / f".{file.name}.probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            what = f"{type(error).__name__}: {error.strerror}"
    if what:
        raise ArgumentError(
            "the output cannot be written there",
            received=f"--output {file}, {what}",
            expected=f"a path that ends in {suffix}, in a folder that can be written to",
            remedy="leave it out: each run has a folder of its own",
        )
    return file
