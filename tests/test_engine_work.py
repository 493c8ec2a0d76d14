"""Multiply-accumulates of exported operators against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_calls import compiled, exported_call
from helpers_engine import native_of
from helpers_patterns import Net, Up, smooth
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.engine.export import Exported
from adalayer_native.engine.work import multiply_accumulates


class Call(nn.Module):
    """A function, and a module that it may use."""

    def __init__(self, function: Callable[..., Any], module: nn.Module | None = None) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.module, *inputs)


def counts(exported: Exported) -> dict[str, int]:
    """Of every operator that has any, by its name; the same operator twice adds up."""
    found: dict[str, int] = {}
    for node in exported.graph.nodes:
        if node.op == "call_function":
            count = multiply_accumulates(exported, node)
            if count:
                found[str(node.target)] = found.get(str(node.target), 0) + count
    return found


def randn(*sizes: int) -> Tensor:
    return torch.randn(3, *sizes)  # a batch that no other size is


# What it is, the module, the function, its inputs without the batch, the operator, its count.
CASES: list[tuple[str, nn.Module | None, Callable[..., Any], list[tuple[int, ...]], str, int]] = [
    (
        "Conv1d", nn.Conv1d(4, 6, 5, stride=2, groups=2), lambda m, x: m(x), [(4, 21)],
        "aten.conv1d.default", 9 * 6 * 2 * 5,
    ),
    (
        "Conv1d same", nn.Conv1d(4, 6, 5, padding="same"), lambda m, x: m(x), [(4, 21)],
        "aten.conv1d.padding", 21 * 6 * 4 * 5,
    ),
    (
        "Conv2d", nn.Conv2d(4, 6, (3, 2), padding=1), lambda m, x: m(x), [(4, 7, 8)],
        "aten.conv2d.default", (7 * 9) * 6 * 4 * 6,
    ),
    (
        "Conv3d", nn.Conv3d(4, 6, 3), lambda m, x: m(x), [(4, 5, 6, 7)],
        "aten.conv3d.default", (3 * 4 * 5) * 6 * 4 * 27,
    ),
    (
        "ConvTranspose1d", nn.ConvTranspose1d(4, 6, 5, stride=3), lambda m, x: m(x), [(4, 9)],
        "aten.conv_transpose1d.default", 9 * 4 * 6 * 5,
    ),
    (
        "ConvTranspose2d", nn.ConvTranspose2d(4, 6, 3, groups=2), lambda m, x: m(x), [(4, 5, 7)],
        "aten.conv_transpose2d.input", (5 * 7) * 4 * 3 * 9,
    ),
    (
        "ConvTranspose3d", nn.ConvTranspose3d(4, 6, 2), lambda m, x: m(x), [(4, 5, 6, 7)],
        "aten.conv_transpose3d.input", (5 * 6 * 7) * 4 * 6 * 8,
    ),
    (
        "convolution", nn.Conv2d(4, 6, 3),
        lambda m, x: torch.convolution(x, m.weight, m.bias, [1], [0], [1], False, [0], 1),
        [(4, 7, 8)], "aten.convolution.default", (5 * 6) * 6 * 4 * 9,
    ),
    (
        "convolution, transposed", nn.ConvTranspose2d(4, 6, 3),
        lambda m, x: torch.convolution(x, m.weight, m.bias, [1], [0], [1], True, [0], 1),
        [(4, 7, 8)], "aten.convolution.default", (7 * 8) * 4 * 6 * 9,
    ),
    (
        "Linear", nn.Linear(5, 7), lambda m, x: m(x), [(2, 4, 5)],
        "aten.linear.default", 2 * 4 * 5 * 7,
    ),
    (
        "Linear over tokens of the whole batch", nn.Linear(5, 7), lambda m, x: m(x.reshape(-1, 5)),
        [(11, 5)], "aten.linear.default", 11 * 5 * 7,
    ),
    (
        "Linear with the batch in another axis", nn.Linear(5, 7), lambda m, x: m(x.transpose(0, 1)),
        [(11, 5)], "aten.linear.default", 11 * 5 * 7,
    ),
    ("matmul", None, lambda _, x, y: x @ y, [(2, 4, 5), (2, 5, 6)], "aten.matmul.default",
     2 * 4 * 5 * 6),
    ("matmul, broadcast", nn.Linear(6, 5), lambda m, x: x @ m.weight, [(2, 4, 5)],
     "aten.matmul.default", 2 * 4 * 5 * 6),
    ("matmul, vector", nn.Linear(5, 1), lambda m, x: x @ m.weight[0], [(2, 4, 5)],
     "aten.matmul.default", 2 * 4 * 5),
    ("mm", nn.Linear(6, 5), lambda m, x: torch.mm(x, m.weight), [(5,)], "aten.mm.default", 5 * 6),
    ("mv", nn.Linear(5, 1), lambda m, x: torch.mv(x, m.weight[0]), [(5,)], "aten.mv.default", 5),
    ("bmm", None, lambda _, x, y: torch.bmm(x, y), [(4, 5), (5, 6)], "aten.bmm.default", 4 * 5 * 6),
    (
        "bmm over heads", None,
        lambda _, x, y: torch.bmm(x.reshape(-1, 4, 5), y.reshape(-1, 5, 6)),
        [(2, 4, 5), (2, 5, 6)], "aten.bmm.default", 2 * 4 * 5 * 6,
    ),
    ("addmm", nn.Linear(6, 5), lambda m, x, y: torch.addmm(y, x, m.weight), [(5,), (6,)],
     "aten.addmm.default", 5 * 6),
    ("addmv", nn.Linear(5, 1), lambda m, x: torch.addmv(m.bias, x, m.weight[0]), [(5,)],
     "aten.addmv.default", 5),
    ("baddbmm", None, lambda _, x, y, z: torch.baddbmm(z, x, y), [(4, 5), (5, 6), (4, 6)],
     "aten.baddbmm.default", 4 * 5 * 6),
    ("addbmm", nn.Linear(6, 4), lambda m, x, y: torch.addbmm(m.weight, x, y), [(4, 5), (5, 6)],
     "aten.addbmm.default", 4 * 5 * 6),
    ("inner", nn.Linear(5, 7), lambda m, x: torch.inner(x, m.weight), [(2, 5)],
     "aten.inner.default", 2 * 7 * 5),
    (
        "tensordot", nn.Conv2d(4, 7, (5, 6)),
        lambda m, x: torch.tensordot(x, m.weight, dims=([1, 3], [1, 3])), [(4, 2, 6)],
        "aten.tensordot.default", 2 * 7 * 5 * (4 * 6),
    ),
    ("Bilinear", nn.Bilinear(5, 6, 7), lambda m, x, y: m(x, y), [(5,), (6,)],
     "aten.bilinear.default", 7 * 5 * 6),
    (
        "attention", None, lambda _, q, k, v: F.scaled_dot_product_attention(q, k, v),
        [(2, 4, 5), (2, 7, 5), (2, 7, 6)], "aten.scaled_dot_product_attention.default",
        2 * (4 * 7 * 5 + 4 * 7 * 6),
    ),
    (
        "attention with fewer heads of keys", None,
        lambda _, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        [(6, 4, 5), (2, 4, 5), (2, 4, 5)], "aten.scaled_dot_product_attention.default",
        6 * (4 * 4 * 5) * 2,
    ),
    (
        "LSTM", nn.LSTM(5, 7, 2, bidirectional=True, batch_first=True), lambda m, x: m(x)[0],
        [(6, 5)], "aten.lstm.input",
        6 * 2 * (4 * 7 * (5 + 7) + 4 * 7 * (14 + 7)),
    ),
    (
        "LSTM, projected, batch second", nn.LSTM(5, 7, proj_size=3),
        lambda m, x: m(x.transpose(0, 1))[0], [(6, 5)], "aten.lstm.input",
        6 * (4 * 7 * (5 + 3) + 3 * 7),
    ),
    (
        "GRU", nn.GRU(5, 7, batch_first=True, bias=False), lambda m, x: m(x)[0], [(6, 5)],
        "aten.gru.input", 6 * 3 * 7 * (5 + 7),
    ),
    (
        "RNN", nn.RNN(5, 7, batch_first=True), lambda m, x: m(x)[0], [(6, 5)],
        "aten.rnn_tanh.input", 6 * 7 * (5 + 7),
    ),
    ("LSTMCell", nn.LSTMCell(5, 7), lambda m, x: m(x)[0], [(5,)], "aten.lstm_cell.default",
     4 * 7 * (5 + 7)),
    ("GRUCell", nn.GRUCell(5, 7), lambda m, x: m(x), [(5,)], "aten.gru_cell.default",
     3 * 7 * (5 + 7)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_operator(case: tuple[Any, ...]) -> None:
    _, module, function, sizes, operator, expected = case
    exported = exported_call(Call(function, module).eval(), *(randn(*size) for size in sizes))
    assert counts(exported) == {operator: expected}


H, N, J, D = 2, 4, 5, 6


@pytest.mark.parametrize(
    ("equation", "sizes", "expected"),
    [
        ("bhid,bhjd->bhij", [(H, N, D), (H, J, D)], H * N * J * D),
        (" b h i d , b h j d -> b h i j ", [(H, N, D), (H, J, D)], H * N * J * D),
        ("bhid,bhjd", [(H, N, D), (H, J, D)], H * N * J * D),  # -> ij
        ("...id,...jd->...ij", [(H, N, D), (H, J, D)], H * N * J * D),
        ("...id,x...jd->...ij", [(H, N, D), (H, J, D)], H * N * J * D),  # x is added up first
        ("bi,bj->bij", [(N,), (J,)], N * J),
        ("bij,bkj->bi", [(N, J), (D, J)], N * J),  # k is added up first
        ("bii->bi", [(N, N)], 0),
        ("bij->bji", [(N, J)], 0),
        # From the left: b i, b i j -> b j, then b j, b j k -> b k.
        ("bi,bij,bjk->bk", [(N,), (N, J), (J, D)], N * J + J * D),
    ],
)
def test_einsum(equation: str, sizes: list[tuple[int, ...]], expected: int) -> None:
    inputs = [randn(*size) for size in sizes]

    def run(_: Any, *tensors: Tensor) -> Tensor:
        return torch.ops.aten.einsum.default(equation, list(tensors))

    exported = exported_call(Call(run).eval(), *inputs)
    assert sum(counts(exported).values()) == expected


def test_einsum_along_a_path() -> None:
    sizes = [(N,), (N, J), (J, D)]

    def run(_: Any, *tensors: Tensor) -> Tensor:
        return torch.ops.aten.einsum.default("bi,bij,bjk->bk", list(tensors), path=[1, 2, 0, 1])

    exported = exported_call(Call(run).eval(), *(randn(*size) for size in sizes))
    assert counts(exported) == {"aten.einsum.default": N * J * D + N * D}


@pytest.mark.parametrize("kind", ["transformer", "attention weights"])
def test_layers_of_several_operators(kind: str) -> None:
    """Batch and heads are one axis in some of them, and the batch is not the first in others."""
    n, width, wide = 6, 8, 20
    attention = nn.MultiheadAttention(width, 2, batch_first=True)
    layer = nn.TransformerEncoderLayer(width, 2, wide, batch_first=True)
    expected = n * width * 3 * width + 2 * (n * n * width) + n * width * width
    if kind == "transformer":
        model, expected = Call(lambda m, x: m(x), layer), expected + 2 * n * width * wide
    else:
        model = Call(lambda m, x: m(x, x, x), attention)
    assert sum(counts(exported_call(model.eval(), randn(n, width))).values()) == expected


def test_a_size_that_varies_by_itself_is_that_of_the_example() -> None:
    tokens = torch.export.Dim("tokens")
    model = Call(lambda m, x: m(x), nn.Linear(5, 7)).eval()
    exported = exported_call(model, randn(11, 5), shapes={1: tokens})
    assert counts(exported) == {"aten.linear.default": 11 * 5 * 7}
    model = Call(lambda m, x: m(x.reshape(-1, 5)), nn.Linear(5, 7)).eval()
    exported = exported_call(model, randn(11, 5), shapes={1: tokens})
    assert counts(exported) == {"aten.linear.default": 11 * 5 * 7}


def test_native_layers_count_as_their_program_does() -> None:
    native = native_of(Net(Up()), smooth(8, seed=1))
    x = smooth(3, seed=2)
    exported = exported_call(native, x)
    rows = {row.name: row.macs for row in compiled(native, x).coverage(rounds=0) if row.macs}
    assert rows["pattern.up"] == 12 * 8 * 9 // 2 * 36
    assert sum(counts(exported).values()) == sum(rows.values())


def test_the_share_of_a_network_that_is_almost_all_in_torch() -> None:
    class Audio(nn.Module):
        """A long one-dimensional stem in float before a small native head."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv1d(1, 16, 9)
            self.head = ada.nn.Linear.from_float(nn.Linear(16, 4), 8, input_range=(-3.0, 3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.stem(x)).mean(2))

    engine = compiled(Audio().eval(), randn(1, 1008))
    stem, head = 1000 * 16 * 9, 16 * 4
    assert engine.native_share == pytest.approx(head / (stem + head))
    assert {row.op: row.macs for row in engine.coverage(rounds=0) if row.macs} == {
        "aten.conv1d.default": stem,
        "conv": head,
    }
