"""Sound, text and other sequences: one-dimensional convolutions and recurrent layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from bench.zoo.entry import Entry, noise, tokens

VOCABULARY = 500


class AudioNet(nn.Module):
    """Raw sound through strided one-dimensional convolutions (M5)."""

    def __init__(self, classes: int = 35, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, width, 80, stride=16)
        self.bn1 = nn.BatchNorm1d(width)
        self.conv2 = nn.Conv1d(width, width, 3)
        self.bn2 = nn.BatchNorm1d(width)
        self.conv3 = nn.Conv1d(width, 2 * width, 3)
        self.bn3 = nn.BatchNorm1d(2 * width)
        self.pool = nn.MaxPool1d(4)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = self.pool(F.relu(self.bn2(self.conv2(x))))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.avg_pool1d(x, x.shape[-1]).permute(0, 2, 1)
        return F.log_softmax(self.fc(x), dim=2)


class Residual1d(nn.Module):
    """A residual block over time."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, outputs, 7, stride, 3, bias=False)
        self.bn1 = nn.BatchNorm1d(outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, 7, 1, 3, bias=False)
        self.bn2 = nn.BatchNorm1d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv1d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm1d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet1d(nn.Module):
    """An electrocardiogram's twelve leads through residual blocks."""

    def __init__(self, leads: int = 12, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(leads, 32, 15, 2, 7, bias=False), nn.BatchNorm1d(32), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            Residual1d(32, 32, 1), Residual1d(32, 64, 2), Residual1d(64, 96, 2)
        )
        self.head = nn.Linear(96, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(F.adaptive_avg_pool1d(x, 1).squeeze(-1))


class CRNN(nn.Module):
    """Lines of text: convolutions, then a bidirectional LSTM over the columns."""

    def __init__(self, classes: int = 37, hidden: int = 64) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.MaxPool2d((8, 1)),
        )  # fmt: skip
        self.rnn = nn.LSTM(128, hidden, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.cnn(x).squeeze(2).transpose(1, 2)
        features, _ = self.rnn(columns)
        return self.fc(features)


class ConvGRU(nn.Module):
    """Features over time, then a GRU whose last state is classified."""

    def __init__(self, features: int = 40, hidden: int = 64, classes: int = 12) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv1d(features, 64, 5, 2, 2), nn.BatchNorm1d(64), nn.ReLU(),
            nn.Conv1d(64, 64, 5, 2, 2), nn.BatchNorm1d(64), nn.ReLU(),
        )  # fmt: skip
        self.gru = nn.GRU(64, hidden, num_layers=2, batch_first=True)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(self.conv(x).transpose(1, 2))
        return self.fc(y[:, -1])


class TextCNN(nn.Module):
    """Sentences: an embedding, convolutions of several widths, the maximum over time."""

    def __init__(self, width: int = 64, filters: int = 50, classes: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(width, filters, k) for k in (3, 4, 5))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(3 * filters, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(1, 2)
        pooled = [F.relu(conv(x)).max(dim=2).values for conv in self.convs]
        return self.fc(self.dropout(torch.cat(pooled, dim=1)))


class WaveNetBlock(nn.Module):
    """Gated dilated convolutions with normalised weights, and the skips of all of them."""

    def __init__(self, width: int = 32, layers: int = 4) -> None:
        super().__init__()
        normalised = parametrizations.weight_norm
        self.start = normalised(nn.Conv1d(1, width, 1))
        self.dilated = nn.ModuleList(
            normalised(nn.Conv1d(width, 2 * width, 3, padding=2**k, dilation=2**k))
            for k in range(layers)
        )
        self.out = nn.ModuleList(normalised(nn.Conv1d(width, 2 * width, 1)) for _ in range(layers))
        self.end = nn.Conv1d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        total = torch.zeros_like(x)
        for dilated, out in zip(self.dilated, self.out, strict=True):
            filtered, gate = dilated(x).chunk(2, dim=1)
            residual, skip = out(torch.tanh(filtered) * torch.sigmoid(gate)).chunk(2, dim=1)
            x = (x + residual) * 0.5**0.5
            total = total + skip
        return self.end(F.relu(total))


ENTRIES = (
    Entry("own/audio-conv1d", "own", AudioNet, noise(1, 8000), noise(1, 12000)),
    Entry("own/resnet-1d", "own", ResNet1d, noise(12, 250), noise(12, 400)),
    Entry("own/crnn", "own", CRNN, noise(1, 32, 64), noise(1, 32, 96), convolutional=False),
    Entry("own/conv-gru", "own", ConvGRU, noise(40, 49), noise(40, 64), convolutional=False),
    Entry("own/textcnn", "own", TextCNN, tokens(VOCABULARY, 30), tokens(VOCABULARY, 44)),
    Entry("own/wavenet", "own", WaveNetBlock, noise(1, 256), noise(1, 400)),
)
