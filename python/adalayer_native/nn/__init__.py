"""Drop-in torch modules on native kernels: float in, float out."""

from adalayer_native.nn.conv import Conv2d, ConvTranspose2d
from adalayer_native.nn.fake_quantize import FakeQuantize
from adalayer_native.nn.linear import Linear
from adalayer_native.nn.policy import Choice, choices, set_policy

__all__ = [
    "Choice",
    "Conv2d",
    "ConvTranspose2d",
    "FakeQuantize",
    "Linear",
    "choices",
    "set_policy",
]
