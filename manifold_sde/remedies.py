"""What torch says when it cannot evaluate or differentiate a loss, and what to write instead."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from manifold_sde.errors import DifferentiationError, ManifoldSDEError

#: What a loss has to be.
DIFFERENTIABLE = "a function that torch.func can batch and differentiate three times"
#: What to write instead where a derivative is cut.
KEEP_DERIVATIVES = (
    "let every value that depends on x keep its derivative: no detach(), .data, .item(), "
    "torch.no_grad(), torch.tensor(...) or straight-through estimator"
)
#: What to write instead, by what torch says when it fails.
_REMEDIES = (
    (
        ("memory_format", "view size is not compatible"),
        "no memory_format inside the loss: x.contiguous(); the layout changes no value",
    ),
    (
        ("inplace", "in-place", "ZeroTensors"),
        "nothing written into a tensor: torch.cat, torch.stack or torch.where build a new one, "
        "and x / (x * x).sum().sqrt() is the elementary normalisation",
    ),
    (
        ("nference tensor", "InferenceMode"),
        "no torch.inference_mode() inside the loss, which cuts derivatives",
    ),
    (
        (".item()", "data-dependent"),
        "no .item(), float(x) or `if` on values: torch.where(condition, a, b)",
    ),
    (
        (".data", "`data`"),
        "no .data: the value itself; modules are made and converted outside the loss",
    ),
    (
        ("dynamic shape",),
        "no boolean mask as an index: torch.where(mask, a, b)",
    ),
    (
        ("random operation",),
        "a loss is a fixed function of x: switch dropout off, draw random constants outside",
    ),
    (
        ("autograd.Function", "jvp function", "once_differentiable"),
        "ordinary operations in place of the custom autograd.Function, and no "
        "torch.utils.checkpoint; or give it setup_context, jvp and generate_vmap_rule = True, with "
        "backward and jvp in differentiable operations",
    ),
    (
        ("forward AD", "not implemented", "not differentiable"),
        "write the operation that torch names in elementary ones: torch.where on the two branches "
        "of huber_loss, ((a[:, None] - b) ** 2).sum(-1).sqrt() for cdist, nn.Embedding and "
        ".mean(1) for EmbeddingBag",
    ),
    (
        ("saved tensor hooks",),
        "no torch.utils.checkpoint and no saved_tensors_hooks: call the layers themselves, as "
        "model.gradient_checkpointing_disable() does",
    ),
    (
        ("storage", "numpy"),
        "torch operations from x to the result: no numpy, no float(...); no packed sequences: the "
        "padded ones, and of each the output at its last place",
    ),
    (
        ("dtype", "scalar type", "device"),
        "constants of the dtype and device of x: Z.to(x) in place of Z",
    ),
)


def remedy(message: str) -> str:
    """What to write instead, from what torch said when a loss failed."""
    for fragments, advice in _REMEDIES:
        if any(fragment in message for fragment in fragments):
            return advice
    return "write the loss in elementary torch operations on its argument"


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def torch_errors_of(name: str | None) -> Iterator[None]:
    """Tell what torch raises in this block as the fault of the loss or the noise of a problem.

    Raises:
        DifferentiationError: With what to write instead.
    """
    try:
        yield
    except ManifoldSDEError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise DifferentiationError(
            f"torch cannot evaluate or differentiate the loss or the noise of {name!r}",
            received=first_line(error),
            expected="functions in plain torch that follow the dtype and device of x",
            remedy=remedy(str(error)),
        ) from error


@contextlib.contextmanager
def differentiating(order: int) -> Iterator[None]:
    """Tell what is raised in this block as that a derivative of the loss of this order fails.

    Raises:
        DifferentiationError: With what to write instead.
    """
    try:
        yield
    except (ManifoldSDEError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the loss is the user's, and raises what it likes
        raise not_differentiable(error, order) from error


def not_differentiable(error: Exception, order: int) -> DifferentiationError:
    """The error for a loss whose derivative of an order raised."""
    return DifferentiationError(
        f"the loss cannot be differentiated: its {ordinal(order)} derivative fails",
        received=first_line(error),
        expected=DIFFERENTIABLE,
        remedy=remedy(str(error)),
    )


def ordinal(order: int) -> str:
    """The order of a derivative in words."""
    return ("first", "second", "third")[order - 1]
