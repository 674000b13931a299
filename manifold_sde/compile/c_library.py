"""C code compiled once by the machine's C compiler, kept on disk, and called on tensors.

The folder is that of the environment variable ``MANIFOLD_SDE_CACHE``, else ``manifold_sde`` in the
user's cache. A library's name is the hash of its code, its compiler and the machine; what is known
of it stands in a small file beside it, with its checksum, written after the library. A file that
does not fit is made anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifold_sde.compile.c_source import VECTOR, c_source
from manifold_sde.compile.scalar_trace import Traced

_FLAGS = ("-O1", "-fno-math-errno", "-fno-trapping-math", "-march=native", "-fPIC", "-shared", "-w")
#: Seconds after which a compiler counts as stuck.
_PATIENCE = 300.0


class CompilerFailed(Exception):
    """The C compiler is missing, or failed."""


@functools.cache
def c_compiler() -> str | None:
    """The C compiler: that of the environment variable CC, else the first one found."""
    named = os.environ.get("CC")
    names = ("gcc", "clang", "cc") if named is None else (named,)
    return next((path for name in names if (path := shutil.which(name))), None)


@functools.cache
def _machine() -> str:
    """What code for this machine depends on."""
    said = [platform.machine(), platform.system(), c_compiler() or ""]
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        said += sorted({x for x in text.splitlines() if x.startswith(("model name", "flags"))})
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            [said[2], "--version"], capture_output=True, text=True, timeout=_PATIENCE, check=True
        )
        said += found.stdout.splitlines()[:1]
    return "\n".join(said)


@functools.cache
def _vectors() -> bool:
    """Whether the C library has functions of vectors that the compiler calls."""
    code = '__attribute__((simd("notinbranch"))) double exp(double);\n'
    code += '__attribute__((optimize("O3"))) void f(double *x) '
    code += "{ for (int i = 0; i < 8; i++) x[i] = exp(x[i]); }\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            _run_compiler(code, Path(folder) / "try.so", ("-lmvec", "-lm", "-Wl,--no-undefined"))
        except CompilerFailed:
            return False
    return True


@functools.cache
def cache_folder() -> Path:
    """The folder in which libraries are kept, of this user alone; a new one if that fails."""
    named = os.environ.get("MANIFOLD_SDE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(OSError, RuntimeError):  # no home, or none that can be written
        folder = Path(named or Path(base or Path.home() / ".cache") / "manifold_sde")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
        if os.access(folder, os.W_OK) and (not hasattr(os, "getuid") or owner == os.getuid()):
            return folder
    return Path(tempfile.mkdtemp(prefix="manifold_sde-"))


def _run_compiler(code: str, target: Path, after: Sequence[str]) -> None:
    compiler = c_compiler()
    if compiler is None:
        raise CompilerFailed("no C compiler was found")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "kernel.c", Path(folder) / "kernel.so"
        source.write_text(code)
        command = [compiler, *_FLAGS, "-o", str(library), str(source), *after]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
        except (OSError, subprocess.SubprocessError) as error:
            raise CompilerFailed(str(error)) from error
        if found.returncode:
            said = [x for x in found.stderr.splitlines() if "error" in x] or [f"{compiler} failed"]
            raise CompilerFailed(said[0])
        own = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copyfile(library, own)
        os.replace(own, target)


def library(code: str) -> tuple[ctypes.CDLL, str]:
    """Compile code, or load what was compiled of it before.

    Returns:
        The library and its name.

    Raises:
        CompilerFailed: If there is no compiler, or it fails.
    """
    name = hashlib.sha256("\n".join((code, *_FLAGS, _machine())).encode()).hexdigest()[:40]
    return _load(name, code), name


@functools.cache
def _loaded(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def _load(name: str, code: str | None) -> ctypes.CDLL:
    """The library of a name, made of its code where it is not there whole."""
    path = cache_folder() / f"{name}.so"
    known = path.with_suffix(".sum")
    if not _is_whole(path, known):
        if code is None:
            raise CompilerFailed("the library is not there")
        vectors = ("-DVECTORS", "-lmvec") if _vectors() else ()
        _run_compiler(code, path, (*vectors, "-lm"))
        _write(known, hashlib.sha256(path.read_bytes()).hexdigest())
    try:
        return _loaded(path)
    except OSError as error:
        raise CompilerFailed(str(error)) from error


def _is_whole(path: Path, known: Path) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == known.read_text()
    except OSError:
        return False


def _write(path: Path, text: str) -> None:
    own = path.with_name(f"{path.name}.{os.getpid()}")
    own.write_text(text)
    os.replace(own, path)


class CKernel:
    """A function of single points on tensors with the points last, as compiled C.

    Args:
        code: The library's function ``kernel``.
        shapes: Shapes of the results for one point.
        single: Whether one tensor is returned and no tuple.
        given: Tensors that the function holds, contiguous; what is written to them counts.
        workspace: Number of vectors that a call needs beside.
        dtype: Of all numbers.
    """

    def __init__(
        self,
        code: ctypes.CDLL,
        shapes: Sequence[tuple[int, ...]],
        single: bool,
        given: Sequence[Tensor],
        workspace: int,
        dtype: torch.dtype,
    ) -> None:
        self._call = code.kernel
        self._call.restype = None
        self.shapes, self.single, self.given = list(shapes), single, list(given)
        self._bytes, self._dtype = (workspace + 1) * VECTOR, dtype
        self._given = _pointers(self.given)

    def __call__(self, *arguments: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Evaluate: each argument (..., n), contiguous -> (..., n)."""
        n = arguments[0].shape[-1]
        results = [torch.empty((*s, n), dtype=self._dtype) for s in self.shapes]
        space = torch.empty(self._bytes, dtype=torch.uint8)
        start = space.data_ptr()
        self._call(
            ctypes.c_long(n),
            _pointers(arguments),
            _pointers(results),
            self._given,
            ctypes.c_void_p(start + (-start) % VECTOR),
        )
        return results[0] if self.single else tuple(results)


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * (len(tensors) + 1))(*[t.data_ptr() for t in tensors])


def compile_traced(traced: Traced, dtype: torch.dtype) -> tuple[CKernel, str]:
    """Compile a traced function.

    Returns:
        The kernel, and the name of its library.

    Raises:
        CompilerFailed: If there is no compiler, or it fails.
    """
    code, workspace = c_source(traced.program, dtype)
    loaded, name = library(code)
    given = [t.contiguous() for t in traced.given]
    return CKernel(loaded, traced.shapes, traced.single, given, workspace, dtype), name


# What is known of a function before it is traced.


def recall(key: str, given: Sequence[Tensor], dtype: torch.dtype) -> CKernel | None:
    """The kernel that was noted under a key, if it is there.

    Args:
        key: What the function is made of.
        given: Tensors that it holds, in the order that was noted.
        dtype: Of all numbers.
    """
    try:
        known = json.loads((cache_folder() / f"{key}.json").read_text())
        tensors = [given[k].contiguous() for k in known["given"]]
        code = _load(known["library"], None)
        shapes = [tuple(s) for s in known["shapes"]]
        return CKernel(code, shapes, known["single"], tensors, known["workspace"], dtype)
    except (OSError, ValueError, KeyError, IndexError, TypeError, CompilerFailed):
        return None


def note(key: str, kernel: CKernel, name: str, given: Sequence[Tensor]) -> None:
    """Note a kernel under a key, if it holds none but the given tensors."""
    places = []
    for tensor in kernel.given:
        same = (k for k, other in enumerate(given) if other.data_ptr() == tensor.data_ptr())
        place = next(same, None)
        if place is None or given[place].shape != tensor.shape:
            return
        places.append(place)
    workspace = kernel._bytes // VECTOR - 1
    said = {"library": name, "shapes": kernel.shapes, "single": kernel.single, "given": places}
    with contextlib.suppress(OSError):
        _write(cache_folder() / f"{key}.json", json.dumps({**said, "workspace": workspace}))
