"""The main job as a library call."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers_cli import CalledTwice, SmallNet
from torch import nn

import adalayer_native as ada
from adalayer_native.allocation import float_bytes


def images(
    count: int = 2, size: int = 16, seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of 3x12x12 noise with labels of four classes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn((size, 3, 12, 12), generator=generator),
            torch.randint(0, 4, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def network(kind: type[nn.Module] = SmallNet) -> nn.Module:
    torch.manual_seed(3)
    return kind().eval()


def compress(model: nn.Module, budget: ada.Budget | None, **options) -> ada.Compressed:
    data = options.pop("data", None) or images()
    return ada.compress(model, data, budget, progress=False, **options)


@pytest.mark.parametrize("method", ["adalayer", "uniform"])
@pytest.mark.parametrize("size", [0.25, 0.13])
def test_the_saved_file_is_within_the_budget_and_restores(tmp_path, method: str, size: float):
    model = network()
    before = copy.deepcopy(model.state_dict())
    result = compress(model, ada.Budget(size=size), method=method)
    written = ada.save(result.model, tmp_path / "model.safetensors")
    assert written == (tmp_path / "model.safetensors").stat().st_size
    # The whole budget is used where it can be: several widths are within reach of both sizes.
    assert 0.8 * size < written / float_bytes(model) <= size
    assert (result.scores is None) == (method == "uniform")

    # The architecture alone is needed to read it back: other weights, same answers.
    again = ada.restore(SmallNet(), tmp_path / "model.safetensors")
    x = images(1, 5, seed=9)[0][0]
    assert torch.equal(again(x), result.model(x))
    assert again(x[:0]).shape == (0, 4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_byte_budget_and_finetuning_without_labels_needs_only_images(tmp_path):
    model = network()
    unlabelled = [x for x, _ in images()]
    result = compress(
        model, ada.Budget(bytes=12_000), data=unlabelled, train_loader=unlabelled, epochs=2
    )
    assert ada.save(result.model, tmp_path / "m.safetensors") <= 12_000
    assert len(result.history.epochs) == 2
    assert result.history.epochs[-1]["accuracy"] is None


def test_an_edited_plan_is_what_gets_built(tmp_path):
    model = network()
    plan = compress(model, ada.Budget(bits=4), method="uniform").plan
    plan["conv2"].bits = 3
    plan["conv3"].sparsity = 0.5
    plan["fc"].bits = None
    plan.save(tmp_path / "plan.json")
    result = compress(model, None, plan=ada.Plan.load(tmp_path / "plan.json"))
    assert result.plan == plan
    ada.save(result.model, tmp_path / "model.safetensors")
    from adalayer_native.files import describe

    stored = {e["name"]: e for e in describe(tmp_path / "model.safetensors")}
    assert {name: e["bits"] for name, e in stored.items() if name} == {
        "conv1": 4,
        "conv2": 3,
        "conv3": 4,
    }
    assert stored["conv3"]["encoding"] == "bitmask"
    assert stored["conv3"]["nonzero"] <= 0.5
    assert isinstance(result.model.get_submodule("fc"), nn.Linear)


def test_finetuning_brings_the_compressed_model_nearer_to_the_float_one():
    model = network(CalledTwice)
    x = [batch for batch, _ in images(4)]
    budget = ada.Budget(size=0.09)
    plain = compress(model, budget, data=x, method="uniform", repair=False)
    options = {"lr": 0.05, "amp": False}
    tuned = compress(
        model, budget, data=x, method="uniform", train_loader=x, epochs=20, repair=False,
        finetune_options=options,
    )  # fmt: skip

    @torch.no_grad()
    def distance(result: ada.Compressed) -> float:
        return sum(float((result.model(batch) - model(batch)).square().mean()) for batch in x)

    assert distance(tuned) < 0.7 * distance(plain)
    assert plain.repair is tuned.repair is None


def test_without_training_the_layers_are_repaired_and_nearer_to_the_float_ones(tmp_path):
    model = network(CalledTwice)
    held_out = images(4, seed=5)
    distances = {}
    for name, repair in (("plain", False), ("first", True), ("again", True)):
        result = compress(
            model, ada.Budget(size=0.12), data=images(8), method="uniform", repair=repair,
            work_dir=tmp_path,
        )  # fmt: skip
        if repair:
            assert result.repair is not None
            assert set(result.repair.layers) == {n for n in result.plan if result.plan[n].bits}
            # The second call finds what the first one did.
            assert result.repair.resumed == (len(result.repair.layers) if name == "again" else 0)
        with torch.no_grad():
            distances[name] = sum(
                float((result.model(x) - model(x)).square().mean()) for x, _ in held_out
            )
    assert distances["first"] == distances["again"] < 0.8 * distances["plain"]
    # Another plan in the same directory is another repair, and both stay resumable.
    other = compress(
        model, ada.Budget(size=0.2), data=images(8), method="uniform", work_dir=tmp_path
    )
    assert other.repair is not None
    assert other.repair.resumed == 0
    assert len(list(tmp_path.glob("repair-*.safetensors"))) == 2


def test_training_starts_from_repaired_layers():
    result = compress(
        network(), ada.Budget(size=0.2), method="uniform", train_loader=images(), epochs=1
    )
    assert result.repair is not None
    assert result.history is not None


def test_layer_called_twice(tmp_path):
    model = network(CalledTwice)
    result = compress(model, ada.Budget(size=0.25), train_loader=images(), epochs=1)
    ada.save(result.model, tmp_path / "m.safetensors")
    again = ada.restore(network(CalledTwice), tmp_path / "m.safetensors")
    x = images(1, 5, seed=4)[0][0]
    assert torch.equal(again(x), result.model(x))


def test_zero_variance_layer(tmp_path):
    model = network()
    with torch.no_grad():
        model.conv3.weight.fill_(0.01)
        model.conv2.weight.zero_()
    result = compress(model, ada.Budget(size=0.25), train_loader=images(), epochs=1)
    assert result.scores is not None
    assert result.scores["conv2"].R == 0.0
    assert torch.isfinite(result.model(images(1)[0][0])).all()


def test_any_padding_is_native():
    model = network()
    model.conv2.padding_mode = "reflect"
    result = compress(model, ada.Budget(size=0.6), method="uniform")
    assert result.kept_float == {} and not result.float_work
    assert isinstance(result.model.get_submodule("conv2"), ada.nn.Conv2d)


def test_layer_that_cannot_be_native_stays_float_and_is_reported(tmp_path):
    torch.manual_seed(0)
    # The sums of products of 8 bits would not fit into the accumulator.
    model = nn.Sequential(nn.Conv2d(3, 460, 1), nn.ReLU(), nn.Flatten(), nn.Linear(66240, 4)).eval()
    captured = ada.capture(model, images()[0][0])
    share = 66240 * 4 / (66240 * 4 + 144 * 3 * 460)
    said = rf"^{100 * share:.2g} % of the multiply-accumulates stay in float: 3 \(.* 66240 products"
    with pytest.warns(UserWarning, match=said) as seen:
        result = compress(captured, ada.Budget(size=1.0), method="uniform", repair=False)
    assert len(seen) == 1
    assert list(result.kept_float) == ["3"]
    assert "accumulator" in result.kept_float["3"]
    assert result.float_work.share == pytest.approx(share)
    assert result.plan.float_work["3"]["share"] == pytest.approx(share)
    assert "Stays in float: 3 (" in str(result.plan)
    assert ada.Plan.from_json(result.plan.to_json()) == result.plan
    assert result.plan["3"].bits is None
    assert type(result.model.get_submodule("3")) is nn.Linear
    assert ada.save(result.model, tmp_path / "m.safetensors") <= float_bytes(model)
    with pytest.raises(ada.UnsupportedModelError, match=r"^strict: .*3 \(.*accumulator"):
        compress(captured, ada.Budget(size=1.0), method="uniform", strict=True)


def test_strict_is_about_the_plan_too():
    captured = ada.capture(network(), images()[0][0])
    options = {"method": "uniform", "allocate_options": {"exclude": ["conv2"]}, "repair": False}
    with pytest.raises(ada.UnsupportedModelError, match=r"strict: .*conv2 \(.*the plan keeps it"):
        compress(captured, ada.Budget(size=0.6), strict=True, **options)
    result = compress(captured, ada.Budget(size=0.6), **options)  # no warning: it was asked for
    assert [part.name for part in result.float_work.parts] == ["conv2"]
    assert result.kept_float == {} and result.plan.float_work == {}


def test_effort_decides_about_learning_and_is_one_of_three() -> None:
    data = images(2, 16)
    passes = {}
    for effort in ("low", "high"):
        learned = compress(network(), ada.Budget(bits=3), method="uniform", data=data,
                           effort=effort).repair.learned  # fmt: skip
        passes[effort] = 0 if learned is None else len(learned.curve) - 1
    assert passes == {"low": 0, "high": 6}
    with pytest.raises(ada.PlanError, match=r"unknown effort 'lots': expected one of \('low', "):
        compress(network(), ada.Budget(bits=3), effort="lots")
