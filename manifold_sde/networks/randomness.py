"""Random numbers that a forward pass draws, seen by the generators that it moves."""

from __future__ import annotations

import gc
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from manifold_sde.errors import ArgumentError


class _Generator(NamedTuple):
    name: str
    state: Callable[[], Any]
    restore: Callable[[Any], object]


class Generators:
    """The generators of random numbers that there are: a forward pass must not move them.

    A module that draws is seen by a generator that moves, in the first pass, however rarely its
    output changes. Looked at are those of torch for the CPU and for CUDA where it is in use,
    Python's ``random``, NumPy's global one, all other generators of Python and NumPy, and those of
    torch that are passed to a function; not those that ``gc.freeze`` hides.
    """

    def __init__(self) -> None:
        self._all = list(_generators())

    @contextmanager
    def unmoved_by(self, what: str) -> Iterator[None]:
        """Refuse what is done inside if it draws; the generators are as before then.

        Args:
            what: What is done inside, for messages.

        Raises:
            ArgumentError: With the generators that moved.
        """
        before = [pickle.dumps(generator.state()) for generator in self._all]
        moved = []
        watch = _Watch()
        try:
            with watch:
                yield
        finally:
            for generator, state in zip(self._all, before, strict=True):
                if pickle.dumps(generator.state()) != state:
                    moved.append(generator.name)
                    generator.restore(pickle.loads(state))
        if watch.passed:
            moved.append("a torch.Generator")
        if moved:
            raise ArgumentError(
                f"{what} is random",
                received=f"random numbers drawn in a forward pass, from {', '.join(moved)}",
                expected="a fixed function of the weights",
                remedy="module.eval() switches dropout and the like off; random constants are "
                "drawn once, outside, and kept as a buffer",
            )


class _Watch(TorchFunctionMode):
    """Notes whether a generator is passed to a function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = (*args, *(kwargs or {}).values())
        self.passed |= any(isinstance(value, torch.Generator) for value in given)
        return func(*args, **(kwargs or {}))


def _generators() -> Iterator[_Generator]:
    yield _Generator(
        "torch's generator",
        lambda: torch.get_rng_state().numpy(),
        lambda state: torch.set_rng_state(torch.from_numpy(state)),
    )
    if torch.cuda.is_initialized():
        yield _Generator(
            "torch's generator for CUDA",
            lambda: [state.numpy() for state in torch.cuda.get_rng_state_all()],
            lambda states: torch.cuda.set_rng_state_all([torch.from_numpy(s) for s in states]),
        )
    # The global ones of Python and NumPy; they are objects among others, but where gc is frozen.
    both: dict[Any, str] = {
        random.getstate.__self__: "Python's random",  # type: ignore[attr-defined]
        np.random.get_state.__self__: "numpy.random",  # type: ignore[attr-defined]
    }
    for found, name in both.items():
        yield _Generator(name, *_accessors(found))
    kinds = {random.Random, np.random.RandomState, np.random.Generator}
    objects = gc.get_objects()
    for found in compress(objects, map(kinds.__contains__, map(type, objects))):
        if found not in both:
            yield _Generator(f"a {type(found).__name__} of its own", *_accessors(found))


def _accessors(found: Any) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    if isinstance(found, random.Random):
        return found.getstate, found.setstate
    if isinstance(found, np.random.RandomState):
        return lambda: found.get_state(legacy=False), found.set_state
    bits = found.bit_generator
    return lambda: bits.state, lambda state: setattr(bits, "state", state)
