"""The tools of the benchmarks that measure nothing themselves: classes, schedule, report."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from bench import arm_counts, gpu_report
from bench.interleave import (
    CONTENDED,
    Comparison,
    Sample,
    Sampler,
    headline,
    ratios,
    rounds,
    schedule,
    spreads,
)
from bench.record import Figure, Results, Target
from bench.report import (
    BEGIN,
    END,
    comparison_lines,
    page_section,
    shown_state,
    write_page,
)

PROBE = 25e-6
SLOW_PROBE = 80e-6


def samples(fast: list[float], contended: list[float]) -> list[Sample]:
    return [Sample(s, PROBE, PROBE) for s in fast] + [
        Sample(s, SLOW_PROBE, SLOW_PROBE) for s in contended
    ]


GPU = {
    "device": "a GPU",
    "capability": "9.0",
    "torch": "2.13",
    "peaks": [
        {"what": "copy", "unit": "GB/s", "value": 2000.0},
        {"what": "_int_mm 8192", "unit": "TOPS", "value": 1000.0},
    ],
    "networks": [
        {
            "network": "resnet50",
            "bits": 8,
            "batch": 1,
            "us": 100.0,
            "half graph us": 180.0,
            "x best": 1.8,
        }
    ],
    "linears": [
        {
            "size": 8192,
            "batch": 1,
            "half us": 70.0,
            "b4 us": 20.0,
            "b4 x": 3.5,
            "b4 GB/s": 1600.0,
            "b2 us": 25.0,
            "b2 x": 2.8,
            "ao int4 us": "ImportError",
        }
    ],
    "sparse": [{"layer": "3x3/1 256-256@14", "batch": 256, "2:4 x": 1.4}],
    "layers": [
        {
            "layer": "3x3/1 256-256@14",
            "channels": 256,
            "out channels": 256,
            "batch": 256,
            "b8 us": 50.0,
            "b8 MB": 26.0,
            "b4 us": 40.0,
            "b4 MB": 25.7,
            "TOPS": 700.0,
            "MMAC": 29595.0,
        }
    ],
}


def test_the_gpu_part_of_the_page(tmp_path):
    """Only where something was measured; the rest of the page stays as it is."""
    page = tmp_path / "performance.md"
    page.write_text("# Performance\n\nAbove.\n", encoding="utf-8")
    gpu_report.write_page(GPU, page)
    first = page.read_text(encoding="utf-8")
    assert first.startswith("# Performance\n\nAbove.\n\n" + gpu_report.BEGIN)
    assert "a GPU, compute capability 9.0" in first
    assert (tmp_path / "images" / "roofline-gpu.png").stat().st_size > 1000
    gpu_report.write_page(GPU, page)
    assert page.read_text(encoding="utf-8") == first
    page.write_text(gpu_report.BEGIN, encoding="utf-8")
    with pytest.raises(ValueError, match="expected the markers"):
        gpu_report.write_page(GPU, page)
    # What bench.report writes stands before it and is left alone.
    assert gpu_report.BEGIN not in (BEGIN, END)


def test_gpu_targets():
    reached = {name: (value, least) for name, value, least in gpu_report.targets(GPU)}
    assert reached == {
        "resnet50 8 bits, batch 1, over the best of half graph": (1.8, 1.5),
        "3x3/1 256-256@14, share of the int8 rate of _int_mm": (0.7, 0.6),
        "linear 8192, batch 1, 4 bits over half": (3.5, 3.3),
        "linear 8192, batch 1, 2 bits over half": (2.8, 5.5),
        "linear 8192, batch 1, 4 bits, share of copy bandwidth": (0.8, 0.85),
        "3x3/1 256-256@14, batch 256, 2:4 over dense": (1.4, 1.3),
        "3x3/1 256-256@14, batch 256, more bits over fewer": (1.25, 0.95),
        "linear 8192, batch 1, more bits over fewer": (0.8, 0.95),
    }
    ((across, up),) = gpu_report.points(GPU["layers"])[8]
    assert across == pytest.approx(2 * 29595e6 / 26e6)
    assert up == pytest.approx(2 * 29595e6 / 50e-6 / 1e12)


def example() -> Results:
    """Ours is 1.5 times as fast on fast cores, and 1.2 times on contended ones."""
    results = Results(machine={"cpu": "test CPU", "cores": 2, "isa": "amx", "versions": {"x": "1"}})
    comparison = Comparison("network/net/batch 1/2T", 2)
    comparison.samples = {
        "ours 8 bits": samples([2e-3] * 6, [5e-3] * 6),
        "openvino int8": samples([3e-3] * 6, [6e-3] * 6),
        "openvino bf16": samples([4e-3] * 6, [9e-3] * 6),
        "torch fp32": samples([30e-3], []),
    }
    rivals = ("openvino int8", "openvino bf16")
    results.add(
        comparison, [Target("ours 8 bits", rivals, 1.4), Target("ours 8 bits", rivals, 1.6)]
    )
    results.figures["call"] = Figure("call", 12.0, "us", at_most=20.0)
    results.figures["memory"] = Figure("memory", 1.3, "x", at_most=1.1)
    return results


@pytest.mark.parametrize(
    ("before", "after", "state"),
    [
        (1.0, 1.0, "fast"),
        (CONTENDED * 0.99, 1.0, "fast"),
        (CONTENDED * 1.01, 1.0, "mixed"),
        (1.0, CONTENDED * 1.01, "mixed"),
        (3.0, CONTENDED * 1.01, "contended"),
    ],
)
def test_state_of_a_sample(before: float, after: float, state: str) -> None:
    assert Sample(1e-3, PROBE * before, PROBE * after).state(PROBE) == state


def test_fastest_probe_ignores_single_readings() -> None:
    comparison = Comparison("c", 1, {"a": [Sample(1.0, PROBE, PROBE)] * 100})
    comparison.samples["a"].append(Sample(1.0, PROBE / 10, PROBE))
    assert comparison.fastest_probe() == PROBE


def test_spread_per_state() -> None:
    comparison = Comparison("c", 1, {"a": samples([1.0, 2.0, 3.0, 4.0, 5.0], [9.0])})
    found = spreads(comparison, PROBE)["a"]
    assert set(found) == {"fast", "contended", "all"}
    fast = found["fast"]
    assert (fast.low, fast.median, fast.high, fast.count) == (2.0, 3.0, 4.0, 5)
    assert found["contended"].median == 9.0
    assert found["all"].count == 6


def test_ratio_compares_like_with_like() -> None:
    results = example()
    table = results.table("network/net/batch 1/2T")
    found = ratios(table, "ours 8 bits", ("openvino int8", "openvino bf16"))
    assert found["fast"].value == pytest.approx(1.5)
    assert found["fast"].peer == "openvino int8"
    assert found["contended"].value == pytest.approx(1.2)
    best = headline(found)
    assert best is not None and best.state == "fast"
    # One fast sample is no base for a comparison; contended ones there are none.
    few = ratios(table, "ours 8 bits", ("torch fp32",))
    assert set(few) == {"all"}
    assert ratios(table, "ours 8 bits", ("absent",)) == {}
    assert headline({}) is None


def test_contention_that_lasts_a_whole_comparison() -> None:
    """The scale comes from all comparisons, so slow cores are not taken for fast ones."""
    results = example()
    results.add(Comparison("other", 1, {"a": samples([], [1.0] * 5)}))
    assert set(results.table("other")["a"]) == {"contended", "all"}


def test_missed_targets_are_named() -> None:
    first, second = example().missed()
    assert "network/net/batch 1/2T: ours 8 bits over" in first
    assert "1.50x, wanted 1.6x" in first
    assert second == "memory: 1.3 x, wanted at most 1.1"


def test_unmeasured_target_is_missed() -> None:
    results = Results()
    results.add(Comparison("c", 1), [Target("ours", ("peer",), 1.0)])
    assert results.missed() == ["c: ours over peer is not measured, wanted 1x"]


def test_results_survive_a_file(tmp_path: Path) -> None:
    results, path = example(), tmp_path / "results.json"
    results.save(path)
    again = Results.load(path)
    assert again.machine == results.machine
    assert again.targets == results.targets
    assert again.figures == results.figures
    assert again.missed() == results.missed()
    assert again.fastest_probe() == pytest.approx(PROBE)
    # A later run on contended cores only still knows what a free core needs.
    later = Results(probe_floor=again.fastest_probe())
    later.add(Comparison("other", 1, {"a": samples([], [1.0] * 5)}))
    assert set(later.table("other")["a"]) == {"contended", "all"}


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="not a file of benchmark results"):
        Results.load(path)


# -------------------------------------------------------------------------------------- sampler


class Machine:
    """A clock that only the candidates move, and what happened in which order."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[str] = []

    def call(self, name: str, seconds: float):
        def run() -> None:
            self.now += seconds
            self.events.append(name)

        return run

    def probe(self, threads: int) -> float:
        self.events.append("probe")
        return PROBE

    def pause(self) -> None:
        self.events.append("pause")


def sampler(machine: Machine, seconds: dict[str, float], **options) -> Sampler:
    found = Sampler(
        {name: machine.call(name, s) for name, s in seconds.items()},
        2,
        clock=lambda: machine.now,
        probe=machine.probe,
        pause=machine.pause,
        **options,
    )
    machine.events.clear()
    return found


def test_turn_of_a_long_call() -> None:
    machine = Machine()
    turns = sampler(machine, {"a": 0.01})
    turns.turn("a")
    assert machine.events == ["pause", "probe", "a", "a", "pause", "probe"]
    assert turns.samples["a"] == [Sample(pytest.approx(0.01), PROBE, PROBE)]


def test_turn_of_short_and_very_long_calls() -> None:
    machine = Machine()
    turns = sampler(machine, {"short": 1e-4, "long": 0.3})
    turns.turn("short")
    assert machine.events.count("short") == 30 + 10
    assert turns.samples["short"][0].seconds == pytest.approx(1e-4)
    machine.events.clear()
    turns.turn("long")
    assert machine.events == ["pause", "probe", "long", "pause", "probe"]


def test_turn_with_cold_weights() -> None:
    machine = Machine()
    turns = sampler(machine, {"a": 1e-4}, cold=lambda: machine.events.append("cold"))
    turns.turn("a")
    assert machine.events == ["pause", "probe", "a", "cold", "a", "pause", "probe"]


def test_schedule_keeps_to_the_time() -> None:
    machine = Machine()
    turns = sampler(machine, {"ours": 2e-3, "rival": 4e-3, "slow": 0.15})
    plan = schedule(turns, ["ours", "rival"], 6.0)
    spent = 0.0
    count = dict.fromkeys(turns.candidates, 0)
    for chosen in rounds(plan, turns.candidates, ["ours", "rival"]):
        spent += sum(turns.turn_seconds(name) for name in chosen)
        for name in chosen:
            count[name] += 1
    assert 0.5 * 6.0 < spent < 1.2 * 6.0
    assert count["ours"] == count["rival"] == plan.rounds > count["slow"] >= 3


def test_rounds_are_drawn_anew() -> None:
    machine = Machine()
    turns = sampler(machine, dict.fromkeys("abcd", 1e-3))
    orders = {tuple(r) for r in rounds(schedule(turns, "abcd", 5.0), "abcd", "abcd")}
    assert len(orders) > 10
    assert all(sorted(order) == list("abcd") for order in orders)


# --------------------------------------------------------------------------------------- report


def with_everything() -> Results:
    results = example()
    layer = Comparison("layer/net/3x3 8-8 @7", 1)
    layer.samples = {"ours 8 bits": samples([1e-5] * 5, []), "torch fp32": samples([9e-5] * 5, [])}
    layer.info = {"operations": 56448, "bytes": {"ours 8 bits": 1360}}
    results.add(layer)
    channels = Comparison("channels/dense 3x3 @14", 1, info={"channels": [1, 2], "many": True})
    for label, channel in itertools.product(("ours", "torch fp32"), (1, 2)):
        channels.samples[f"{label} {channel}"] = samples([1e-5 * channel] * 5, [])
    results.add(channels)
    results.figures["int8 peak of one core"] = Figure("int8 peak of one core", 4000.0, "GOPS")
    name = "memory bandwidth of one core"
    results.figures[name] = Figure(name, 9.0, "GiB/s")
    name = "nodes of net, 8 bits, 1 thread"
    row = {"name": "conv1", "op": "conv", "kind": "native", "kernel": "amx", "macs": 2_000_000}
    rows = [{**row, "microseconds": 31.25}]
    results.figures[name] = Figure(name, 31.25, "us", info={"rows": rows})
    return results


def test_page_shows_what_was_measured() -> None:
    section = page_section(with_everything())
    assert "test CPU, 2 cores" in section
    assert "| net, batch 1, 2T | fast |" in section
    assert "2.000 (2.000–2.000)" in section and "30.0 (30.0–30.0)" in section
    assert "| openvino int8 | 1.50 | 1.20 | 1.29 | 1.4 | met |" in section
    assert "| 1.6 | **missed** |" in section
    assert "| call | 12 | us | ≤ 20 | met |" in section
    assert "| memory | 1.3 | x | ≤ 1.1 | **missed** |" in section
    assert "| conv1 | conv | amx | 31.2 | 2.0 |" in section
    assert "images/channels-dense-3x3-14.png" in section


def test_page_is_rewritten_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "performance.md"
    write_page(with_everything(), page)
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("# Performance", "# Performance\n\nBy hand."), encoding="utf-8")
    write_page(with_everything(), page)
    again = page.read_text(encoding="utf-8")
    assert again.replace("\n\nBy hand.", "") == text
    assert again.count(BEGIN) == again.count(END) == 1
    pictures = {p.name: p.stat().st_size for p in (page.parent / "images").iterdir()}
    assert set(pictures) == {"networks.png", "roofline.png", "channels-dense-3x3-14.png"}
    assert all(1000 < size < 200_000 for size in pictures.values())


def test_page_without_markers_is_kept(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="markers"):
        write_page(example(), page)
    assert page.read_text(encoding="utf-8") == "mine"


def test_terminal_lines() -> None:
    lines = list(comparison_lines(with_everything(), "network/net/batch 1/2T"))
    assert lines[0] == "network/net/batch 1/2T"
    assert "fast 2.000 ms (2.000-2.000) [6]   contended 5.000 ms" in lines[1]
    assert len(lines) == 5
    assert len(list(comparison_lines(with_everything(), "channels/dense 3x3 @14"))) == 1


def test_shown_state() -> None:
    results = example()
    name = "network/net/batch 1/2T"
    assert shown_state(results.table(name)) == "fast"
    results.comparisons[name].samples["torch fp32"] = samples([], [0.05])
    assert shown_state(results.table(name)) == "contended"


def test_a_loop_of_arm_is_counted() -> None:
    text = """
0000000000000010 <before()>:
      10:	ret
0000000000000014 <kernel(int)>:
      14:	sdot	v1.4s, v2.16b, v3.4b[0]
      18:	ld1	{v4.16b-v7.16b}, [x0], #64
      1c:	ld1	{v30.16b, v31.16b}, [x1]
      20:	ldp	q8, q9, [x2]
      24:	ldr	q10, [x3, x4]
      28:	smlal	v0.8h, v1.8b, v2.8b
      2c:	zip1	v5.2d, v6.2d, v7.2d
      30:	str	q1, [sp, #16]
      34:	smmla	v1.4s, v2.16b, v3.16b
      38:	ldr	x5, [x6]
      3c:	b.ne	18 <kernel(int)+0x4>  // b.any
      40:	ret
"""
    loop = arm_counts.inner_loop(arm_counts.functions(text)["kernel(int)"])
    assert len(loop.lines) == 10 and loop.products == 8 + 32 and loop.multiplies == 2
    assert loop.loads == 4 + 2 + 2 + 1
    assert loop.other_vector == 1 and loop.spills == 1
    with pytest.raises(ValueError, match="no loop with products"):
        arm_counts.inner_loop(arm_counts.functions(text)["before()"])
