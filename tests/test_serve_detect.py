"""``/detect``: an image in, boxes in its own pixels out."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("prometheus_client", reason="needs the extra [serve]")
pytest.importorskip("orjson", reason="needs the extra [serve]")

from helpers_serve import Running, running
from helpers_serve_model import CLASSES, PREPROCESSING, detector_engine, write_model
from PIL import Image

from adalayer_native.detection import Detection
from adalayer_native.serve.images import Preprocessing
from adalayer_native.serve.runner import Description, TensorInfo
from adalayer_native.serve.settings import ModelSource

DETECT = "/v2/models/finder/detect"
SPEC = {"boxes": "boxes", "scores": "scores", "channels": "last", "iou_threshold": 0.6}


class BrightestRunner:
    """Finds the brightest pixel: a box of 2x2 around it, and a weaker one that overlaps it by half.

    Args:
        resized: whether images are scaled to 16 and cropped to 8.
    """

    def __init__(self, path: str, threads: int, resized: bool = False) -> None:
        spec = {"resize": 16} if resized else {}
        self.description = Description(
            (TensorInfo("x", (3, 8, 8)),),
            (TensorInfo("boxes", (3, 4)), TensorInfo("scores", (3, 2))),
            spec,
            ("spark",),
            Detection.from_dict(SPEC),
        )

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        boxes, scores = [], []
        for image in inputs[0]:
            y, x = np.unravel_index(image.sum(axis=0).argmax(), (8, 8))
            box = np.array([x, y, x + 1, y + 1], np.float32)
            boxes.append([box, box + np.eye(4, dtype=np.float32)[3], box * 0])
            scores.append([[0.9, 0.1], [0.6, 0.3], [0.0, np.nan]])
        return [np.array(part, np.float32) for part in (boxes, scores)]


class CroppedRunner(BrightestRunner):
    """The same, of the middle of images whose shorter side is scaled to 16."""

    def __init__(self, path: str, threads: int) -> None:
        super().__init__(path, threads, resized=True)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def spark(height: int, width: int, y: int, x: int, size: int) -> bytes:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y : y + size, x : x + size] = 255
    return png(pixels)


def server_of(path: Path, runner: str, **settings: Any) -> Any:
    sources = [ModelSource("finder", "1", path)]
    return running(sources, runner=f"test_serve_detect:{runner}", **settings)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("detect") / "tiny.ada")


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Running]:
    with server_of(path, "BrightestRunner") as found:
        yield found


def test_boxes_are_in_the_images_own_pixels(server: Running) -> None:
    image = spark(16, 24, 4, 18, 2)  # scaled to 8x8: 2 pixels high and 3 wide are one
    status, answer = server.request("POST", DETECT, image)
    assert status == 200
    assert (answer["model_name"], answer["model_version"]) == ("finder", "1")
    assert answer["image"] == {"width": 24, "height": 16}
    first, second, third = answer["detections"]
    assert first == {
        "box": [18, 4, 21, 6],
        "score": pytest.approx(0.9),
        "index": 0,
        "name": "spark",
    }
    assert (second["box"], second["score"]) == ([18, 4, 21, 8], pytest.approx(0.6))
    assert (third["index"], third["box"], "name" in third) == (1, [18, 4, 21, 8], False)


def test_settings_of_the_request(server: Running) -> None:
    def found(query: str) -> list[float]:
        status, answer = server.request("POST", f"{DETECT}?{query}", spark(16, 16, 2, 2, 2))
        assert status == 200, answer
        return [round(row["score"], 3) for row in answer["detections"]]

    assert found("") == [0.9, 0.6, 0.3]  # 0.5 of the first and second overlap
    assert found("iou=0.4") == [0.9, 0.3]
    assert found("score=0.5") == [0.9, 0.6]
    assert found("score=0") == [0.9, 0.6, 0.3, 0.1, 0.0]  # of both classes, a NaN left out
    assert found("score=0&iou=0.4") == [0.9, 0.3, 0.0]
    assert found("max=1&score=0.2") == [0.9]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("score=2", "score: expected a number from 0 to 1, got 2.0"),
        ("iou=nan", "iou: expected a number from 0 to 1, got nan"),
        ("score=high", "score: expected a number from 0 to 1, got 'high'"),
        ("max=0", "max: expected a number from 1 to 1000, got 0.0"),
        ("max=1e300", "max: expected a number from 1 to 1000"),
        ("max=", "max: expected a number from 1 to 1000, got ''"),
        ("top=3", "unknown setting 'top', expected some of ['iou', 'max', 'score']"),
    ],
)
def test_settings_that_make_no_sense(server: Running, query: str, message: str) -> None:
    status, answer = server.request("POST", f"{DETECT}?{query}", spark(8, 8, 0, 0, 1))
    assert status == 400 and message in answer["error"]


def test_other_bad_requests(server: Running) -> None:
    assert server.request("POST", DETECT, b"")[0] == 400
    status, answer = server.request("POST", DETECT, b"no image")
    assert status == 400 and "JPEG or PNG" in answer["error"]
    assert server.request("GET", DETECT)[0] == 405
    assert server.request("POST", "/v2/models/nobody/detect", b"x")[0] == 404
    status, answer = server.request("POST", "/v2/models/finder/classify", spark(8, 8, 0, 0, 1))
    assert status == 400 and "is a detector" in answer["error"]
    assert server.request("GET", "/v2/models/finder")[1]["parameters"]["detection"] == {
        **Detection.from_dict(SPEC).as_dict()
    }


def test_a_cropped_image(path: Path) -> None:
    """Scaled to 32x16, of which the middle 8x8 is shown, from (12, 4)."""
    with server_of(path, "CroppedRunner") as server:
        status, answer = server.request("POST", DETECT, spark(32, 64, 10, 30, 2))
        assert status == 200
        assert answer["detections"][0]["box"] == [30, 10, 32, 12]
        # What reaches over the edge is cut off there.
        boxes = np.array([[-20, -20, 40, 40]], np.float32)
        _, placing = Preprocessing({"resize": 16}, (3, 8, 8)).placed(spark(32, 64, 0, 0, 1), 10_000)
        assert placing.located(boxes).tolist() == [[0, 0, 64, 32]]


def test_a_file_has_the_engines_boxes(tmp_path: Path) -> None:
    engine, path = detector_engine(), tmp_path / "finder.ada"
    spec = {"boxes": "boxes", "scores": "scores", "score_threshold": 0.3, "max_boxes": 7}
    engine.save(path, preprocessing=PREPROCESSING, class_names=CLASSES, detection=spec)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    x = Preprocessing(PREPROCESSING, (3, 8, 8))(png(pixels), 100)
    (wanted,) = Detection.from_dict(spec)(engine(torch.from_numpy(x[None])))
    assert len(wanted) == 7
    with running([ModelSource("finder", "1", path)]) as server:
        status, answer = server.request("POST", DETECT, png(pixels))
        assert status == 200
    found = answer["detections"]
    assert [row["score"] for row in found] == pytest.approx(wanted.scores.tolist())
    assert [row["name"] for row in found] == [CLASSES[k] for k in wanted.classes]
    np.testing.assert_allclose([row["box"] for row in found], wanted.boxes.clip(0, 8), rtol=1e-6)


def test_a_classifier_is_no_detector(path: Path) -> None:
    with running([ModelSource("tiny", "1", path)]) as server:
        status, answer = server.request("POST", "/v2/models/tiny/detect", spark(8, 8, 0, 0, 1))
        assert status == 400 and "model 'tiny' is no detector" in answer["error"]
        assert "detection" not in server.request("GET", "/v2/models/tiny")[1]["parameters"]
