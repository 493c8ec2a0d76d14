"""Pictures out of batch norms, and compression without any data."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.data import distilled
from adalayer_native.errors import CalibrationError, UnsupportedModelError

SHAPE = (3, 12, 12)


def pictures(count: int, seed: int = 0) -> Tensor:
    """Smooth ones, whose channels know of each other, as real ones."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    mixed = torch.einsum(
        "ij,njhw->nihw", torch.tensor([[1.0, 0, 0], [0.8, 0.5, 0], [0.6, 0.2, 0.4]]), coarse
    )
    return nn.functional.interpolate(mixed, SHAPE[1:], mode="bilinear").clamp(-2, 2)


def network() -> nn.Sequential:
    """Batch norms with the statistics of pictures."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # of all batches
    with torch.no_grad():
        for seed in range(8):
            model(pictures(64, seed))
    return model.eval()


def apart(model: nn.Sequential, x: Tensor) -> float:
    """How far the statistics of a batch are from those that the norms remember."""
    total = 0.0
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                mean, deviation = x.mean((0, 2, 3)), x.std((0, 2, 3))
                wanted = module.running_var.sqrt()
                total += float(((mean - module.running_mean) / wanted).square().mean())
                total += float((deviation / wanted - 1).square().mean())
            x = module(x)
    return total


def test_statistics_become_those_that_the_norms_remember():
    model = network()
    before = copy.deepcopy(model.state_dict())
    batches = distilled(model, pictures(1), samples=40, steps=60, progress=False)
    assert [len(batch) for batch in batches] == [32, 8]
    x = batches[0]
    assert x.shape[1:] == SHAPE
    assert x.dtype == torch.float32
    assert not x.requires_grad
    noise = torch.randn(32, *SHAPE)
    assert apart(model, x) < 0.2 * apart(model, noise)
    assert apart(model, x) < 3 * apart(model, pictures(32, 99)) + 0.1
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not model[1]._forward_pre_hooks


@pytest.mark.parametrize(
    ("example", "limits", "expected"),
    [
        (torch.zeros(1, *SHAPE), None, (-2.5, 2.75)),
        (torch.full((1, *SHAPE), -4.0), None, (-4.0, 2.75)),
        (torch.rand(1, *SHAPE), None, (0.0, 1.0)),
        (torch.full((1, *SHAPE), 200.0), None, (0.0, 255.0)),
        (torch.rand(1, *SHAPE), (-0.5, 0.5), (-0.5, 0.5)),
    ],
)
def test_pictures_stay_within_what_a_model_will_see(example, limits, expected):
    batches = distilled(network(), example, limits=limits, samples=4, steps=3, progress=False)
    assert float(batches[0].min()) >= expected[0]
    assert float(batches[0].max()) <= expected[1]
    spread = expected[1] - expected[0]
    assert float(batches[0].max() - batches[0].min()) > 0.5 * spread


def test_the_seed_is_all_that_is_random():
    model, example = network(), torch.zeros(1, *SHAPE)
    one, same, other = (
        distilled(model, example, samples=4, steps=3, seed=seed, progress=False)[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_compression_without_data():
    model = network()
    with pytest.warns(UserWarning, match="pictures are distilled"):
        result = ada.compress(
            model, None, 8, example_inputs=torch.zeros(1, *SHAPE), effort="low", progress=False
        )
    x = pictures(64, 77)
    with torch.no_grad():
        want, got = model(x), result.model(x)
    assert float((want - got).norm() / want.norm()) < 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ada.compress(model, [pictures(16)], 8, effort="low", progress=False)


def test_what_no_picture_can_be_distilled_for():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(UnsupportedModelError, match="batch norms, and the model has none"):
        distilled(plain, torch.zeros(1, *SHAPE))
    with pytest.raises(UnsupportedModelError, match=r"an example \[N, C, ...\], got torch.int64"):
        distilled(network(), torch.zeros(1, 4, dtype=torch.int64))
    for options, text in (
        ({"limits": (1.0, 1.0)}, "expected limits from low to high"),
        ({"limits": (float("nan"), 1.0)}, "expected limits from low to high"),
        ({"samples": 0}, "at least 1, got 0 and"),
        ({"steps": 0}, "at least 1, got 128 and 0"),
    ):
        with pytest.raises(CalibrationError, match=text):
            distilled(network(), torch.zeros(1, *SHAPE), **options)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x) + self.layer(y)

    inputs = (torch.randn(2, 8), torch.randn(2, 8))
    with pytest.raises(CalibrationError, match="a model of one input is needed, got 2"):
        ada.compress(Two(), None, 8, example_inputs=inputs)
