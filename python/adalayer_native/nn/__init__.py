"""Drop-in torch modules on native kernels: float in, float out."""

from adalayer_native.nn.modules import Conv2d, ConvTranspose2d, FakeQuantize, Linear

__all__ = ["Conv2d", "ConvTranspose2d", "FakeQuantize", "Linear"]
