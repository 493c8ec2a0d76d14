"""The studies on a few small images: pieces, going on, bad input, Markdown, page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import helpers_study
import pytest
import torch

from adalayer_native.cli import main
from adalayer_native.energy import meter
from adalayer_native.errors import DataError, FileFormatError, MissingExtraError, PlanError
from adalayer_native.models.resnet_cifar import ResNetCifar
from adalayer_native.plan import Plan
from adalayer_native.study import (
    AdalayernetSettings,
    GreenSettings,
    adalayernet,
    green,
    load_study,
    run_adalayernet,
    run_green,
    section,
    write_report,
)
from adalayer_native.study.configurations import STAGES, configuration, network, plan_of
from adalayer_native.study.folder import Clock, Study
from adalayer_native.study.markdown import data_name
from adalayer_native.study.papers import FIGURE6, TABLE2, TABLE3
from adalayer_native.study.splits import Images, SomeBatches
from adalayer_native.study.timing import ledger
from bench import studies_page
from bench.studies_page import markers_of


def test_a_study_is_loaded_by_its_commands_alone() -> None:
    code = (
        "import sys, adalayer_native.cli, adalayer_native.compress, adalayer_native.jobs\n"
        "print(sorted(m for m in sys.modules if m.startswith('adalayer_native.study')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[0] == (
        "['adalayer_native.study', 'adalayer_native.study.commands']"
    )


@pytest.fixture
def data(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("ADALAYER_CACHE", str(tmp_path / "cache"))
    return str(helpers_study.write_images(tmp_path / "data"))


@pytest.fixture
def small_green(data: str, tmp_path, monkeypatch) -> GreenSettings:
    monkeypatch.setattr(green, "ROUNDS", 1)
    return GreenSettings(
        data, tmp_path / "green", epochs=2, images=32, batch_size=16, seeds=(0,), blocks=1,
        configurations=("full", "rising"), curve_images=10, energy=False,
        memory=False, seconds=0.01, image_size=8, progress=False,
    )  # fmt: skip


@pytest.fixture
def small_adalayernet(data: str, tmp_path) -> AdalayernetSettings:
    return AdalayernetSettings(
        data, tmp_path / "ada", size=0.5, float_epochs=1, seeds=(0,), batch_size=16,
        methods=("uniform", "adalayer"), calibration=20, energy=False, memory=False,
        seconds=0.01, image_size=8, network="helpers_study:SmallNet", progress=False,
    )  # fmt: skip


class Ticks:
    """A clock that is over after so many looks at it."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def over(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def without_times(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


# -- pieces ---------------------------------------------------------------------------------------


def test_papers_agree_with_themselves() -> None:
    """After is before x (1 - P) x bits / 32 (Conv2: to 0.4 %); totals are those of Table 2."""
    for row in FIGURE6.values():
        assert row.before * (1 - row.pruned / 100) * row.bits / 32 == pytest.approx(
            row.after, rel=5e-3
        )
    assert sum(row.before for row in FIGURE6.values()) == pytest.approx(
        TABLE2["float"].parameters, rel=1e-2
    )
    assert sum(row.after for row in FIGURE6.values()) == pytest.approx(
        TABLE2["adalayer"].parameters, rel=1e-2
    )
    full = TABLE3["cifar10"]["full"]
    assert full.joules[0] / full.seconds[0] == pytest.approx(168, abs=1)  # watts
    assert full.kg[0] / full.kwh[0] == pytest.approx(0.33, abs=0.01)  # kg per kWh


@pytest.mark.parametrize(
    ("name", "bits"),
    [("ascending", (2, 3, 4)), ("descending", (4, 3, 2)), ("fixed", (3, 3, 3)),
     ("fixed-5", (5, 5, 5)), ("rising", (4, 4, 4)), ("falling", (2, 2, 2))],
)  # fmt: skip
def test_widths_of_stages(name: str, bits: tuple[int, ...]) -> None:
    plan = plan_of(network(1, 10, 0), configuration(name, 3))
    assert plan is not None
    for layer in plan.layers.values():
        stage = layer.name.split(".")[0]
        if stage in STAGES:
            assert layer.bits == layer.activation_bits == bits[STAGES.index(stage)]
        else:
            assert layer.bits is None


def test_configurations_refuse() -> None:
    assert plan_of(network(1, 10, 0), configuration("full")) is None
    with pytest.raises(PlanError, match="unknown configuration 'up'"):
        configuration("up")
    with pytest.raises(PlanError, match="from 2 to 8, got 9"):
        configuration("fixed-9")


def test_networks_depend_on_the_seed_alone() -> None:
    first, again, other = (network(1, 10, seed).conv1.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_epochs_of_some_images(data: str) -> None:
    images = Images(data, "cifar10", 8, False)
    batches = images.training(16, 32, 0)
    assert isinstance(batches, SomeBatches)
    assert len(batches) == 2
    first, second = ([y for _, y in batches] for _ in range(2))
    assert [len(y) for y in first] == [16, 16]
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert len(images.training(16, 10**6, 0)) == 3  # 60 images, full batches alone
    assert len(images.training(128, 32, 0)) == 1


def test_counted_costs() -> None:
    """conv1: 3 x 8 x 9 weights at 64 positions, 4 bits on 8-bit inputs, a quarter pruned."""
    model = helpers_study.SmallNet()
    x = torch.zeros(1, 3, 8, 8)
    macs = {"conv1": 216 * 64, "conv2": 1152 * 16, "classifier": 160}
    whole = ledger(model, None, x)
    assert whole["flops"] == whole["nonzero_flops"] == 2 * sum(macs.values())
    assert whole["bops"] == 1024 * sum(macs.values())
    assert whole["weight_bytes"] == 4 * (216 + 1152 + 160)
    entry = {"name": "conv1", "kind": "conv2d", "params": 216, "bits": 4, "sparsity": 0.25}
    plan = Plan.from_json(json.dumps({"format": "adalayer-plan", "version": 1, "layers": [entry]}))
    part = ledger(model, plan, x)
    assert part["nonzero_flops"] == whole["flops"] - 0.5 * macs["conv1"]
    assert part["bops"] == whole["bops"] + macs["conv1"] * (4 * 8 * 0.75 - 1024)
    assert part["activation_bytes"] == whole["activation_bytes"] - 3 * (3 * 64 + 8 * 64)
    with pytest.raises(PlanError, match="conv1"):
        ledger(ResNetCifar(1, 10), plan, x)


def test_clock() -> None:
    time = [0.0]
    clock = Clock(2, now=lambda: time[0])
    assert not clock.over()
    time[0] = 119.0
    assert not clock.over()
    time[0] = 120.0
    assert clock.over()
    assert not Clock(None).over()
    with pytest.raises(PlanError, match="minutes must be above 0, got 0"):
        Clock(0)


# -- directories ----------------------------------------------------------------------------------


def test_a_study_goes_on_with_the_same_settings_only(tmp_path) -> None:
    Study.open(tmp_path, "green", {"epochs": 1}, {"seeds": [0]}).put("a", 1)
    again = Study.open(tmp_path, "green", {"epochs": 1}, {"seeds": [0, 1]})
    assert again.entries == {"a": 1}
    assert again.data["wanted"] == {"seeds": [0, 1]}
    with pytest.raises(FileFormatError, match="epochs is 1 there and 2 here"):
        Study.open(tmp_path, "green", {"epochs": 2}, {})
    with pytest.raises(FileFormatError, match="belongs to study 'green', not 'adalayernet'"):
        Study.open(tmp_path, "adalayernet", {"epochs": 1}, {})


def test_studies_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(FileFormatError, match="does not exist"):
        load_study(tmp_path / "none")
    with pytest.raises(FileFormatError, match=r"is empty: it has no study\.json"):
        load_study(tmp_path)
    file = tmp_path / "study.json"
    file.write_text("{")
    with pytest.raises(FileFormatError, match="is a file"):
        load_study(file)
    with pytest.raises(FileFormatError, match="not readable as JSON"):
        load_study(tmp_path)
    file.write_text('{"format": "else"}')
    with pytest.raises(FileFormatError, match='"format": "adalayer-study"'):
        load_study(tmp_path)
    file.write_text('{"format": "adalayer-study", "version": 9}')
    with pytest.raises(FileFormatError, match="expected version 1, got 9"):
        load_study(tmp_path)
    Study.open(tmp_path / "half", "green", {}, {}).put("a", 1)
    with pytest.raises(FileFormatError, match="is not finished"):
        load_study(tmp_path / "half")


def test_output_that_cannot_be_written(small_green: GreenSettings, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        run_green(replace(small_green, out=tmp_path / "file" / "out"))


# -- the green study ------------------------------------------------------------------------------


@pytest.mark.slow
def test_green_goes_on_where_it_stopped(small_green: GreenSettings, monkeypatch) -> None:
    whole = run_green(small_green)
    assert whole["missing"] == []
    written = sorted(file.name for file in write_report(small_green.out))
    assert written == ["curves.png", "native.png", "study.md"]
    text = (small_green.out / "study.md").read_text(encoding="utf-8")
    rising = whole["entries"]["run/rising/0"]
    assert f"| rising over time (2, 3, 4) | 1 | {rising['test_accuracy']:.2f} |" in text
    assert "90.01 ± 3.72" in text  # the paper's full precision
    assert "Not finished" not in text
    assert rising["native_share"] > 0.9
    assert rising["bytes"] < rising["float_bytes"] / 4

    # The same with an end in the middle of the second configuration, and another after it.
    other = replace(small_green, out=small_green.out.parent / "parts")
    for looks in (6, 2):
        monkeypatch.setattr(green, "Clock", lambda _, looks=looks: Ticks(looks))
        found = run_green(other)
        assert "timing" in found["missing"]
        assert "**Not finished.**" in section(found)
    with pytest.raises(FileFormatError, match="is not finished: run/"):
        load_study(other.out)
    monkeypatch.setattr(green, "Clock", Clock)
    resumed = run_green(other)
    assert resumed["missing"] == []
    for name in small_green.configurations:
        one, two = (study["entries"][f"run/{name}/0"] for study in (whole, resumed))
        assert without_times(one["history"]) == without_times(two["history"])
        assert one["test_accuracy"] == two["test_accuracy"]

    # Timings are measured anew, the runs are not.
    before = resumed["entries"]
    anew = run_green(replace(other, only="timing"))["entries"]
    assert anew["timing"] != before["timing"]
    assert anew["run/full/0"] == before["run/full/0"]

    # The plan of something else in the place of ours.
    plan_of(network(2, 10, 0), configuration("ascending")).save(
        other.out / "work" / "rising-0" / "plan.json"
    )
    with pytest.raises(PlanError, match=r"plan\.json is the plan of another model"):
        run_green(replace(other, only="timing"))
    plan_of(network(1, 10, 0), configuration("fixed")).save(
        other.out / "work" / "rising-0" / "plan.json"
    )
    with pytest.raises(PlanError, match="not the plan of configuration 'rising'"):
        run_green(replace(other, only="timing"))


def test_green_stops_at_an_accuracy(small_green: GreenSettings) -> None:
    found = run_green(
        replace(small_green, configurations=("full",), stop_accuracy=1e-6, only="train")
    )
    entry = found["entries"]["run/full/0"]
    assert entry["stopped_at"] == len(entry["history"]) == 1
    assert found["missing"] == ["timing"]
    assert "full precision (seed 0) after epoch 1" in section(found)


def test_a_run_stops_with_widths_that_it_trained() -> None:
    assert green.first_stop(configuration("fixed"), 100) == 1
    assert green.first_stop(configuration("falling"), 100) == 67
    assert green.first_stop(configuration("rising"), 3) == 3


@pytest.mark.parametrize("name", ["digits-16", "cifar10"])
def test_data_are_named(name: str, tmp_path) -> None:
    source = "digits" if name != "cifar10" else "x"
    settings = GreenSettings(source, tmp_path, image_size=16)
    assert data_name({"settings": settings.shared()}) == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, "seeds must be different and at least one"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"seeds": (-1,)}, "must not be negative"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"stop_accuracy": 101.0}, "from 0 to 100"),
        ({"configurations": ("up",)}, "unknown configuration 'up'"),
        ({"only": "timing"}, "is empty: nothing is trained yet"),
    ],
)
def test_green_refuses(small_green: GreenSettings, change: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        run_green(replace(small_green, **change))


def test_other_data_are_refused(small_green: GreenSettings, tmp_path) -> None:
    with pytest.raises(DataError, match="cifar100 has 100 classes in both splits, got 10"):
        run_green(replace(small_green, dataset="cifar100"))
    run_green(replace(small_green, only="report"))
    other = replace(small_green, only="train", configurations=("full",), epochs=2)
    run_green(other)
    more = str(helpers_study.write_images(tmp_path / "more", train=7))
    with pytest.raises(PlanError, match="begun with other data"):
        run_green(replace(other, data=more))


def test_missing_extra_is_named(small_green: GreenSettings, monkeypatch) -> None:
    real = meter.importlib.import_module

    def without(name: str, *rest: object) -> object:
        if name.startswith("codecarbon"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(meter.importlib, "import_module", without)
    with pytest.raises(MissingExtraError, match=r"adalayer_native\[energy\]"):
        run_green(replace(small_green, energy=True))
    assert load_study(small_green.out, finished=False)["entries"] == {}


# -- the AdaLayerNet study ------------------------------------------------------------------------


@pytest.mark.slow
def test_adalayernet_goes_on(small_adalayernet: AdalayernetSettings, monkeypatch) -> None:
    monkeypatch.setattr(adalayernet, "Clock", lambda _: Ticks(4))  # three steps of training
    found = run_adalayernet(small_adalayernet)
    assert "model/adalayer/0" in found["missing"] and "timing" in found["missing"]
    monkeypatch.setattr(adalayernet, "Clock", Clock)
    found = run_adalayernet(small_adalayernet)
    assert found["missing"] == []
    write_report(small_adalayernet.out)
    text = (small_adalayernet.out / "study.md").read_text(encoding="utf-8")
    run = found["entries"]["model/adalayer/0"]
    assert run["size"] <= 0.5
    assert f"{run['bytes']:,}" in text
    assert "229.53 KB, synthetic" in text
    assert "| conv1 | 0.216 |" in text  # Figure 6, beside the paper's
    assert (small_adalayernet.out / "layers.png").stat().st_size > 1000

    anew = run_adalayernet(replace(small_adalayernet, only="timing"))
    assert anew["entries"]["model/adalayer/0"] == run
    assert anew["entries"]["timing"] != found["entries"]["timing"]
    folder = small_adalayernet.out / "work" / "adalayer-0"
    plan_of(network(1, 10, 0), configuration("fixed")).save(folder / "plan.json")
    with pytest.raises(PlanError, match=r"plan\.json is the plan of another model"):
        run_adalayernet(replace(small_adalayernet, only="timing"))
    with pytest.raises(FileFormatError, match=r"size is 0\.5 there and 0\.4 here"):
        run_adalayernet(replace(small_adalayernet, size=0.4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"methods": ("rl",)}, PlanError, r"unknown \['rl'\]"),
        ({"seeds": ()}, PlanError, "seeds must be different and at least one"),
        ({"epochs": -1}, PlanError, "epochs must not be negative"),
        ({"models": Path("none")}, FileFormatError, "weight file 'none' does not exist"),
        ({"only": "timing"}, PlanError, "nothing is there yet to time"),
    ],
)
def test_adalayernet_refuses(small_adalayernet, change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run_adalayernet(replace(small_adalayernet, **change))


# -- the page -------------------------------------------------------------------------------------


def test_page(small_green: GreenSettings, tmp_path) -> None:
    page = tmp_path / "docs" / "studies.md"
    page.parent.mkdir()
    begin, end = markers_of("green")
    page.write_text(
        f"# Studies\n\nBy hand.\n\n{begin}\nof before\n{end}\n\nBelow.\n", encoding="utf-8"
    )
    run_green(replace(small_green, configurations=("full",), only="train"))
    with pytest.raises(FileFormatError, match="not finished: timing not done"):
        studies_page.write_page([small_green.out], page)
    assert "of before" in page.read_text(encoding="utf-8")
    run_green(replace(small_green, configurations=("full",)))
    assert studies_page.main([str(small_green.out), "--page", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "of before" not in text and "By hand." in text and text.endswith("Below.\n")
    assert "](images/green-curves.png)" in text
    assert (page.parent / "images" / "green-curves.png").is_file()
    page.write_text("# Studies\n", encoding="utf-8")
    with pytest.raises(ValueError, match="expected the markers"):
        studies_page.write_page([small_green.out], page)


def test_the_page_has_the_markers() -> None:
    text = studies_page.PAGE.read_text(encoding="utf-8")
    for name in ("adalayernet", "green", "green digits-16"):
        assert [text.count(marker) for marker in markers_of(name)] == [1, 1]


# -- the commands ---------------------------------------------------------------------------------


def run_command(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["adalayer", "study", *arguments])
        patch.setattr("warnings.showwarning", None)  # the entry point replaces it
        with pytest.raises(SystemExit) as done:
            main()
    return int(done.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["green", "--seeds", "a"], "whole numbers separated by commas"),
        (["green", "--only", "compress"], "expected one of"),
        (["green", "--minutes", "0"], "--minutes.*expected a finite number above 0"),
        (["adalayernet", "--size", "0"], "--size.*expected a finite number above 0"),
        (["adalayernet", "--models", "none"], "weight file 'none' does not exist"),
        (["green"], "is neither a directory nor a readable zip|does not exist"),
    ],
)
def test_commands_refuse(arguments: list[str], message: str, tmp_path, capsys) -> None:
    command, *rest = arguments
    out = ["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--no-energy"]
    assert run_command(command, *out, *rest) in (1, 2)
    assert re.search(message, " ".join(capsys.readouterr().err.replace("│", " ").split()))


@pytest.mark.slow
def test_green_command(tmp_path, capsys) -> None:
    """On digits, with energy and memory as they are on this machine."""
    out = tmp_path / "out"
    arguments = ["green", "--data", "digits", "--out", str(out), "--epochs", "1", "--images", "96",
                 "--batch-size", "32", "--blocks", "1", "--seeds", "0,1", "--configurations",
                 "full,ascending,falling", "--curve-images", "50", "--seconds", "0.2",
                 "--threads", "1", "--quiet"]  # fmt: skip
    assert run_command(*arguments, "--minutes", "1e-5") == 0
    assert "not done yet: run/full/0" in capsys.readouterr().err
    assert run_command(*arguments) == 0
    data = load_study(out)
    entry = data["entries"]["run/falling/1"]["history"][0]
    assert entry["joules"] > 0
    assert entry["energy_label"].split()[0] in ("measured", "estimated")
    timing = data["entries"]["timing"]
    assert timing["step"]["ascending"]["energy"]["joules"] > 0
    assert timing["step"]["full"]["peak_bytes"] > 1_000_000
    text = (out / "study.md").read_text(encoding="utf-8")
    assert entry["energy_label"] in text
    assert "| full precision | 2 |" in text


@pytest.mark.slow
def test_adalayernet_command(tmp_path) -> None:
    """On digits: the whole network, one epoch; energy as it is on this machine."""
    out = tmp_path / "out"
    arguments = ["adalayernet", "--data", "digits", "--out", str(out), "--float-epochs", "1",
                 "--calibration", "32", "--seeds", "0", "--methods", "adalayer",
                 "--seconds", "0.2", "--threads", "1", "--quiet"]  # fmt: skip
    assert run_command(*arguments) == 0
    data = load_study(out)
    run, timing = data["entries"]["model/adalayer/0"], data["entries"]["timing"]
    assert run["size"] <= 0.165
    assert timing["energy"]["adalayer"]["joules"] > 0
    # 1.39 million float32 weights alone are more than the whole compressed model takes.
    assert timing["peak_bytes"]["float"] > 5_000_000
    assert timing["peak_bytes"]["adalayer"] > run["engine_bytes"]
    text = (out / "study.md").read_text(encoding="utf-8")
    assert timing["energy"]["adalayer"]["label"] in text
    for name in ("fingerprint", "ribbon", "bars", "layers"):
        assert f"({name}.png)" in text
        assert (out / f"{name}.png").stat().st_size > 1000
