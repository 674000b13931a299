"""The clock as a callback of Lightning, and of the Trainer of Hugging Face."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manifold_sde.errors import ArgumentError, MissingDependencyError
from manifold_sde.training.clock import MixingClock
from manifold_sde.writing import replacing

_FILE = "mixing_clock.pt"


def lightning_callback(inputs: Any = None, *, optimizer: int = 0, **options: Any) -> LightningClock:
    """Make a callback of Lightning that keeps a clock of the module in training.

    Its numbers are logged by ``log_dict`` every ``log_every_n_steps`` steps, and its state is in
    Lightning's checkpoints. ``callback.clock`` is the clock, for ``audit(callback.clock)``.

    Args:
        inputs: A batch of what the module is called with, to find its scale-invariant groups; by
            default that of the first batch, whose first part it is if it has several.
        optimizer: Which of the trainer's optimizers it watches.
        **options: Of :class:`~manifold_sde.training.MixingClock`: ``groups``, ``sampling``, ...

    Raises:
        MissingDependencyError: If Lightning is not installed.
    """
    base = _class_of(("lightning.pytorch", "pytorch_lightning"), "Callback", "lightning")
    made: LightningClock = _joined(LightningClock, base)(inputs, optimizer, options)
    return made


def trainer_callback(
    inputs: Any = None,
    *,
    report: Callable[[dict[str, float]], object] | None = None,
    **options: Any,
) -> TrainerClock:
    """Make a callback of Hugging Face's Trainer that keeps a clock of the model in training.

    Its numbers are added to what the trainer logs of the training, for the callbacks after this one
    and in ``trainer.state.log_history``; its state is saved into the folder of each checkpoint.
    ``callback.clock`` is the clock, for ``audit(callback.clock)``.

    Args:
        inputs: A batch of what the model is called with, as a mapping, to find its scale-invariant
            groups.
        report: What else the numbers are given to, such as ``wandb.log``.
        **options: Of :class:`~manifold_sde.training.MixingClock`: ``groups``, ``sampling``, ...

    Raises:
        ArgumentError: If neither inputs nor groups are given.
        MissingDependencyError: If transformers is not installed.
    """
    if inputs is None and options.get("groups") is None:
        raise ArgumentError(
            "which weights are scale-invariant is not known",
            received="neither inputs nor groups",
            expected="a batch of inputs to measure them, or the groups",
            remedy="trainer_callback(inputs=data_collator([dataset[0], dataset[1]]))",
        )
    base = _class_of(("transformers",), "TrainerCallback", "transformers")
    made: TrainerClock = _joined(TrainerClock, base)(inputs, report, options)
    return made


class ClockKeeper:
    """A clock that is made when a training begins.

    Args:
        inputs: A batch of inputs, or ``None``.
        options: Of the clock.

    Attributes:
        clock: The clock; ``None`` before the training begins.
    """

    def __init__(self, inputs: Any, options: Mapping[str, Any]) -> None:
        self.inputs = inputs
        self.options = dict(options)
        self.clock: MixingClock | None = None
        self.loaded: dict[str, Any] | None = None

    def begin(self, model: nn.Module, optimizer: Any, inputs: Any) -> None:
        """Make the clock, and go on from a state that was loaded."""
        inputs = _moved(inputs, next(model.parameters()).device)
        self.clock = MixingClock(model, optimizer, inputs=inputs, **self.options)
        if self.loaded is not None:
            self.clock.load_state_dict(self.loaded)
            self.loaded = None

    def end(self) -> None:
        """Stop to watch the optimizer; the clock can still be read."""
        if self.clock is not None:
            self.clock.detach()


class LightningClock(ClockKeeper):
    """The hooks of Lightning's ``Callback``; see :func:`lightning_callback`."""

    def __init__(self, inputs: Any, index: int, options: Mapping[str, Any]) -> None:
        super().__init__(inputs, options)
        self.index = index
        self._begun = False
        self._logged = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """A new training has a new clock."""
        self.end()
        self._begun, self._logged = False, 0

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Make the clock before the first step."""
        if self._begun:
            return
        count = len(trainer.optimizers)
        if not 0 <= self.index < count:
            raise ArgumentError(
                "the trainer does not have this optimizer",
                received=f"optimizer={self.index}",
                expected=f"the place of one of its {count}, counted from 0",
                remedy="lightning_callback(optimizer=0)",
            )
        inputs = self.inputs
        if inputs is None:
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        self.begin(pl_module, trainer.optimizers[self.index], inputs)
        self._begun = True

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the numbers, where the trainer logs."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        if self.clock is not None and step != self._logged and every and step % every == 0:
            self._logged = step
            pl_module.log_dict(self.clock.values())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop to watch the optimizer."""
        self.end()

    def state_dict(self) -> dict[str, Any]:
        """The clock's state, for a checkpoint."""
        if self.clock is not None:
            return self.clock.state_dict()
        return self.loaded or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state until there is a clock."""
        self.loaded = state_dict or None


class TrainerClock(ClockKeeper):
    """The events of Hugging Face's ``TrainerCallback``; see :func:`trainer_callback`."""

    def __init__(
        self,
        inputs: Any,
        report: Callable[[dict[str, float]], object] | None,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(inputs, options)
        self.report = report

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: nn.Module,
        optimizer: Any,
        **others: Any,
    ) -> None:
        """Make the clock; in a run that goes on, with the state beside the checkpoint."""
        self.end()
        file = self._file(args, state)
        if state.global_step and file.exists():
            self.loaded = torch.load(file, weights_only=True)
        self.begin(model, optimizer, self.inputs)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any
    ) -> None:
        """Add the numbers to what is logged of the training."""
        if self.clock is None or logs is None or "loss" not in logs:
            return
        numbers = self.clock.values()
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)
        if self.report is not None:
            self.report(numbers)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Save the clock's state into the folder of the checkpoint."""
        if self.clock is not None and state.is_world_process_zero:
            with replacing(self._file(args, state)) as file:
                torch.save(self.clock.state_dict(), file)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stop to watch the optimizer."""
        self.end()

    @staticmethod
    def _file(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE


def _class_of(packages: tuple[str, ...], name: str, extra: str) -> Any:
    """A class of the first of these packages that is installed."""
    reasons = []
    for package in packages:
        try:
            return getattr(importlib.import_module(package), name)
        except ImportError as error:
            reasons.append(error)
    raise MissingDependencyError(
        f"this callback needs {extra}, which is not installed",
        received=str(reasons[0]),
        expected=" or ".join(packages),
        remedy=f'pip install "manifold_sde[{extra}]", or MixingClock(model, optimizer) by hand',
    ) from reasons[0]


@functools.cache
def _joined(hooks: type, base: type) -> Any:
    """A class of both; Lightning knows the state of a callback by its name."""
    return type("MixingClockCallback", (hooks, base), {"__doc__": hooks.__doc__})


def _moved(inputs: Any, device: torch.device) -> Any:
    """The same on another device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: _moved(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_moved(value, device) for value in inputs)
    return inputs
