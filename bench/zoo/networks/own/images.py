"""Images to images: segmentation, denoising, enlarging, generators."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.zoo.entry import Entry, noise


def conv_bn_relu(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution with batch norm and relu."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Bilinear enlargement to the size of the skip connection, in a loop with ``zip``."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), classes: int = 5) -> None:
        super().__init__()
        inputs = (3, *widths[:-1])
        self.down = nn.ModuleList(
            nn.Sequential(conv_bn_relu(i, o), conv_bn_relu(o, o))
            for i, o in zip(inputs, widths, strict=True)
        )
        self.up = nn.ModuleList(
            conv_bn_relu(low + high, high)
            for low, high in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([skip, x], dim=1))
        return self.head(x)


class DnCNN(nn.Module):
    """Predicts the noise and subtracts it."""

    def __init__(self, depth: int = 8, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(inplace=True),
            *(conv_bn_relu(width, width) for _ in range(depth - 2)),
            nn.Conv2d(width, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x - self.body(x)


class ESPCN(nn.Module):
    """Enlarges by pixel shuffle at the end."""

    def __init__(self, factor: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, 5, padding=2)
        self.conv2 = nn.Conv2d(64, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, factor**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(factor)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv1(x))
        return self.shuffle(self.conv3(torch.tanh(self.conv2(x))))


class ScaledResidual(nn.Module):
    """EDSR's block: no batch norm, and a constant on the branch."""

    def __init__(self, width: int, scale: float = 0.1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.conv2(F.relu(self.conv1(x)))


class EDSR(nn.Module):
    """Residual blocks without batch norm, a long skip, two pixel shuffles; a mean to subtract."""

    mean: Tensor

    def __init__(self, blocks: int = 4, width: int = 32) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.45, 0.44, 0.40]).view(1, 3, 1, 1))
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(
            *(ScaledResidual(width) for _ in range(blocks)), nn.Conv2d(width, width, 3, padding=1)
        )
        enlarge: list[nn.Module] = []
        for _ in range(2):
            enlarge += [nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2)]
        self.tail = nn.Sequential(*enlarge, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x - self.mean)
        return self.tail(x + self.body(x)) + self.mean


class DCGANGenerator(nn.Module):
    """Transposed convolutions from a vector to an image of 64 x 64."""

    def __init__(self, latent: int = 100, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        sizes = [latent, 8 * width, 4 * width, 2 * width, width]
        for k, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            stride, padding = (1, 0) if k == 0 else (2, 1)
            layers += [
                nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(True),
            ]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z.view(z.size(0), -1, 1, 1))


class ReflectResidual(nn.Module):
    """CycleGAN's block: reflection padding and instance norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            nn.InstanceNorm2d(width),
            nn.ReLU(True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            nn.InstanceNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class CycleGANGenerator(nn.Module):
    """Down, residual blocks, up; every norm takes its statistics from the image at hand."""

    def __init__(self, width: int = 16, blocks: int = 3) -> None:
        super().__init__()

        def step(layer: nn.Module, outputs: int) -> list[nn.Module]:
            return [layer, nn.InstanceNorm2d(outputs), nn.ReLU(True)]

        self.model = nn.Sequential(
            nn.ReflectionPad2d(3),
            *step(nn.Conv2d(3, width, 7), width),
            *step(nn.Conv2d(width, 2 * width, 3, 2, 1), 2 * width),
            *step(nn.Conv2d(2 * width, 4 * width, 3, 2, 1), 4 * width),
            *(ReflectResidual(4 * width) for _ in range(blocks)),
            *step(nn.ConvTranspose2d(4 * width, 2 * width, 3, 2, 1, 1), 2 * width),
            *step(nn.ConvTranspose2d(2 * width, width, 3, 2, 1, 1), width),
            nn.ReflectionPad2d(3),
            nn.Conv2d(width, 3, 7),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class GroupNormNet(nn.Module):
    """A residual network with group norm."""

    def __init__(self, width: int = 32, blocks: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(F.relu(x).mean(dim=(2, 3)))


ENTRIES = (
    Entry("own/unet-bilinear", "own", UNet, noise(3, 64, 64), noise(3, 96, 128)),
    Entry("own/dncnn", "own", DnCNN, noise(1, 48, 48), noise(1, 64, 56)),
    Entry("own/espcn", "own", ESPCN, noise(1, 32, 32), noise(1, 24, 40)),
    Entry("own/edsr", "own", EDSR, noise(3, 24, 24), noise(3, 32, 40)),
    Entry("own/dcgan-generator", "own", DCGANGenerator, noise(100)),
    Entry("own/cyclegan-generator", "own", CycleGANGenerator, noise(3, 64, 64), noise(3, 96, 80)),
    Entry("own/groupnorm-resnet", "own", GroupNormNet, noise(3, 48, 48), noise(3, 64, 64)),
)
