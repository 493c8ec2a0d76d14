"""Decoding and suppression beside plain loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_serve_model import detector_engine
from hypothesis import given
from hypothesis import strategies as st

import adalayer_native as ada
from adalayer_native.detection import Boxes, Detection, box_iou, named, nms
from adalayer_native.errors import FileFormatError, InputError


def plain_iou(a: list[float], b: list[float]) -> float:
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [max(0.0, x[2] - x[0]) * max(0.0, x[3] - x[1]) for x in (a, b)]
    union = sum(areas) - wide * high
    return wide * high / union if union > 0 else 0.0


def plain_nms(boxes: Any, scores: Any, threshold: float) -> list[int]:
    """Every box beside every better one."""
    order = sorted(range(len(scores)), key=lambda k: (-scores[k], k))
    kept: list[int] = []
    for k in order:
        if all(plain_iou(boxes[k].tolist(), boxes[j].tolist()) <= threshold for j in kept):
            kept.append(k)
    return kept


# Whole corners, so that overlaps are exact, also where they equal the threshold.
corners = st.integers(0, 12)
many = st.lists(st.tuples(corners, corners, corners, corners), max_size=12)


@given(many, st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 2**16))
def test_nms_is_that_of_plain_loops(rows: Any, threshold: float, seed: int) -> None:
    boxes = np.array(rows, np.float32).reshape(-1, 4)
    scores = np.random.default_rng(seed).integers(0, 5, len(boxes)).astype(np.float32)  # with ties
    kept = nms(boxes, scores, threshold)
    assert kept == plain_nms(boxes, scores, threshold)
    assert nms(boxes, scores, threshold, 3) == kept[:3]
    overlaps = box_iou(boxes, boxes)
    for i, a in enumerate(boxes.tolist()):
        for j, b in enumerate(boxes.tolist()):
            assert overlaps[i, j] == pytest.approx(plain_iou(a, b), abs=1e-6)


def test_a_known_picture() -> None:
    """Two overlapping boxes of one class, the same place in another class, one apart, one weak."""
    boxes = np.array(
        [[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]],
        np.float32,
    )
    scores = np.zeros((5, 2), np.float32)
    scores[0, 0], scores[1, 0], scores[2, 1], scores[3, 0], scores[4, 1] = 0.6, 0.9, 0.7, 0.8, 0.1
    found = Detection((("b", 0, None),), (("s", 0, None),)).select(boxes, scores)
    assert found.boxes.tolist() == [boxes[1].tolist(), boxes[3].tolist(), boxes[2].tolist()]
    assert found.scores.tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert found.classes.tolist() == [0, 0, 1]


def test_thresholds_count_as_said() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 30, 30]], np.float32)
    scores = np.array([[0.9], [0.8], [0.25]], np.float32)
    detection = Detection.from_dict({"boxes": "b", "scores": "s"})
    assert len(detection.select(boxes, scores)) == 3  # an overlap of exactly 0.5, a score of 0.25
    assert len(detection.changed(iou_threshold=0.49).select(boxes, scores)) == 2
    assert len(detection.changed(score_threshold=0.26).select(boxes, scores)) == 2
    assert detection.changed(max_boxes=1).select(boxes, scores).scores.tolist() == [
        pytest.approx(0.9)
    ]


def test_what_is_no_number_is_no_box() -> None:
    boxes = np.array([[0, 0, np.nan, 1], [0, 0, np.inf, 1], [0, 0, 1, 1], [2, 2, 3, 3]], np.float32)
    scores = np.array([[0.9], [0.9], [np.nan], [0.5]], np.float32)
    found = Detection.from_dict({"boxes": "b", "scores": "s"}).select(boxes, scores)
    assert found.boxes.tolist() == [[2, 2, 3, 3]]
    empty = Detection.from_dict({"boxes": "b", "scores": "s"}).select(boxes[:0], scores[:0])
    assert len(empty) == 0 and empty.boxes.shape == (0, 4)


def test_maps_are_joined_and_formats_read() -> None:
    rng = np.random.default_rng(0)
    fine, coarse = rng.random((2, 7, 4, 4)), rng.random((2, 7, 2, 2))  # 4 of a box, 3 classes
    rows = np.concatenate([m.reshape(2, 7, -1).transpose(0, 2, 1) for m in (fine, coarse)], axis=1)
    wanted = rows.astype(np.float32)
    spec = {"boxes": [["a", 0, 4], ["b", 0, 4]], "scores": [["a", 4, 7], ["b", 4, None]]}
    boxes, scores = Detection.from_dict(spec).decode({"a": fine, "b": torch.tensor(coarse)})
    np.testing.assert_array_equal(boxes, wanted[..., :4])
    np.testing.assert_array_equal(scores, wanted[..., 4:])

    last = {"boxes": ["output", 0, 4], "scores": ["output", 4, 7], "channels": "last"}
    for again in (last, Detection.from_dict(last).as_dict()):
        boxes, scores = Detection.from_dict({**again, "format": "cxcywh"}).decode(wanted)
        middle, size = wanted[..., :2], wanted[..., 2:4]
        np.testing.assert_allclose(boxes[..., :2], middle - size / 2, rtol=1e-6)
        np.testing.assert_allclose(boxes[..., 2:], middle + size / 2, rtol=1e-6)
        np.testing.assert_array_equal(scores, wanted[..., 4:])
    nested = {"x": [wanted, (wanted, 3)], "y": wanted}
    assert list(named(nested)) == ["x_0", "x_1_0", "y"]
    assert list(named((wanted, wanted))) == ["output_0", "output_1"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["boxes"], "expected an object, got list"),
        ({"boxes": "b", "scores": "s", "size": 3}, "unknown field 'size'"),
        ({"scores": "s"}, "as boxes, got None"),
        ({"boxes": [], "scores": "s"}, r"as boxes, got \[\]"),
        ({"boxes": [["b", -1, 4]], "scores": "s"}, "as boxes"),
        ({"boxes": ["b", "c"], "scores": "s"}, "2 outputs of boxes, but 1 of scores"),
        ({"boxes": "b", "scores": "s", "format": "yx"}, "format 'yx', expected one of"),
        ({"boxes": "b", "scores": "s", "iou_threshold": 2}, "iou_threshold: .*from 0 to 1, got 2"),
        ({"boxes": "b", "scores": "s", "max_boxes": 0.5}, "max_boxes: .*from 1 to 1000, got 0.5"),
        ({"boxes": "b", "scores": "s", "score_threshold": float("nan")}, "score_threshold"),
    ],
)
def test_a_description_that_makes_no_sense(spec: Any, message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        Detection.from_dict(spec)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"b": (4, 9)}, r"no output 's', its outputs are \['b'\]"),
        ({"b": (5, 9), "s": (3, 9)}, r"expected 4 channels of boxes in output 'b' of \[5, 9\]"),
        ({"b": (4, 9), "s": (3, 8)}, "9 boxes in output 'b', but scores for 8 in 's'"),
        ({"b": (4,), "s": (3, 9)}, r"output 'b' is \[4\], expected channels and positions"),
    ],
)
def test_outputs_that_do_not_fit(shapes: Any, message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        Detection.from_dict({"boxes": "b", "scores": "s"}).check(shapes)


def test_settings_are_checked() -> None:
    detection = Detection.from_dict({"boxes": "b", "scores": "s"})
    for bad in ({"max_boxes": 1001}, {"iou_threshold": -1}, {"score_threshold": "x"}, {"top": 1}):
        with pytest.raises(InputError, match=next(iter(bad))):
            detection.changed(**bad)


def test_a_file_says_that_its_model_is_a_detector(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    engine = detector_engine()
    engine.save(tmp_path / "plain.ada")
    assert ada.load(tmp_path / "plain.ada").detection is None
    with pytest.raises(FileFormatError, match=r"no output 'box', its outputs are \['boxes', 'sc"):
        engine.save(tmp_path / "a.ada", detection={"boxes": "box", "scores": "scores"})
    assert [path.name for path in tmp_path.iterdir()] == ["plain.ada"]
    spec = {"boxes": "boxes", "scores": "scores", "score_threshold": 0.4}
    engine.save(tmp_path / "a.ada", detection=spec)
    loaded = ada.load(tmp_path / "a.ada")
    assert loaded.detection == Detection.from_dict(spec)
    loaded.save(tmp_path / "b.ada")
    assert ada.load(tmp_path / "b.ada").detection == loaded.detection
    found = loaded.detection(loaded(x))
    assert len(found) == 2 and all(isinstance(image, Boxes) for image in found)
    assert all((image.scores >= 0.4).all() for image in found)
