"""REPORT.md and report.html, from the JSON files of a folder and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper_repro.harness import errata, out_of_reach, page, published
from paper_repro.harness.experiment import NOT_RUN, VERDICTS, Experiment, table
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


@dataclass(frozen=True)
class Chapter:
    """What the report has of an experiment.

    Attributes:
        record: its JSON file; None if there is none that fits, and `lacks` then says why.
    """

    experiment: Experiment
    record: dict[str, Any] | None
    lacks: str = ""

    @property
    def result(self) -> dict[str, Any] | None:
        return None if self.record is None else self.record["result"]

    @property
    def link(self) -> str:
        name = self.experiment.name
        return name if self.record is None else f"[{name}](#{name})"


def write(folder: Path) -> Path:
    """Write REPORT.md, report.html and the plots into `folder`; returns the path of REPORT.md.

    Experiments without a JSON file there are "not run", as are those whose file another version wrote.
    """
    chapters = [_read(folder, experiment) for experiment in EXPERIMENTS.values()]
    parts = [
        INTRODUCTION,
        _origin(chapters),
        "## Claims",
        *_claims(chapters),
        "## What is not run, and why",
        *_not_run(chapters),
        *(part for chapter in chapters for part in _section(chapter, folder)),
        "## What does not add up in the papers",
        _bullets([*(line for c in chapters for line in _said(c, "errata")), *errata.found()]),
        "## What a researcher learns",
        *(_lessons(chapters) or ["Nothing yet."]),
        "## How it was measured",
        *_provenance(chapters),
    ]
    path, text = folder / "REPORT.md", "\n\n".join(parts) + "\n"
    files.write_text(path, text)
    files.write_text(folder / "report.html", page.html(text, TITLE, folder))
    return path


def _read(folder: Path, experiment: Experiment) -> Chapter:
    path = folder / f"{experiment.name}.json"
    again = f"run `python -m paper_repro {experiment.name}`"
    if not path.is_file():
        return Chapter(experiment, None, again)
    record = files.read_json(path)
    if "mode" not in record:
        return Chapter(experiment, None, f"{path.name} is of an earlier version: {again} again")
    try:
        verdicts(experiment, record)
        for show in (experiment.section, experiment.errata, experiment.lessons):
            show(record["result"])
    except KeyError as error:
        lacks = f"{path.name} is of another version, it has no {error}: {again} again"
        return Chapter(experiment, None, lacks)
    return Chapter(experiment, record)


def verdicts(experiment: Experiment, record: dict[str, Any] | None) -> list[tuple[str, ...]]:
    """(statement, paper, measured, criterion, verdict) of each claim of an experiment."""
    result = None if record is None else record["result"]
    return [
        (
            claim.statement,
            claim.paper,
            "-" if result is None else claim.measured(result),
            claim.criterion,
            claim.verdict(result),
        )
        for claim in experiment.claims
    ]


def _origin(chapters: Sequence[Chapter]) -> str:
    """Mode, devices, commits and time of what was measured, in a sentence."""
    records = [chapter.record for chapter in chapters if chapter.record is not None]
    if not records:
        return "Nothing was run yet."
    origins = [origin for record in records for origin in record["measured_on"]]
    return (
        f"Mode: {_distinct(record['mode'] for record in records)}. "
        f"Device: {_distinct(_device(origin) for origin in origins)}. "
        f"Commit: {_distinct(origin['commit'] for origin in origins)}. "
        f"Time to measure it: {_minutes(sum(record['seconds'] for record in records))}."
    )


def _claims(chapters: Sequence[Chapter]) -> list[str]:
    judged = [(c, row) for c in chapters for row in verdicts(c.experiment, c.record)]
    rows = [
        [c.link, statement, paper, ours, criterion, verdict]
        for c, (statement, paper, ours, criterion, verdict) in judged
    ]
    counts = Counter(row[-1] for row in rows)
    counted = [(verdict, counts[verdict]) for verdict in VERDICTS]
    header = ["experiment", "claim", "paper", "ours", "reproduced or in trend when", "verdict"]
    return [table(["verdict", "claims"], counted), table(header, map(_cells, rows), text=True)]


def _not_run(chapters: Sequence[Chapter]) -> list[str]:
    missing = [_cells([c.link, "all claims", c.lacks]) for c in chapters if c.record is None]
    single = [
        _cells([chapter.link, statement, measured])
        for chapter in chapters
        for statement, _, measured, _, verdict in verdicts(chapter.experiment, chapter.record)
        if verdict == NOT_RUN and chapter.record is not None
    ]
    header, rows = ["experiment", "claim", "why"], missing + single
    here = table(header, rows, text=True) if rows else "All claims that can be run here were run."
    there = [_cells([claim.claim, claim.why, claim.how]) for claim in out_of_reach.CLAIMS]
    header = ["out of reach", "why", "what would run it"]
    return [
        here,
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


def _section(chapter: Chapter, folder: Path) -> list[str]:
    if chapter.record is None:
        return []
    experiment, name = chapter.experiment, chapter.experiment.name
    plots = experiment.plots(chapter.result, folder)
    return [
        f'<a id="{name}"></a>',
        f"## {experiment.title}",
        experiment.section(chapter.result),
        *(f"![{caption}]({path.name})\n\n*{caption}*" for caption, path in plots.items()),
        f"Every number, in full: [{name}.json]({name}.json).",
    ]


def _said(chapter: Chapter, what: str) -> Sequence[str]:
    """The errata or lessons of an experiment."""
    return () if chapter.record is None else getattr(chapter.experiment, what)(chapter.result)


def _lessons(chapters: Sequence[Chapter]) -> list[str]:
    """Of what goes beyond the papers first: it is the last experiment."""
    return [
        f"**{chapter.experiment.title}.** {' '.join(lines)}"
        for chapter in reversed(chapters)
        if (lines := _said(chapter, "lessons"))
    ]


def _provenance(chapters: Sequence[Chapter]) -> list[str]:
    records = [chapter.record for chapter in chapters if chapter.record is not None]
    rows = [
        _cells(
            [
                record["experiment"],
                record["mode"],
                _seeds(record["result"]),
                _device(origin),
                _versions(origin),
                origin["commit"],
                f"{record['seconds']:g}",
            ]
        )
        for record in records
        for origin in record["measured_on"]
    ]
    header = ["experiment", "mode", "seeds", "device", "versions", "commit", "seconds measured"]
    total = sum(record["seconds"] for record in records)
    return [table(header, rows, text=True), f"In all: {_minutes(total)}."]


def _seeds(result: dict[str, Any]) -> str:
    seeds = result.get("seeds", [result["seed"]] if "seed" in result else [])
    return ", ".join(map(str, seeds)) or "-"


def _device(origin: dict[str, Any]) -> str:
    return f"{origin['device']}, {origin['cores']} cores"


def _versions(origin: dict[str, Any]) -> str:
    """Everything that the origin tells besides the device and the commit."""
    names = [name for name in origin if name not in ("device", "cores", "commit")]
    return ", ".join(f"{name} {origin[name]}" for name in names)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _distinct(values: Any) -> str:
    return "; ".join(dict.fromkeys(values)) or "none"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _cells(row: Sequence[str]) -> list[str]:
    """Cells in which nothing ends a cell or a row."""
    return [" ".join(cell.replace("|", "\\|").split()) for cell in row]
