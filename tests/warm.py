"""A Python that has imported what programs need, and forks for each of them.

A Python of its own would spend three seconds on imports. A program that is forked has nothing of
another one: globals, folder, environment, output and exit status are its own, and warnings are
errors as in the tests.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = (
    "matplotlib.pyplot",
    "scipy.stats",
    "torch",
    "torch._dynamo",  # torch imports it at a first derivative
    "manifold_sde.experiments.cli",
    "manifold_sde.training",
    "manifold_sde.verification",
)
SERVER = """
import gc, importlib, json, os, runpy, signal, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
gc.freeze()
for line in sys.stdin:
    child = os.fork()
    if not child:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
asked = json.loads(line)
signal.alarm(asked["limit"])
os.chdir(asked["folder"])
os.environ.clear()
os.environ.update(asked["environment"])
for number, name in enumerate(asked["streams"]):
    os.dup2(os.open(name, os.O_RDWR), number)
if encoding := os.environ.get("PYTHONIOENCODING"):
    sys.stdout.reconfigure(encoding=encoding)
    sys.stderr.reconfigure(encoding=encoding)
sys.argv = asked["command"]
if sys.argv[0] == "-m":
    sys.argv.pop(0)
    sys.path[0] = asked["folder"]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
elif sys.argv[0] == "-c":
    exec(compile(sys.argv.pop(1), "<string>", "exec"), {"__name__": "__main__"})
else:
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def warning_options() -> list[str]:
    """The project's warning filters, as options of ``python``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    filters = project["tool"]["pytest"]["ini_options"]["filterwarnings"]
    return [option for entry in filters for option in ("-W", entry)]


@functools.cache
def server() -> subprocess.Popen[str]:
    """The Python that forks; it ends with this process, which closes its input."""
    command = [sys.executable, *warning_options(), "-c", SERVER, *MODULES]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def close() -> None:
    """End the server, if there is one."""
    if server.cache_info().currsize:
        server().communicate()
        server.cache_clear()


class Program:
    """A program on its way: one at a time.

    Args:
        command: What follows ``python``: the path of a script, ``-m module`` or ``-c code``, with
            the program's arguments.
        folder: Where it runs.
        environment: Its environment; that of this process without it.
        limit: Longest that it runs, in seconds; it is killed then.
    """

    def __init__(
        self,
        *command: str | Path,
        folder: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        limit: int = 600,
    ) -> None:
        self.command = [*map(str, command)]
        self._place = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._place.name, name) for name in ("out", "err"))
        self._out.touch()
        self._err.touch()
        asked = {
            "command": self.command,
            "folder": str(folder),
            "environment": dict(os.environ if environment is None else environment),
            "streams": [os.devnull, str(self._out), str(self._err)],
            "limit": limit,
        }
        stdin, stdout = server().stdin, server().stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps(asked), file=stdin, flush=True)
        self.pid = int(stdout.readline())
        self._stdout = stdout

    def wait(self, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
        """What it has printed, and its exit status."""
        status = int(self._stdout.readline())
        out, err = (path.read_text(encoding) for path in (self._out, self._err))
        self._place.cleanup()
        return subprocess.CompletedProcess(self.command, status, out, err)
