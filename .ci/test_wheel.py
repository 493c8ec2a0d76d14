"""Uses the installed package from Python and its library from C, which have to agree.

    test_wheel.py             compresses a network first; writes model.ada into the current folder
    test_wheel.py FILE.ada    runs that file, whose results FILE.json has

The second form is for an emulated processor, to which it takes minutes to follow a network.
"""

import argparse
import ctypes
import json
from pathlib import Path

import torch

import adalayer_native as ada
from adalayer_native import ops


def layers() -> int:
    """Native layers have the bits of the scalar reference, whatever the instruction set."""
    torch.manual_seed(0)
    compared = 0
    for bits in range(2, 9):
        x = torch.randn(2, 36, 9, 9)
        x.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        for conv in (
            torch.nn.Conv2d(36, 40, 3, padding=1),
            torch.nn.Conv2d(36, 24, 1),
            torch.nn.Conv2d(36, 36, 3, stride=2, padding=1, groups=36),
            torch.nn.Conv2d(36, 72, 3, padding=2, dilation=2, groups=4),
        ):
            native = ada.nn.Conv2d.from_float(conv, bits=bits, input_range=(-3.0, 3.0))
            results = {}
            for isa in (*ops.isas(), "scalar"):
                ops.force_isa(isa)
                results[isa] = native(x)
            for isa, y in results.items():
                assert torch.equal(y, results["scalar"]), (isa, bits, conv)
                compared += isa != "scalar"
            assert results["scalar"].std() > 0
    ops.force_isa("auto")
    assert compared == 28 * (len(ops.isas()) - 1) > 0
    return compared


def compressed() -> tuple[str, torch.Tensor, torch.Tensor]:
    """A file, images, and what an engine makes of them that has just been compiled."""
    from adalayer_native.models import adalayernet
    from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers

    torch.manual_seed(0)
    model = adalayernet(10).eval()
    images = torch.rand(16, 3, 32, 32)
    plan = {
        name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), 4)
        for name, layer in supported_layers(model).items()
    }
    prepared = ada.prepare(model, Plan(plan, "fixed", {}))
    ada.calibrate(prepared, [images], progress=False)
    engine = ada.compile(ada.convert(prepared), images[:1], policy="native", strict=True)
    engine.save("model.ada")
    return "model.ada", images, engine(images)


def stored(path: Path) -> tuple[str, torch.Tensor, torch.Tensor]:
    """The same of a file that another machine wrote, with its results."""
    torch.manual_seed(1)
    images = torch.rand(2, 3, 32, 32)
    found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert found["input"] == "torch.manual_seed(1); torch.rand(2, 3, 32, 32)"
    rows = [[float.fromhex(number) for number in row] for row in found["output"]]
    return str(path), images, torch.tensor(rows)


class Input(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t)] + [
        (name, ctypes.c_int32) for name in ("type", "layout")
    ]


class Output(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


def through_c(path: str, images: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The results of the C library that is in the wheel."""
    assert (Path(ada.get_include()) / "adalayer" / "adalayer.h").is_file()
    library = ctypes.CDLL(str(Path(ada.get_library_dir()) / "libadalayer.so.1"))
    library.adalayer_last_error.restype = ctypes.c_char_p

    def check(status: int) -> None:
        assert status == 0, library.adalayer_last_error()

    handle, context = ctypes.c_void_p(), ctypes.c_void_p()
    check(library.adalayer_model_load(path.encode(), None, ctypes.byref(handle)))
    check(library.adalayer_context_create(handle, ctypes.byref(context)))
    got = torch.empty_like(like)
    check(
        library.adalayer_run(
            context,
            ctypes.c_int64(len(images)),
            ctypes.byref(Input(images.data_ptr(), images.nbytes, 0, 0)),
            ctypes.c_size_t(1),
            ctypes.byref(Output(got.data_ptr(), got.nbytes)),
            ctypes.c_size_t(1),
        )
    )
    return got


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?", type=Path)
    file = parser.parse_args().file
    compared = layers()
    path, images, expected = compressed() if file is None else stored(file)
    scores = ada.load(path)(images)
    assert torch.equal(scores, expected)
    assert scores.std() > 0
    assert torch.equal(through_c(path, images, scores), scores)
    print(
        f"adalayer_native {ada.__version__}: {compared} layers are equal on "
        f"{', '.join(ops.isas())}; Python and C agree on {len(images)} images"
    )


if __name__ == "__main__":
    main()
