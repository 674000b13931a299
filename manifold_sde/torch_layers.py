"""Layers that torch cannot differentiate three times or batch, from functions where it can.

In torch 2.13 ``scaled_dot_product_attention`` and ``glu`` have no forward-mode derivatives,
recurrent layers and their cells no rules for batches, and layouts of memory are refused in batches.
The second derivatives of ``prelu`` at several points along several directions are those of other
points, or raise; ``celu`` divides by its alpha in single precision.
What stands here computes the same (tests/networks/test_modules.py).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_State = tuple[Tensor, ...]
_Step = Callable[[Tensor, _State, Sequence[Tensor]], _State]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p or (is_causal and attn_mask is not None):
        return NotImplemented
    if enable_gqa:
        heads = query.shape[-3]
        key, value = (t.repeat_interleave(heads // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is None:
        return torch.softmax(scores, -1) @ value
    masked = attn_mask.dtype is torch.bool
    scores = scores.masked_fill(~attn_mask, -torch.inf) if masked else scores + attn_mask
    # A query that may look at nothing gets 0.
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), -1)
    return weights.masked_fill(nothing, 0.0) @ value


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    channels = (-1, *[1] * (input.dim() - 2)) if weight.numel() > 1 and input.dim() > 1 else ()
    return torch.where(input > 0.0, input, weight.reshape(channels) * input)


def _celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    if inplace:
        return NotImplemented
    below = alpha * torch.expm1(input.clamp(max=0.0) / alpha)
    return torch.where(input > 0.0, input, below)


def _in_usual_layout(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """A copy of a tensor in a layout of memory, which changes no value, as one in the usual one."""
    usual = (None, torch.contiguous_format, torch.preserve_format)

    def run(tensor: Tensor, *given: Any, memory_format: Any = None, **named: Any) -> Any:
        return NotImplemented if memory_format in usual else function(tensor, *given, **named)

    return run


# Recurrent layers. The weights of a step are w_ih, w_hh, and b_ih, b_hh where there are biases.


def _halves(x: Tensor, h: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What input and hidden state give to the gates."""
    biases = weights[2:4] if len(weights) > 3 else (None, None)
    return (
        functional.linear(x, weights[0], biases[0]),
        functional.linear(h, weights[1], biases[1]),
    )


def _simple(activation: Callable[[Tensor], Tensor]) -> _Step:
    def step(x: Tensor, state: _State, weights: Sequence[Tensor]) -> _State:
        of_input, of_state = _halves(x, state[0], weights)
        return (activation(of_input + of_state),)

    return step


def _gru(x: Tensor, state: _State, weights: Sequence[Tensor]) -> _State:
    of_input, of_state = (part.chunk(3, -1) for part in _halves(x, state[0], weights))
    reset, update = (torch.sigmoid(of_input[i] + of_state[i]) for i in (0, 1))
    new = torch.tanh(of_input[2] + reset * of_state[2])
    return (new + update * (state[0] - new),)


def _lstm(x: Tensor, state: _State, weights: Sequence[Tensor]) -> _State:
    of_input, of_state = _halves(x, state[0], weights)
    i, f, g, o = (of_input + of_state).chunk(4, -1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    hidden = torch.sigmoid(o) * torch.tanh(cell)
    # An odd weight more projects the hidden state.
    return (hidden @ weights[-1].mT if len(weights) % 2 else hidden, cell)


def _layers(step: _Step) -> Callable[..., Any]:
    """Layers of steps, in one direction or both, with the arguments of ``torch.lstm``."""

    def run(*given: Any) -> Any:
        packed, dropped = not isinstance(given[3], bool), given[5] and given[6]
        if packed or dropped:
            return NotImplemented
        x, starts, weights, _, n_layers, _, _, both, batch_first = given
        x = x.transpose(0, 1) if batch_first else x
        starts = (starts,) if isinstance(starts, Tensor) else starts
        count = len(weights) // (n_layers * (1 + both))
        ends: list[_State] = []
        for _layer in range(n_layers):
            outputs = []
            for backward in range(1 + both):
                own = weights[len(ends) * count : (len(ends) + 1) * count]
                state, found = tuple(s[len(ends)] for s in starts), []
                for row in reversed(x.unbind()) if backward else x.unbind():
                    state = step(row, state, own)
                    found.append(state[0])
                ends.append(state)
                outputs.append(torch.stack(found[::-1] if backward else found))
            x = torch.cat(outputs, -1)
        return x.transpose(0, 1) if batch_first else x, *map(torch.stack, zip(*ends, strict=True))

    return run


def _cell(step: _Step) -> Callable[..., Any]:
    """One step, with the arguments of ``torch.lstm_cell``."""

    def run(input: Tensor, hx: Any, *weights: Any) -> Any:
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        result = step(input, state, [w for w in weights if w is not None])
        return result if len(result) > 1 else result[0]

    return run


def _opened(function: Any) -> Callable[..., Any]:
    """A copy of a Python function of torch whose calls are seen by a mode that is in force."""
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    code, defaults = function.__code__, function.__defaults__
    return types.FunctionType(code, names, function.__name__, defaults, function.__closure__)


#: What takes the place of a function, by torch's own object; ``NotImplemented`` leaves a call to
#: torch.
REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    functional.scaled_dot_product_attention: _attention,
    functional.glu: _glu,
    functional.celu: _celu,
    torch.celu: _celu,
    torch.prelu: _prelu,
    Tensor.prelu: _prelu,
    Tensor.contiguous: _in_usual_layout(Tensor.contiguous),
    Tensor.clone: _in_usual_layout(Tensor.clone),
    torch.clone: _in_usual_layout(torch.clone),
    Tensor.to: _in_usual_layout(
        lambda x, *given, **named: x.to(*given, **named) if given or named else x
    ),
    torch.rnn_tanh: _layers(_simple(torch.tanh)),
    torch.rnn_relu: _layers(_simple(torch.relu)),
    torch.gru: _layers(_gru),
    torch.lstm: _layers(_lstm),
    torch.rnn_tanh_cell: _cell(_simple(torch.tanh)),
    torch.rnn_relu_cell: _cell(_simple(torch.relu)),
    torch.gru_cell: _cell(_gru),
    torch.lstm_cell: _cell(_lstm),
}
#: Functions within which others have to be replaced.
OPENED = {functional.multi_head_attention_forward: _opened(functional.multi_head_attention_forward)}
