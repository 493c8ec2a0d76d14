"""The report of a run: what it reads, what it refuses, and the page in a real browser."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers_browser import MISSING, Browser, browser, installed
from helpers_cli import run
from helpers_models import batches, tiny
from rich.console import Console
from torch import nn

import adalayer_native as ada
from adalayer_native import FileFormatError, PlanError, files
from adalayer_native.measure import Hits, accuracy, hits
from adalayer_native.report import class_rows, load_run, page, record, run_table, write_page

ROWS = [
    {"size": s, "predicted_loss": 0.01 / s**2, "average_bits": 30 * s, "bytes": int(1e4 * s)}
    for s in (0.06, 0.12, 0.25)
]
USE = {"joules": 12.5, "seconds": 2.0, "label": "estimated (codecarbon)", "co2_grams": 0.001,
       "country": "ITA"}  # fmt: skip


def finished(root: Path, model: nn.Module, plan: ada.Plan, more: dict) -> Path:
    """A run's directory without its training."""
    root.mkdir(parents=True)
    result = ada.compress(model, batches(1), None, plan=plan, progress=False)
    packed = root / "model.safetensors"
    files.save(result.model, packed)
    result.plan.save(root / "plan.json")
    report = record("tiny <script>alert(1)</script>", model, result, packed, batches(1)[0][0], more)
    (root / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A finished run of :func:`helpers_models.tiny`."""
    model = tiny()
    plan = ada.allocate(None, ada.Budget(bits=4), method="uniform", model=model, progress=False)
    plan["conv1"] = (8, 0.25)
    plan["fc"] = None
    before, after = Hits((40, 50), (50, 50, 0)), Hits((48, 40, 0), (50, 50, 0))
    more = {
        "classes": class_rows(["ape", "bee <b>", "cow"], before, after),
        "budget": "4 bits per weight", "accuracy": 88.0, "float_accuracy": 90.0, "seed": 3,
        "epochs": 0, "test_images": 100, "float_ms": 2.0, "native_ms": 0.5, "frontier": ROWS,
        "energy": {"compression": USE, "float": USE, "native": USE},
    }  # fmt: skip
    return finished(tmp_path_factory.mktemp("report") / "run", model, plan, more)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A run of one's own to damage."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_what_is_protected_is_shown(copy: Path) -> None:
    assert (
        "protected" not in page(load_run(copy)).split("How it was made")[1].split("</section>")[0]
    )
    plan = ada.Plan.load(copy / "plan.json")
    plan.scores = {"conv1": {"E_even": 0.03}, "conv2": {"E_even": 0.01}}
    plan.measured["even_bits"] = 4.0
    plan.save(copy / "plan.json")
    words = "conv1 (8 bits; 4 would lose 0.03, 75 % of all layers' loss there)"
    assert plan.protected() == {"conv1": words.removeprefix("conv1 (").removesuffix(")")}
    assert words in unescape(page(load_run(copy)))
    assert f"protected: {words}" in str(run_table(load_run(copy)).caption)


def test_what_stays_float_is_shown(made: Path, copy: Path) -> None:
    (part,) = load_run(made).data["float_rest"]
    share = 192 / (27 * 8 * 64 + 72 * 12 * 16 + 192)
    assert part["name"] == "fc" and part["reason"] == "the plan keeps it in float"
    assert part["share"] == pytest.approx(share)
    said = f"<dd>the plan keeps it in float, {100 * share:.2g} % of the work</dd>"
    assert f"<dt>fc stays float</dt>{said}" in page(load_run(made))
    console = Console(width=300, no_color=True)
    with console.capture() as capture:
        console.print(run_table(load_run(made)))
    assert f"stays in float: fc ({100 * share:.2g} %: the plan keeps it in float)" in capture.get()
    # A run of an earlier version knows names and reasons alone.
    report = json.loads((copy / "report.json").read_text())
    del report["float_rest"]
    report["kept_float"] = {"fc": "because"}
    (copy / "report.json").write_text(json.dumps(report))
    assert "fc stays float</dt><dd>because</dd>" in page(load_run(copy))


def test_right_answers_by_class() -> None:
    model = nn.Identity()
    logits = torch.eye(4)[torch.tensor([0, 0, 1, 3, 1, 2])]
    labels = torch.tensor([0, 1, 1, 3, -1, 3])
    for size in (1, 2, 6):
        data = list(zip(logits.split(size), labels.split(size), strict=True))
        found = hits(model, data, progress=False)
        assert found == Hits((1, 1, 0, 1), (1, 2, 0, 2))
        assert found.accuracy == accuracy(model, data, progress=False) == 100 * 3 / 5


def test_class_rows_of_a_run(made: Path, copy: Path) -> None:
    rows = load_run(made).classes
    assert [(row.name, row.images, row.before, row.after) for row in rows] == [
        ("ape", 50, 80.0, 96.0), ("bee <b>", 50, 100.0, 80.0), ("cow", 0, None, None),
    ]  # fmt: skip
    text = page(load_run(made))
    assert '<td class="text" data-value="bee &lt;b&gt;">bee &lt;b&gt;</td>' in text
    assert ">+16.00</td>" in text and ">-20.00</td>" in text
    # A run of an earlier version does not say it.
    report = json.loads((copy / "report.json").read_text())
    del report["classes"]
    (copy / "report.json").write_text(json.dumps(report))
    assert load_run(copy).classes == () and "Class by class" not in page(load_run(copy))
    report["classes"] = [{"name": "ape"}]
    (copy / "report.json").write_text(json.dumps(report))
    with pytest.raises(FileFormatError, match="not a complete report: KeyError"):
        load_run(copy)


def test_the_filter_says_what_it_looks_at(made: Path, copy: Path) -> None:
    assert 'placeholder="name, pattern of zeros or kernel"' in page(load_run(made))
    report = json.loads((copy / "report.json").read_text())
    for layer in report["layers"]:
        layer["planned_sparsity"], layer["kernel"] = 0.0, ""
    (copy / "report.json").write_text(json.dumps(report))
    assert 'placeholder="name of the layer"' in page(load_run(copy))


def test_rows_of_a_run(made: Path) -> None:
    found = load_run(made)
    rows = {layer.name: layer for layer in found.layers}
    assert list(rows) == ["conv1", "conv2", "fc"]
    assert rows["conv1"].bits == 8 and rows["conv1"].sparsity == 0.25
    assert rows["fc"].bits is None and rows["fc"].bytes == 4 * 192
    stored = {e["name"]: e for e in files.describe(made / "model.safetensors")}
    assert rows["conv2"].bytes == stored["conv2"]["bytes"]
    assert rows["conv1"].flops == 2 * 216 * 64
    energy = ada.plan_energy(tiny(), found.plan, torch.zeros(1, 3, 8, 8))
    assert rows["conv2"].energy_nj == pytest.approx(1e-3 * energy["conv2"].total)
    assert rows["conv2"].extrapolated and not rows["conv1"].extrapolated
    assert rows["conv2"].error is not None and 0 < rows["conv2"].error < 1
    assert found.error_name == "relative output error"
    assert rows["conv1"].kernel and rows["conv2"].microseconds is not None
    assert found.data["modelled_float_energy_uj"] > found.data["modelled_energy_uj"]


def test_the_same_in_the_terminal(monkeypatch, capsys, made: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "info", made) == 0
    shown = capsys.readouterr().out
    for text in ("conv2", "unstructured", "energy nJ", "88.00 % test accuracy", "float", "total"):
        assert text in shown
    assert run(monkeypatch, "info", made, "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["name"] == "conv1"
    console = Console(width=200)
    with console.capture() as capture:
        console.print(run_table(load_run(made)))
    assert "relative output error" in capture.get()


class Outside(HTMLParser):
    """Everything that a page asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "poster", "data", "srcset"):
                self.found.append(value or "")
            if name == "id":
                self.ids.append(value or "")


def test_nothing_comes_from_outside(made: Path) -> None:
    text = page(load_run(made))
    parser = Outside()
    parser.feed(text)
    assert all(value.startswith(("#", "data:")) for value in parser.found)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text
    assert len(parser.ids) == len(set(parser.ids))  # of five pictures in one document
    assert {value[1:] for value in parser.found if value.startswith("#")} <= set(parser.ids)
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    assert text.count("<script>") == 1


def test_report_command(monkeypatch, capsys, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "r.html"
    assert run(monkeypatch, "report", made, "--out", out) == 0
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    (tmp_path / "file").write_text("")
    assert run(monkeypatch, "report", made, "--out", tmp_path / "file" / "r.html") == 2
    assert "file" in capsys.readouterr().err
    assert run(monkeypatch, "report", tmp_path / "none", "--out", out) == 1
    assert "does not exist" in " ".join(capsys.readouterr().err.split())


def test_no_frontier_and_no_engine_are_said(copy: Path) -> None:
    data = json.loads((copy / "report.json").read_text())
    data["frontier"], data["engine"], data["energy"] = None, {"why": "of a test"}, None
    for layer in data["layers"]:
        layer.pop("microseconds", None)
        layer.pop("kernel", None)
    (copy / "report.json").write_text(json.dumps(data))
    text = page(load_run(copy))
    assert "--frontier measures it" in text and "of a test" in text
    assert all(layer.microseconds is None for layer in load_run(copy).layers)


def test_runs_that_are_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="does not exist"):
        load_run(tmp_path / "none")
    with pytest.raises(FileFormatError, match="is a file"):
        load_run(copy / "plan.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match=r"is empty: it has no report\.json"):
        load_run(tmp_path / "empty")
    (tmp_path / "half" / "work").mkdir(parents=True)
    with pytest.raises(FileFormatError, match=r"is not finished.*goes on where it stopped"):
        load_run(tmp_path / "half")
    original = (copy / "report.json").read_text()
    for text, message in (
        ("{broken", "not readable as JSON"),
        ("{}", '"format": "adalayer-report"'),
        (original.replace('"version": 1', '"version": 9'), "expected version 1, got 9"),
        (original.replace('"energy_pj"', '"energy_xx"'), "not a complete report: KeyError"),
    ):
        (copy / "report.json").write_text(text)
        with pytest.raises(FileFormatError, match=message):
            load_run(copy)
    (copy / "report.json").write_text(original)
    plan = ada.Plan.load(copy / "plan.json")
    ada.Plan({n: p for n, p in plan.layers.items() if n != "fc"}).save(copy / "plan.json")
    with pytest.raises(PlanError, match=r"plan of another model.*'fc'"):
        load_run(copy)
    plan.layers["fc"] = ada.LayerPlan("fc", "linear", 7, None)
    plan.save(copy / "plan.json")
    with pytest.raises(PlanError, match="layer 'fc' has 7 weights there and 192 here"):
        load_run(copy)
    os.remove(copy / "plan.json")
    with pytest.raises(FileFormatError, match=r"plan\.json"):
        load_run(copy)


def compared(run: Path) -> ada.Comparison:
    """The run's model beside its float network."""
    model = tiny()
    native = ada.restore(model, run / "model.safetensors", batches(1)[0][0])
    return ada.compare(model, native, batches(2, 32), progress=False)


def test_a_comparison_is_a_tab(made: Path, copy: Path) -> None:
    without = page(load_run(made))
    assert load_run(made).comparison is None and '<nav role="tablist"' not in without
    assert "adalayer compare looks for the layers" in without
    found = compared(copy)
    found.save(copy / "compare.json")
    run = load_run(copy)
    assert run.comparison == found
    text = page(run).split("<script>")[0]
    assert text.count('<button type="button" role="tab"') == 2
    assert '<nav role="tablist" aria-label' in text
    body = text[text.index('<div id="microscope">') :]
    for row in found:
        assert f'data-value="{row.name}">{row.name}</td>' in body
    assert "<svg" in body and found.summary() in body and "script>alert(1)" not in body
    for item in found.suggestions:
        assert escape(item.text) in body and f"{100 * item.recovered:.1f}</td>" in body
    hostile = ada.Comparison(
        tuple(replace(row, finding="<b>x") for row in found), math.inf, "squared_error", 3,
        note="<i>why", engine={"equal": 0.5, "snr_db": None},
    )  # fmt: skip
    hostile.save(copy / "compare.json")
    text = page(load_run(copy))
    assert "&lt;b&gt;x" in text and "&lt;i&gt;why" in text and "<b>x" not in text
    assert "50 % of the engine" in text and "What would recover most" not in text


def test_comparisons_that_are_refused(copy: Path) -> None:
    found = compared(copy)
    other = [replace(row, bits=3) if row.name == "conv2" else row for row in found]
    replace(found, rows=tuple(other)).save(copy / "compare.json")
    with pytest.raises(FileFormatError, match=r"compare\.json is about another model.*'conv2'"):
        load_run(copy)
    (copy / "compare.json").write_text("{")
    with pytest.raises(FileFormatError, match=r"compare\.json: not readable"):
        load_run(copy)


# -- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(made: Path, tmp_path_factory) -> Browser:
    """The page of the run, open."""
    if not installed():
        pytest.skip(MISSING)
    root = tmp_path_factory.mktemp("browser")
    write_page(load_run(made), root / "report.html")
    shutil.copytree(made, root / "run")
    compared(root / "run").save(root / "run" / "compare.json")
    write_page(load_run(root / "run"), root / "tabs.html")
    with browser(root / "profile") as session:
        session.open(root / "report.html")
        yield session


def column(session: Browser, heading: str) -> list[str]:
    return session.run(
        """const heads = Array.from(document.querySelectorAll("#layers thead th"));
        const k = heads.findIndex((h) => h.textContent === arguments[0]);
        return Array.from(document.querySelectorAll("#layers tbody tr"))
          .filter((row) => !row.hidden).map((row) => row.cells[k].textContent);""",
        heading,
    )


def sort_by(session: Browser, heading: str) -> str:
    number = session.run(
        """return 1 + Array.from(document.querySelectorAll("#layers thead th"))
          .findIndex((h) => h.textContent === arguments[0]);""",
        heading,
    )
    session.click(f"#layers thead th:nth-child({number}) button")
    return session.run(f"return document.querySelector('#layers th:nth-child({number})').ariaSort;")


def test_page_content(chromium: Browser) -> None:
    assert chromium.run("return document.title") == "tiny <script>alert(1)</script>: uniform"
    cards = chromium.run("return document.getElementById('summary').textContent")
    assert "88.00 %" in cards and "-2.00" in cards and "estimated (codecarbon)" in cards
    for picture in ("ribbon", "fingerprints", "bars", "frontier"):
        width, height = chromium.run(
            "const b = document.querySelector(`#${arguments[0]} svg`).getBoundingClientRect();"
            "return [b.width, b.height];",
            picture,
        )
        assert width > 400 and height > 100
    assert column(chromium, "layer") == ["conv1", "conv2", "fc"]
    assert column(chromium, "bits") == ["8", "4", "float"]
    facts = chromium.run("return document.getElementById('facts').textContent")
    assert "12.5 J per 1,000 images" in facts and "g CO2 (ITA)" in facts


def test_sorting(chromium: Browser) -> None:
    assert sort_by(chromium, "weights") == "ascending"
    assert column(chromium, "weights") == ["192", "216", "864"]  # as numbers
    assert sort_by(chromium, "weights") == "descending"
    assert column(chromium, "layer") == ["conv2", "conv1", "fc"]
    assert sort_by(chromium, "layer") == "ascending"
    assert column(chromium, "layer") == ["conv1", "conv2", "fc"]
    sort_by(chromium, "error")  # the float layer has none: last, in both directions
    assert column(chromium, "layer")[-1] == "fc"
    sort_by(chromium, "error")
    assert column(chromium, "layer")[-1] == "fc"
    marked = chromium.run("return document.querySelectorAll('#layers th[aria-sort]').length")
    assert marked == 1


def test_filtering(chromium: Browser) -> None:
    chromium.type("#filter", "conv2")
    assert column(chromium, "layer") == ["conv2"]
    assert chromium.run("return document.getElementById('count').textContent") == "1 of 3 layers"
    chromium.type("#filter", "nothing of the kind")
    assert column(chromium, "layer") == []
    chromium.run(
        "const f = document.getElementById('filter'); f.value = '';"
        "f.dispatchEvent(new Event('input'));"
    )
    chromium.click("#bits option[value='float']")
    assert column(chromium, "layer") == ["fc"]
    chromium.click("#bits option[value='']")
    assert len(column(chromium, "layer")) == 3


def test_light_dark_and_narrow(chromium: Browser) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        chromium.emulate(scheme)
        colours[scheme] = chromium.run(
            """const ink = document.querySelector("#bars svg text, #bars svg use");
            const axes = document.querySelector("#bars svg path[style*='--ink'], "
              + "#bars svg [style*='--ink']");
            return [getComputedStyle(document.body).backgroundColor,
                    getComputedStyle(document.body).color, getComputedStyle(axes).fill];"""
        )
    light, dark = colours["light"], colours["dark"]
    assert light[0] == "rgb(254, 254, 254)" and dark[0] == "rgb(20, 23, 27)"
    # Pictures are drawn in the page's own ink.
    assert light[2] == light[1] and dark[2] == dark[1] and light[1] != dark[1]
    chromium.emulate("light")
    for width in (500, 1280):
        chromium.resize(width, 900)
        page_width, window = chromium.run(
            "return [document.documentElement.scrollWidth, window.innerWidth];"
        )
        assert page_width <= window  # tables and pictures scroll in themselves


def test_what_is_cut_off_says_that_it_scrolls(chromium: Browser) -> None:
    found = {}
    for width in (400, 1400):
        chromium.resize(width, 900)
        found[width] = chromium.run(
            """return Array.from(document.querySelectorAll(".wide")).map((box) => {
              const hint = box.previousElementSibling;
              box.focus();
              return [box.getAttribute("aria-label"), box.scrollWidth > box.clientWidth,
                      hint.textContent.includes("scroll") && hint.offsetHeight > 0,
                      document.activeElement === box];
            });"""
        )
        assert len(found[width]) == 6  # four pictures and two tables
        for name, cut, said, reachable in found[width]:
            assert cut == said and reachable, (width, name)
    assert all(cut for name, cut, *_ in found[400] if name != "Class by class")
    assert not any(cut for name, cut, *_ in found[1400] if name != "Layer by layer")


def test_the_filter_shows_all_of_its_words(chromium: Browser) -> None:
    for width in (400, 1280):
        chromium.resize(width, 900)
        room, needed = chromium.run(
            """const input = document.getElementById("filter"), style = getComputedStyle(input);
            const ruler = document.createElement("canvas").getContext("2d");
            ruler.font = style.font;
            const padding = parseFloat(style.paddingLeft) + parseFloat(style.paddingRight);
            return [input.clientWidth - padding, ruler.measureText(input.placeholder).width];"""
        )
        assert needed < room


def test_classes_are_sorted_like_layers(chromium: Browser) -> None:
    def order() -> list[str]:
        return chromium.run(
            "return Array.from(document.querySelectorAll('#classes tbody tr'))"
            ".map((row) => row.cells[0].textContent);"
        )

    chromium.resize(1280, 900)
    chromium.click("#classes th:nth-child(5) button")
    assert order() == ["bee <b>", "ape", "cow"]  # who lost most comes first, unknown last
    chromium.click("#classes th:nth-child(5) button")
    assert order() == ["ape", "bee <b>", "cow"]


def test_tabs(chromium: Browser, tmp_path_factory) -> None:
    here = Path(chromium.run("return decodeURIComponent(location.pathname)"))

    def shown() -> list[bool]:
        return chromium.run(
            "return ['plan', 'microscope'].map((name) => "
            "document.getElementById(name).getBoundingClientRect().height > 0);"
        )

    assert shown() == [True, True]  # of a run without a comparison: a sentence, and no tabs
    assert chromium.run("return document.querySelector('[role=tablist]')") is None
    try:
        chromium.open(here.parent / "tabs.html")
        assert shown() == [True, False]
        chromium.click("#tab-microscope")
        assert shown() == [False, True]
        assert chromium.run(
            "return ['plan', 'microscope'].map((n) => "
            "document.getElementById(`tab-${n}`).ariaSelected)"
        ) == ["false", "true"]
        width = chromium.run(
            "return document.querySelector('#layers-picture svg').getBoundingClientRect().width"
        )
        assert width > 400
        order = (
            "return [...document.querySelectorAll('#errors tbody tr')].map((r) => r.dataset.place)"
        )
        before = chromium.run(order)
        assert before == sorted(before, key=int)  # worst own error first
        chromium.click("#errors th:nth-child(4) button")  # by own signal to noise, ascending
        assert chromium.run(order) == before
        chromium.click("#errors th:nth-child(4) button")
        assert chromium.run(order) == before[::-1]
        chromium.run(
            "document.getElementById('tab-microscope').dispatchEvent("
            "new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));"
        )
        assert shown() == [True, False]
        assert chromium.run("return document.activeElement.id") == "tab-plan"
        chromium.type("#filter", "conv2")
        assert column(chromium, "layer") == ["conv2"]
        chromium.run("location.hash = '#microscope'; location.reload();")
        assert shown() == [False, True]
    finally:
        chromium.open(here)


def test_console_is_clean_and_nothing_is_requested(chromium: Browser) -> None:
    chromium.run("document.getElementById('filter').value = '';")
    assert [entry for entry in chromium.log("browser") if entry["level"] != "INFO"] == []
    urls = []
    for entry in chromium.log("performance"):
        message = json.loads(entry["message"])["message"]
        request = message["params"]
        # The browser's own first tab asks for things, too.
        if (
            message["method"] == "Network.requestWillBeSent"
            and request["documentURL"][:5] == "file:"
        ):
            urls.append(request["request"]["url"])
    assert urls  # the page itself
    assert all(url.startswith(("file:", "data:")) for url in urls), urls
