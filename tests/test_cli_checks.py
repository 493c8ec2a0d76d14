"""The command line before the work: arguments, --check, normalisation; and the way to an .ada."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_cli import (
    SIZE,
    SmallNet,
    make_quick,
    run,
    save_weights,
    train_small,
    write_images,
)
from helpers_torchvision import torchvision_models
from torch import nn

import adalayer_native as ada
from adalayer_native import _files, _options, infos
from adalayer_native.data import open_dataset
from adalayer_native.models import get_model


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """(image folder, float weights)."""
    root = tmp_path_factory.mktemp("checks")
    data = write_images(root / "images")
    return data, save_weights(train_small(data), root / "weights.safetensors")


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path) -> None:
    make_quick(monkeypatch, tmp_path / "cache")


@pytest.fixture
def compress(monkeypatch, capsys, files, tmp_path):
    """Runs compress; its exit code and what it said."""

    def call(
        *more: object, model: str = "SmallNet", weights: Path | None = None
    ) -> tuple[int, str]:
        arguments = (
            "compress", f"helpers_cli:{model}", "--weights", weights or files[1],
            "--data", files[0], "--image-size", SIZE, "--calibration", 32, "--epochs", 0,
        )  # fmt: skip
        if "--out" not in more:
            more = (*more, "--out", tmp_path / "out")
        if not {"--size", "--bits", "--method"} & set(map(str, more)):
            more = (*more, "--size", 0.3)
        capsys.readouterr()
        code = run(monkeypatch, *arguments, *more)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.err

    return call


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--fix", "conv1=9"), "expected 2 to 8 bits"),
        (("--fix", "conv1=4", "--fix", "conv1=5"), "more than once"),
        (("--lr", "nan"), "above 0"),
        (("--lr", "inf"), "above 0"),
        (("--lr", 0), "above 0"),
        (("--seed", "1e22"), "--seed"),
        (("--seed", 10**22), "--seed"),
        (("--threads", 100_000), "--threads"),
        (("--threads", 0), "--threads"),
        (("--classes", 0), "--classes"),
        (("--image-size", 5000), "--image-size"),
        (("--out", ""), "--out"),
        (("--out=",), "--out"),
        (("--weights", ""), "--weights"),
        (("--data", ""), "--data"),
        (("--stages", ""), "--stages"),
        (("--layer-bits", "2,9"), "expected 2 to 8 bits"),
        (("--mean", "0.1,0.2"), "expected one number, or three"),
        (("--mean", "red"), "expected numbers"),
        (("--std", "0"), "above 0"),
        (("--std", "nan"), "expected numbers"),
        (("--scale", "1/0"), "expected numbers"),
        (("--scale", "-1"), "above 0"),
    ],
)
def test_bad_arguments_are_found_before_anything_is_loaded(
    compress, monkeypatch, tmp_path, more, message
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("adalayer_native.jobs.run_compress", never)
    monkeypatch.chdir(tmp_path)
    code, said = compress(*more)
    assert code == 2 and message in said
    assert not [p for p in tmp_path.iterdir() if p.name != "cache"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--exclude", "nope"), "exclude: unknown layer 'nope'"),
        (("--fix", "nope=4"), "fixed: unknown layer 'nope'"),
        (("--fix", "fc=4", "--exclude", "fc"), "both fixed and excluded"),
        (("--size", 0.001), "smallest reachable size"),
        (("--size", 0.001, "--method", "optimal"), "cannot be met"),
        (("--size", 0.3, "--layer-bits", "2,3"), "takes no bits and stages"),
        (("--size", 0.3, "--criterion", "kurtosi"), "did you mean 'kurtosis'"),
        (("--method", "optimal", "--latency", 1, "--latency-table", "gone.json"), "does not exist"),
        (("--method", "ascending", "--stages", "conv1,nope"), "stage 'nope'"),
        (("--method", "ascending", "--layer-bits", "2,3", "--stages", "conv1"), "widths"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_what_needs_the_model_is_found_before_the_analysis(
    compress, monkeypatch, tmp_path, more, message, check: bool
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    for name in ("analyze", "allocate", "prepare", "calibrate"):
        monkeypatch.setattr(sys.modules["adalayer_native.compress"], name, never)
    code, said = compress(*more, *(["--check"] if check else []))
    assert code == 1 and message in said
    assert not (tmp_path / "out").exists()


def test_the_library_says_it_before_the_analysis_too(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["adalayer_native.compress"], "analyze", None)
    data = [torch.randn(4, 3, SIZE, SIZE)]
    for wrong in ({"fixed": {"nope": 4}}, {"fixed": {"conv1": 9}}, {"exclude": ["nope"]}):
        with pytest.raises(ada.PlanError, match=r"nope|bits must be"):
            ada.compress(SmallNet().eval(), data, ada.Budget(size=0.3), allocate_options=wrong)


def test_check_says_what_would_be_done_and_writes_nothing(compress, tmp_path) -> None:
    code, said = compress("--check", "--exclude", "fc")
    assert code == 0
    for text in (
        "3 layers", "fc", "64 training images", "20 test images", "4 classes",
        "normalisation: mean",
        "100.00 % of the calibration images", "size 0.3 of the float file", "model.ada",
    ):  # fmt: skip
        assert text in said
    assert not (tmp_path / "out").exists()


def test_threads_of_a_large_machine_are_allowed(monkeypatch) -> None:
    monkeypatch.setattr(_options.os, "cpu_count", lambda: 192)
    assert _options.most_threads() == 768


def test_output_is_checked_before_the_work(monkeypatch, capsys, compress, files, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    code, said = compress("--out", tmp_path / "file")
    assert code == 2 and "is a file" in said
    assert run(monkeypatch, "train", "adalayernet", "--data", files[0], "--out", tmp_path) == 2
    assert "is a folder" in capsys.readouterr().err
    assert run(monkeypatch, "report", tmp_path, "--out", tmp_path) == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_no_command_overwrites_what_it_reads(monkeypatch, capsys, files, tmp_path) -> None:
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    weights = run_folder / "model.safetensors"  # of the float network
    shutil.copy(files[1], weights)
    (run_folder / "report.json").write_text("{}")
    link = tmp_path / "link"
    link.symlink_to(run_folder)
    network, sizes = "helpers_cli:SmallNet", ("--image-size", SIZE)
    given = ("--weights", weights, "--data", files[0], "--bits", 4, *sizes)
    for command in (
        ("compress", network, *given, "--out", run_folder),
        ("compress", network, *given, "--out", link, "--check"),
        ("compile", run_folder, "-o", weights),
        ("compile", weights, "--model", network, *sizes, "-o", link / "report.json"),
        ("profile", network, "--weights", weights, *sizes, "--out", weights),
        ("report", run_folder, "--out", link / "report.json"),
    ):
        assert run(monkeypatch, *command) == 1, command
        assert "would overwrite" in capsys.readouterr().err
    assert weights.read_bytes() == files[1].read_bytes()
    assert (run_folder / "report.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("name", "classes"), [("with_classes", 7), ("with_keywords", 7), ("SmallNet", 7)]
)
def test_classes_are_given_to_the_callable(name: str, classes: int) -> None:
    assert get_model(f"helpers_cli:{name}", classes, required=True).fc.out_features == classes


def test_classes_that_cannot_be_given_are_an_error(compress) -> None:
    assert get_model("helpers_cli:without_classes", 7).fc.out_features == 4
    code, said = compress("--classes", 4, "--check", model="without_classes")
    assert code == 1 and "takes no number of classes" in said and "--classes" in said
    code, said = compress("--check", model="without_classes")
    assert code == 0


def test_a_callable_that_fails_is_one_sentence(compress) -> None:
    code, said = compress("--quiet", model="failing")
    assert code == 1 and said.count("\n") == 1
    assert "helpers_cli:failing" in said and "KeyError" in said


def test_a_full_disk_names_the_file_and_not_a_temporary_one(monkeypatch, tmp_path) -> None:
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def write(self, _: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(handle: int, _: str) -> Full:
        os.close(handle)
        return Full()

    monkeypatch.setattr(_files.os, "fdopen", full)
    path = tmp_path / "deep" / "plan.json"
    with pytest.raises(OSError, match="No space left") as caught:
        _files.write_text_atomic(path, "text")
    assert caught.value.filename == str(path)
    assert not list(path.parent.iterdir())


def test_a_full_disk_while_an_engine_is_saved_names_the_file(tmp_path) -> None:
    target = tmp_path / "model.ada"
    with pytest.raises(OSError, match="No space left") as caught, _files.replacing(target) as file:
        raise OSError(errno.ENOSPC, f"cannot write {file}")
    assert caught.value.filename == str(target) and ".tmp" not in str(caught.value)


@pytest.mark.parametrize("allocator", ["torch", "numpy", "python"])
def test_a_lack_of_memory_is_one_line(monkeypatch, capsys, tmp_path, allocator: str) -> None:
    def greedy(as_json: bool) -> None:
        if allocator == "torch":
            torch.empty(1 << 60, dtype=torch.uint8)
        elif allocator == "numpy":
            np.empty(1 << 60, dtype=np.uint8)
        bytearray(1 << 60)

    monkeypatch.setattr(infos, "show_machine", greedy)
    assert run(monkeypatch, "info") == 1
    text = capsys.readouterr().err
    assert "not enough memory (" in text and "smaller images" in text and text.count("\n") == 1


def test_the_package_runs_as_a_module() -> None:
    for module in ("adalayer_native", "adalayer_native.cli"):
        done = subprocess.run(
            [sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("adalayer_native ")


# -- normalisation --------------------------------------------------------------------------------


def plain_weights(data: Path, path: Path) -> Path:
    """Weights of a network trained on values from 0 to 1."""
    dataset = open_dataset(data, "train", SIZE, (0, 0, 0), (1, 1, 1), cache=False, progress=False)
    x, y = dataset.normalise(dataset.pixels()), dataset.labels
    torch.manual_seed(1)
    model = SmallNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return save_weights(model.eval(), path)


def test_an_interruption_while_it_is_loaded_is_one_line() -> None:
    code = """
import sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
from adalayer_native.__main__ import main
main()
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "error: interrupted\n")


@pytest.mark.parametrize(
    "options",
    [
        ("--mean", 0),
        ("--std", 1),
        ("--mean", 0, "--std", "255", "--scale", 1),
        ("--scale", "1/255"),
    ],
)
def test_values_from_0_to_1(compress, files, tmp_path, options) -> None:
    weights = plain_weights(files[0], tmp_path / "plain.safetensors")
    code, said = compress("--check", *options, weights=weights)
    assert code == 0 and "warning:" not in said
    assert "normalisation: mean 0, 0, 0, std 1, 1, 1 of values from 0 to 1 (as the options" in said
    code, said = compress("--check", weights=weights)
    assert "normalisation: mean 0.485, 0.456, 0.406" in said and "ImageNet's" in said


def test_guessing_is_a_warning_that_names_causes(compress, files, tmp_path) -> None:
    torch.manual_seed(3)
    weights = save_weights(SmallNet(), tmp_path / "untrained.safetensors")
    code, said = compress("--check", weights=weights)
    assert code == 0
    for text in ("warning:", "guessing", "--mean", "classes", "blue, green, grey", "--image-size"):
        assert text in said
    assert "warning:" not in compress("--check")[1]


def test_a_model_that_knows_its_normalisation(compress) -> None:
    code, said = compress("--check", model="configured")
    assert code == 0 and "mean 0.5, 0.4, 0.3, std 0.2, 0.2, 0.2" in said
    assert "pretrained_cfg" in said
    assert "mean 0.1, 0.1, 0.1" in compress("--check", "--mean", 0.1, model="configured")[1]


def test_torchvision_knows_its_normalisation() -> None:
    torchvision_models()
    from adalayer_native.jobs.normalise import preset

    found = preset("torchvision.models:resnet18", nn.Identity())
    assert found.mean == (0.485, 0.456, 0.406) and "torchvision's weights" in found.source


def test_builtin_models_know_theirs() -> None:
    from adalayer_native.jobs.normalise import preset

    assert preset("resnet20", nn.Identity()).source == "of resnet20: ImageNet's"
    assert "names none" in preset("other:net", nn.Identity()).source


# -- to an .ada file ------------------------------------------------------------------------------


def test_compress_writes_an_engine_that_knows_its_images(
    monkeypatch, capsys, compress, files, tmp_path
) -> None:
    out = tmp_path / "out"
    more = ("--method", "uniform", "--bits", 4, "--mean", 0.5, "--std", 0.25)
    code, said = compress(*more, model="without_classes")
    assert code == 0 and "model.ada" in said and "engine" in said
    assert "normalisation: mean 0.5" in said
    assert said.startswith("checking model, weights and data\n")
    assert "search for a plan (stage 1 of 4)" in said and "(stage 4 of 4" in said
    engine = ada.load(out / "model.ada")
    assert engine.class_names == ["blue", "green", "grey", "red"]
    assert engine.preprocessing == {
        "size": [SIZE, SIZE], "resize": SIZE, "mean": [0.5] * 3, "std": [0.25] * 3
    }  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["engine_ms"] > 0 and report["ada"]["bytes"] == (out / "model.ada").stat().st_size
    shown = f"{report['engine_ms']:.3f}"
    assert shown in said  # the headline is the engine's time
    test = open_dataset(files[0], "test", SIZE, (0.5,) * 3, (0.25,) * 3, progress=False)
    predicted = engine(test.normalise(test.pixels())).argmax(1)
    right = 100 * (predicted == test.labels).float().mean().item()
    assert right == pytest.approx(report["accuracy"])

    # The same file by hand, from the directory and from the packed model.
    written = (out / "model.ada").read_bytes()
    (out / "model.ada").unlink()
    assert run(monkeypatch, "compile", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == len(written)
    assert (out / "model.ada").read_bytes() == written
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((out / "model.safetensors").read_bytes())
    target = tmp_path / "other" / "net.ada"
    given = ("--model", "helpers_cli:SmallNet", "--input-shape", f"3,{SIZE},{SIZE}")  # 4 classes
    norm = ("--mean", 0.5, "--std", 0.25, "--threads", 1, "--batch", 2)
    assert run(monkeypatch, "compile", alone, *given, *norm, "-o", target) == 0
    assert "per call (batch 2" in capsys.readouterr().err
    other = ada.load(target)
    assert other.preprocessing == engine.preprocessing and other.class_names is None


def test_a_network_that_no_ada_file_can_hold_still_compresses(
    monkeypatch, capsys, compress, tmp_path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.ada").write_bytes(b"of an earlier run")
    code, said = compress("--method", "uniform", "--size", 0.9, model="SortedNet")
    assert code == 0
    (line,) = [line for line in said.splitlines() if line.startswith("no model.ada")]
    assert "run in torch" in line
    assert not (out / "model.ada").exists() and (out / "model.safetensors").exists()
    assert "plan.json, model.safetensors, report.json" in said
    assert run(monkeypatch, "compile", out) == 1
    assert "run in torch" in capsys.readouterr().err
    assert not (out / "model.ada").exists()


def test_compile_says_what_it_lacks(monkeypatch, capsys, files, tmp_path) -> None:
    def fails(*arguments: object, code: int = 1) -> str:
        assert run(monkeypatch, "compile", *arguments) == code
        return capsys.readouterr().err

    assert "does not exist" in fails(tmp_path / "nothing")
    assert "holds no model.safetensors" in fails(tmp_path)
    assert "give --model" in fails(files[1])
    assert "--image-size" in fails(files[1], "--model", "helpers_cli:SmallNet")
    assert "3,32" in fails(files[1], "--input-shape", "3,32", code=2)
    both = ("--input-shape", "3,32,32", "--image-size", 32)
    assert "got both" in fails(files[1], *both, code=2)
    wrong = ("--model", "helpers_cli:CalledTwice", "--image-size", SIZE, "--classes", 4)
    assert "weights.safetensors" in fails(files[1], *wrong)


# -- help, info, and what they load ---------------------------------------------------------------

COMMANDS = (
    "compress", "train", "compile", "report", "info", "demo", "serve", "study", "study green",
    "study adalayernet",
)  # fmt: skip


def loaded_by(*arguments: str) -> tuple[str, set[str]]:
    """What a command prints, and the packages that it loads, in a process of its own."""
    code = (
        "import sys\n"
        "sys.argv = ['adalayer', *sys.argv[1:]]\n"
        "import adalayer_native.cli\n"
        "try:\n    adalayer_native.cli.main()\n"
        "finally:\n    print('LOADED', *{name.split('.')[0] for name in sys.modules})\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    text, _, names = found.stdout.rpartition("LOADED")
    return text, set(names.split())


HEAVY = {"torch", "numpy", "scipy", "matplotlib", "sklearn", "PIL", "rich", "ray", "safetensors"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["study", "green", "--help"]])
def test_help_and_version_load_nothing_heavy(arguments: list[str]) -> None:
    text, names = loaded_by(*arguments)
    assert not names & HEAVY
    assert "adalayer_native" in names and text.strip()


def test_help_is_soon_there() -> None:
    """Within half of the time that importing torch alone takes, by the processor's clock."""

    def seconds(*command: str) -> float:
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_utime + used.ru_stime

    help_ = min(seconds("-m", "adalayer_native", "--help") for _ in range(2))
    assert help_ < 0.5 * seconds("-c", "import torch")


def test_the_package_loads_what_is_used() -> None:
    code = (
        "import sys, adalayer_native as ada\n"
        "assert 'torch' not in sys.modules\n"
        "ada.get_include, ada.Budget(bits=4), ada.Plan({})\n"
        "assert 'torch' not in sys.modules\n"
        "ada.load, ada.set_num_threads(1)\n"
        "print(*{name.split('.')[0] for name in sys.modules}, *sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = set(found.stdout.split())
    assert not names & {"scipy", "matplotlib", "sklearn", "PIL"}
    # What makes engines is not needed to run one.
    unused = ("engine.compiler", "capture", "allocation.optimal", "quantization", "repair")
    assert not names & {f"adalayer_native.{name}" for name in unused}


def test_public_names_are_what_they_were() -> None:
    code = (
        "import adalayer_native.compress, adalayer_native.repair, adalayer_native.capture\n"
        "import adalayer_native as ada\n"
        "assert set(ada.__all__) <= set(dir(ada)), set(ada.__all__) - set(dir(ada))\n"
        "for name in ada.__all__: getattr(ada, name)\n"
        "for name in ('compress', 'capture', 'repair', 'compile'):\n"
        "    assert type(getattr(ada, name)).__name__ == 'function', name\n"
        "from adalayer_native import allocation, engine, report, study\n"
        "for package in (allocation, engine, report, study):\n"
        "    for name in package.__all__:\n"
        "        assert type(getattr(package, name)).__name__ != 'Package', name\n"
        "        assert type(getattr(package, name)).__name__ != 'module', name\n"
        "assert isinstance(ada.__version__, str)\n"
        "ada.importance.CRITERIA, ada.training.Watch, ada.pruning.prune_channels\n"
        "ada.energy.Meter, ada.errors.AdaError, ada.engine.Coverage, ada.plan.PATTERNS\n"
        "try: ada.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_is_whole(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("", *COMMANDS):
        assert run(monkeypatch, *command.split(), "--help") == 0
        text = capsys.readouterr().out
        assert not re.search(r"[a-z]\.\.\.$", text, re.MULTILINE), command
        assert "…" not in text, command
    assert run(monkeypatch, "serve", "--help") == 0
    assert "[serve]" in capsys.readouterr().out


def test_version(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"adalayer_native {ada.__version__}\n"


def test_info_without_a_file_shows_the_machine(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "info") == 0
    text = capsys.readouterr().out
    assert ", ".join(ada.ops.isas()) in text and f"in use: {ada.ops.active_isa()}" in text
    assert run(monkeypatch, "info", "--json") == 0
    assert json.loads(capsys.readouterr().out)["instruction_sets"] == ada.ops.isas()


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory) -> Path:
    """The output of a run."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch, out.parent / "cache")
        code = run(
            patch, "compress", "helpers_cli:SmallNet", "--weights", files[1], "--data", files[0],
            "--image-size", SIZE, "--calibration", 32, "--epochs", 0, "--method", "uniform",
            "--bits", 4, "--out", out, "--quiet",
        )  # fmt: skip
    assert code == 0
    return out


def numbers_of(report: dict) -> list[str]:
    """Numbers of the table, as it shows them."""
    found = []
    for layer in report["layers"]:
        found += [f"{layer['params']:,}", f"{layer['bytes']:,}", f"{layer['microseconds']:.1f}"]
        found += [f"{layer['energy_pj'] / 1000:,.1f}"]
    return found


@pytest.mark.parametrize("columns", [80, 60, 200])
@pytest.mark.parametrize("terminal", [True, False])
def test_info_breaks_no_number(monkeypatch, capsys, finished, columns: int, terminal: bool) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
    report = json.loads((finished / "report.json").read_text())
    assert run(monkeypatch, "info", finished) == 0
    text = capsys.readouterr().out
    for number in numbers_of(report):
        assert number in text
    if terminal:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert all(len(line) <= columns for line in plain.splitlines())
    else:  # a line per layer, whatever the width
        for layer in report["layers"]:
            lines = [line for line in text.splitlines() if f" {layer['name']} " in line]
            assert len(lines) == 1 and f"{layer['bytes']:,}" in lines[0]


def test_info_of_files_breaks_no_number(monkeypatch, capsys, finished) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert run(monkeypatch, "info", finished / "model.safetensors") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("32×32×3×3", "9,216", "of float32", "input bits"))
    assert run(monkeypatch, "info", finished / "model.ada") == 0
    text = capsys.readouterr().out
    assert "MACs per image" in text and "331,776" in text
