"""Networks, their state-dict keys, and loading of weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from adalayer_native.errors import FileFormatError, UnsupportedModelError
from adalayer_native.models import get_model, load_weights


@pytest.mark.parametrize(
    ("name", "shape", "weights"),
    [
        ("adalayernet", (2, 3, 32, 32), 1_389_920),
        ("resnet20", (2, 3, 32, 32), 268_336),
        ("resnet18", (1, 3, 64, 64), 11_166_912 + 5_120),
    ],
)
def test_shapes_and_sizes(name: str, shape: tuple[int, ...], weights: int) -> None:
    model = get_model(name, num_classes=10)
    assert not model.training
    with torch.no_grad():
        assert model(torch.zeros(shape)).shape == (shape[0], 10)
    convolutions_and_linears = [
        p for key, p in model.named_parameters() if key.endswith("weight") and p.dim() > 1
    ]
    assert sum(p.numel() for p in convolutions_and_linears) == weights


def test_keys_are_the_documented_ones() -> None:
    keys = set(get_model("adalayernet").state_dict())
    assert {"conv1.weight", "bn6.running_var", "fc1.bias", "fc2.weight", "classifier.bias"} <= keys
    assert "conv1.bias" not in keys
    keys = set(get_model("resnet20").state_dict())
    assert {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer3.2.bn2.bias"} <= keys
    assert "linear.weight" in keys


def test_model_from_a_callable() -> None:
    model = get_model("helpers_models:tiny")
    assert type(model).__name__ == "TinyNet"
    model = get_model("adalayer_native.models:resnet20", num_classes=7)
    assert model.linear.out_features == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet21", "unknown model 'resnet21'"),
        ("no_such_package:net", "cannot import"),
        ("adalayer_native.models:nothing", "cannot import"),
        ("adalayer_native.models:MODELS", "expected a callable"),
        ("builtins:dict", r"must return a torch\.nn\.Module"),
    ],
)
def test_unknown_models(name: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        get_model(name)


def test_load_weights_round_trip(tmp_path) -> None:
    source, target = get_model("resnet20"), get_model("resnet20")
    path = tmp_path / "w.safetensors"
    save_file(source.state_dict(), path)
    load_weights(target, path)
    for key, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[key]), key


def test_load_weights_without_batch_counters(tmp_path) -> None:
    model = get_model("resnet20")
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")


def test_missing_and_corrupt_weight_files(tmp_path) -> None:
    model = get_model("resnet20")
    with pytest.raises(FileFormatError, match=r"nowhere\.safetensors.*does not exist"):
        load_weights(model, tmp_path / "nowhere.safetensors")
    path = tmp_path / "w.safetensors"
    save_file(model.state_dict(), path)
    data = path.read_bytes()
    for broken in (b"", data[:100], data[:-1000], b"\xff" * 4096, b"\x00" * 64):
        path.write_bytes(broken)
        with pytest.raises(FileFormatError, match=r"w\.safetensors"):
            load_weights(model, path)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save_are_told_how_to_become_safetensors(tmp_path, zipped: bool) -> None:
    model = get_model("resnet20")
    file = tmp_path / "net.pt"
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileFormatError, match=r"net.pt' is one of torch.save") as found:
        load_weights(model, file)
    line = str(found.value).partition("state_dict: ")[2]
    exec(f"import torch, safetensors.torch; {line}")
    load_weights(model, tmp_path / "net.safetensors")


def test_mismatches_are_listed_and_nothing_is_changed(tmp_path) -> None:
    model = get_model("resnet20")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    del state["bn1.weight"]
    state["surprise"] = torch.zeros(2)
    state["linear.bias"] = torch.zeros(3)
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    with pytest.raises(FileFormatError) as caught:
        load_weights(model, path)
    for part in ("bn1.weight", "surprise", "linear.bias: model (10,), file (3,)"):
        assert part in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value: float) -> None:
    model = get_model("resnet20")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["layer2.0.conv1.weight"][0, 0, 0, 0] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(FileFormatError, match=r"'layer2\.0\.conv1\.weight' holds NaN"):
        load_weights(model, tmp_path / "w.safetensors")
