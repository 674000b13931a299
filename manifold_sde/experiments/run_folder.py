"""Where a command writes: a folder for each run, with what was run, so that it can be run again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from manifold_sde.errors import ArgumentError, CheckpointError, ManifoldSDEError
from manifold_sde.solvers.archive import versions
from manifold_sde.writing import write_text

#: Folder in which runs get folders of their own.
RESULTS = Path("results")
#: Options that say where a run is, and not what it is.
_WHERE = {"out", "output", "resume", "overwrite", "restart", "config", "ctx"}


@dataclass(frozen=True)
class Run:
    """A run of a command, and where it writes.

    Attributes:
        folder: The folder, made when something is written.
        command: The command, such as "figure 2".
        options: Its options, as ``--config`` takes them back.
        overwrite: Whether results that are there may be overwritten.
        started: When it began, in seconds of the clock that measures time.
    """

    folder: Path
    command: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    overwrite: bool = False
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(
        cls,
        command: str,
        subject: str,
        parameters: Mapping[str, Any],
        *,
        out: Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Run:
        """The run of a command, in a folder of its own unless one is given.

        Args:
            command: The command.
            subject: What it is about, for the folder's name.
            parameters: All its parameters by name.
            out: The folder that was asked for.
            resume: Whether to go on with the last run that was stopped and has these options.
            overwrite: Whether results that are there may be overwritten.

        Raises:
            ArgumentError: If there is no such run.
        """
        options = {k: plain for k, v in parameters.items() if (plain := _plain(v)) is not None}
        options = {name: value for name, value in options.items() if name not in _WHERE}
        if out is not None:
            return cls(out, command, options, overwrite)
        name = "_".join(filter(None, [command.replace(" ", ""), subject]))
        if resume:
            return cls(_stopped(name, command, options), command, options, overwrite)
        moment = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
        folder, number = RESULTS / f"{name}_{moment}", 2
        while folder.exists():
            folder, number = RESULTS / f"{name}_{moment}_{number}", number + 1
        return cls(folder, command, options, overwrite)

    def require_free(self, stem: str) -> None:
        """Refuse to overwrite results of a name, unless it was said or they are unfinished.

        Raises:
            ArgumentError: If there are such results.
        """
        there = sorted(path.name for path in self.folder.glob(f"{stem}.*") if path.is_file())
        if self.overwrite or not there:
            return
        record = self.folder / f"{stem}.toml"
        if record.exists() and not _read(record).get("finished", True):
            return
        raise ArgumentError(
            "there are results of this name",
            received=f"{self.folder / stem}: {', '.join(there)}",
            expected="a folder without them",
            remedy="--overwrite, another folder, or none: each run then has one of its own",
        )

    @contextlib.contextmanager
    def noted(self, stem: str, settings: object = None) -> Iterator[None]:
        """Note what is run before and after; what is refused leaves nothing behind.

        Args:
            stem: Name of the results.
            settings: As of :meth:`note`.
        """
        path = self.note(stem, settings, finished=False)
        try:
            yield
        except ManifoldSDEError:
            if not any(self.folder.glob("*.unfinished")):
                path.unlink()
                with contextlib.suppress(OSError):  # it holds something else
                    self.folder.rmdir()
            raise
        self.note(stem, settings, finished=True)

    def note(self, stem: str, settings: object = None, *, finished: bool) -> Path:
        """Write what is run to a file of TOML, which ``--config`` takes back; its path.

        Args:
            stem: Name of the results.
            settings: The settings that follow from the options, if they are a dataclass.
            finished: Whether the results are there.
        """
        resolved = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else {}  # type: ignore[arg-type]
        record: dict[str, Any] = {
            "command": self.command,
            "finished": finished,
            "time": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
            "seconds": round(time.perf_counter() - self.started, 1),
            "options": self.options,
            "resolved": resolved,
            "versions": versions(),
        }
        path = self.folder / f"{stem}.toml"
        head = f"# manifold-sde {self.command} --config {path.name} runs it again.\n"
        write_text(path, head + "\n".join(_toml(record)) + "\n")
        return path


def _stopped(name: str, command: str, options: Mapping[str, Any]) -> Path:
    """The folder of the last run of a command with some options that was stopped."""
    for record in sorted(RESULTS.glob(f"{name}_*/*.toml"), reverse=True):
        found = _read(record)
        same = (found.get("command"), found.get("options")) == (command, dict(options))
        if same and not found.get("finished", True):
            return record.parent
    raise ArgumentError(
        "there is no stopped run to go on with",
        received=f"--resume, and in {RESULTS} no such run of {command!r} with these options",
        expected="a run that was stopped, by Ctrl-C or otherwise",
        remedy="leave --resume out",
    )


def options_of(path: Path, command: str) -> dict[str, Any]:
    """The options that a file of TOML gives to a command.

    Raises:
        ArgumentError: If there is no such file, or it is that of another command.
        CheckpointError: If it cannot be read.
    """
    if not path.is_file():
        raise ArgumentError(
            "there is no such file",
            received=f"--config {path}",
            expected="the .toml of an earlier run",
            remedy="it lies beside the results",
        )
    found = _read(path)
    options = found.get("options", found)
    if found.get("command", command) != command or not isinstance(options, dict):
        raise ArgumentError(
            "the configuration is that of another command",
            received=f"--config {path}, of {found.get('command')!r}",
            expected=f"one of {command!r}",
            remedy=f"manifold-sde {found.get('command')} --config {path}",
        )
    return dict(options)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "the configuration cannot be read",
            received=f"{path}: {error}",
            expected="a file of TOML, as a run writes it",
            remedy="mend it or leave it out",
        ) from error


def _plain(value: Any) -> Any:
    """A value as TOML has it; ``None`` for what it has not."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if isinstance(value, (bool, int, float, str)) else None


def _toml(record: Mapping[str, Any], path: str = "") -> Iterator[str]:
    r"""Lines of TOML of nested dictionaries; what is ``None`` is left out.

    >>> print("\n".join(_toml({"a": 1.0, "b": None, "c": {"d": [True, "x"]}})))
    a = 1.0
    <BLANKLINE>
    [c]
    d = [true, "x"]
    """
    tables = {name: value for name, value in record.items() if isinstance(value, Mapping)}
    for name, value in record.items():
        if name not in tables and (plain := _plain(value)) is not None:
            yield f"{_key(name)} = {_value(plain)}"
    for name, table in tables.items():
        full = f"{path}{_key(name)}"
        yield from ("", f"[{full}]", *_toml(table, f"{full}."))


def _key(name: object) -> str:
    text = str(name)
    return text if text.replace("_", "a").replace("-", "a").isalnum() else json.dumps(text)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_value(part) for part in value if part is not None)}]"
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)
