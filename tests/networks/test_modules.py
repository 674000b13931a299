"""What becomes of modules as people build them: torch's own SGD and differences as the truth."""

import pytest
import torch
from torch import Tensor, nn

from manifold_sde import errors, torch_layers, torch_norms
from manifold_sde.torch_norms import elementary
from tests.modules import (
    BIAS,
    CAUSAL,
    CLASSES,
    MODULES,
    compare_with_torch,
    normal,
    prepared,
    problem_of,
    table,
    what_becomes_of,
)

TABLE = table()


def test_the_page_has_all_modules() -> None:
    assert list(TABLE) == list(MODULES)
    assert {what.split(";")[0] for what in TABLE.values()} == {"works", "replaced", "refused"}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_works_is_replaced_or_is_refused_with_a_way_out_that_works(name: str) -> None:
    case = MODULES[name]
    what, module, problem = what_becomes_of(case)
    assert what == TABLE[name]
    assert (problem is None) == (case.other is not None)
    if case.other is not None:
        module = prepared(case.other)
        problem = problem_of(module, case.inputs)
    assert problem is not None
    x = problem.vector(module)
    for point in (x, x + 0.3 * normal(len(x))):
        assert max(problem.derivative_errors(point).values()) < 1e-7
    compare_with_torch(problem, module, case.inputs, CLASSES)


@pytest.mark.parametrize(
    "name",
    ["`MultiheadAttention`, masked, without weights", "`GRU`", "`LSTMCell`"],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_broken_twin_without_replacements(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in torch_layers.REPLACEMENTS:
        monkeypatch.delitem(torch_norms._REPLACEMENTS, function)
    monkeypatch.setattr(torch_layers, "OPENED", {})
    with pytest.raises(errors.DifferentiationError):
        problem_of(prepared(MODULES[name].make), MODULES[name].inputs)


def test_broken_twin_of_the_comparison_with_torch() -> None:
    """Attention with another scale is found."""
    case = MODULES["`scaled_dot_product_attention`"]
    module = prepared(case.make)
    problem = problem_of(module, case.inputs)
    with torch.no_grad():
        module.qkv.weight[:4] *= 1.0 + 1e-9  # type: ignore[union-attr, index]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            problem.outputs(problem.vector()), module(case.inputs), rtol=1e-12, atol=1e-12
        )


def attend(**options: object) -> object:
    return lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, **options)


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, ((3, 4), (3, 4), (3, 5))),
        ({"is_causal": True}, ((2, 2, 5, 4), (2, 2, 3, 4), (2, 2, 3, 4))),
        ({"scale": 2.0}, ((2, 3, 4), (2, 3, 4), (2, 3, 4))),
        ({"enable_gqa": True}, ((2, 4, 3, 2), (2, 2, 3, 2), (2, 2, 3, 2))),
        ({"attn_mask": CAUSAL.tril(-1)}, ((2, 3, 4), (2, 3, 4), (2, 3, 4))),
        ({"attn_mask": BIAS}, ((2, 2, 3, 4), (2, 2, 3, 4), (2, 2, 3, 4))),
        ({"attn_mask": BIAS - torch.inf}, ((3, 4), (3, 4), (3, 4))),
    ],
)
def test_attention_computes_the_same(
    options: dict[str, object], shapes: tuple[tuple[int, ...], ...]
) -> None:
    tensors = [normal(*shape) for shape in shapes]

    def function(*given: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(*given, **options)  # type: ignore[arg-type]

    replaced = elementary(function, *tensors)
    assert replaced is not function
    torch.testing.assert_close(replaced(*tensors), function(*tensors), rtol=1e-13, atol=1e-13)


def test_what_is_left_to_torch() -> None:
    """Dropout in attention, packed sequences, and the usual layout."""
    q = normal(2, 3, 4)
    lengths = torch.tensor([3, 1])
    packed = nn.utils.rnn.pack_padded_sequence(q, lengths, batch_first=True)
    layer = nn.GRU(4, 3, batch_first=True).double()

    def gru(_: Tensor) -> Tensor:
        return layer(packed)[1]

    def dropped(t: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(t, t, t, dropout_p=0.5)

    def copied(t: Tensor) -> Tensor:
        return t.mT.contiguous().clone().to(torch.float64)

    for function in (gru, dropped, copied):
        assert elementary(function, q) is function
