"""Fine-tuning: it learns, it is deterministic, it can be interrupted, it says what is wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from adalayer_native.errors import CalibrationError, FileFormatError, PlanError
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from adalayer_native.pruning.masks import pruned_count
from adalayer_native.quantization import calibrate, convert, prepare, reestimate_batch_norms
from adalayer_native.quantization.graph import layers_of
from adalayer_native.repair import repair
from adalayer_native.training import bf16_helps, finetune, fit
from adalayer_native.training.average import Average
from adalayer_native.training.schedule import cubic_sparsity, half_cosine, lowered_bits


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def batches(count: int = 8, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Four classes: which quadrant of the image is bright."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        y = torch.randint(0, 4, (size,), generator=generator)
        x = torch.randn(size, 1, 8, 8, generator=generator)
        for image, label in zip(x, y.tolist(), strict=True):
            row, column = 4 * (label // 2), 4 * (label % 2)
            image[0, row : row + 4, column : column + 4] += 1.5
        found.append((x, y))
    return found


def prepared_model(bits: int = 3, sparsity: float = 0.25) -> fx.GraphModule:
    net = model()
    layers = {
        name: LayerPlan(name, layer_kind(m), m.weight.numel(), bits, sparsity)
        for name, m in supported_layers(net).items()
    }
    prepared = prepare(net, Plan(layers))
    calibrate(prepared, batches(2), progress=False)
    return prepared


def run(prepared: nn.Module, loader: Any, epochs: int = 2, **options: Any) -> Any:
    options = {"lr": 0.05, "amp": False, "progress": False, **options}
    return finetune(prepared, loader, epochs, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[key]) for key, value in a.state_dict().items())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_learns_and_keeps_the_masks(optimizer: str) -> None:
    prepared = prepared_model()
    masks = {name: layer.mask.clone() for name, layer in layers_of(prepared).items()}
    data = batches()
    history = run(prepared, data, 6, optimizer=optimizer, gradual=False)
    assert len(history.epochs) == 6
    assert history.finished
    assert history.epochs[-1]["loss"] < 0.8 * history.epochs[0]["loss"]
    assert history.epochs[-1]["accuracy"] > 0.8
    assert history.epochs[0]["samples"] == 256
    assert history.epochs[-1]["lr"] < history.epochs[0]["lr"]
    assert not prepared.training
    for name, layer in layers_of(prepared).items():
        assert torch.equal(layer.mask, masks[name])
        assert not bool(layer.quantized_weight()[~layer.mask].any())


def test_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    a, b, c = prepared_model(), prepared_model(), prepared_model()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    run(a, batches())
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)
    run(b, batches())
    run(c, batches(), seed=5)
    assert same(a, b)
    assert not same(a, c)


def test_distillation_with_and_without_labels() -> None:
    teacher = model()
    torch.manual_seed(3)
    nn.init.normal_(teacher[6].weight)
    teacher.train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    data = batches()
    prepared = prepared_model(bits=2)
    history = run(prepared, [x for x, _ in data], 6, teacher=teacher, lr=0.1)
    assert history.epochs[-1]["accuracy"] is None
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
    run(prepared, data, 1, teacher=teacher, distill_weight=0.5)
    assert teacher.training
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key])


def test_equation_5_shrinks_unimportant_layers() -> None:
    sizes = {}
    for eta in (0.0, 3.0):
        prepared = prepared_model(bits=8, sparsity=0.0)
        run(prepared, batches(), 3, scores={"0": {"I": 1.0}, "6": 0.0}, eta=eta)
        sizes[eta] = float(layers_of(prepared)["6"].quantized_weight().detach().abs().mean())
    assert sizes[3.0] < 0.8 * sizes[0.0]


def test_equation_5_value() -> None:
    prepared = prepared_model(bits=4, sparsity=0.0)
    x, y = batches(1)[0]
    layers = layers_of(prepared)
    norms = {n: float(m.quantized_weight().detach().abs().mean()) for n, m in layers.items()}
    prepared.train()
    prepared.get_submodule("3").eval()
    expected = float(F.cross_entropy(prepared(x), y).detach())
    expected += 0.5 * ((1 - 0.25) * norms["0"] + (1 - 0.75) * norms["6"])
    fresh = prepared_model(bits=4, sparsity=0.0)
    fresh.get_submodule("3").p = 0.0
    history = run(fresh, [(x, y)], 1, scores={"0": 0.25, "6": 0.75}, eta=0.5)
    assert history.epochs[0]["loss"] == pytest.approx(expected, rel=1e-5)


class Interrupting:
    """A list of batches that raises, or sends a signal, before batch ``at``; draws random noise."""

    def __init__(self, at: int | None, *, by_signal: bool = False) -> None:
        self.data = batches()
        self.at = at
        self.by_signal = by_signal
        self.served = 0
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.data:
            self.served += 1
            if self.served == self.at:
                if not self.by_signal:
                    raise OSError("disk gone")
                os.kill(os.getpid(), signal.SIGINT)
            yield x + 0.1 * torch.randn_like(x), y


@pytest.mark.parametrize("at", [3, 8, 9, 13])
def test_ctrl_c_then_resume_gives_the_uninterrupted_result(tmp_path: Path, at: int) -> None:
    whole = prepared_model()
    expected = run(whole, Interrupting(None), 2)
    path = tmp_path / "run" / "checkpoint.safetensors"
    broken = prepared_model()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(broken, Interrupting(at, by_signal=True), 2, checkpoint=path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert path.is_file()
    assert not same(whole, broken)
    again = prepared_model()
    loader = Interrupting(None)
    history = run(again, loader, 2, checkpoint=path)
    assert history.resumed
    assert same(whole, again)
    assert [e["loss"] for e in history.epochs] == [e["loss"] for e in expected.epochs]
    # A finished run is only loaded.
    served = loader.served
    third = prepared_model()
    assert run(third, loader, 2, checkpoint=path).resumed
    assert loader.served == served
    assert same(whole, third)
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_loader_error_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(OSError, match="disk gone"):
        run(prepared_model(), Interrupting(12), 2, checkpoint=path)
    again = prepared_model()
    loader = Interrupting(None)
    history = run(again, loader, 2, checkpoint=path)
    assert history.resumed
    assert loader.epochs == [1, 2]  # the last one is for the batch norms
    whole = prepared_model()
    run(whole, Interrupting(None), 2)
    assert same(whole, again)


def test_checkpoint_of_another_run_or_a_corrupt_one(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    run(prepared_model(), batches(), 1, checkpoint=path)
    with pytest.warns(UserWarning, match="another run"):
        history = run(prepared_model(), batches(), 1, checkpoint=path, lr=0.01)
    assert not history.resumed
    assert not run(prepared_model(), batches(), 1, checkpoint=path, resume=False).resumed
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(FileFormatError, match=r"checkpoint\.safetensors"):
        run(prepared_model(), batches(), 1, checkpoint=path)


def test_time_limit_ends_the_run(tmp_path: Path) -> None:
    prepared = prepared_model()
    history = run(prepared, batches(), 50, max_minutes=1e-9)
    assert not history.finished
    assert len(history.epochs) == 1
    assert not prepared.training


def test_loader_without_length_and_bfloat16() -> None:
    class Stream:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(batches(3))

    prepared = prepared_model()
    history = run(prepared, Stream(), 2, amp=True)
    assert history.amp
    assert all(p.dtype == torch.float32 for p in prepared.parameters())
    assert isinstance(bf16_helps(), bool)
    assert run(prepared, batches(1), 1, amp="auto").amp is bf16_helps()


def test_refusals() -> None:
    net = model()
    plan = Plan({"6": LayerPlan("6", "linear", net[6].weight.numel(), 4)})
    with pytest.raises(CalibrationError, match="calibrate"):
        run(prepare(net, plan), batches())
    prepared = prepared_model()
    with pytest.raises(CalibrationError, match="empty"):
        run(prepared, [])
    with pytest.raises(CalibrationError, match="teacher"):
        run(prepared, [x for x, _ in batches(1)])
    with pytest.raises(CalibrationError, match="NaN"):
        run(prepared, [(torch.full((2, 1, 8, 8), float("nan")), torch.zeros(2).long())])
    with pytest.raises(CalibrationError, match="got str"):
        run(prepared, ["x"])
    with pytest.raises(PlanError, match="'nothing'"):
        run(prepared, batches(1), scores={"nothing": 0.5})
    for bad in (
        {"lr": -1.0},
        {"temperature": 0.0},
        {"optimizer": "lbfgs"},
        {"epochs": -1},
        {"ramp": 2.0},
    ):
        options: dict[str, Any] = {"epochs": 1, **bad}
        with pytest.raises(PlanError, match=next(iter(bad))):
            run(prepared, batches(1), **options)
    broken = model()
    with torch.no_grad():
        broken[6].weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="loss became nan in epoch 1, batch 0"):
        run(prepared, batches(1), teacher=broken)


# -- gradual compression --------------------------------------------------------------------------


def test_schedules_in_numbers() -> None:
    assert cubic_sparsity(0.8, 0.0) == 0.0
    assert cubic_sparsity(0.8, 0.5) == pytest.approx(0.8 * 0.875)
    assert cubic_sparsity(0.8, 1.0) == cubic_sparsity(0.8, 7.0) == 0.8
    assert [lowered_bits(2, 2, t) for t in (0.0, 0.33, 0.34, 0.66, 0.67, 1.0)] == [4, 4, 3, 3, 2, 2]
    assert [lowered_bits(7, 4, t) for t in (0.0, 0.7, 1.0)] == [8, 8, 7]
    assert half_cosine(0.0) == 1.0
    assert half_cosine(0.5) == pytest.approx(0.5)
    assert half_cosine(2.0) == pytest.approx(0.0, abs=1e-12)


class Watching(list):
    """Batches that note sparsity and bits of a layer before each of them."""

    def __init__(self, prepared: fx.GraphModule, count: int = 8) -> None:
        super().__init__(batches(count))
        self.layer = layers_of(prepared)["0"]
        self.seen: list[tuple[float, int]] = []

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.seen.append((1.0 - float(self.layer.mask.float().mean()), self.layer.bits))
            yield batch


def test_sparsity_and_bits_go_to_the_plan_and_end_there() -> None:
    prepared = prepared_model(bits=3, sparsity=0.5)
    data = Watching(prepared)
    run(prepared, data, 4, ramp=0.5, extra_bits=2, reestimate_norms=False)
    sparsities, bits = zip(*data.seen[1:], strict=True)  # before the first step nothing is placed
    assert sparsities[0] == 0.0
    assert list(sparsities) == sorted(sparsities)
    assert all(0.0 < s < 0.5 for s in sparsities[2:11])
    assert set(sparsities[16:]) == {0.5}
    assert list(bits) == sorted(bits, reverse=True)
    assert set(bits) == {5, 4, 3}
    assert set(bits[16:]) == {3}
    for name, layer in layers_of(prepared).items():
        numel = layer.weight.numel()
        assert int((~layer.mask).sum()) == pruned_count(numel, 0.5), name
        assert layer.bits == 3
        assert not layer.dense_gradient
        assert int((layer.integers() != 0).sum()) <= numel - pruned_count(numel, 0.5)


def test_plan_is_reached_however_a_run_ends(tmp_path: Path) -> None:
    for options in ({"max_minutes": 1e-9}, {"epochs": 0}):
        prepared = prepared_model(bits=3, sparsity=0.5)
        epochs = options.pop("epochs", 20)
        run(prepared, batches(), epochs, extra_bits=2, **options)
        for layer in layers_of(prepared).values():
            assert layer.bits == 3
            assert int((~layer.mask).sum()) == pruned_count(layer.weight.numel(), 0.5)
            assert layer.step is None
    prepared = prepared_model(bits=3, sparsity=0.5)
    with pytest.raises(KeyboardInterrupt):
        run(prepared, Interrupting(3, by_signal=True), 9, extra_bits=2)
    assert layers_of(prepared)["0"].bits == 3
    assert convert(prepared) is not None


def test_repaired_masks_stay() -> None:
    prepared = prepared_model(bits=3, sparsity=0.5)
    repair(prepared, batches(2), progress=False)
    masks = {name: layer.mask.clone() for name, layer in layers_of(prepared).items()}
    run(prepared, batches(), 2)
    for name, layer in layers_of(prepared).items():
        assert torch.equal(layer.mask, masks[name])


# -- averages and batch norms ---------------------------------------------------------------------


def test_average_in_closed_form() -> None:
    net = nn.Linear(1, 1, bias=False)
    average = Average(net, limit=0.3)
    expected = None
    for step in range(6):
        with torch.no_grad():
            net.weight.fill_(float(step))
        average.update()
        decay = min(0.3, (1 + step) / (10 + step))  # so many went before
        expected = 0.0 if expected is None else decay * expected + (1 - decay) * step
    assert average.values["weight"].item() == pytest.approx(expected)
    average.use()
    assert net.weight.item() == pytest.approx(expected)


def test_average_is_what_remains() -> None:
    ends = {}
    for ema in (0.0, 0.999):
        prepared = prepared_model()
        run(prepared, batches(), 2, ema=ema, gradual=False)
        ends[ema] = prepared
    assert not same(ends[0.0], ends[0.999])


def test_batch_norms_frozen_and_taken_anew() -> None:
    whole = prepared_model()
    before = whole.get_submodule("1").running_mean.clone()
    run(whole, batches(), 1, freeze_norms=1.0, reestimate_norms=False)
    assert torch.equal(whole.get_submodule("1").running_mean, before)
    fresh = prepared_model()
    run(fresh, batches(), 1, ema=0.0)
    taken = fresh.get_submodule("1").running_mean.clone()
    reestimate_batch_norms(fresh, batches(), progress=False)
    torch.testing.assert_close(fresh.get_submodule("1").running_mean, taken)


# -- float training -------------------------------------------------------------------------------


def fit_options(**more: Any) -> dict[str, Any]:
    return {"lr": 0.05, "amp": False, "progress": False, **more}


def test_float_training_learns_and_resumes(tmp_path: Path) -> None:
    whole = model()
    history = fit(whole, Interrupting(None), 4, **fit_options(label_smoothing=0.1))
    assert history.epochs[-1]["accuracy"] > 0.8
    assert not whole.training
    path = tmp_path / "checkpoint.safetensors"
    broken = model()
    options = fit_options(label_smoothing=0.1, checkpoint=path)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, Interrupting(13, by_signal=True), 4, **options)
    again = model()
    assert fit(again, Interrupting(None), 4, **options).resumed
    assert same(whole, again)


def test_label_smoothing_value() -> None:
    net = model()
    net[3].p = 0.0
    x, y = batches(1)[0]
    expected = F.cross_entropy(net.train()(x), y, label_smoothing=0.2).item()
    fresh = model()
    fresh[3].p = 0.0
    history = fit(fresh, [(x, y)], 1, **fit_options(label_smoothing=0.2))
    assert history.epochs[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_float_training_refuses() -> None:
    with pytest.raises(CalibrationError, match="labels"):
        fit(model(), [x for x, _ in batches(1)], 1, **fit_options())
    with pytest.raises(PlanError, match="label_smoothing"):
        fit(model(), batches(1), 1, **fit_options(label_smoothing=1.5))
    with pytest.raises(CalibrationError, match="empty"):
        fit(model(), [], 1, **fit_options())


def test_l2_term_on_activations_keeps_them_small() -> None:
    def size(trained: nn.Module) -> float:
        """Mean square of what enters the linear layer."""
        seen: list[float] = []
        layers = layers_of(trained)
        last = layers[list(layers)[-1]]
        handle = last.register_forward_pre_hook(
            lambda _, x: seen.append(float(x[0].square().mean()))
        )
        with torch.no_grad():
            trained(batches(1)[0][0])
        handle.remove()
        return seen[0]

    sizes = {}
    for weight in (0.0, 1.0, 5.0):
        trained = prepared_model()
        run(trained, batches(), activation_l2=weight)
        assert not any(layer._forward_pre_hooks for layer in layers_of(trained).values())
        sizes[weight] = size(trained)
    assert sizes[5.0] < 0.7 * sizes[0.0] and sizes[5.0] < sizes[1.0] < sizes[0.0]
    plain = prepared_model()
    run(plain, batches())
    assert size(plain) == sizes[0.0]  # off by default
    with pytest.raises(PlanError, match="activation_l2"):
        run(prepared_model(), batches(), activation_l2=-1.0)


class Pair(nn.Module):
    """Two outputs, which cross-entropy cannot judge."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.place = nn.Conv2d(1, 8, 4, stride=4), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.trunk(x).relu().flatten(1)
        return {"place": self.place(y), "features": y}


def of_place(output: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Squared distance from where the bright quadrant lies, per image."""
    wanted = torch.stack([labels // 2, labels % 2], dim=1).float()
    return (output["place"] - wanted).square().sum(dim=1)


def test_fit_with_a_loss_of_its_own(tmp_path: Path) -> None:
    data, path = batches(), tmp_path / "checkpoint"
    options = {**fit_options(), "checkpoint": path}
    torch.manual_seed(0)
    net = Pair()
    history = fit(net, data, 4, loss_fn=of_place, **options)
    assert history.epochs[-1]["loss"] < 0.5 * history.epochs[0]["loss"]
    assert history.epochs[-1]["accuracy"] is None
    with torch.no_grad():
        assert float(of_place(net(data[0][0]), data[0][1]).mean()) < 0.15
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="belongs to another run"):  # it had another loss
        fit(Pair(), data, 4, loss_fn=lambda y, t: of_place(y, t).mean(), **options)
    with pytest.raises(PlanError, match="label_smoothing belongs to cross-entropy"):
        fit(Pair(), data, 4, loss_fn=of_place, **fit_options(label_smoothing=0.1))
