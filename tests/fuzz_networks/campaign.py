"""Many cases; of one that fails the cell at fault, its smallest recipe, and a file about it."""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .check import Case, case_of, evaluated, judge
from .generate import size_of
from .judging import Failed, Finding
from .recipe import Recipe, from_json, smaller

CELLS = 12  # in one model
EVERY_ODD = 6  # one case in so many is a single odd cell
SETTINGS = ("seed", "style", "batch", "training", "free_sizes", "engine", "files")
SHRINKS = 60  # judgements that making a recipe smaller may take

Judge = Callable[[Case], Counter[str]]


@dataclass(frozen=True)
class Report:
    """A finding with what reproduces it."""

    finding: Finding
    case: Case
    smallest: Recipe | None

    def __str__(self) -> str:
        case = self.case
        lines = [
            str(self.finding),
            f"case {case.seed}: {len(case.recipes)} cells, {case.style}, batch {case.batch}"
            + (", in training mode" if case.training else "")
            + (", free sizes" if case.free_sizes else ""),
        ]
        shown = [self.smallest] if self.smallest else case.recipes
        return "\n".join([*lines, *map(str, shown)])

    def as_json(self) -> str:
        recipes = [self.smallest] if self.smallest else list(self.case.recipes)
        words = {key: getattr(self.case, key) for key in SETTINGS}
        return json.dumps({**words, "recipes": [asdict(recipe) for recipe in recipes]})


def case_from_json(text: str) -> Case:
    raw = json.loads(text)
    recipes = tuple(from_json(json.dumps(item)) for item in raw.pop("recipes"))
    return Case(recipes=recipes, **raw)


def finding_of(case: Case, judge: Judge) -> Finding | None:
    """What is wrong with a case. Odd cells may be refused."""
    try:
        judge(case)
    except Failed as failure:
        return None if case.odd and failure.finding.kind == "refused" else failure.finding
    except Exception as error:  # of the judge itself: it must not end a run of hours
        detail = traceback.format_exc(limit=-4)
        return Finding("the judge", "crash", detail, error=type(error).__name__)
    return None


def isolate(case: Case, finding: Finding, judge: Judge) -> tuple[Case, Finding]:
    """The smallest set of cells that fails, by halves."""
    count = len(case.recipes)
    if count == 1:
        return case, finding
    parts = [range(count // 2), range(count // 2, count)]
    if finding.cell is not None:
        parts.insert(0, range(finding.cell, finding.cell + 1))
    for part in parts:
        smaller_case = case.of(part)
        found = finding_of(smaller_case, judge)
        if found is not None:
            return isolate(smaller_case, found, judge)
    return case, finding  # the cells fail only together


def shrink(case: Case, finding: Finding, judge: Judge) -> tuple[Case, Finding]:
    """A case of one cell with as few steps as fail in the same way."""
    # What comes after the stage that fails need not be tried.
    later = finding.stage not in ("compile", "engine")
    saved = finding.stage in ("save", "restore", "size")
    lean = replace(case, engine=case.engine and not later, files=case.files and saved)
    if finding_of(lean, judge) is not None:
        case = lean
    tries = 0
    again = True
    while again:
        again = False
        for candidate in _candidates(case):
            if tries >= SHRINKS:
                return case, finding
            if not _runs(candidate):
                continue
            tries += 1
            found = finding_of(candidate, judge)
            if found is not None and found.signature == finding.signature:
                case, finding, again = candidate, found, True
                break
    return case, finding


def _candidates(case: Case) -> Iterator[Case]:
    if case.style != "positional":
        yield replace(case, style="positional")
    if case.training:
        yield replace(case, training=False)
    if case.free_sizes:
        yield replace(case, free_sizes=False)
    (recipe,) = case.recipes
    for item in smaller(recipe):
        if size_of(item) < size_of(recipe):
            yield replace(case, recipes=(item,))


def _runs(case: Case) -> bool:
    """Whether the float model still takes its inputs, in batches of one, too."""
    try:
        evaluated(case.build(), case.call(0))
        evaluated(case.build(), case.call(2, batch=1))
    except Exception:
        return False
    return True


def investigate(case: Case, judge: Judge = judge) -> tuple[Counter[str], list[Report]]:
    """Judge a case; for every cell that fails a report. The others are judged again without it."""
    counts: Counter[str] = Counter()
    reports: list[Report] = []
    while True:
        try:
            counts += judge(case)
            return counts, reports
        except Exception:
            finding = finding_of(case, judge)
        if finding is None:  # an odd one that was refused
            return counts + Counter(cases=1, cells=1, refused=1), reports
        alone, found = isolate(case, finding, judge)
        if len(alone.recipes) == 1:
            small, found = shrink(alone, found, judge)
            reports.append(Report(found, small, small.recipes[0]))
        else:
            reports.append(Report(found, alone, None))
        seeds = {recipe.seed for recipe in alone.recipes}
        rest = [k for k, recipe in enumerate(case.recipes) if recipe.seed not in seeds]
        if not rest:
            return counts, reports
        case = case.of(rest)


def numbered(number: int) -> Case:
    """The case of a number: mostly many cells, now and then an odd one alone."""
    odd = number % EVERY_ODD == EVERY_ODD - 1
    return case_of(number, 1 if odd else CELLS, odd=odd)


def investigate_number(number: int) -> tuple[int, Counter[str], list[Report]]:
    """For worker processes."""
    torch.set_num_threads(1)
    counts, reports = investigate(numbered(number))
    return number, counts, reports


def campaign(
    first: int,
    seconds: float,
    workers: int,
    *,
    seen: Callable[[int, Counter[str], list[Report]], Any],
) -> int:
    """Judge cases ``first``, ``first + 1``, ... until the time is over.

    Args:
        seen: called with the number of every case that is done, its counts and reports.

    Returns:
        The number of the case to go on with.
    """
    end = time.monotonic() + seconds
    number = first
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running: set[Future[Any]] = set()
        while running or time.monotonic() < end:
            while len(running) < workers and time.monotonic() < end:
                running.add(pool.submit(investigate_number, number))
                number += 1
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                seen(*future.result())
    return number


def file_name(report: Report) -> str:
    """One name for one recipe: a finding that comes again replaces its file."""
    digest = hashlib.sha256(report.as_json().encode()).hexdigest()[:10]
    stage = report.finding.stage.replace(" ", "-").replace("'", "")
    return f"{report.finding.kind}-{stage}-{digest}.txt"


def write(report: Report, folder: Path) -> Path:
    """The report for people, and as its last line what ``python -m fuzz_networks FILE`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(report)
    path.write_text(f"{report}\n\n{report.as_json()}\n")
    return path
