"""REPORT.md and report.html, from the JSON files of a folder and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paper_repro.harness import errata, out_of_reach, page, published
from paper_repro.harness.chapter import Chapter, Judged, read_chapter
from paper_repro.harness.experiment import (
    KINDS,
    KINDS_IN_WORDS,
    NOT_RUN,
    VERDICTS,
    seeds_in_words,
    table,
)
from paper_repro.harness.registry import EXPERIMENTS
from qlora import files

TITLE = "What of QLoRA and LoRA was reproduced here"
INTRODUCTION = f"""\
# {TITLE}

Each claim of two papers beside what was measured here, by the criterion that stands beside it: QLoRA is Dettmers et al.
2023, *QLoRA: Efficient Finetuning of Quantized LLMs*, arXiv 2305.14314; LoRA is Hu et al. 2021, *LoRA: Low-Rank
Adaptation of Large Language Models*, arXiv 2106.09685. *Reproduced*: the paper's value, by arithmetic or measured.
*In trend*: the paper's direction or order, on other models and texts than its own. *Not reproduced*: the criterion
failed. *Not run*: something is missing, and it is said what. `python -m paper_repro` wrote this from the JSON files
beside it, which have every number in full."""


def write(folder: Path, made: Mapping[str, Chapter] | None = None) -> Path:
    """Write REPORT.md, report.html and the plots into `folder`; returns the path of REPORT.md.

    Experiments without a JSON file there are "not run", as are those whose file another version wrote.

    Args:
        folder: where the JSON files lie.
        made: chapters that `read_chapter` has made from them already, by the experiment's name.
    """
    made = made or {}
    chapters = [made.get(name) or read_chapter(folder, each) for name, each in EXPERIMENTS.items()]
    parts = [
        INTRODUCTION,
        _origin(chapters),
        "## Claims",
        *_claims(chapters),
        "## What is not run, and why",
        *_not_run(chapters),
        *(part for each in chapters for part in _section(each)),
        "## What does not add up in the papers",
        _bullets([*(line for each in chapters for line in each.errata), *errata.found()]),
        "## What a researcher learns",
        *(_lessons(chapters) or ["Nothing yet."]),
        "## How it was measured",
        *_provenance(chapters),
    ]
    path, text = folder / "REPORT.md", "\n\n".join(parts) + "\n"
    files.write_text(path, text)
    files.write_text(folder / "report.html", page.html(text, TITLE, folder))
    return path


def _origin(chapters: Sequence[Chapter]) -> str:
    """Mode, devices, commits and time of what was measured, in a sentence."""
    records = _records(chapters)
    if not records:
        return "Nothing was run yet."
    origins = [origin for record in records for origin in record["measured_on"]]
    return (
        f"Mode: {_distinct(record['mode'] for record in records)}. "
        f"Device: {_distinct(_device(origin) for origin in origins)}. "
        f"Commit: {_distinct(origin['commit'] for origin in origins)}. "
        f"Time to measure it: {_minutes(_seconds(records))}."
    )


def _records(chapters: Sequence[Chapter]) -> list[dict[str, Any]]:
    return [chapter.record for chapter in chapters if chapter.record is not None]


def _seconds(records: Sequence[dict[str, Any]]) -> float:
    """What it took to measure all that these have; what several share counts once."""
    return sum({n: s for record in records for n, s in record["measurements"].items()}.values())


def _claims(chapters: Sequence[Chapter]) -> list[str]:
    rows = [[chapter.link, *judged] for chapter in chapters for judged in chapter.judged]
    header = [
        "experiment",
        "claim",
        "paper",
        "ours",
        "reproduced or in trend when",
        "kind",
        "verdict",
    ]
    unreachable = sum(claim.tables for claim in out_of_reach.CLAIMS)
    return [
        _counts([judged for chapter in chapters for judged in chapter.judged]),
        KINDS_IN_WORDS,
        f"Besides these, {unreachable} tables of the papers cannot be run here as they stand: they are "
        "[shown with the papers' values](#out-of-reach), without a verdict; for some of them a smaller experiment above "
        f"stands in. {out_of_reach.NOT_TRANSCRIBED}",
        table(header, map(_cells, rows), text=True),
    ]


def _counts(judged: Sequence[Judged]) -> str:
    """How many claims have each verdict, by what it rests on."""
    counts = Counter((each.verdict, each.kind) for each in judged)
    rows = []
    for verdict in VERDICTS:
        of_kinds = [counts[verdict, kind] for kind in KINDS]
        rows.append((verdict, *of_kinds, sum(of_kinds)))
    return table(["verdict", *KINDS, "all"], rows)


def _not_run(chapters: Sequence[Chapter]) -> list[str]:
    missing = [_cells([c.link, "all claims", c.lacks]) for c in chapters if c.record is None]
    single = [
        _cells([chapter.link, judged.statement, judged.measured])
        for chapter in chapters
        for judged in chapter.judged
        if judged.verdict == NOT_RUN and chapter.record is not None
    ]
    header, rows = ["experiment", "claim", "why"], missing + single
    here = table(header, rows, text=True) if rows else "All claims that can be run here were run."
    there = [_cells([claim.claim, claim.why, claim.how]) for claim in out_of_reach.CLAIMS]
    header = ["out of reach", "why", "what would run it"]
    return [
        here,
        '<a id="out-of-reach"></a>',
        "Out of reach, so that the papers' values are all that can be shown:",
        table(header, there, text=True),
        *(_folded(claim.claim, claim.values) for claim in out_of_reach.CLAIMS),
    ]


def unreachable_in_words() -> str:
    """What is out of reach, for the command line."""
    lines = ["Out of reach, with the papers' values in the report:"]
    for claim in out_of_reach.CLAIMS:
        lines += [f"  - {claim.claim}", f"    why: {claim.why}"]
        lines += [f"    what would run it: {claim.how}"]
    return "\n".join(lines)


def _folded(title: str, values: str) -> str:
    header, *rows = published.rows(values)
    words = f"<summary>{title}: the paper's values</summary>"
    return f'<details markdown="1">\n{words}\n\n{table(header, rows)}\n\n</details>'


def _section(chapter: Chapter) -> list[str]:
    if chapter.record is None:
        return []
    name = chapter.experiment.name
    return [
        f'<a id="{name}"></a>',
        f"## {chapter.experiment.title}",
        chapter.section,
        *(f"![{caption}]({path.name})\n\n*{caption}*" for caption, path in chapter.plots.items()),
        f"Every number, in full: [{name}.json]({name}.json).",
    ]


def _lessons(chapters: Sequence[Chapter]) -> list[str]:
    """Of what goes beyond the papers first: it is the last experiment."""
    return [
        f"**{chapter.experiment.title}.** {' '.join(chapter.lessons)}"
        for chapter in reversed(chapters)
        if chapter.lessons
    ]


def _provenance(chapters: Sequence[Chapter]) -> list[str]:
    records = _records(chapters)
    rows = [
        _cells(
            [
                record["experiment"],
                record["mode"],
                seeds_in_words(record["result"]),
                _device(origin),
                _versions(origin),
                origin["commit"],
                f"{_seconds([record]):.1f}",
            ]
        )
        for record in records
        for origin in record["measured_on"]
    ]
    header = ["experiment", "mode", "seeds", "device", "versions", "commit", "seconds measured"]
    total = f"In all, with what several share counted once: {_minutes(_seconds(records))}."
    return [table(header, rows, text=True), total]


def _device(origin: dict[str, Any]) -> str:
    return f"{origin['device']}, {origin['cores']} cores"


def _versions(origin: dict[str, Any]) -> str:
    """Everything that the origin tells besides the device and the commit."""
    names = [name for name in origin if name not in ("device", "cores", "commit")]
    return ", ".join(f"{name} {origin[name]}" for name in names)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values)) or "none"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _cells(row: Sequence[str]) -> list[str]:
    """Cells in which nothing ends a cell or a row."""
    return [" ".join(cell.replace("|", "\\|").split()) for cell in row]
