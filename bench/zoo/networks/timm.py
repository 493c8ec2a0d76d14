"""Networks of timm, with random weights."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from bench.zoo.entry import Entry, noise
from bench.zoo.packages import package

# At 64 pixels the last images are 2 x 2. Where position embeddings, attention biases or windows
# fix the size, it is that of the name.
CONVOLUTIONAL = (
    "resnet26d",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "efficientnet_lite0",
    "tf_efficientnet_b0",
    "efficientnetv2_rw_t",
    "ghostnet_100",
    "repvgg_a0",
    "mobileone_s0",
    "regnety_004",
    "convnext_atto",
    "convnextv2_atto",
    "dla34",
    "densenet121",
    "xception41",
    "nfnet_l0",
    "rexnet_100",
    "poolformer_s12",
    "lcnet_050",
)
# Their products of two activations are little beside their convolutions and linear layers.
HYBRID = ("edgenext_xx_small", "mobilevit_xxs")
ATTENTION = (
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "levit_128s",
    "mixer_s32_224",
)


def _make(name: str) -> nn.Module:
    model: Any = package("timm").create_model(name, pretrained=False)
    if not isinstance(model, nn.Module):
        raise TypeError(f"timm made a {type(model).__name__} of {name!r}")
    return model


def _entry(name: str, size: int, other: int | None, convolutional: bool) -> Entry:
    return Entry(
        f"timm/{name}",
        "timm",
        partial(_make, name),
        noise(3, size, size),
        None if other is None else noise(3, other, other),
        convolutional,
    )


ENTRIES = (
    *(_entry(name, 64, 96, True) for name in CONVOLUTIONAL),
    *(_entry(name, 64, 128, True) for name in HYBRID),
    *(_entry(name, 224, None, False) for name in ATTENTION),
)
