"""Images: folders, zips, scikit-learn's digits, and the loaders over them."""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .datasets import IMAGENET_MEAN, IMAGENET_STD, ImageDataset, open_dataset
    from .digits import digits
    from .distilled import distilled
    from .loaders import Batches, Loaders, calibration_indices, loaders

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Batches",
    "ImageDataset",
    "Loaders",
    "calibration_indices",
    "digits",
    "distilled",
    "loaders",
    "open_dataset",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "datasets": ["IMAGENET_MEAN", "IMAGENET_STD", "ImageDataset", "open_dataset"],
        "digits": ["digits"],
        "distilled": ["distilled"],
        "loaders": ["Batches", "Loaders", "calibration_indices", "loaders"],
    },
)
