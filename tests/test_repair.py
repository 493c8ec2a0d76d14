"""Repair without training: closed forms, exact counts, exact grids, resumption, bad input."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers_models import batches, tiny
from torch import nn

import adalayer_native as ada
from adalayer_native.plan import layer_kind, supported_layers
from adalayer_native.pruning.masks import magnitude_mask, pruned_count
from adalayer_native.quantization.graph import layers_of
from adalayer_native.repair import LayerHessian, layer_hessians, repair
from adalayer_native.repair import hessian as ada_hessian
from adalayer_native.repair.input_rows import columns
from adalayer_native.rounding import conv_form, layer_form, quantize_weight, round_weight

# torch says so about every even kernel with "same"; it is one of the cases that matter here.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

LAYERS = {
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1), (6, 9, 7)),
    "stride": (lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0)), (6, 9, 8)),
    "same": (lambda: nn.Conv2d(6, 8, (2, 4), padding="same", dilation=(1, 2)), (6, 9, 8)),
    "valid": (lambda: nn.Conv2d(6, 8, 3, padding="valid", bias=False), (6, 9, 8)),
    "groups": (lambda: nn.Conv2d(6, 9, 3, padding=2, dilation=2, groups=3), (6, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6), (6, 8, 8)),
    "transposed": (
        lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
        (6, 5, 4),
    ),
    "cropped": (lambda: nn.ConvTranspose2d(6, 4, 2, stride=(1, 3), padding=(2, 3)), (6, 8, 8)),
    "dilated-t": (lambda: nn.ConvTranspose2d(6, 4, 3, dilation=2), (6, 4, 4)),
    "linear": (lambda: nn.Linear(20, 8), (20,)),
    "linear-3d": (lambda: nn.Linear(20, 8, bias=False), (5, 20)),
}


def make(kind: str, samples: int = 48) -> tuple[nn.Module, torch.Tensor]:
    """A layer and correlated inputs with a mean, as after a ReLU."""
    build, shape = LAYERS[kind]
    torch.manual_seed(11)
    layer = build().requires_grad_(False)
    x = torch.randn(samples, *shape)
    return layer, (x + 0.7 * x.roll(1, dims=1) + 0.5 * x.roll(1, dims=-1)).relu()


def observed(layer: nn.Module, x: torch.Tensor, **options) -> LayerHessian:
    hessian = LayerHessian(layer, name="layer", **options)
    for part in x.split(20):
        hessian.add(part)
    return hessian


def output_of(layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Output [n, O] of the layer with another weight (output channels first), without bias."""
    other = copy.deepcopy(layer)
    other.weight.copy_(layer_form(layer, weight))
    if other.bias is not None:
        other.bias.zero_()
    y = other(x)
    return y.transpose(1, -1).reshape(-1, y.shape[1]) if y.dim() == 4 else y.flatten(0, -2)


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_times_weight_are_the_layer(kind: str):
    layer, x = make(kind, samples=3)
    rows = columns(layer, x, 1 << 30, torch.Generator())
    form = conv_form(layer, layer.weight)
    y = form.reshape(rows.shape[0], -1, rows.shape[2]) @ rows.transpose(1, 2)  # [G, O/G, n]
    y = y.reshape(form.shape[0], -1).t()
    wanted = output_of(layer, form, x)
    if x.dim() == 4:  # rows go image by image, each line by line
        shape = layer(x).shape
        y = y.reshape(shape[0], shape[2], shape[3], -1).transpose(1, 2).reshape(wanted.shape)
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("bits", "sparsity"), [(2, 0.0), (3, 0.0), (4, 0.5), (8, 0.9)])
def test_the_error_is_that_of_the_output_and_not_above_plain_rounding(kind, bits, sparsity):
    layer, x = make(kind)
    solution = observed(layer, x).quantize(bits, sparsity)
    form = conv_form(layer, layer.weight)
    wanted = output_of(layer, form, x).double()
    got = output_of(layer, solution.weight, x).double() + solution.bias_shift
    error = float((got - wanted).square().mean(0).sum() / wanted.var(0, unbiased=False).sum())
    assert solution.error == pytest.approx(error, rel=1e-3, abs=1e-7)
    # The shift takes the mean of the error, in every channel.
    torch.testing.assert_close(got.mean(0), wanted.mean(0), rtol=0, atol=1e-5)

    mask = magnitude_mask(form, sparsity) if sparsity else None
    levels, scale = quantize_weight(form, bits, mask)
    plain = levels.float() * scale.view(-1, *([1] * (form.dim() - 1)))
    difference = output_of(layer, plain, x).double() - wanted
    plain_error = float(
        difference.var(0, unbiased=False).sum() / wanted.var(0, unbiased=False).sum()
    )
    assert solution.plain_error == pytest.approx(plain_error, rel=2e-3, abs=1e-7)
    assert solution.error <= solution.plain_error
    if kind != "depthwise" and bits < 8:
        assert solution.error < 0.99 * solution.plain_error


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.37, 0.5, 0.9, 0.999])
def test_density_is_exact_and_weights_are_on_their_grid(kind: str, sparsity: float):
    layer, x = make(kind)
    solution = observed(layer, x).quantize(3, sparsity)
    count = pruned_count(layer.weight.numel(), sparsity)
    assert (solution.mask is None) == (count == 0)
    if solution.mask is not None:
        assert int((~solution.mask).sum()) == count
        assert not solution.levels[~solution.mask].any()
    assert solution.levels.shape == conv_form(layer, layer.weight).shape
    assert int(solution.levels.min()) >= -4
    assert int(solution.levels.max()) <= 3
    assert bool((solution.scale > 0).all())
    again = round_weight(solution.weight, solution.scale, 3, solution.mask)
    assert torch.equal(again, solution.levels.float())


def test_uncorrelated_inputs_leave_nothing_to_compensate():
    # Columns of a Hadamard matrix: exactly orthogonal, of equal variance, without a mean.
    h = torch.ones(1, 1)
    for _ in range(6):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    layer = nn.Linear(63, 12).requires_grad_(False)
    solution = observed(layer, h[:, 1:]).quantize(4)
    levels, scale = quantize_weight(layer.weight, 4)
    assert torch.equal(solution.levels, levels)
    torch.testing.assert_close(solution.scale, scale, rtol=1e-5, atol=0)
    assert solution.error == pytest.approx(solution.plain_error, rel=1e-4)


def test_pruning_one_of_two_weights_follows_optimal_brain_surgeon():
    # The larger weight is almost fully explained by the other input; magnitude would keep it.
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(4096, generator=generator)
    b = 0.2 * a + 1.5 * torch.randn(4096, generator=generator)
    x = torch.stack([0.3 * a, b], 1)
    layer = nn.Linear(2, 1, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[1.0, 0.8]]))
    solution = observed(layer, x, damping=1e-9).quantize(8, 0.5)
    assert solution.mask.tolist() == [[False, True]]
    c = torch.cov(x.t())
    wanted = 0.8 + 1.0 * c[0, 1] / c[1, 1]
    assert float(solution.weight[0, 1]) == pytest.approx(float(wanted), rel=1e-4)
    # w^2 / [H^-1]_jj, the saliency of Optimal Brain Surgeon, is the whole error.
    saliency = 1.0 / float(torch.linalg.inv(c)[0, 0])
    variance = float(torch.tensor([1.0, 0.8]) @ c @ torch.tensor([1.0, 0.8]))
    assert solution.error == pytest.approx(saliency / variance, rel=1e-3)


def test_close_to_the_best_integers_of_an_exhaustive_search():
    torch.manual_seed(4)
    mixed = torch.randn(256, 5) @ torch.randn(5, 5)
    layer = nn.Linear(5, 16, bias=False).requires_grad_(False)
    hessian = observed(layer, mixed)
    solution = hessian.quantize(2)
    c = torch.cov(mixed.t(), correction=0).double()
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=5)), dtype=torch.float64)
    found, best = 0.0, 0.0
    for row in range(16):
        scale, w = float(solution.scale[row]), layer.weight[row].double()
        candidates = w - scale * every
        best += float(((candidates @ c) * candidates).sum(1).min())
        rest = w - solution.weight[row].double()
        found += float(rest @ c @ rest)
    assert best <= found * (1 + 1e-9)
    energy = float(((layer.weight.double() @ c) * layer.weight.double()).sum())
    plain = solution.plain_error * energy
    assert found - best < 0.4 * (plain - best)


def test_a_wrong_input_is_corrected_towards_the_float_output():
    torch.manual_seed(5)
    layer = nn.Linear(12, 6).requires_grad_(False)
    exact = torch.randn(512, 12) @ torch.randn(12, 12)
    wrong = 0.8 * exact + 0.1 * torch.randn(512, 12) + 0.3
    aware, blind = LayerHessian(layer), LayerHessian(layer)
    aware.add(wrong, exact)
    blind.add(wrong)
    wanted = layer(exact)

    def error(solution) -> float:
        got = wrong @ solution.weight.t() + layer.bias + solution.bias_shift
        return float((got - wanted).var(0).sum() / wanted.var(0).sum())

    solution = aware.quantize(6)
    assert solution.error == pytest.approx(error(solution), rel=0.01)
    assert error(solution) < 0.5 * error(blind.quantize(6))


@pytest.mark.parametrize("kind", ["conv", "groups", "depthwise", "transposed", "linear"])
def test_the_table_of_errors_is_that_of_single_settings(kind: str):
    layer, x = make(kind)
    hessian = observed(layer, x)
    settings = [(b, s) for b in (2, 3, 4, 8) for s in (0.0, 0.3, 0.6)]
    table = hessian.errors(settings, channels=None, passes=2)
    single = [hessian.quantize(b, s, passes=2).error for b, s in settings]
    # quantize() takes plain rounding where that is better, the table does not look.
    for got, wanted, setting in zip(table, single, settings, strict=True):
        assert got >= wanted * (1 - 1e-6), setting
        assert got == pytest.approx(wanted, rel=0.1, abs=1e-6), setting
    values = torch.tensor(table).view(4, 3)
    # More bits, less error; where zeros are most of it, up to the luck of the choice.
    assert bool((values[:, 0].diff() < 0).all())
    assert bool((values.diff(dim=0) < 0.05 * values[1:]).all())
    # More zeros, more error; at 2 bits a third of the weights is zero anyway.
    assert bool((values.diff(dim=1) > -0.01 * values[:, 1:]).all())
    sampled = hessian.errors(settings, channels=4)
    assert all(
        s == pytest.approx(t, rel=0.8, abs=1e-4) for s, t in zip(sampled, table, strict=True)
    )


def test_a_given_mask_is_kept_and_the_same_call_gives_the_same_result():
    layer, x = make("groups")
    mask = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    first = observed(layer, x, per_image=7, seed=3).quantize(4, mask=mask)
    assert torch.equal(first.mask, mask)
    assert not first.levels[~mask].any()
    again = observed(layer, x, per_image=7, seed=3).quantize(4, mask=mask)
    assert torch.equal(first.levels, again.levels)
    assert torch.equal(first.scale, again.scale)
    assert torch.equal(first.bias_shift, again.bias_shift)
    other = observed(layer, x, per_image=7, seed=4).quantize(4, mask=mask)
    assert not torch.equal(first.scale, other.scale)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_degenerate_layers(sparsity: float):
    layer, x = make("conv")
    constant = observed(layer, torch.full_like(x, 2.0))
    assert 0.0 <= constant.quantize(4, sparsity).error < 1.0
    silent = observed(layer, torch.zeros_like(x)).quantize(4, sparsity)
    assert silent.error == 0.0
    assert bool(torch.isfinite(silent.weight).all())
    single = observed(layer, x[:1], per_image=1).quantize(4, sparsity)  # rank 0 after the mean
    assert bool(torch.isfinite(single.weight).all())
    # One channel twice: the covariance is singular, and the damping decides.
    twin = x.clone()
    twin[:, 1] = twin[:, 0]
    assert observed(layer, twin).quantize(4, sparsity).error < 0.3
    layer.weight.zero_()
    empty = observed(layer, x).quantize(4, sparsity)
    assert not empty.levels.any()
    assert empty.error == 0.0


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(150, 24, 3, padding=1), nn.Linear(300, 24)], ids=["conv", "linear"]
)
@pytest.mark.parametrize(("sparsity", "pattern"), [(0.0, "unstructured"), (0.6, "unstructured"),
                                                   (0.5, "2:4"), (0.5, "block16x64")])  # fmt: skip
@torch.no_grad()
def test_wide_layers_are_taken_in_parts(
    layer: nn.Module, sparsity: float, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of one matrix is not reached, but what counts as the error is not far from it."""
    torch.manual_seed(3)
    x = torch.randn(48, 150, 6, 6) if isinstance(layer, nn.Conv2d) else torch.randn(800, 300)
    x = (x + 0.7 * x.roll(1, dims=1)).relu()
    other = x + 0.05 * torch.randn_like(x)
    whole = LayerHessian(layer)
    whole.add(x, other)
    monkeypatch.setattr(ada_hessian, "MOST_COLUMNS", 64 * layer.weight[0, 0].numel())
    parts = LayerHessian(layer, name="wide")
    parts.add(x, other)
    assert [p.stop - p.start for p in parts.parts] == (
        [576, 576, 198] if x.dim() == 4 else [64, 64, 64, 64, 44]
    )
    found = parts.quantize(4, sparsity, pattern=pattern)
    best = whole.quantize(4, sparsity, pattern=pattern)
    pruned = [0 if s.mask is None else int((~s.mask).sum()) for s in (found, best)]
    # As many blocks, of which those at the edges are smaller.
    assert abs(pruned[0] - pruned[1]) < (16 * 64 if "block" in pattern else 1)
    assert torch.equal(round_weight(found.weight, found.scale, 4), found.levels.float())
    y = output_of(layer, layer.weight, other)
    errors = [
        float(
            (output_of(layer, s.weight, x) - y).var(dim=0, unbiased=False).sum()
            / y.var(dim=0).sum()
        )
        for s in (found, best)
    ]
    assert errors[0] < 2.0 * errors[1]
    assert found.error <= found.plain_error
    assert (found.error == pytest.approx(errors[0], rel=0.5)) or sparsity
    table = parts.errors([(4, sparsity), (8, 0.0)], channels=8)
    assert table[1] < table[0] < 1.0
    if pattern != "unstructured" or sparsity == 0.0:
        (again,) = parts.solutions([(4, sparsity)], pattern=pattern)
        assert torch.equal(again.levels, found.levels)


def test_what_a_hessian_refuses():
    layer, x = make("conv")
    hessian = LayerHessian(layer, name="stem")
    with pytest.raises(ada.CalibrationError, match="'stem': no input was seen"):
        hessian.quantize(4)
    with pytest.raises(ada.CalibrationError, match="'stem': its input contains NaN"):
        hessian.add(torch.full_like(x, float("nan")))
    with pytest.raises(ada.CalibrationError, match=r"'stem': expected an input \[N, C, H, W\]"):
        hessian.add(x[0])
    with pytest.raises(ada.CalibrationError, match="does not fit its weight"):
        hessian.add(x[:, :3])
    with pytest.raises(ada.CalibrationError, match="should be of one shape"):
        hessian.add(x, x[:1])
    hessian.add(x)
    with pytest.raises(ada.CalibrationError, match="float inputs are needed in all"):
        hessian.add(x, x)
    for bits, sparsity in ((1, 0.0), (9, 0.0), (4, 1.0), (4, -0.1)):
        with pytest.raises(ada.PlanError):
            hessian.quantize(bits, sparsity)
    with pytest.raises(ada.PlanError, match="mask has shape"):
        hessian.quantize(4, mask=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ada.CalibrationError, match="got ReLU"):
        LayerHessian(nn.ReLU())
    with pytest.raises(ada.CalibrationError, match="must be positive"):
        LayerHessian(layer, damping=0.0)


# -- whole models -------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Every kind of layer: grouped, depthwise, transposed, called twice, residual, no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.twice = nn.Conv2d(8, 8, 1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, bias=False)
        self.fc = nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        y = torch.relu(self.twice(torch.relu(self.depth(x))))
        x = x + self.twice(y)
        return self.fc(self.up(x).mean((2, 3)))


def mixed() -> nn.Module:
    torch.manual_seed(8)
    model = Mixed()
    model.bn.running_var.uniform_(0.5, 2.0)
    model.bn.running_mean.uniform_(-0.2, 0.2)
    return model.eval()


def prepared(model: nn.Module, bits: int = 3, sparsity: float = 0.0, data=None):
    layers = supported_layers(model)
    plan = ada.Plan(
        {
            name: ada.LayerPlan(name, layer_kind(m), m.weight.numel(), bits, sparsity)
            for name, m in layers.items()
        }
    )
    ready = ada.prepare(model, plan)
    return ada.calibrate(ready, data or batches(), progress=False)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("build", [tiny, mixed])
@pytest.mark.parametrize(("bits", "sparsity"), [(3, 0.0), (4, 0.5)])
def test_a_repaired_model_converts_bit_for_bit_and_is_closer_to_the_float_model(
    build, bits, sparsity
):
    model, data = build(), batches(4, 32)
    ready = prepared(model, bits, sparsity, data)
    plain = copy.deepcopy(ready)
    report = repair(ready, data, progress=False)
    assert set(report.layers) == set(layers_of(ready))
    assert report.images == 128
    for row in report.layers.values():
        assert row.error <= row.plain_error, row.name
        assert (row.bits, row.sparsity) == (bits, sparsity)
    for name, layer in layers_of(ready).items():
        count = pruned_count(layer.weight.numel(), sparsity)
        assert (0 if layer.mask is None else int((~layer.mask).sum())) == count, name
        on_grid = layer.quantized_weight()
        assert torch.equal(on_grid, layer.weight), name
    x = batches(2, 64, seed=77)[0][0]
    with torch.no_grad():
        wanted = model(x)
        errors = [float((m(x) - wanted).square().mean()) for m in (ready, plain)]
    assert errors[0] < errors[1]

    native = ada.convert(ready)
    with ada.simulate(ready, exact=True) as exact, torch.no_grad():
        assert torch.equal(native(x), exact(x))
    for name, layer in layers_of(ready).items():
        stored = native.get_submodule(name).weight_int
        stored = stored() if callable(stored) else stored
        assert torch.equal(stored.reshape(layer.integers().shape), layer.integers()), name


def test_errors_of_earlier_layers_are_corrected():
    model, data = mixed(), batches(4, 64)
    aware, blind = prepared(model, 2, data=data), prepared(model, 2, data=data)
    repair(aware, data, progress=False)
    repair(blind, data, correct_inputs=False, progress=False)
    x = data[0][0]
    with torch.no_grad():
        first, second = (float((m(x) - model(x)).square().mean()) for m in (aware, blind))
    assert first < second


def test_batch_norms_are_only_re_estimated_where_the_output_gets_nearer():
    def distance(model: nn.Module, ready: nn.Module) -> float:
        with torch.no_grad():
            return sum(float((ready(x) - model(x)).square().sum()) for x, _ in batches())

    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                          nn.Linear(8 * 36, 4)).eval()  # fmt: skip
    # Statistics that are not those of this data: fresh ones would be another network.
    ready = prepared(model, bits=4)
    state_before = copy.deepcopy(ready.get_submodule("1").running_var)
    report = repair(ready, batches(), bn_reestimate=True, progress=False)
    assert not report.reestimated
    assert torch.equal(ready.get_submodule("1").running_var, state_before)
    # And those of this data, but pruned until hardly anything is left.
    with torch.no_grad():
        model[1].train()
        model[1].momentum = None
        model[0](batches()[0][0])
        for x, _ in batches():
            model(x)
        model.eval()
    plain, fresh = (prepared(model, bits=2, sparsity=0.9) for _ in range(2))
    repair(plain, batches(), correct_inputs=False, passes=0, progress=False)
    report = repair(
        fresh, batches(), correct_inputs=False, passes=0, bn_reestimate=True, progress=False
    )
    assert distance(model, fresh) <= distance(model, plain)
    norms = [ready.get_submodule("1").running_var for ready in (plain, fresh)]
    assert report.reestimated == (not torch.equal(*norms))


def test_masks_can_be_kept():
    ready = prepared(mixed(), 4, 0.4)
    masks = {name: layer.mask.clone() for name, layer in layers_of(ready).items()}
    chosen = copy.deepcopy(ready)
    repair(ready, batches(), choose_masks=False, progress=False)
    repair(chosen, batches(), progress=False)
    assert all(torch.equal(layer.mask, masks[name]) for name, layer in layers_of(ready).items())
    assert any(not torch.equal(m.mask, masks[name]) for name, m in layers_of(chosen).items())


def test_the_same_seed_gives_the_same_model_and_labels_are_not_read():
    runs = []
    for labels, seed in ((True, 0), (False, 0)):
        ready = prepared(mixed(), 3, 0.3)
        torch.manual_seed(labels + 40)  # the global generator is neither used nor moved
        before = torch.get_rng_state()
        repair(ready, batches(labels=labels), seed=seed, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(state(ready))
    assert same(*runs)


class Stops:
    """A loader that is interrupted when it is read for the n-th time."""

    def __init__(self, data: list, readings: int, error: type[BaseException]) -> None:
        self.data, self.left, self.error = data, readings, error

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self):
        self.left -= 1
        for index, batch in enumerate(self.data):
            if self.left < 0 and index == 1:
                raise self.error
            yield batch


@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_interrupted_repair_leaves_the_model_alone_and_goes_on(tmp_path, done: int):
    data, path = batches(), tmp_path / "deep" / "repair.safetensors"
    whole = prepared(mixed(), 3, 0.3)
    full = repair(whole, data, progress=False)

    ready = prepared(mixed(), 3, 0.3)
    start = state(ready)
    # One reading checks the data, one each repairs a layer.
    stops = Stops(data, 1 + done, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        repair(ready, stops, checkpoint=path, memory=0, progress=False)
    assert same(state(ready), start)
    assert layers_of(ready)["fc"].bias is None
    assert path.exists() == (done > 0)

    resumed = repair(ready, data, checkpoint=path, progress=False)
    assert resumed.resumed == done
    assert same(state(ready), state(whole))
    assert [row.error for row in resumed.layers.values()] == [
        row.error for row in full.layers.values()
    ]
    # A finished run is taken from the file as a whole.
    again = prepared(mixed(), 3, 0.3)
    assert repair(again, data, checkpoint=path, progress=False).resumed == len(full.layers)
    assert same(state(again), state(whole))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = tmp_path / "repair.safetensors"
    repair(prepared(mixed(), 3, 0.3), batches(), checkpoint=path, progress=False)
    others = {
        "plan": (prepared(mixed(), 4, 0.3), batches(), {}),
        "model": (prepared(tiny(), 3, 0.3), batches(), {}),
        "data": (prepared(mixed(), 3, 0.3), batches(seed=5), {}),
        "options": (prepared(mixed(), 3, 0.3), batches(), {"passes": 1}),
    }
    for ready, data, options in others.values():
        start = state(ready)
        with pytest.raises(ada.FileFormatError, match="belongs to another repair"):
            repair(ready, data, checkpoint=path, progress=False, **options)
        assert same(state(ready), start)
    damaged = path.read_bytes()
    for content in (damaged[:-40], b"", b"{}" * 20):
        path.write_bytes(content)
        with pytest.raises(ada.FileFormatError, match="corrupt"):
            repair(prepared(mixed(), 3, 0.3), batches(), checkpoint=path, progress=False)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ada.FileFormatError, match="expected format adalayer-repair"):
        repair(prepared(mixed(), 3, 0.3), batches(), checkpoint=path, progress=False)


def test_what_a_repair_refuses():
    ready = prepared(tiny())
    start = state(ready)
    bad = batches()
    bad[1][0][3, 0, 2, 2] = float("inf")
    refusals = [
        ([], "loader is empty"),
        (bad, r"batch 1 of shape \(16, 3, 8, 8\) contains NaN or infinite"),
        (["text"], "expected batches that are a tensor"),
    ]
    for data, message in refusals:
        with pytest.raises(ada.CalibrationError, match=message):
            repair(ready, data, progress=False)
    with pytest.raises(ada.CalibrationError, match=r"does not fit.*got \[2, 5,"):
        repair(ready, [torch.zeros(2, 5, 8, 8)], progress=False)
    for options in ({"passes": -1}, {"damping": 0.0}, {"batches": 0}, {"memory": -1}):
        with pytest.raises(ada.CalibrationError, match="must"):
            repair(ready, batches(), progress=False, **options)
    assert same(state(ready), start)
    with pytest.raises(ada.UnsupportedModelError, match="expected a model that prepare"):
        repair(tiny(), batches(), progress=False)
    model = tiny()
    fresh = ada.prepare(model, ada.Plan({"fc": ada.LayerPlan("fc", "linear", 192, 4)}))
    with pytest.raises(ada.CalibrationError, match="have no range"):
        repair(fresh, batches(), progress=False)
    # An overflow inside the model: the message says where.
    layers_of(ready)["conv2"].bias.data.fill_(float("inf"))
    with pytest.raises(ada.CalibrationError, match="layer 'fc': its input contains NaN"):
        repair(ready, batches(), progress=False)


class InPlace(nn.Module):
    """Operations in place on values that other layers read later."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(6, 6, 1)
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(x))
        y = self.second(x)
        y += x
        z = self.third(self.act(y)).add_(x)
        return self.fc(self.act(z).mean((2, 3)))


@pytest.mark.parametrize("build", [tiny, mixed, InPlace])
def test_memory_decides_only_what_runs_again(build):
    torch.manual_seed(1)
    model, data = build().eval(), batches(3, 8)
    results = []
    for memory in (0, 40_000, 1 << 30):
        ready = prepared(model, 3, 0.25, data)
        loader = Stops(data, 1 << 20, ValueError)
        repair(ready, loader, memory=memory, equalize=False, progress=False)
        results.append((state(ready), (1 << 20) - loader.left))
    layers = len(layers_of(ready))
    assert same(results[0][0], results[2][0])
    assert same(results[1][0], results[2][0])
    assert results[0][1] > layers  # read for every layer
    assert results[2][1] < 4


def test_one_shot_iterators_and_partial_plans():
    data = batches(3)
    model = mixed()
    layers = {n: m for n, m in supported_layers(model).items() if n in ("depth", "up")}
    plan = ada.Plan(
        {n: ada.LayerPlan(n, layer_kind(m), m.weight.numel(), 3) for n, m in layers.items()}
    )
    first, second = ada.prepare(model, plan), ada.prepare(model, plan)
    for ready in (first, second):
        ada.calibrate(ready, data, progress=False)
    repair(first, iter(data), batches=2, progress=False)
    report = repair(second, data[:2], progress=False)
    assert list(report.layers) == ["depth", "up"]
    assert same(state(first), state(second))
    assert torch.equal(first.fc.weight, model.fc.weight)


def test_statistics_of_a_float_model():
    model, data = mixed(), batches(2, 32)
    model.train()
    before = state(model)
    together = dict(layer_hessians(model, data, progress=False))
    apart = dict(layer_hessians(model, data, memory=1, progress=False))
    assert list(together) == list(apart) == list(supported_layers(model))
    assert model.training
    assert same(state(model), before)
    for name, hessian in together.items():
        table = hessian.errors([(8, 0.0), (3, 0.0), (3, 0.5)])
        assert table == apart[name].errors([(8, 0.0), (3, 0.0), (3, 0.5)])
        assert table[0] < table[1] < table[2], name
    # The gain of the folded batch norm counts, and only there.
    assert together["stem"].gain.unique().numel() > 1
    assert together["depth"].gain.unique().tolist() == [1.0]
    some = dict(layer_hessians(model, data, ["fc"], progress=False))
    assert list(some) == ["fc"]
    with pytest.raises(ada.PlanError, match="layer 'nope' cannot be quantized"):
        next(layer_hessians(model, data, ["nope"], progress=False))
    with pytest.raises(ada.CalibrationError, match="loader is empty"):
        next(layer_hessians(model, [], progress=False))


def test_the_report_names_every_layer():
    from rich.console import Console

    report = repair(prepared(tiny()), batches(), progress=False)
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        console.print(report)
    text = capture.get()
    assert all(name in text for name in ("conv1", "conv2", "fc", "Plain", "Repaired"))
