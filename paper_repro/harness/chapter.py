"""What the report has of an experiment, made once from its JSON file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from paper_repro.harness.experiment import Experiment, Result
from qlora import files


class Judged(NamedTuple):
    """A claim beside what was found."""

    statement: str
    paper: str
    measured: str
    criterion: str
    kind: str
    verdict: str


@dataclass(frozen=True)
class Chapter:
    """What the report has of an experiment.

    Attributes:
        record: its JSON file; None if there is none that fits, and `lacks` then says why. What follows it is
            made from it.
    """

    experiment: Experiment
    judged: Sequence[Judged]
    record: dict[str, Any] | None = None
    lacks: str = ""
    section: str = ""
    plots: Mapping[str, Path] = field(default_factory=dict)
    errata: Sequence[str] = ()
    lessons: Sequence[str] = ()

    @property
    def link(self) -> str:
        name = self.experiment.name
        return name if self.record is None else f"[{name}](#{name})"


def read_chapter(folder: Path, experiment: Experiment) -> Chapter:
    """An experiment's part of the report, from its JSON file; its plots are drawn into `folder`."""
    path = folder / f"{experiment.name}.json"
    again = f"run `python -m paper_repro {experiment.name}`"
    nothing = _judge(experiment, None)
    if not path.is_file():
        return Chapter(experiment, nothing, lacks=again)
    record = files.read_json(path)
    if "measurements" not in record:
        lacks = f"{path.name} is of an earlier version: {again} again"
        return Chapter(experiment, nothing, lacks=lacks)
    result = record["result"]
    try:
        return Chapter(
            experiment,
            _judge(experiment, result),
            record,
            section=experiment.section(result),
            plots=experiment.plots(result, folder),
            errata=experiment.errata(result),
            lessons=experiment.lessons(result),
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        lacks = f"{path.name} does not fit this version ({why}): {again} again"
        return Chapter(experiment, nothing, lacks=lacks)


def _judge(experiment: Experiment, result: Result | None) -> list[Judged]:
    return [
        Judged(
            claim.statement,
            claim.paper,
            "-" if result is None else claim.measured(result),
            claim.criterion,
            claim.kind,
            claim.verdict(result),
        )
        for claim in experiment.claims
    ]
