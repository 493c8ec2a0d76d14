"""Unusual inputs and results, networks without convolutions, and MLPerf Tiny's shapes."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.zoo.entry import Entry, noise, positional
from bench.zoo.networks.own.images import conv_bn_relu


class VAE(nn.Module):
    """Returns the reconstruction, the mean and the logarithm of the variance."""

    def __init__(self, latent: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_bn_relu(3, 32, 2), conv_bn_relu(32, 64, 2), nn.Flatten())
        self.mu = nn.Linear(64 * 8 * 8, latent)
        self.logvar = nn.Linear(64 * 8 * 8, latent)
        self.expand = nn.Linear(latent, 64 * 8 * 8)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(64, 32, 3, 2, 1, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 3, 3, 2, 1, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar) if self.training else mu
        return self.decoder(self.expand(z).view(-1, 64, 8, 8)), mu, logvar


class Siamese(nn.Module):
    """One embedding for two images, and the probability that they show the same."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            conv_bn_relu(1, 32),
            nn.MaxPool2d(2),
            conv_bn_relu(32, 64),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 64),
        )
        self.compare = nn.Linear(64, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        distance = torch.abs(self.embed(first) - self.embed(second))
        return torch.sigmoid(self.compare(distance))


class TwoHeads(nn.Module):
    """A dictionary as result: classes, boxes and the features that they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            conv_bn_relu(3, 32, 2), conv_bn_relu(32, 64, 2), conv_bn_relu(64, 64)
        )
        self.classes = nn.Linear(64, 10)
        self.boxes = nn.Conv2d(64, 4, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = self.trunk(image)
        return {
            "classes": self.classes(features.mean((2, 3))),
            "boxes": torch.sigmoid(self.boxes(features)),
            "features": features,
        }


class PatchTransformer(nn.Module):
    """``nn.TransformerEncoder`` over the patches of an image."""

    def __init__(self, size: int = 32, patch: int = 8, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(tokens).mean(dim=1))


class TableMLP(nn.Module):
    """Rows of a table."""

    def __init__(self, columns: int = 20, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm1d(columns),
            nn.Linear(columns, width),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class KeywordDSCNN(nn.Module):
    """MLPerf Tiny's keyword spotting: 49 frames of 10 coefficients, separable convolutions."""

    def __init__(self, classes: int = 12, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(1, width, (10, 4), 2, (5, 1), bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Dropout(0.2),
        ]  # fmt: skip
        for _ in range(4):
            layers += [
                nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            ]  # fmt: skip
        self.features = nn.Sequential(*layers, nn.Dropout(0.4))
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.avg_pool2d(x, x.shape[-2:])
        return F.softmax(self.fc(torch.flatten(x, 1)), dim=1)


class AnomalyAutoencoder(nn.Module):
    """MLPerf Tiny's anomaly detection: 640 values down to 8 and back."""

    def __init__(self, inputs: int = 640, width: int = 128, latent: int = 8) -> None:
        super().__init__()
        sizes = [inputs, *[width] * 4, latent, *[width] * 4]
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(sizes):
            layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, inputs))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layers(x)
        return y, ((y - x) ** 2).mean(dim=1)


ENTRIES = (
    Entry("own/vae", "own", VAE, noise(3, 32, 32)),
    Entry("own/siamese", "own", Siamese, positional(noise(1, 28, 28), noise(1, 28, 28))),
    Entry("own/dict-output", "own", TwoHeads, noise(3, 32, 32), noise(3, 48, 64)),
    Entry(
        "own/transformer-encoder", "own", PatchTransformer, noise(3, 32, 32), convolutional=False
    ),
    Entry("own/mlp-table", "own", TableMLP, noise(20), convolutional=False),
    Entry("own/ds-cnn", "own", KeywordDSCNN, noise(1, 49, 10)),
    Entry("own/autoencoder", "own", AnomalyAutoencoder, noise(640), convolutional=False),
)
