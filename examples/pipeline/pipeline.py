"""Native layers inside a torch pipeline that exists already.

The pipeline crops, classifies and names; only its classifier is compressed, and nothing around it
changes. Trains a small network on handwritten digits first: python examples/pipeline/pipeline.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import adalayer_native as ada
from adalayer_native.data import digits, loaders
from adalayer_native.models import adalayernet


class Pipeline(nn.Module):
    """Raw images ``[n, 3, height, width]`` with values 0 to 255 in, names of classes out."""

    def __init__(
        self,
        classifier: nn.Module,
        names: list[str],
        normalise: Callable[[torch.Tensor], torch.Tensor],
        size: int = 32,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.names = names
        self.normalise = normalise
        self.size = size

    def scores(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of the centre crops."""
        top = (images.shape[2] - self.size) // 2
        left = (images.shape[3] - self.size) // 2
        crop = images[:, :, top : top + self.size, left : left + self.size]
        return self.classifier(self.normalise(crop))

    def forward(self, images: torch.Tensor) -> list[str]:
        return [self.names[k] for k in self.scores(images).argmax(1).tolist()]


def compressed(pipeline: Pipeline, calibration: list[torch.Tensor], bits: float) -> Pipeline:
    """The same pipeline around a compressed classifier."""
    result = ada.compress(
        pipeline.classifier, calibration, ada.Budget(bits=bits), epochs=0, progress=False
    )
    return Pipeline(result.model, pipeline.names, pipeline.normalise, pipeline.size)


def main(epochs: int = 2) -> float:
    """Share of the test images on which both pipelines agree."""
    data = loaders(*digits(32), batch_size=64, calibration=128)
    model, names = adalayernet(10), [str(k) for k in range(10)]
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for x, y in data.train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    pipeline = Pipeline(model.eval(), names, data.test.dataset.normalise)
    small = compressed(pipeline, [x for x, *_ in data.calibration], bits=6)
    with torch.inference_mode():
        images = data.test.dataset.pixels(torch.arange(len(data.test.dataset)))
        agreed, total = sum(map(str.__eq__, pipeline(images), small(images))), len(images)
    print(f"{agreed} of {total} test images get the same name")
    return agreed / total


if __name__ == "__main__":
    main()
