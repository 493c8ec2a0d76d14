"""Drop-in torch modules on native kernels, float in, float out; float layers made of several."""

from adalayer_native.nn.conv import Conv2d, ConvTranspose2d
from adalayer_native.nn.fake_quantize import FakeQuantize
from adalayer_native.nn.linear import Linear
from adalayer_native.nn.policy import Choice, choices, set_policy
from adalayer_native.nn.recurrence import Recurrence
from adalayer_native.nn.tensor_train import TensorTrainConv2d, TensorTrainLinear

__all__ = [
    "Choice",
    "Conv2d",
    "ConvTranspose2d",
    "FakeQuantize",
    "Linear",
    "Recurrence",
    "TensorTrainConv2d",
    "TensorTrainLinear",
    "choices",
    "set_policy",
]
