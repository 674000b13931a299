"""Files that are written whole or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from manifold_sde.arguments import check_path
from manifold_sde.errors import ArgumentError, CheckpointError, WriteError, printable

if sys.platform != "win32":  # nothing is locked there
    import fcntl

#: What a file system answers that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


def unwritable(path: str | Path, error: OSError) -> WriteError:
    """What is said of a file or folder that cannot be written."""
    remedy = "a path on a file system that works; what stood there before is as it was"
    if error.errno in _NO_ROOM:
        remedy = "make room, or name another disk; what stood there before is as it was"
    elif error.errno in _NOT_ALLOWED:
        remedy = "a folder in which this user may write"
    elif error.errno in _IN_THE_WAY:
        remedy = "another name: a file stands where a folder has to be, or a folder for the file"
    found = WriteError(
        "the file cannot be written",
        received=f"{path}: {error.strerror or type(error).__name__}",
        expected="a path that this process, and all workers, can write to",
        remedy=remedy,
    )
    found.errno = error.errno
    return found


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file that takes its place in one step, once all of it is on the disk.

    It is written beside its place, whose folder is made. What processes that were killed while
    they wrote this file have left there is removed.

    Args:
        path: Where to.

    Raises:
        WriteError: If it cannot be written; what stood there before is as it was.
    """
    path = check_path("path", path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, glob.escape(path.name))
        with temporary.open("xb") as file:
            _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, in one step.

    Raises:
        WriteError: If it cannot be written.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_form(path: str | Path, forms: Mapping[str, Callable[[], str]]) -> None:
    """Write a text in the form that the ending of the file names.

    Args:
        path: Where to.
        forms: What makes the text, by the ending.

    Raises:
        ArgumentError: If the file has another ending.
        WriteError: If it cannot be written; what stood there before is as it was.
    """
    target = check_path("path", path)
    if target.suffix not in forms:
        raise ArgumentError(
            "the form of the report is not known",
            received=str(path),
            expected=f"a file that ends in {', '.join(forms)}",
            remedy='report.save("report.html")',
        )
    write_text(target, forms[target.suffix]() + "\n")


def plain(value: object, *, named: bool = False) -> Any:
    """What JSON can hold: NaN is None, and so is infinity.

    Args:
        value: Mappings, lists and tuples of anything.
        named: Whether infinity is "Infinity" or "-Infinity" instead, which ``float`` reads back.
    """
    if isinstance(value, Mapping):
        return {name: plain(one, named=named) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one, named=named) for one in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) or not named else "Infinity" if value > 0 else "-Infinity"


def sweep(folder: Path, pattern: str) -> None:
    """Remove unfinished files of a pattern of names that no process writes any more."""
    for left in folder.glob(f".{pattern}.????????"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            if _lock(file):
                left.unlink()


@contextlib.contextmanager
def held(lock: Path, what: Path, *, readable: bool) -> Iterator[None]:
    """Keep something for this run alone.

    The lock goes with the process, however that ends; its file says whose it is.

    Args:
        lock: File of the lock, whose folder is made; removed at the end.
        what: What is kept, for the error.
        readable: Whether there is something to read, so that a place where nothing can be written
            is no fault yet.

    Raises:
        CheckpointError: If another run keeps it; it is named.
        WriteError: If the lock cannot be written.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = _taken(lock, what)
    except OSError as error:
        if not readable or error.errno not in _NOT_ALLOWED:
            raise unwritable(what, error) from error
        file = None
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)
            file.close()


def _taken(lock: Path, what: Path) -> BinaryIO:
    """The file of a lock that is ours."""
    while True:
        file = lock.open("a+b")
        if not _lock(file):
            file.seek(0)
            text = file.read(1000)
            file.close()
            raise _in_use(what, text)
        # Whoever held it before removes the file: then the lock is on a file that is gone.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                file.truncate(0)
                owner = {"pid": os.getpid(), "host": socket.gethostname()}
                file.write(json.dumps(owner).encode())
                file.flush()
                return file
        file.close()


def _in_use(what: Path, text: bytes) -> CheckpointError:
    whose = "another process"
    with contextlib.suppress(ValueError, KeyError, TypeError):
        owner = json.loads(text)
        own = (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
        whose = f"process {owner['pid']} on {owner['host']}" + (", this one" if own else "")
    return CheckpointError(
        "another run writes this checkpoint",
        received=printable(f"{what}, in use by {whose}"),
        expected="a checkpoint for each run that is under way",
        remedy="wait until that run has ended, or name another checkpoint",
    )


def _lock(file: BinaryIO) -> bool:
    """Lock an open file, if nobody else has locked it."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
