"""One thread of torch, for numbers that are the same to the bit whoever computes them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.RLock()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch in this block, and one such block at a time in a process.

    Where a tensor is cut for several threads decides which of its numbers go through vector
    instructions, and so the last bits.
    """
    with _lock:
        threads = torch.get_num_threads()
        if threads == 1:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
