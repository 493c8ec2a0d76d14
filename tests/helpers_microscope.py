"""Networks for the microscope's tests, and faults to plant in what is made of them."""

from __future__ import annotations

import functools

import torch
from torch import nn

import adalayer_native as ada
from adalayer_native.capture import GraphModel


class Residual(nn.Module):
    """A stem, two residual blocks (one with a projection) and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.a1, self.a2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.an1, self.an2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.b1 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.b2, self.bp = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(8, 16, 1, stride=2)
        self.bn1, self.bn2, self.bnp = (nn.BatchNorm2d(16) for _ in range(3))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.an2(self.a2(torch.relu(self.an1(self.a1(x))))))
        y = self.bn2(self.b2(torch.relu(self.bn1(self.b1(x)))))
        x = torch.relu(y + self.bnp(self.bp(x)))
        return self.fc(x.mean((2, 3)))


class Depthwise(nn.Module):
    """Pointwise and depthwise convolutions with relu6, as MobileNets have them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.wide, self.wide_norm = nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.deep = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.deep_norm = nn.BatchNorm2d(24)
        self.narrow, self.narrow_norm = nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        relu6 = nn.functional.relu6
        x = self.stem(x)
        y = relu6(self.wide_norm(self.wide(x)))
        y = relu6(self.deep_norm(self.deep(y)))
        x = x + self.narrow_norm(self.narrow(y))
        return self.fc(x.mean((2, 3)))


class Tokens(nn.Module):
    """Ids to logits through one block of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.fc = nn.Linear(16, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc(self.encoder(self.table(ids)).mean(1))


class Several(nn.Module):
    """Two inputs by name; a dictionary of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor, depth: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.left(image) + self.right(depth))
        return {"map": self.up(x), "logits": self.fc(x.mean((2, 3)))}


def seeded(network: type[nn.Module]) -> nn.Module:
    """Seeded, with running statistics that are not trivial and norms with weights of their own."""
    torch.manual_seed(0)
    model = network().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(1.5, 3)
                module.bias.uniform_(-0.3, 0.3)
    return model


@functools.cache
def captured(network: type[nn.Module]) -> GraphModel:
    """:func:`seeded`, captured once for all tests; nobody changes it."""
    (example, *_) = data_of(network, 1)
    return ada.capture(seeded(network), example if network is Several else (example,))


def data_of(network: type[nn.Module], count: int = 2, size: int = 32, seed: int = 1) -> list:
    """Seeded batches."""
    generator = torch.Generator().manual_seed(seed)

    def images(channels: int) -> torch.Tensor:
        return torch.randn((size, channels, 8, 8), generator=generator)

    if network is Tokens:
        return [torch.randint(0, 40, (size, 6), generator=generator) for _ in range(count)]
    if network is Several:
        return [{"image": images(3), "depth": images(1)} for _ in range(count)]
    return [images(3) for _ in range(count)]


def prepared_of(
    model: nn.Module, data: list, bits: int = 8, changes: dict[str, int | None] | None = None
) -> nn.Module:
    """So many bits everywhere but for some layers, calibrated."""
    example = data[0] if isinstance(data[0], dict) else (data[0],)
    found = model if isinstance(model, GraphModel) else ada.capture(model, example)
    plan = ada.allocate(None, ada.Budget(bits=bits), method="uniform", model=found, progress=False)
    for name, width in (changes or {}).items():
        plan[name].bits = width
    return ada.calibrate(ada.prepare(found, plan), data, progress=False)


def quantizer_of(prepared: nn.Module, layer: str) -> nn.Module:
    """The quantizer of a layer's input."""
    return prepared.get_submodule(prepared.meta["layers"][layer]["input"])
