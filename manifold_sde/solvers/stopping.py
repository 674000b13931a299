"""Runs that are stopped by Ctrl-C or SIGTERM: nothing is lost, and it is said what goes on."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from manifold_sde.errors import Terminated, WriteError

_CHECKPOINT_SECONDS = 20.0


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, which would end the process on the spot, leaves this block as an exception.

    So it is in the main thread, and where nobody else handles it.

    Raises:
        Terminated: Uncaught, it ends the process with status 143.
    """
    alone = threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is under way now ends by itself
    raise Terminated


class Autosave:
    """Saves a run now and then, and where it is stopped by Ctrl-C or SIGTERM.

    A block of steps may be half done then: the state before it is whole, as no step changes a
    tensor.

    Args:
        save: Saves a state; ``None`` where nothing is saved.
        state: The state at the beginning.
    """

    def __init__(self, save: Callable[[Any], object] | None, state: Any) -> None:
        self._save = save
        self._state = state
        self._saved = time.monotonic()

    def __enter__(self) -> Autosave:
        return self

    def keep(self, state: Any) -> None:
        """Note that a block is done, and save the state where it is time to.

        Raises:
            WriteError: If it cannot be written.
        """
        self._state = state
        if self._save is not None and time.monotonic() - self._saved > _CHECKPOINT_SECONDS:
            self._save(state)
            self._saved = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._save is not None and isinstance(error, (KeyboardInterrupt, SystemExit)):
            with contextlib.suppress(WriteError):
                self._save(self._state)


class Stoppable:
    """A run that may be stopped.

    Ctrl-C leaves as a KeyboardInterrupt that says what was saved, and whose traceback ends here.
    Where there is something to save or to end, SIGTERM leaves as an exception too.

    Args:
        checkpoint: Where the run is saved, or ``None``.
        workers: Whether other processes work for it.
    """

    def __init__(self, checkpoint: Path | None, *, workers: bool = False) -> None:
        self.checkpoint = checkpoint
        watched = workers or checkpoint is not None
        self._signal = terminable() if watched else contextlib.nullcontext()

    def __enter__(self) -> None:
        self._signal.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._signal.__exit__(None, None, None)
        if isinstance(error, KeyboardInterrupt) and not error.args:
            raise KeyboardInterrupt(self._said()) from None

    def _said(self) -> str:
        if self.checkpoint is None:
            return "stopped; nothing was saved: checkpoint= keeps what is done"
        return f"stopped; what was done is in {self.checkpoint}, and the same call goes on from it"
