"""Networks that the package knows by name, and loading of weights."""

from .adalayernet import AdaLayerNet, adalayernet
from .registry import MODELS, get_model, is_file, load_weights
from .resnet import ResNet, resnet18
from .resnet_cifar import ResNetCifar, resnet20

__all__ = [
    "MODELS",
    "AdaLayerNet",
    "ResNet",
    "ResNetCifar",
    "adalayernet",
    "get_model",
    "is_file",
    "load_weights",
    "resnet18",
    "resnet20",
]
