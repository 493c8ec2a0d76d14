"""Analysis: what is measured, what it streams, what it refuses."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers_models import batches, tiny
from torch import nn

from adalayer_native.errors import (
    CalibrationError,
    FileFormatError,
    PlanError,
    UnsupportedModelError,
)
from adalayer_native.importance import CRITERIA, LayerScores, analyze
from adalayer_native.importance.analyze import dequantized

LAYERS = ["conv1", "conv2", "fc"]


def test_values_against_a_direct_computation() -> None:
    model, data = tiny(), batches(3)
    data[2] = (data[2][0][:5], data[2][1][:5])  # an uneven last batch counts by its samples
    scores = analyze(model, data, progress=False)
    x = torch.cat([x for x, _ in data])
    y = torch.cat([y for _, y in data])
    with torch.no_grad():
        base = float(nn.functional.cross_entropy(model(x), y))
        assert scores.loss == pytest.approx(base, rel=1e-5)
        raw = {}
        for name in LAYERS:
            changed = copy.deepcopy(model)
            layer = changed.get_submodule(name)
            layer.weight.copy_(dequantized(layer.weight, 2))
            raw[name] = float(nn.functional.cross_entropy(changed(x), y)) - base
    top = max(0.0, *raw.values())
    flops = {"conv1": 2 * 27 * 8 * 64, "conv2": 2 * 72 * 12 * 16, "fc": 2 * 48 * 4}
    variances = {n: float(model.get_submodule(n).weight.detach().var(correction=0)) for n in LAYERS}
    for name in LAYERS:
        s = scores[name]
        assert s.raw == pytest.approx(raw[name], abs=2e-6)
        a, f, r, importance = s.A, s.F, s.R, s.I
        assert a == pytest.approx(max(0.0, raw[name]) / top, abs=1e-4)
        assert s.flops == flops[name]
        assert f == pytest.approx(flops[name] / max(flops.values()))
        assert r == pytest.approx(variances[name] / max(variances.values()), rel=1e-5)
        assert importance == pytest.approx(0.7 * a + 0.3 * f)
    assert scores.metric == "cross_entropy"
    assert scores.samples == 37


def test_model_is_left_alone() -> None:
    model = tiny().train()
    model.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    one = analyze(model, batches(3), progress=False)
    assert model.training
    assert not model.bn1.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert one.samples == 48
    assert analyze(model, batches(3), batches=2, progress=False).samples == 32


def test_without_labels_it_is_kl_divergence() -> None:
    scores = analyze(tiny(), batches(labels=False), progress=False)
    assert scores.metric == "kl_divergence"
    assert scores.loss == pytest.approx(0.0, abs=1e-7)
    assert all(s.raw >= 0 for s in scores.layers.values())
    assert max(s.A for s in scores.layers.values()) == 1.0
    shorter = analyze(tiny(), [(x,) for x in batches(labels=False)], progress=False)
    assert shorter == scores


def test_own_loss_and_other_outputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": self.net(x)}

    def loss(output: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output["out"], target)

    model = Pair()
    wrapped = analyze(model, batches(), loss, progress=False)
    plain = analyze(tiny(), batches(), progress=False)
    assert wrapped["net.conv1"].raw == plain["conv1"].raw
    assert wrapped.metric == "loss_fn"
    # The only output holds the logits, whatever it is called.
    alone = analyze(model, batches(), progress=False)
    assert alone["net.conv1"].raw == plain["conv1"].raw
    assert alone.metric == plain.metric == "cross_entropy"


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_every_criterion(criterion: str) -> None:
    model = tiny()
    for labels in (True, False):
        scores = analyze(model, batches(labels=labels), criterion=criterion, progress=False)
        assert list(scores) == LAYERS
        assert all(0 <= s.A <= 1 for s in scores.layers.values())
        lost = max(CRITERIA[criterion].importance(s.raw) for s in scores.layers.values())
        assert max(s.A for s in scores.layers.values()) == (1 if lost > 0 else 0)
        assert lost > 0 or criterion == "accuracy_drop"  # no decision of 32 need change
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_layer_used_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.fc = nn.Linear(3 * 64, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(self.conv(x)).flatten(1))

    scores = analyze(Twice(), batches(), progress=False)
    assert scores["conv"].flops == 2 * (2 * 27 * 3 * 64)


def test_inverse_redundancy_and_zero_variance() -> None:
    model = tiny()
    with torch.no_grad():
        model.conv2.weight.fill_(0.5)
    scores = analyze(model, batches(), progress=False)
    assert scores["conv2"].R == 0.0
    assert scores["conv2"].raw == pytest.approx(0.0, abs=1e-5)
    inverse = analyze(model, batches(), inverse=True, progress=False)
    assert inverse["conv2"].R == 1.0
    assert max(inverse["conv1"].R, inverse["fc"].R) == 1.0
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    flat = analyze(model, batches(), progress=False)
    assert all(s.A == 0 and s.R == 0 for s in flat.layers.values())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "yields no batch"),
        ([torch.zeros(0, 3, 8, 8)], "hold no sample"),
        ([torch.full((2, 3, 8, 8), float("nan"))], "batch 0 holds NaN"),
        ([torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), float("inf"))], "batch 1 holds NaN"),
        ([{"x": 1}], "batch 0: expected tensors, got int"),
        ([()], "batch 0: .*got an empty tuple"),
        ([7], "batch 0: .*got int"),
        (iter(batches()), "a list_iterator, which can be read only once.*give a list"),
    ],
)
def test_bad_data(data: list, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        analyze(tiny(), data, progress=False)


def test_integers_for_a_model_of_floats() -> None:
    with pytest.raises(UnsupportedModelError, match=r"unsigned char|Byte"):
        analyze(tiny(), [torch.zeros(2, 3, 8, 8, dtype=torch.uint8)], progress=False)


def test_bad_models() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"no convolution .* its weights are weight \[2"
    ):
        analyze(nn.Conv3d(3, 2, 3), [torch.randn(2, 3, 4, 4, 4)], progress=False)
    with pytest.raises(UnsupportedModelError, match="no convolution or linear layer"):
        analyze(nn.Sequential(nn.ReLU()), batches(), progress=False)
    model = tiny()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"'conv2'.*NaN"):
        analyze(model, batches(), progress=False)
    model = tiny()
    with torch.no_grad():
        model.fc.bias.fill_(float("inf"))
    with pytest.raises(CalibrationError, match=r"not finite|is nan|is inf"):
        analyze(model, batches(), progress=False)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="unknown criterion"):
        analyze(tiny(), batches(), criterion="magic", progress=False)
    with pytest.raises(ValueError, match="alpha and beta"):
        analyze(tiny(), batches(), alpha=-1, progress=False)
    with pytest.raises(PlanError, match="bits"):
        analyze(tiny(), batches(), probe_bits=1, progress=False)


def test_cache_resumes_after_an_interruption(tmp_path, monkeypatch) -> None:
    model, data, cache = tiny(), batches(3), tmp_path / "cache.json"
    whole = analyze(model, data, progress=False)

    class Interrupted:
        def __iter__(self):
            yield data[0]
            yield data[1]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyze(model, Interrupted(), cache=cache, progress=False)
    calls = []
    original = nn.Conv2d.forward
    monkeypatch.setattr(
        nn.Conv2d, "forward", lambda self, x: (calls.append(1), original(self, x))[1]
    )
    assert analyze(model, data, cache=cache, progress=False) == whole
    # One sample for FLOPs, then only the third batch: float, once more to keep what the layers
    # give, and one pass per layer, from that layer on.
    assert len(calls) == 2 * (1 + 1 + 1) + 2 + 1 + 0
    calls.clear()
    assert analyze(model, data, cache=cache, progress=False) == whole
    assert len(calls) == 2
    # Other weights or options use nothing of it; a damaged file is replaced.
    assert analyze(model, data, cache=cache, probe_bits=3, progress=False) != whole
    cache.write_text("{broken")
    assert analyze(model, data, cache=cache, progress=False) == whole
    assert json.loads(cache.read_text())["batches"]


def test_scores_round_trip(tmp_path) -> None:
    scores = analyze(tiny(), batches(), progress=False)
    scores.save(tmp_path / "s.json")
    assert LayerScores.load(tmp_path / "s.json") == scores
    assert set(scores.as_dict()["fc"]) == {"A", "F", "R", "I"}
    assert scores.importance(8.0, 0.0)["conv1"] <= 1.0
    with pytest.raises(PlanError, match=r"'conv9'.*closest"):
        scores["conv9"]
    with pytest.raises(FileFormatError, match=r"none\.json"):
        LayerScores.load(tmp_path / "none.json")
    for text in ("{", "{}", '{"format": "adalayer-scores", "version": 1}'):
        with pytest.raises(FileFormatError):
            LayerScores.from_json(text)
