"""The zoo's own tools: what is built, compared, kept, judged and shown."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import adalayer_native as ada
from bench.zoo.__main__ import chosen, main
from bench.zoo.compare import cosines, difference
from bench.zoo.entry import (
    TRAINED,
    Entry,
    arguments,
    call,
    draw_late_weights,
    keywords,
    leaves,
    noise,
    positional,
    settle,
    tokens,
)
from bench.zoo.judge import grouped, misses
from bench.zoo.macs import all_macs, layer_macs
from bench.zoo.networks import NETWORKS
from bench.zoo.networks.own import ENTRIES as OWN
from bench.zoo.page import page
from bench.zoo.rounding import rounded
from bench.zoo.sanity import sanity
from bench.zoo.store import is_fresh, key_of, path_of, read, write

RECORD: dict[str, Any] = {
    "name": "own/net",
    "key": {"format": 1, "cpu": "a processor", "isa": "avx2", "versions": {"torch": "2.13"}},
    "complete": True,
    "convolutional": True,
    "equal": {"the example": True, "batch 3": True},
    "sanity": {"problems": [], "growth": 12.0},
    "capture_seconds": 1.0,
    "bits": {
        "8": {
            "quantized_share": 0.99,
            "kept_float": {},
            "native": {"equal": True},
            "engine": {"equal": True},
            "in_torch": [["last", "aten.sigmoid.default", "wanted in float32", 0]],
            "native_share": 1.0,
            "cosines": {"result": [0.999, 0.99]},
            "rounded": {"result": [0.999, 0.99]},
            "milliseconds": {"engine": 1.0, "torch": 2.0},
            "compress_seconds": 2.0,
            "compile_seconds": 3.0,
        }
    },
}


def record(**changes: Any) -> dict[str, Any]:
    """A result without a miss; ``changes`` go into its 8 bits."""
    made = copy.deepcopy(RECORD)
    made["bits"]["8"].update(changes)
    return made


def test_every_network_is_named_after_its_package_and_keeps_one_file() -> None:
    assert len(NETWORKS) > 70
    assert all(name.startswith(f"{entry.package}/") for name, entry in NETWORKS.items())
    assert len({path_of(name) for name in NETWORKS}) == len(NETWORKS)


@pytest.mark.parametrize("entry", OWN, ids=lambda entry: entry.name)
def test_own_networks_are_fit_to_be_judged(entry: Entry) -> None:
    model = entry.build()
    assert not model.training
    result = leaves(call(model, entry.inputs(2, 5)))
    assert result and all(value.shape[0] == 2 for _, value in result)
    assert sanity(model, entry.inputs(8, 6)).problems == ()
    if entry.other is not None:
        call(model, entry.other(3, 7))


def test_networks_are_the_same_every_time() -> None:
    entry = NETWORKS["own/vae"]
    first, second = entry.build().state_dict(), entry.build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_depend_on_their_seed_alone() -> None:
    pair = positional(noise(3), tokens(10, 4))
    first, second = pair(2, 1), pair(2, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    args, kwargs = arguments(pair(2, 2))
    assert not torch.equal(args[0], first[0]) and kwargs == {}
    args, kwargs = arguments(keywords(x=noise(3))(2, 1))
    assert args == () and list(kwargs) == ["x"]
    assert int(tokens(10, 50)(4, 0).min()) > 0


def test_settled_batch_norms_normalise_what_they_see() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.9)).requires_grad_(False)
    batch = 3.0 * noise(2, 8, 8)(16, 1) + 1.0
    settle(model, batch)
    assert model[0].momentum == 0.1 and not model[0].training
    y = model(batch)
    assert float(y.mean().abs()) < 1e-3 and float(y.std()) == pytest.approx(1.0, abs=0.01)


def test_weights_that_begin_at_zero_are_drawn_and_biases_are_not() -> None:
    norm, scale = nn.BatchNorm2d(4), nn.Module()
    nn.init.zeros_(norm.weight)
    scale.gamma = nn.Parameter(torch.full((4, 1, 1), 1e-6))
    head = nn.Linear(100, 50)
    nn.init.zeros_(head.weight)
    model = nn.ModuleList([norm, scale, nn.BatchNorm2d(4), head])
    draw_late_weights(model, 0)
    for drawn in (norm.weight.detach(), scale.gamma.detach()):
        assert float(drawn.min()) >= TRAINED[0] and float(drawn.max()) <= TRAINED[1]
        assert len(set(drawn.flatten().tolist())) == 4
    assert float(head.weight.detach().std()) == pytest.approx(0.1, rel=0.1)
    assert not norm.bias.any() and bool((model[2].weight == 1.0).all())


def test_differences_name_the_place_and_its_size() -> None:
    wanted = {"a": torch.ones(4), "b": torch.tensor([0.0, 51.0, 2.0])}
    assert difference(wanted, wanted).equal
    found = difference({"a": torch.ones(4), "b": torch.tensor([0.0, 51.0, 2.2])}, wanted)
    assert not found.equal and found.where == "['b']"
    assert found.levels == pytest.approx(1.0) and found.share == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="expected float tensors of shapes"):
        difference(torch.ones(3), torch.ones(4))
    nan = torch.tensor([float("nan"), 1.0])
    assert difference(nan, nan.clone()).equal
    assert not difference(torch.ones(2), nan).equal


def test_cosines() -> None:
    a = torch.tensor([[100.0, 1.0], [100.0, -1.0]])
    b = torch.tensor([[100.0, -1.0], [100.0, 1.0]])
    whole, varying = cosines(a, b)["result"]
    assert whole > 0.999 and varying == pytest.approx(-1.0)
    assert cosines({"a": a[:1], "b": b}, {"a": a[:1], "b": b}) == {
        "['a']": (pytest.approx(1.0), pytest.approx(1.0)),
        "['b']": (pytest.approx(1.0), pytest.approx(1.0)),
    }


def test_degenerate_networks_are_recognised() -> None:
    constant = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(constant[0].weight)
    (problem,) = sanity(constant, noise(4)(8, 0)).problems
    assert problem.startswith("results vary by 0 %")
    small = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Identity())
    with torch.no_grad():
        small[0].weight.mul_(1e-7)
    assert any("rms" in problem for problem in sanity(small, noise(4)(8, 0)).problems)


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_growth_of_an_error_is_that_of_the_network() -> None:
    same = nn.Sequential(nn.Identity())
    assert sanity(same, noise(64)(8, 0)).growth == pytest.approx(1.0, rel=0.1)
    assert sanity(nn.Sequential(nn.Embedding(9, 4)), tokens(9, 5)(8, 0)).growth is None


def test_multiply_accumulates_of_recurrence_attention_and_transposed_convolutions() -> None:
    assert all_macs(Attention(), noise(2, 5, 8)(1, 0)) == 2 * 2 * 5 * 5 * 8
    lstm = nn.LSTM(8, 16, batch_first=True)
    assert all_macs(lstm, noise(5, 8)(1, 0)) == 5 * 4 * 16 * (8 + 16)
    up = nn.ConvTranspose2d(3, 4, 2, stride=2)
    assert layer_macs(up, {"": up}, noise(3, 6, 6)(1, 0)) == {"": 3 * 36 * 4 * 4}
    assert all_macs(up, noise(3, 6, 6)(1, 0)) == 3 * 36 * 4 * 4


def test_results_are_fresh_until_something_changes(tmp_path: Any) -> None:
    path = path_of("own/net", tmp_path)
    assert read(path) is None and not is_fresh(None, "own", [8])
    write(path, {"complete": True, "bits": {"8": {}}}, "own")
    kept = read(path)
    assert kept is not None and kept["key"] == key_of("own")
    assert is_fresh(kept, "own", [8]) and not is_fresh(kept, "own", [8, 4])
    assert not is_fresh({**kept, "complete": False}, "own", [8])
    assert not is_fresh({**kept, "key": {**kept["key"], "isa": "another"}}, "own", [8])
    assert is_fresh({**kept, "bits": {}, "refused": {}}, "own", [8, 4])
    path.write_text("{", encoding="utf-8")
    assert read(path) is None


@torch.no_grad()
def test_noise_of_rounding_has_its_size_and_leaves_the_network_alone() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=False)
    x = torch.rand(256, 64) * 2 - 1
    captured = ada.capture(layer, x)
    before = {name: value.clone() for name, value in captured.state_dict().items()}
    wanted = layer(x)
    for bits in (8, 4):
        noise = rounded(captured, x, bits, [x[:128], x[128:]]) - wanted
        weight = layer.weight.abs().amax(1) / (2 ** (bits - 1) - 1)
        # Both noises are uniform over a step; their variances add.
        of_inputs = (2 / 255) ** 2 / 12 * layer.weight.square().sum(1)
        of_weights = weight.square() / 12 * x.square().sum(1).mean()
        expected = (of_inputs + of_weights).mean().sqrt()
        assert float(noise.std() / expected) == pytest.approx(1, abs=0.1)
    # Values beyond those of the calibration data are clipped to them.
    clipped = rounded(captured, 9 * x, 8, [x])
    largest, smallest = x.max(), x.min()
    assert_close(clipped, layer((9 * x).clamp(smallest, largest)), rtol=0, atol=0.1)
    assert torch.equal(captured(x), wanted)
    assert all(torch.equal(before[name], value) for name, value in captured.state_dict().items())


def test_misses_are_named() -> None:
    assert misses(record()) == []
    apart = {"equal": False, "where": "result", "relative": 0.1, "levels": 2.0, "share": 0.5,
             "nodes": [["pool", "avg_pool", 3, 100, 1]]}  # fmt: skip
    (found,) = misses(record(engine=apart))
    assert (
        found.startswith("8 bits: engine ≠ native: result") and "pool (avg_pool, 3 of 100" in found
    )
    rounded = {"a": [0.9, 0.8], "b": [0.995, 1.0]}
    assert misses(record(cosines={"a": [0.88, 0.4], "b": [0.991, 1.0]}, rounded=rounded)) == []
    (first, second) = misses(record(cosines={"a": [0.87, 0.9], "b": [0.98, 1.0]}, rounded=rounded))
    grows = "an error of the input grows 12.0-fold"
    assert first == f"8 bits: cosine of a 0.8700 (rounding alone leaves 0.9000, {grows})"
    assert second.startswith("8 bits: cosine of b 0.9800 (rounding alone leaves 0.9950")
    (found,) = misses(record(quantized_share=0.5))
    assert "50.0 % of the multiply-accumulates" in found
    (found,) = misses(record(milliseconds={"engine": 2.0, "torch": 1.0}))
    assert "torch 1.000 ms" in found
    (found,) = misses(record(in_torch=[["a", "aten.bmm.default", "two activations", 10]]))
    assert found == "8 bits: in torch: a (aten.bmm.default): two activations"
    refused = record()
    refused["bits"]["8"] = {"refused": {"stage": "prepare", "why": "ValueError: no"}}
    assert misses(refused) == ["8 bits: refused at prepare: ValueError: no"]
    assert grouped({"a": "x", "b": "y", "c": "x"}) == "a, c: x; b: y"


def test_the_page_has_a_row_and_the_reasons_of_every_network() -> None:
    bad = record(kept_float={"conv": "a|b *c*"})
    bad["name"] = "own/other"
    bad["equal"]["another size"] = {"fixed": "InputError: 64 alone"}
    assert "Not measured" not in page([record()])
    text = page([record(), bad], ["own/late", "own/later"])
    assert "Not measured for this page: own/late, own/later." in text
    assert (
        "| own/net | yes | 99.0 % | 12.0 | = | = | 0.9990 \\| 0.9900 | 0.9990 | 100.0 %, 1 |"
        in text
    )
    assert "| own/other | this size |" in text and "64 alone" not in text
    assert "1 of 2 networks miss nothing" in text
    assert "- 8 bits: kept float: conv: a\\|b \\*c\\*" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_networks_are_chosen_by_name_package_or_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert [entry.name for entry in chosen(["own/vae"])] == ["own/vae"]
    assert [entry.name for entry in chosen(["vae"])] == ["own/vae"]
    assert chosen(["own"]) == list(OWN)
    assert {entry.name for entry in chosen(["own/d*"])} == {
        "own/dncnn", "own/dcgan-generator", "own/dict-output", "own/ds-cnn",
    }  # fmt: skip
    with pytest.raises(ValueError, match="no network fits 'nothing'"):
        chosen(["nothing"])
    assert main(["--list", "--only", "own/vae"]) == 0
    assert capsys.readouterr().out == "own/vae\n"
