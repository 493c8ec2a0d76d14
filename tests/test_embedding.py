"""libadalayer as a program sees it: the installed library, headers, CMake package and examples.

The examples are built against the installation that is tested and must give Python's bits.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import adalayer_native as ada
from adalayer_native.models import get_model, load_weights
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]
CLASSES = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]

needs_library = pytest.mark.skipif(
    not (Path(ada.__file__).parent / "lib").is_dir(), reason="the package was not installed"
)


def _run(*command: str | Path, **settings: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | settings,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def _compiled(model: torch.nn.Module, images: torch.Tensor) -> ada.Engine:
    layers = {
        name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), 4)
        for name, layer in supported_layers(model).items()
    }
    prepared = ada.prepare(model, Plan(layers, "fixed", {}))
    ada.calibrate(prepared, [images], progress=False)
    return ada.compile(ada.convert(prepared), images[:1], policy="native", strict=True)


def _normalised(pixels: np.ndarray) -> torch.Tensor:
    """As torchvision's ToTensor and Normalize."""
    x = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 255
    shape = (1, 3, 1, 1)
    return (x - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """Pieces of a photograph, u8 [8, 32, 32, 3]."""
    image = Image.fromarray(load_sample_image("china.jpg")).resize((256, 32))
    return np.asarray(image).reshape(32, 8, 32, 3).transpose(1, 0, 2, 3).copy()


@pytest.fixture(scope="module")
def engine(photograph: np.ndarray) -> ada.Engine:
    torch.manual_seed(0)
    return _compiled(get_model("adalayernet").eval(), _normalised(photograph))


@pytest.fixture(scope="module")
def saved(engine: ada.Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.ada"
    engine.save(path, preprocessing={"mean": MEAN, "std": STD}, class_names=CLASSES)
    return path


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The examples, built with find_package(adalayer) of this installation."""
    built = {}
    for example, program in (("embed_c", "classify"), ("embed_cpp", "batch")):
        folder = tmp_path_factory.mktemp(example)
        cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        assert cmake is not None
        warnings = "-Wall -Wextra -Werror"
        _run(
            *(
                cmake,
                "-S",
                EXAMPLES / example,
                "-B",
                folder,
                f"-Dadalayer_DIR={ada.get_cmake_dir()}",
            ),
            *(f"-DCMAKE_C_FLAGS={warnings}", f"-DCMAKE_CXX_FLAGS={warnings}"),
            "-DCMAKE_BUILD_TYPE=Release",
        )
        _run(cmake, "--build", folder)
        built[program] = folder / program
    built["tokens"] = built["classify"].parent / "tokens"
    return built


def _write_ppm(path: Path, pixels: np.ndarray) -> None:
    height, width, _ = pixels.shape
    path.write_bytes(b"P6\n# a comment\n%d %d\n255\n" % (width, height) + pixels.tobytes())


@needs_library
def test_c_example_gives_the_bits_of_python(programs, saved, engine, photograph, tmp_path):
    for k, pixels in enumerate(photograph[:3]):
        _write_ppm(tmp_path / "image.ppm", pixels)
        out = _run(programs["classify"], saved, tmp_path / "image.ppm", tmp_path / "scores.f32")
        scores = np.fromfile(tmp_path / "scores.f32", np.float32)
        want = engine(_normalised(photograph[k : k + 1]))[0].numpy()
        assert scores.tobytes() == want.tobytes()
        assert CLASSES[int(want.argmax())] in out.splitlines()[0]
        assert len(out.splitlines()) == 5


@needs_library
def test_token_ids_in_c(programs, tmp_path):
    class Texts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.last = torch.nn.Embedding(50, 12), torch.nn.Linear(12, 5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.last(self.embedding(ids).relu())

    torch.manual_seed(0)
    ids = torch.randint(0, 50, (4, 7))
    engine = _compiled(Texts().eval(), ids)
    engine.save(tmp_path / "text.ada")
    command = programs["tokens"], tmp_path / "text.ada", tmp_path / "ids.txt"
    (tmp_path / "ids.txt").write_text(" ".join(map(str, ids[0].tolist())))
    _run(*command, tmp_path / "results.f32")
    got = np.fromfile(tmp_path / "results.f32", np.float32)
    assert got.tobytes() == engine(ids[:1]).numpy().tobytes()
    for text, message in (
        ("1 2 3 4 5 6 50", "expected ids of 0 to 49, got 50 in sample 0, position 6"),
        ("1 2 3", "expected 7 whole numbers, found 3"),
        ("1 2 3 4 5 6 x", "expected 7 whole numbers, found 6"),
    ):
        (tmp_path / "ids.txt").write_text(text)
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 1 and message in done.stderr


@needs_library
def test_cpp_example_gives_the_bits_of_python(programs, saved, engine, photograph, tmp_path):
    images = _normalised(photograph)
    images.numpy().tofile(tmp_path / "images.f32")
    for threads in ("1", "3"):
        out = _run(
            *(programs["batch"], saved, tmp_path / "images.f32", "--threads", threads),
            *("--repeat", "3", "--output", tmp_path / "scores.f32"),
        )
        scores = np.fromfile(tmp_path / "scores.f32", np.float32)
        assert scores.tobytes() == engine(images).numpy().tobytes()
        assert out.count("image ") == len(images)


@needs_library
def test_every_instruction_set_gives_these_bits(programs, saved, engine, photograph, tmp_path):
    images = _normalised(photograph[:2])
    images.numpy().tofile(tmp_path / "images.f32")
    for isa in (*ada._C.isas(), "scalar"):
        out = _run(
            *(programs["batch"], saved, tmp_path / "images.f32", "--repeat", "1"),
            *("--output", tmp_path / "scores.f32"),
            ADALAYER_FORCE_ISA=isa,
        )
        assert f"({isa})" in out
        scores = np.fromfile(tmp_path / "scores.f32", np.float32)
        assert scores.tobytes() == engine(images).numpy().tobytes()


@needs_library
def test_examples_say_what_is_wrong(programs, saved, photograph, tmp_path):
    def failed(*command: str | Path) -> str:
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1 and not done.stdout
        return done.stderr

    image = tmp_path / "image.ppm"
    assert "absent.ada" in failed(programs["classify"], tmp_path / "absent.ada", image)
    assert "cannot be opened" in failed(programs["classify"], saved, image)
    _write_ppm(image, photograph[0][:16])
    assert "expected 32 x 32 pixels" in failed(programs["classify"], saved, image)
    image.write_bytes(b"P6 32 32 255\n123")
    assert "ends early" in failed(programs["classify"], saved, image)
    damaged = tmp_path / "damaged.ada"
    damaged.write_bytes(saved.read_bytes()[:-1])
    assert "damaged.ada" in failed(programs["batch"], damaged, image)
    assert "floats" in failed(programs["batch"], saved, image)


@needs_library
def test_pkg_config(tmp_path, saved, photograph):
    pkg_config = shutil.which("pkg-config")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if pkg_config is None or compiler is None:
        pytest.skip("needs pkg-config and a C compiler")
    settings = {"PKG_CONFIG_PATH": f"{ada.get_library_dir()}/pkgconfig"}
    flags = _run(pkg_config, "--cflags", "--libs", "adalayer", **settings).split()
    assert Path(flags[0].removeprefix("-I")).resolve() == Path(ada.get_include()).resolve()
    program = tmp_path / "classify"
    library = ada.get_library_dir()
    _run(
        *(compiler, "-std=c99", EXAMPLES / "embed_c" / "classify.c", *flags),
        *(f"-Wl,-rpath,{library}", "-o", program),
    )
    _write_ppm(tmp_path / "image.ppm", photograph[0])
    assert len(_run(program, saved, tmp_path / "image.ppm").splitlines()) == 5


@needs_library
def test_the_library_needs_neither_python_nor_torch(programs):
    ldd = shutil.which("ldd")
    if ldd is None:
        pytest.skip("needs ldd")
    needed = _run(ldd, programs["batch"])
    assert f"{ada.get_library_dir()}/libadalayer.so.1" in needed
    assert "python" not in needed.replace(ada.get_library_dir(), "") and "torch" not in needed


@needs_library
@pytest.mark.slow
def test_a_trained_network_knows_its_classes(shared_dir, programs, tmp_path):
    from adalayer_native.data import open_dataset

    photographs = open_dataset(
        shared_dir / "data" / "cifar10.zip", "test", cache=False, progress=False
    )
    indices = torch.arange(0, len(photographs), len(photographs) // 64)[:64]
    pixels = photographs.pixels(indices).permute(0, 2, 3, 1).contiguous().numpy()
    assert pixels.dtype == np.uint8
    model = load_weights(
        get_model("adalayernet"), shared_dir / "models/adalayernet_cifar10.safetensors"
    )
    engine = _compiled(model.eval(), _normalised(pixels))
    path = tmp_path / "model.ada"
    engine.save(path, preprocessing={"mean": MEAN, "std": STD}, class_names=photographs.classes)
    want = engine(_normalised(pixels)).numpy()
    right = 0
    for k in range(len(pixels)):
        _write_ppm(tmp_path / "image.ppm", pixels[k])
        out = _run(programs["classify"], path, tmp_path / "image.ppm", tmp_path / "scores.f32")
        assert np.fromfile(tmp_path / "scores.f32", np.float32).tobytes() == want[k].tobytes()
        name = photographs.classes[int(photographs.labels[indices[k]])]
        right += out.splitlines()[0].split()[1] == name
    assert right > 40, f"{right} of {len(pixels)}"
