"""Masks of attention that are inputs of the call: padded batches in one program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers_engine import compiled
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.engine import Engine
from adalayer_native.errors import InputError, UnsupportedModelError

TOKENS, WIDTH, HEADS = 9, 16, 4
LOWEST = torch.finfo(torch.float32).min


def flags_of(batch: int, seed: int = 0) -> Tensor:
    """Which tokens count; the first one always does."""
    generator = torch.Generator().manual_seed(seed)
    flags = torch.rand(batch, TOKENS, generator=generator) < 0.6
    flags[:, 0] = True
    return flags


class Masked(nn.Module):
    """Two attentions whose masks are made from an input of the call."""

    def __init__(self, make: Callable[[Tensor], Tensor], spelled: bool = False) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.outputs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.make, self.spelled = make, spelled

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        made = self.make(mask)
        for first, last in zip(self.inputs, self.outputs, strict=True):
            parts = first(x).reshape(x.shape[0], TOKENS, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            q, k, v = parts.unbind(0)
            if self.spelled:
                scores = q @ k.transpose(-1, -2) / 2.0 + made
                y = scores.softmax(-1) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v, made, scale=0.5)
            x = x + last(y.transpose(1, 2).flatten(2))
        return x


def kept(mask: Tensor) -> Tensor:
    return mask[:, None, None, :].bool()


def hidden(mask: Tensor) -> Tensor:
    return ~mask[:, None, None, :]


def large(mask: Tensor) -> Tensor:
    return (1.0 - mask[:, None, None, :].float()) * LOWEST


def both(mask: Tensor) -> Tensor:
    ahead = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return torch.where(ahead | (mask[:, None, None, :] == 0), LOWEST, 0.0)


def biased(mask: Tensor) -> Tensor:
    places = torch.arange(TOKENS)
    slopes = 0.1 * torch.arange(1, HEADS + 1)[:, None, None]
    bias = (places[None, :] - places[:, None]) * slopes
    return bias.masked_fill(mask[:, None, None, :] == 0, float("-inf"))


CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], bool]] = {
    "integers": (kept, lambda flags: flags.long(), False),
    "int32": (kept, lambda flags: flags.int() * 3, False),
    "bools": (lambda mask: mask[:, None, None, :], lambda flags: flags, False),
    "what is hidden": (hidden, lambda flags: ~flags, False),
    "a large number": (large, lambda flags: flags.long(), False),
    "a large number, spelled out": (large, lambda flags: flags.long(), True),
    "with later tokens": (both, lambda flags: flags.long(), False),
    "with later tokens, spelled out": (both, lambda flags: flags.long(), True),
    "with a bias": (biased, lambda flags: flags.long(), False),
    "floats": (
        lambda mask: mask[:, None, None, :],
        lambda flags: torch.zeros(flags.shape).masked_fill(~flags, -1e4),
        False,
    ),
    "floats of four axes": (
        lambda mask: mask,
        lambda flags: torch.zeros(flags.shape).masked_fill(~flags, LOWEST)[:, None, None, :],
        True,
    ),
}


def in_torch(engine: Engine) -> list[str]:
    return [row.op for row in engine.coverage(rounds=0) if row.kind == "torch"]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_masks_of_the_call(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, given, spelled = CASES[name]
    model, x = Masked(make, spelled), torch.randn(5, TOKENS, WIDTH)
    native, engine = compiled(model, x, given(flags_of(5)))
    assert in_torch(engine) == []
    engine.save(tmp_path / "masked.ada")
    loaded = ada.load(tmp_path / "masked.ada")
    for batch in (1, 3):
        for flags in (flags_of(batch, seed=batch), flags_of(batch) | True):
            inputs = x[:batch], given(flags)
            wanted = native(*inputs)
            assert torch.equal(engine(*inputs), wanted)
            assert torch.equal(loaded(*inputs), wanted)
            close = F.cosine_similarity(wanted.flatten(), model(*inputs).flatten(), 0)
            assert close > 0.99


@torch.no_grad()
def test_a_sample_without_any_key() -> None:
    """Where all is hidden by a finite number, all keys are alike; by infinity, nothing is met."""
    torch.manual_seed(0)
    x = torch.randn(3, TOKENS, WIDTH)
    for make in (large, kept):
        native, engine = compiled(Masked(make), x, flags_of(3).long())
        mask = flags_of(3, seed=1).long()
        mask[1] = 0
        assert torch.equal(engine(x, mask), native(x, mask))


@pytest.mark.parametrize("float_mask", [False, True])
@torch.no_grad()
def test_padding_of_torchs_own_encoder(float_mask: bool, tmp_path: Path) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, dropout=0.0)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            y: Tensor = self.encoder(x, src_key_padding_mask=padding)
            return y

    def given(flags: Tensor) -> Tensor:
        return torch.zeros(flags.shape).masked_fill(~flags, -1e4) if float_mask else ~flags

    torch.manual_seed(0)
    x = torch.randn(4, TOKENS, WIDTH)
    native, engine = compiled(Encoder(), x, given(flags_of(4)))
    assert in_torch(engine) == []
    for seed in range(3):
        mask = given(flags_of(4, seed))
        assert torch.equal(engine(x, mask), native(x, mask))
        if float_mask:
            mask = mask.masked_fill(mask < 0, float("-inf"))
            assert torch.equal(engine(x, mask), native(x, mask))


@torch.no_grad()
def test_wrong_masks_are_refused() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(3, TOKENS, WIDTH), flags_of(3).long()
    _, engine = compiled(Masked(large), x, mask)
    for wrong, message in (
        (mask[:, :-1], r"expected shape \[batch, 9\], got \[3, 8\]"),
        (mask[:, None], r"expected shape \[batch, 9\], got \[3, 1, 9\]"),
        (mask[:2], "expected a batch of 3"),
        (mask.float(), "expected torch.int64, got torch.float32"),
        (mask.bool(), "expected torch.int64, got torch.bool"),
        (mask * 2, "expected ids of 0 to 1, got 2 in sample 0, position 0"),
        (mask - 1, "expected ids of 0 to 1, got -1"),
    ):
        with pytest.raises(InputError, match=message):
            engine(x, wrong)
    assert torch.equal(engine(x, mask.int()), engine(x, mask))
    assert engine.tables == {"mask": 2}
    # What asks whether a number is zero takes any.
    _, engine = compiled(Masked(kept), x, mask)
    assert torch.equal(engine(x, mask * -7), engine(x, mask)) and engine.tables == {}


def _by_query(mask: Tensor) -> Tensor:
    return (mask[:, None, :, None] * mask[:, None, None, :]).bool()


def _counted(mask: Tensor) -> Tensor:
    return mask.cumsum(1)[:, None, None, :] < 4


def _scaled(mask: Tensor) -> Tensor:
    return mask[:, None, None, :] * 2.0


@pytest.mark.parametrize("make", [_by_query, _counted, _scaled])
@torch.no_grad()
def test_other_masks_stay_in_torch(make: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(3, TOKENS, WIDTH), torch.ones(3, TOKENS, dtype=torch.long)
    mask[0, 1] = 0
    mask = mask.float() if make is _scaled else mask
    native = compiled_in_parts(make, x, mask)
    engine = ada.compile(native, (x, mask), policy="native")
    assert in_torch(engine)
    torch.testing.assert_close(engine(x, mask), native(x, mask))
    with pytest.raises(UnsupportedModelError, match=r"strict: .* operators cannot run"):
        ada.compile(native, (x, mask), strict=True)


def compiled_in_parts(make: Callable[[Tensor], Tensor], x: Tensor, mask: Tensor) -> nn.Module:
    from helpers_engine import plan_of

    from adalayer_native.capture import capture

    graph = capture(Masked(make).eval(), (x, mask))
    prepared = ada.prepare(graph, plan_of(graph))
    ada.calibrate(prepared, [(x, mask)], observer="minmax", progress=False)
    return ada.convert(prepared)


def test_opcheck() -> None:
    constant = torch.randn(2, 3, 4)
    for keys in (torch.tensor([[0, 1, 1, 5], [1, 0, 0, 1]]), torch.randn(2, 1, 1, 4)):
        torch.library.opcheck(
            torch.ops.adalayer.key_mask.default, (keys, constant, -1e9, 0.0, True)
        )
    with pytest.raises(ValueError, match="expected a mask of zeros and ones"):
        torch.ops.adalayer.key_mask(torch.tensor([[2]]), torch.zeros(1, 1, 1), -1.0, 0.0, False)
