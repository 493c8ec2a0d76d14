"""Drop-in torch modules on native kernels: float in, float out."""

from adalayer_native.nn.conv import Conv2d, ConvTranspose2d
from adalayer_native.nn.fake_quantize import FakeQuantize
from adalayer_native.nn.linear import Linear

__all__ = ["Conv2d", "ConvTranspose2d", "FakeQuantize", "Linear"]
