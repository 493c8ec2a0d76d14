"""Drop-in modules: against their float layers, state, types, compile, export, errors."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import adalayer_native as ada
from adalayer_native import _C
from adalayer_native.errors import FileFormatError, UnsupportedModelError
from adalayer_native.operations import geometry, parameters


def conv(bits=8, **options):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, **{"padding": 1, **options})
    return layer, ada.nn.Conv2d.from_float(layer, bits, input_range=(-3.0, 3.0))


def linear(bits=8):
    torch.manual_seed(0)
    layer = nn.Linear(20, 7)
    return layer, ada.nn.Linear.from_float(layer, bits, input_range=(-3.0, 3.0))


OPTIONS = [
    {},
    {"padding": "same", "kernel_size": 4, "dilation": 2},
    {"padding": "valid"},
    {"stride": 2, "padding": (2, 0)},
    {"groups": 2, "bias": False},
    {"dilation": (1, 2)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_close_to_the_float_convolution(options):
    torch.manual_seed(0)
    options = {"kernel_size": 3, **options}
    layer = nn.Conv2d(6, 8, **options)
    native = ada.nn.Conv2d.from_float(layer, 8, input_range=(-3.0, 3.0))
    x = torch.randn(2, 6, 9, 10).clamp(-3, 3)
    want, got = layer(x).detach(), native(x)
    # Half a step of the input and of the weights, per product.
    reduction = layer.weight[0].numel()
    step = 0.5 * 6 / 255 * layer.weight.detach().abs().max() + 0.5 * native.weight_scale.max() * 3
    assert got.shape == want.shape
    assert float((got - want).detach().abs().max()) < float(step) * reduction


def test_equals_the_same_arithmetic_in_float64():
    layer, native = conv(4)
    x = torch.randn(2, 6, 5, 5)
    q = (
        (x / native.input_scale)
        .round()
        .clamp(-native.input_zero_point, 255 - native.input_zero_point)
    )
    want = nn.functional.conv2d(q.double(), native.weight_int().double(), padding=1)
    scale = (native.input_scale * native.weight_scale).double().view(1, -1, 1, 1)
    want = want * scale + layer.bias.double().view(1, -1, 1, 1)
    torch.testing.assert_close(native(x).double(), want, rtol=1e-6, atol=1e-6)


def test_linear_any_rank_and_empty():
    layer, native = linear()
    for shape in ((20,), (5, 20), (2, 3, 20), (0, 20)):
        x = torch.randn(shape).clamp(-3, 3)
        torch.testing.assert_close(native(x), layer(x), atol=0.1, rtol=0)


def test_memory_formats_agree_and_are_kept():
    _, native = conv()
    x = torch.randn(2, 6, 8, 8)
    contiguous = native(x)
    last = native(x.to(memory_format=torch.channels_last))
    assert contiguous.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(contiguous, last)
    strided = torch.randn(2, 6, 8, 16)[..., ::2]
    assert torch.equal(native(strided), native(strided.contiguous()))
    assert native(x[:0]).shape == (0, 8, 8, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast(dtype):
    for _, native in (conv(), linear()):
        shape = (2, 6, 8, 8) if isinstance(native, ada.nn.Conv2d) else (3, 20)
        x = torch.randn(shape).to(dtype)
        out = native(x)
        assert out.dtype == dtype
        assert torch.equal(out, native(x.float()).to(dtype))
        half = copy.deepcopy(native).to(dtype)
        assert half.weight_scale.dtype == torch.float32
        assert torch.equal(half(x), out)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), conv()[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(torch.randn(1, 3, 8, 8)).isfinite().all()


def test_residual_and_output_grid_are_the_separate_steps():
    layer, _ = conv()
    x, residual = torch.randn(2, 6, 7, 7), torch.randn(2, 8, 7, 7)
    plain = ada.nn.Conv2d.from_float(layer, 8, input_range=(-3, 3))
    fused = ada.nn.Conv2d.from_float(layer, 8, input_range=(-3, 3), activation="relu")
    grid = ada.nn.FakeQuantize(0.03, 0, 6)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        for isa in ada.ops.isas():
            ada.ops.force_isa(isa)
            fused.__dict__["output_grid"] = None
            for addend in (residual, residual[:1, :, :1, :1]):  # the second is broadcast
                assert torch.equal(fused(x, addend), (plain(x) + addend).relu())
            fused.__dict__["output_grid"] = grid
            assert torch.equal(fused(x, residual), grid((plain(x) + residual).relu()))
            assert torch.equal(fused(x), grid(plain(x).relu()))
    ada.ops.force_isa("auto")


def test_activation_is_fused():
    layer, _ = conv()
    x = torch.randn(1, 6, 8, 8)
    plain = ada.nn.Conv2d.from_float(layer, 8, input_range=(-3, 3))(x)
    for activation, want in (
        ("relu", plain.relu()),
        ("relu6", plain.clamp(0, 6)),
        ((-0.2, 0.3), plain.clamp(-0.2, 0.3)),
        ((None, 0.1), plain.clamp(max=0.1)),
    ):
        got = ada.nn.Conv2d.from_float(layer, 8, input_range=(-3, 3), activation=activation)(x)
        assert torch.equal(got, want)


@pytest.mark.parametrize("make", [conv, linear])
def test_state_dict_safetensors_deepcopy(make, tmp_path):
    _, native = make(3)
    assert sorted(native.state_dict()) == ["bias", "input_qparams", "weight_packed", "weight_scale"]
    save_file(native.state_dict(), tmp_path / "layer.safetensors")
    _, other = make(6)  # another width: the packed size differs
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(2, 6, 8, 8) if make is conv else torch.randn(2, 20)
    assert torch.equal(other(x), native(x))
    assert other.bits == 3
    assert torch.equal(copy.deepcopy(native)(x), native(x))
    assert "bits=3" in repr(native) and "input=u8" in repr(native)


def test_damaged_state_is_refused():
    _, native = conv(4)
    state = native.state_dict()
    with pytest.raises(FileFormatError, match="weight_packed"):
        native.load_state_dict({**state, "weight_packed": state["weight_packed"][:-1]})
    with pytest.raises(FileFormatError, match="shape"):
        native.load_state_dict(
            {**state, "weight_packed": ada.ops.pack_weight(torch.ones(8, 5, 3, 3).char(), 4)}
        )
    bad = torch.tensor([float("nan"), 0.0, 8.0])
    with pytest.raises(FileFormatError, match="input_qparams"):
        native.load_state_dict({**state, "input_qparams": bad})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = conv(4)[1], linear(3)[1]
        self.grid = ada.nn.FakeQuantize(0.05, 10, 8)

    def forward(self, x):
        y = self.grid(self.conv(x))
        return self.fc(y.mean((2, 3)).repeat(1, 3)[:, :20])


def test_compile_fullgraph():
    net = Net().eval()
    x = torch.randn(2, 6, 8, 8)
    with torch.inference_mode():
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), net(x))


# torch's own inductor warns about its own deprecated parts.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_compile_inductor():
    net = Net().eval()
    x = torch.randn(2, 6, 8, 8)
    with torch.inference_mode():
        compiled = torch.compile(net, fullgraph=True)
        torch.testing.assert_close(compiled(x), net(x), atol=0.06, rtol=0)


def test_export_round_trip(tmp_path):
    net = Net().eval()
    x = torch.randn(2, 6, 8, 8)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for n in (1, 5):
        x = torch.randn(n, 6, 8, 8)
        torch.testing.assert_close(loaded(x), net(x))


def test_backward_is_a_clear_error():
    for _, native in (conv(), linear()):
        shape = (1, 6, 8, 8) if isinstance(native, ada.nn.Conv2d) else (1, 20)
        out = native(torch.randn(shape, requires_grad=True))
        with pytest.raises(RuntimeError, match=r"native layer.*prepare"):
            out.sum().backward()


def test_wrong_inputs_name_the_layer():
    _, native = conv()
    with pytest.raises(ValueError, match=r"Conv2d\(6, 8.*expected 6 channels"):
        native(torch.randn(1, 5, 8, 8))
    with pytest.raises(ValueError, match=r"Conv2d\(6, 8.*4 dimensions"):
        native(torch.randn(6, 8, 8))
    with pytest.raises(TypeError, match=r"float32.*got torch.int64"):
        native(torch.zeros(1, 6, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="the layer is on cpu, but its input is on meta"):
        native(torch.randn(1, 6, 8, 8, device="meta"))
    with pytest.raises(ValueError, match=r"Linear\(20, 7.*expected 20"):
        linear()[1](torch.randn(3, 19))


def test_nan_and_infinity_are_defined():
    _, native = conv()
    x = torch.zeros(1, 6, 4, 4)
    x[0, 0, 0, 0] = float("nan")
    low = torch.zeros(1, 6, 4, 4)
    low[0, 0, 0, 0] = float("-inf")
    assert torch.equal(native(x), native(low)) and native(x).isfinite().all()


def test_what_cannot_be_converted():
    with pytest.raises(UnsupportedModelError, match="padding_mode"):
        ada.nn.Conv2d.from_float(
            nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), 8, input_range=(0, 1)
        )
    broken = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        broken.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"[Nn]a[Nn]|finite"):
        ada.nn.Conv2d.from_float(broken, 8, input_range=(0, 1))
    with pytest.raises(ValueError, match="range of the input"):
        ada.nn.Conv2d.from_float(nn.Conv2d(3, 4, 3), 8, input_range=(1, 0))
    with pytest.raises(UnsupportedModelError, match="overflow"):
        ada.nn.Linear.from_quantized(
            torch.zeros(1, 70000, dtype=torch.int8),
            8,
            torch.ones(1),
            None,
            input_scale=1.0,
            input_zero_point=0,
        )


class Seen(TorchDispatchMode):
    """The native operators that ran under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "adalayer":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("layer", "shape", "name"),
    [(conv, (2, 6, 5, 5), "conv2d"), (linear, (3, 2, 20), "linear")],
    ids=["conv2d", "linear"],
)
def test_layers_leave_the_dispatcher_out_only_where_nobody_watches(layer, shape, name):
    native, x = layer(4)[1], torch.randn(shape)
    with torch.profiler.profile() as profile:
        watched = native(x)
    assert any(f"adalayer::{name}" in event.name for event in profile.events())
    with Seen() as seen:
        also = native(x)
    assert seen.names == [name]
    assert torch.equal(native(x), watched) and torch.equal(native(x), also)


def fresh(layer):
    """The operator on what the layer holds now."""
    name, given = layer.operator()
    return lambda x: getattr(ada.ops, name)(x, **given)


def _bias_past_its_version(layer):
    layer.bias.data.add_(1)


def _other_memory(layer):
    layer.bias.data = layer.bias * 3


def _another_scale(layer):
    layer.weight_scale.numpy()[:] *= 2


def _another_buffer(layer):
    layer.bias = layer.bias + 5


def _another_clamp(layer):
    layer.lo, layer.hi = -0.1, 0.2


def _another_grid(layer):
    layer._set_grid(ada.nn.layer.checked_qparams(0.3, 7, 5))


def _other_weights(layer):
    torch.manual_seed(9)
    other = nn.Conv2d(6, 8, 3) if isinstance(layer, ada.nn.Conv2d) else nn.Linear(20, 7)
    made = type(layer).from_float(other, 3, input_range=(-1.0, 2.0))
    layer.load_state_dict(made.state_dict())


CHANGES = [
    _bias_past_its_version,
    _other_memory,
    _another_scale,
    _another_buffer,
    _another_clamp,
    _another_grid,
    _other_weights,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("make", "shape"), [(conv, (2, 6, 5, 5)), (linear, (3, 20))])
def test_a_layer_that_is_ready_notices_what_is_changed(make, shape, change):
    _, layer = make()
    x = torch.randn(shape)
    before = layer(x)
    assert torch.equal(layer(x), before)
    change(layer)
    after = layer(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(layer)(x))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), after)


def test_a_layer_that_is_ready_notices_geometry_and_output_grid():
    _, layer = conv()
    x = torch.randn(2, 6, 7, 7)
    before = layer(x)
    layer.stride = (2, 2)
    assert torch.equal(layer(x), before[..., ::2, ::2])
    grid = ada.nn.FakeQuantize(0.25, 3, 4)
    layer.__dict__["output_grid"] = grid
    assert torch.equal(layer(x), grid(before[..., ::2, ::2]))
    grid._set_grid(ada.nn.layer.checked_qparams(0.5, 1, 3))
    assert torch.equal(layer(x), grid(before[..., ::2, ::2]))
    layer.bias = torch.zeros(5)
    with pytest.raises(TypeError, match=r"bias must be contiguous float32 \[8\]"):
        layer(x)


def test_moving_a_layer_leaves_no_memory_behind():
    _, layer = conv()
    layer(torch.randn(1, 6, 5, 5))
    assert layer._made is not None
    layer.to("meta")
    assert layer._made is None


def test_sizes_of_results_are_those_of_torch_and_of_the_engine():
    numbers = random.Random(3)
    checked = 0
    while checked < 60:
        kernel, stride, dilation, size = (
            (numbers.randint(1, most), numbers.randint(1, most)) for most in (4, 3, 3, 12)
        )
        padding = [numbers.randint(0, 3) for _ in range(4)]
        top, left, bottom, right = padding
        x = torch.empty(1, 2, *size, device="meta")
        try:
            found = ada.ops.conv_out_shape(x.shape, 3, kernel, stride, padding, dilation)
        except ValueError:
            continue
        checked += 1
        weight = torch.empty(3, 2, *kernel, device="meta")
        padded = F.pad(x, (left, right, top, bottom))
        assert F.conv2d(padded, weight, None, stride, 0, dilation).shape == found
        around = [min(k - 1, 2) for k in kernel]
        back = ada.ops.transposed_out_size(size, kernel, stride, around, dilation)
        turned = weight.transpose(0, 1)
        expected = F.conv_transpose2d(x, turned, None, stride, around, dilation=dilation)
        assert expected.shape[2:] == back
        program = _C.Program()
        values = [program.add_value("x", "f32", 2, *size)]
        values.append(program.add_value("y", "f32", 3, *found[2:]))
        held = torch.zeros(3, 2, *kernel), torch.zeros(3)
        numbers_of = [program.add_constant_f32(t.data_ptr(), t.numel()) for t in held]
        lists = parameters(
            "float_conv",
            **geometry(kernel, stride, padding, dilation),
            weights=numbers_of[0],
            bias=numbers_of[1],
        )
        program.add_node("float_conv", "c", values[:1], values[1], *lists)
        program.set_inputs(values[:1])
        program.set_outputs(values[1:])
        program.validate()  # which refuses any other size


def test_layers_are_made_by_name() -> None:
    layer = nn.Conv2d(3, 4, 3)
    with pytest.warns(DeprecationWarning, match="'conv' is called 'layer' now"):
        native = ada.nn.Conv2d.from_float(conv=layer, input_range=(-3.0, 3.0))
    assert type(native) is ada.nn.Conv2d
    weight, scale = torch.zeros(4, 3, 1, 1, dtype=torch.int8), torch.ones(4)
    for kind, window in ((ada.nn.Conv2d, "output_padding"), (ada.nn.ConvTranspose2d, "strides")):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{window}'"):
            kind.from_quantized(
                weight, 8, scale, None, input_scale=1.0, input_zero_point=0, **{window: 1}
            )
