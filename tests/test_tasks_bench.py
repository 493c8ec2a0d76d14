"""The bench of detection and segmentation: known answers of its figures, its scenes, its loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from adalayer_native.detection import Boxes
from bench.tasks import page
from bench.tasks.losses import assigned, detection_loss, paired_giou
from bench.tasks.measure import ROWS
from bench.tasks.metrics import COCO, Truth, confusion, mean_average_precision, mean_iou
from bench.tasks.scenes import CLASSES, SIZE, SceneBatches, Scenes, Sources


def boxes(*rows: tuple[int, float, float, float, float, float]) -> Boxes:
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Boxes(table[:, 2:], table[:, 1], table[:, 0].astype(np.int64))


def truth(*rows: tuple[int, float, float, float, float]) -> Truth:
    table = np.array(rows, np.float32).reshape(-1, 5)
    return Truth(table[:, 1:], table[:, 0].astype(np.int64))


A, B = (0, 0, 10, 10), (20, 20, 30, 30)


def test_perfect_and_empty_answers() -> None:
    image = truth((0, *A), (1, *B))
    perfect = mean_average_precision([boxes((0, 0.9, *A), (1, 0.3, *B))], [image], 2)
    assert list(perfect) == list(COCO) and set(perfect.values()) == {1.0}
    assert set(mean_average_precision([boxes()], [image], 2).values()) == {0.0}
    # A class without objects does not count, wherever boxes of it were found.
    assert (
        mean_average_precision([boxes((0, 0.9, *A), (2, 1.0, *B))], [truth((0, *A))], 3)[0.5] == 1
    )
    with pytest.raises(ValueError, match="no object"):
        mean_average_precision([boxes()], [truth()], 2)


def test_precision_at_101_recalls() -> None:
    """Right, wrong, right, of two objects: 51 recalls at 1 and 50 at 2/3."""
    found = [boxes((0, 0.9, *A), (0, 0.8, 50, 50, 60, 60), (0, 0.7, *B))]
    value = mean_average_precision(found, [truth((0, *A), (0, *B))], 1, [0.5])
    assert value[0.5] == pytest.approx((51 + 50 * 2 / 3) / 101)
    # Half of the objects are never found: only the first 51 count.
    value = mean_average_precision([boxes((0, 0.9, *A))], [truth((0, *A), (0, *B))], 1, [0.5])
    assert value[0.5] == pytest.approx(51 / 101)


def test_an_object_is_found_once_and_by_the_best() -> None:
    """A second box on the same object is wrong; scores order boxes across images."""
    found = [boxes((0, 0.5, *A), (0, 0.9, *A)), boxes((0, 0.8, *B))]
    value = mean_average_precision(found, [truth((0, *A)), truth((0, *B))], 1, [0.5])
    assert value[0.5] == 1.0  # both objects are found before the wrong one
    found = [boxes((0, 0.9, *A), (0, 0.8, *A)), boxes((0, 0.5, *B))]
    value = mean_average_precision(found, [truth((0, *A)), truth((0, *B))], 1, [0.5])
    assert value[0.5] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_overlaps_of_coco() -> None:
    """A box with an IoU of 0.8 is right at 0.5 ... 0.8, seven of ten."""
    value = mean_average_precision([boxes((0, 0.9, 0, 0, 10, 8))], [truth((0, *A))], 1)
    assert [overlap for overlap, precision in value.items() if precision == 1.0] == list(COCO[:7])
    assert np.mean(list(value.values())) == pytest.approx(0.7)


def test_iou_of_pixels() -> None:
    real = np.array([[0, 0, 1, 1], [0, 0, 2, 2]])
    said = np.array([[0, 0, 1, 2], [0, 1, 2, 2]])
    counts = confusion(real, said, 4)
    sklearn = pytest.importorskip("sklearn.metrics")
    assert (counts[:3, :3] == sklearn.confusion_matrix(real.ravel(), said.ravel())).all()
    wanted = sklearn.jaccard_score(real.ravel(), said.ravel(), average="macro")
    assert mean_iou(counts) == pytest.approx(wanted)  # (3/4 + 1/3 + 2/3) / 3; class 3 is nowhere
    assert wanted == pytest.approx((3 / 4 + 1 / 3 + 2 / 3) / 3)


def test_the_page_says_which_layers_differ() -> None:
    machine = {"cpu": "a machine"}
    names = ["backbone.stem", "backbone.last", "head"]
    results: dict[str, dict[str, Any]] = {}
    for row in ROWS:
        if row.task == "segmentation" or row.bits == 3:
            continue  # rows that are not there yet are left out
        bits = [8, 4, 4] if row.task == "detection" else [4, 5, 8]
        need = [1.0, 0.0, 3.0] if row.task == "detection" else [1.0, 1.0, 0.0]
        results[row.name] = {
            "machine": machine, "figures": {"figure": 50.0 + row.bits}, "bytes": 1000 - row.bits,
            "bits": dict(zip(names, bits, strict=True)),
            "weights": dict(zip(names, [100, 300, 50], strict=True)),
            "need": dict(zip(names, need, strict=True)),
            "protected": {"backbone.stem": "8 bits; why"} if row.task == "detection" else {},
        }  # fmt: skip
    lines = page.part(results).splitlines()
    assert lines[0] == "Machine: a machine."
    assert "| detection | float |  | figure 50.0 | 1,000 | 100.0 % |" in lines
    assert "| detection | 4 on average | labels | figure 54.0 | 996 | 99.6 % |" in lines
    assert "| `stem` | 100 | 4 (50 %) | **8** (25 %) |" in lines
    assert "| `last` | 300 | **5** (50 %) | 4 (0 %) |" in lines
    assert "| mean, sum |  | 4.75 (100 %) | 5.00 (25 %) |" in lines
    assert "| the task's own layers |  | 8.00 (0 %) | 4.00 (75 %) |" in lines
    assert "- **detection**: `backbone.stem` (8 bits; why)" in lines
    assert "segmentation" not in page.part(results)


@pytest.fixture(scope="module")
def sources() -> Sources:
    draw = np.random.default_rng(0)
    objects = np.full((10, 32, 32, 3), 255, np.uint8)
    labels = np.arange(10) % len(CLASSES)
    return Sources(objects, labels, draw.integers(0, 100, (4, 32, 32, 3), dtype=np.uint8))


def test_scenes_say_where_their_objects_are(sources: Sources) -> None:
    scenes = Scenes.drawn(sources, 20, 3)
    again = Scenes.drawn(sources, 20, 3)
    assert torch.equal(scenes.images, again.images) and torch.equal(scenes.boxes, again.boxes)
    assert not torch.equal(scenes.boxes, Scenes.drawn(sources, 20, 4).boxes)
    counts = []
    for image, rows, mask in zip(scenes.images, scenes.boxes, scenes.masks, strict=True):
        rows = rows[rows[:, 0] >= 0]
        counts.append(len(rows))
        assert torch.equal((image > 1.9).all(0), mask > 0)  # objects are white, nothing else is
        for label, x1, y1, x2, y2 in rows.long().tolist():
            assert 0 <= x1 < x2 <= SIZE and 0 <= y1 < y2 <= SIZE
            part = mask[y1:y2, x1:x2] == label + 1
            assert part.float().mean() > 0.6  # rounded; another object covers little of it
            assert part.any(0).float().mean() > 0.8 and part.any(1).float().mean() > 0.8
    assert set(counts) == {1, 2, 3}


def test_batches_follow_from_the_epoch(sources: Sources) -> None:
    loader = SceneBatches(sources, "classification", 4, 2)
    first = list(loader)
    assert len(first) == len(loader) == 2 and first[0][1].shape == (4,)
    other = list(loader)
    loader.set_epoch(0)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, loader, strict=True))
    assert not torch.equal(first[0][0], other[0][0])


def test_giou_of_known_boxes() -> None:
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 2, 2]])
    b = torch.tensor([[1.0, 1, 3, 3], [2, 0, 3, 1], [0, 0, 2, 2]])
    iou, giou = paired_giou(a, b)
    assert iou.tolist() == pytest.approx([1 / 7, 0, 1])
    assert giou.tolist() == pytest.approx([1 / 7 - 2 / 9, -1 / 3, 1])


def test_the_detectors_loss_falls_towards_the_truth() -> None:
    target = torch.tensor([[[2.0, 8, 8, 32, 32], [0, 40, 40, 88, 88], [-1] * 5]])  # small, large
    owners = [assigned(target, level, cells)[0] for level, cells in enumerate((12, 6))]
    assert owners[0].unique().tolist() == [-1, 0] and owners[1].unique().tolist() == [-1, 1]
    assert owners[0].reshape(12, 12)[2, 2] == 0 and owners[1].reshape(6, 6)[4, 4] == 1
    perfect, blank = {}, {}
    for level, (cells, owner) in enumerate(zip((12, 6), owners, strict=True)):
        at = owner.clamp(min=0)
        found = torch.where((owner >= 0)[:, None], target[0, at, 1:], torch.zeros(()))
        scores = torch.zeros(cells * cells, 5)
        for k in (owner >= 0).nonzero().flatten().tolist():
            scores[k, int(target[0, at[k], 0])] = 1.0
        perfect[f"boxes{level}"] = found.T.reshape(1, 4, cells, cells)
        perfect[f"scores{level}"] = scores.T.reshape(1, 5, cells, cells)
        blank[f"boxes{level}"] = torch.zeros(1, 4, cells, cells)
        blank[f"scores{level}"] = torch.zeros(1, 5, cells, cells)
    assert float(detection_loss(perfect, target)) == pytest.approx(0.0, abs=1e-4)
    assert float(detection_loss(blank, target)) > 2.0
    none = torch.full((1, 3, 5), -1.0)  # an image without objects
    assert float(detection_loss(blank, none)) == pytest.approx(0.0, abs=1e-4)
