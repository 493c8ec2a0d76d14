"""Transposed convolutions: arithmetic, module, and the whole way through the stack."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native import ops
from adalayer_native.errors import FileFormatError, UnsupportedModelError
from adalayer_native.importance.flops import count_flops
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from adalayer_native.rounding import conv_form, fma_float32, layer_form

GEOMETRIES = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": (2, 4), "stride": (1, 3), "padding": (0, 1), "output_padding": (0, 2)},
    {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": (2, 1), "groups": 2},
    {"kernel_size": 4, "stride": 3, "groups": 6},
    # More padding than the kernel reaches: the borders of the input are cut off.
    {"kernel_size": 1, "stride": 2, "padding": 1},
    {"kernel_size": (1, 2), "stride": (1, 1), "padding": (2, 3), "dilation": (1, 2)},
    # One extra row by dilation alone.
    {"kernel_size": 2, "dilation": 3, "output_padding": 2},
]


@pytest.fixture(autouse=True)
def _restore():
    yield
    ops.force_isa("auto")


def random_native(options: dict, bits: int = 5, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A native layer with random integers, and its weight in torch's form."""
    torch.manual_seed(seed)
    layer = nn.ConvTranspose2d(12, 18, **options)
    shape = conv_form(layer, layer.weight).shape
    weight = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    native = ada.nn.ConvTranspose2d.from_quantized(
        weight,
        bits,
        torch.randn(18) * 0.01,
        torch.randn(18),
        input_scale=0.03,
        input_zero_point=101,
        stride=layer.stride,
        padding=layer.padding,
        output_padding=layer.output_padding,
        dilation=layer.dilation,
        groups=layer.groups,
        activation=(-2.0, 3.0),
    )
    return native, layer_form(layer, weight)


def expected(native: nn.Module, weight: Tensor, x: Tensor, output_padding=None) -> Tensor:
    """The same arithmetic through torch's own transposed convolution of the integers."""
    inverse = 1 / torch.tensor(native.input_scale)
    levels = (x * inverse).clamp(-101, 154).round().double()
    acc = F.conv_transpose2d(
        levels,
        weight.double(),
        stride=native.stride,
        padding=native.padding,
        output_padding=native.output_padding if output_padding is None else output_padding,
        dilation=native.dilation,
        groups=native.groups,
    )
    scale = native.weight_scale * torch.tensor(native.input_scale)
    out = fma_float32(acc.float(), scale.view(1, -1, 1, 1), native.bias.view(1, -1, 1, 1))
    return out.clamp(-2.0, 3.0)


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_equals_the_transposed_convolution_of_the_integers(options):
    native, weight = random_native(options)
    x = torch.randn(2, 12, 6, 7) * 2
    want = expected(native, weight, x)
    assert float(want.std()) > 0.1
    for isa in ops.isas():
        ops.force_isa(isa)
        assert torch.equal(native(x), want)
        interleaved = native(x.contiguous(memory_format=torch.channels_last))
        assert torch.equal(interleaved, want)
        assert interleaved.is_contiguous(memory_format=torch.channels_last)


def test_conv_form_is_not_flipped_and_has_an_inverse():
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    form = conv_form(layer, layer.weight)
    assert form.shape == (6, 2, 3, 3)
    # Output channel 4 is the second of group 1, whose inputs are channels 2 and 3.
    assert torch.equal(form[4, 1], layer.weight[3, 1])
    assert torch.equal(layer_form(layer, form), layer.weight)
    plain = nn.Conv2d(2, 3, 3)
    assert conv_form(plain, plain.weight) is plain.weight


def test_output_on_a_grid_and_reduced_types():
    native, weight = random_native({"kernel_size": 2, "stride": 2})
    x = torch.randn(1, 12, 4, 4)
    grid = ada.nn.FakeQuantize(0.02, 90)
    want = grid(expected(native, weight, x))
    native.__dict__["output_grid"] = grid
    assert torch.equal(native(x), want)
    half = native(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, native(x.to(torch.bfloat16).float()).to(torch.bfloat16))


def test_output_size_chooses_the_output_padding():
    native, weight = random_native({"kernel_size": 3, "stride": 2, "padding": 1})
    x = torch.randn(1, 12, 5, 4)
    assert native(x).shape == (1, 18, 9, 7)
    got = native(x, output_size=[10, 7])
    assert torch.equal(got, expected(native, weight, x, (1, 0)))
    assert native(x, output_size=(1, 18, 9, 8)).shape == (1, 18, 9, 8)
    for wrong in ([8, 7], [11, 7]):
        with pytest.raises(ValueError, match="no output of size"):
            native(x, output_size=wrong)


def test_opcheck():
    packed = ops.pack_weight(torch.randint(-8, 8, (6, 5, 3, 2), dtype=torch.int8), 4)
    scale, bias = torch.rand(6) * 0.01, torch.randn(6)
    geometry = ([3, 2], [2, 1], [1, 0], [1, 0], [1, 1], 1)
    for x in (
        torch.randn(2, 5, 4, 6),
        torch.randn(2, 5, 4, 6).to(memory_format=torch.channels_last),
        torch.randn(2, 5, 4, 6, dtype=torch.half),
        torch.randn(0, 5, 4, 6),
    ):
        arguments = (x, packed, scale, bias, 0.02, 99, 8, *geometry, 0.0, None, 0.1, 7, 8)
        torch.library.opcheck(ops.conv_transpose2d, arguments)


def test_flipped_weights_are_cached_by_content():
    native, weight = random_native({"kernel_size": 2, "stride": 2})
    x = torch.randn(1, 12, 3, 3)
    native(x)
    before = len(ops.layer._flipped)
    assert torch.equal(copy.deepcopy(native)(x), expected(native, weight, x))
    assert len(ops.layer._flipped) == before
    # Edited in place: other content, other entry.
    other, other_weight = random_native({"kernel_size": 2, "stride": 2}, seed=1)
    native.load_state_dict(other.state_dict())
    assert torch.equal(native(x), expected(other, other_weight, x))
    for seed in range(int(ops.layer._flipped.limit) + 3):
        random_native({"kernel_size": 2, "stride": 2}, bits=2, seed=seed)[0](x)
    assert len(ops.layer._flipped) == ops.layer._flipped.limit


def test_wrong_arguments_are_errors():
    native, _ = random_native({"kernel_size": 2, "stride": 2})
    with pytest.raises(ValueError, match="expected 12 channels on axis 1"):
        native(torch.randn(1, 11, 4, 4))
    with pytest.raises(ValueError, match="expected 4 dimensions"):
        native(torch.randn(12, 4, 4))
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        native(torch.randn(1, 12, 4, 4).double())
    for options, message in (
        ({"stride": 2, "output_padding": 2}, "output_padding must be"),
        ({"stride": 0}, "stride and dilation"),
        ({"padding": -1}, "padding at least 0"),
        ({"groups": 5}, "do not divide in 5 groups"),
    ):
        with pytest.raises(ValueError, match=message):
            ada.nn.ConvTranspose2d.from_quantized(
                torch.zeros(4, 2, 2, 2, dtype=torch.int8),
                4,
                torch.ones(4),
                None,
                input_scale=0.1,
                input_zero_point=0,
                **options,
            )
    run = [torch.randn(1, 2, 3, 3), ops.pack_weight(torch.ones(4, 2, 2, 2).to(torch.int8), 4)]
    run += [torch.ones(4), torch.ones(4), 0.1, 0, 8, [2, 2]]
    with pytest.raises(ValueError, match="output_padding must be"):
        ops.conv_transpose2d(*run, [1, 1], [0, 0], [1, 0], [1, 1], 1)
    with pytest.raises(ValueError, match="leaves no output"):
        ops.conv_transpose2d(*run, [1, 1], [3, 0], [0, 0], [1, 1], 1)
    with pytest.raises(ValueError, match="stride and dilation"):
        ops.conv_transpose2d(*run, [0, 1], [0, 0], [0, 0], [1, 1], 1)
    wrong_kernel = [*run[:-1], [3, 2]]
    with pytest.raises(ValueError, match=r"\[4, 2, 2, 2\]"):
        ops.conv_transpose2d(*wrong_kernel, [1, 1], [0, 0], [0, 0], [1, 1], 1)


def test_from_float_is_close_and_refuses_backward():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1, groups=2)
    native = ada.nn.ConvTranspose2d.from_float(layer, 8, input_range=(-3.0, 3.0))
    assert "output_padding=(1, 1)" in repr(native)
    x = torch.randn(2, 6, 5, 5).clamp(-3, 3)
    want = layer(x).detach()
    assert float((native(x) - want).norm() / want.norm()) < 0.02
    x.requires_grad_(True)
    with pytest.raises(RuntimeError, match="not possible"):
        # Written over in place before: the refusal is not a view.
        native(x).relu_().sum().backward()


class Decoder(nn.Module):
    """Transposed convolutions with what follows them: batch norm, clamps, additions, reuse."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 12, 4, stride=2, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.relu = nn.ReLU6(inplace=True)
        self.same = nn.ConvTranspose2d(12, 12, 3, padding=1)
        self.down = nn.Conv2d(12, 12, 3, stride=2, padding=1)
        self.sized = nn.ConvTranspose2d(12, 4, 3, stride=2, padding=1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.up(self.stem(x))))
        y = self.same(y) + y
        z = self.sized(F.relu(self.down(y)), output_size=[y.shape[-2], y.shape[-1]])
        return self.head(F.relu(z))


def decoder() -> Decoder:
    torch.manual_seed(3)
    model = Decoder()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-0.2, 0.2)
        model.norm.running_var.uniform_(0.1, 0.5)
        model.norm.weight.uniform_(-1.0, 1.0)
    return model.eval()


def plan_for(model: nn.Module, bits: int = 5, sparsity: float = 0.0) -> Plan:
    return Plan(
        {
            name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), bits, sparsity)
            for name, layer in supported_layers(model).items()
        }
    )


def prepared_decoder(sparsity: float = 0.0):
    prepared = ada.prepare(decoder(), plan_for(decoder(), sparsity=sparsity))
    batch = torch.randn(4, 3, 10, 12, generator=torch.Generator().manual_seed(1))
    return ada.calibrate(prepared, [batch], progress=False)


@torch.no_grad()
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_conversion_is_bit_equal_to_the_simulation(sparsity):
    prepared = prepared_decoder(sparsity)
    native = ada.convert(prepared)
    assert isinstance(native.get_submodule("norm"), nn.Identity)
    up = native.get_submodule("up")
    assert isinstance(up, ada.nn.ConvTranspose2d)
    assert (up.lo, up.hi) == (0.0, 6.0)
    assert up.output_grid is not None
    for height in (10, 9):
        x = torch.randn(2, 3, height, 12)
        with ada.simulate(prepared, exact=True):
            want = prepared(x)
        assert torch.equal(native(x), want)
        assert float((prepared(x) - want).abs().max()) < 0.1 * float(want.abs().max())


def test_plan_names_the_kind_and_round_trips():
    plan = plan_for(decoder())
    assert plan["up"].kind == "conv_transpose2d"
    assert Plan.from_json(plan.to_json()) == plan
    plan["up"].kind = "conv2d"
    with pytest.raises(ada.PlanError, match=r"'up'.*must be 'conv_transpose2d'"):
        plan.validate(decoder())


def test_weights_train_and_masks_hold():
    prepared = prepared_decoder(0.5)
    prepared.train()
    layer = prepared.get_submodule("up")
    assert layer.mask.shape == layer.weight.shape
    prepared(torch.randn(4, 3, 10, 12)).square().mean().backward()
    assert layer.weight.grad.shape == layer.weight.shape
    assert float(layer.weight.grad.abs().sum()) > 0
    assert not bool(layer.weight.grad[~layer.mask].any())


def test_saved_file_restores_and_its_size_was_known(tmp_path: Path):
    native = ada.convert(prepared_decoder())
    path = tmp_path / "decoder.safetensors"
    size = ada.save(native, path)
    estimate = ada.estimate_bytes(decoder(), plan_for(decoder()))
    assert size <= estimate <= 1.01 * size
    restored = ada.restore(decoder(), path)
    x = torch.randn(1, 3, 10, 12)
    assert torch.equal(restored(x), native(x))
    broken = native.state_dict()
    broken["up.weight_packed"] = broken["same.weight_packed"]
    with pytest.raises(FileFormatError, match=r"up\.weight_packed: expected packed weights"):
        native.load_state_dict(broken)


def test_flops_count_products_of_the_input():
    model = decoder()
    layers = supported_layers(model)
    flops = count_flops(model, layers, torch.randn(1, 3, 10, 12))
    # 8 channels of 5x6 values, each times 6 output channels of its group and 16 kernel places.
    assert flops["up"] == 2 * 8 * 5 * 6 * 6 * 16
    assert flops["same"] == 2 * 12 * 10 * 12 * 12 * 9


def test_analysis_and_allocation_accept_transposed_convolutions():
    model = decoder()
    data = [torch.randn(2, 3, 10, 12)]
    for criterion in ("accuracy", "weight_error", "gradient"):
        scores = ada.analyze(model, data, F.mse_loss, criterion=criterion, progress=False)
        assert scores.layers["up"].kind == "conv_transpose2d"
    plan = ada.allocate(
        scores, ada.Budget(size=0.5), model=model, calibration=data, method="uniform",
        loss_fn=F.mse_loss,
    )  # fmt: skip
    assert plan["up"].bits is not None


def test_layers_that_cannot_be_native_stay_float():
    wide = nn.Sequential(nn.ConvTranspose2d(70_000, 1, 1), nn.Conv2d(1, 2, 1))
    with pytest.warns(UserWarning, match="stays in float"):
        prepared = ada.prepare(wide, plan_for(wide, bits=8))
    assert "overflow" in prepared.meta["kept_float"]["0"]
    with pytest.raises(UnsupportedModelError, match="overflow"):
        ada.nn.ConvTranspose2d.from_float(wide[0], 8, input_range=(0.0, 1.0))
