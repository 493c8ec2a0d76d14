"""Uses the installed package from Python and its library from C, which have to agree.

Writes model.ada into the current folder.
"""

import ctypes
from pathlib import Path

import torch

import adalayer_native as ada
from adalayer_native.models import adalayernet
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers

torch.manual_seed(0)
model = adalayernet(10).eval()
images = torch.rand(16, 3, 32, 32)
layers = {
    name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), 4)
    for name, layer in supported_layers(model).items()
}
prepared = ada.prepare(model, Plan(layers, "fixed", {}))
ada.calibrate(prepared, [images], progress=False)
engine = ada.compile(ada.convert(prepared), images[:1], policy="native", strict=True)
engine.save("model.ada")
scores = ada.load("model.ada")(images)
assert torch.equal(scores, engine(images)) and scores.std() > 0

# The C library of the wheel computes the same.
assert (Path(ada.get_include()) / "adalayer" / "adalayer.h").is_file()
library = ctypes.CDLL(str(Path(ada.get_library_dir()) / "libadalayer.so.1"))
library.adalayer_last_error.restype = ctypes.c_char_p


class Input(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t)] + [
        (name, ctypes.c_int32) for name in ("type", "layout")
    ]


class Output(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


def check(status):
    assert status == 0, library.adalayer_last_error()


handle, context = ctypes.c_void_p(), ctypes.c_void_p()
check(library.adalayer_model_load(b"model.ada", None, ctypes.byref(handle)))
check(library.adalayer_context_create(handle, ctypes.byref(context)))
got = torch.empty_like(scores)
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
assert torch.equal(got, scores)
print(f"adalayer_native {ada.__version__}: Python and C agree on {len(images)} images")
