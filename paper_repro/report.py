"""REPORT.md, from the JSON files in out/ and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paper_repro.experiment import NOT_RUN, Experiment, table
from paper_repro.out_of_reach import CLAIMS as OUT_OF_REACH
from paper_repro.registry import EXPERIMENTS
from qlora import files

INTRODUCTION = """\
# What of QLoRA was reproduced here

Written by `python -m paper_repro` from the JSON files beside it. The paper is Dettmers et al. 2023, *QLoRA:
Efficient Finetuning of Quantized LLMs*, arXiv 2305.14314; LoRA is Hu et al. 2021, arXiv 2106.09685. The models and
texts are other ones than the papers', so a claim counts as reproduced by the criterion beside it, never by equal
values."""


def write(folder: Path) -> Path:
    """Write REPORT.md and the plots into `folder`; experiments without a JSON file there are "not run"."""
    found = {name: _read(folder, name) for name in EXPERIMENTS}
    parts = [INTRODUCTION, "## Claims", _verdicts(found)]
    for name, record in found.items():
        if record is not None:
            parts += _section(EXPERIMENTS[name], record, folder)
    parts += ["## Not run, and why", _out_of_reach(), "## How it was measured", _provenance(found)]
    path = folder / "REPORT.md"
    files.write_text(path, "\n\n".join(parts) + "\n")
    return path


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    return files.read_json(path) if path.is_file() else None


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


def _verdicts(found: dict[str, dict[str, Any] | None]) -> str:
    rows = [row for name, record in found.items() for row in verdicts(EXPERIMENTS[name], record)]
    header = ["claim", "paper", "measured", "reproduced when", "verdict"]
    text = table(header, rows).replace("--:", ":--")
    missing = [name for name, record in found.items() if record is None]
    if missing:
        command = f"python -m paper_repro {' '.join(missing)}"
        text += f"\n\n{NOT_RUN.capitalize()} yet: {', '.join(missing)}. Run them with `{command}`."
    return text


def _section(experiment: Experiment, record: dict[str, Any], folder: Path) -> list[str]:
    plots = experiment.plots(record["result"], folder)
    images = [f"![{caption}]({path.name})\n\n*{caption}*" for caption, path in plots.items()]
    return [f"## {experiment.title}", experiment.section(record["result"]), *images]


def _out_of_reach() -> str:
    rows = [(claim.claim, claim.paper, claim.why, claim.how) for claim in OUT_OF_REACH]
    return table(["claim", "paper", "why", "what would run it"], rows).replace("--:", ":--")


def _provenance(found: dict[str, dict[str, Any] | None]) -> str:
    rows = []
    for name, record in found.items():
        for origin in record["measured_on"] if record else []:
            versions = f"torch {origin['torch']}, transformers {origin['transformers']}"
            device = f"{origin['device']}, {origin['cores']} cores"
            python = f"Python {origin['python']}"
            rows.append(
                (name, device, f"{python}, {versions}", origin["commit"], record["seconds"])
            )
    header = ["experiment", "device", "versions", "commit", "seconds measured"]
    return table(header, rows).replace("--:", ":--")
