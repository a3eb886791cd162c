"""What an experiment is, what a claim is, and how a claim is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paper_repro.harness.lab import Lab

Result = dict[str, Any]

REPRODUCED, IN_TREND, NOT_REPRODUCED, NOT_RUN, REPORTED = VERDICTS = (
    "reproduced",
    "in trend",
    "not reproduced",
    "not run",
    "reported only",
)
ARITHMETIC, MEASURED, OTHER = KINDS = ("arithmetic", "measured", "other claims")
KINDS_IN_WORDS = (
    "Arithmetic: computed from shapes, formulas and the library's own objects, at most on torch's "
    "meta device, which has shapes alone. Measured: on models, weights, random draws or by the clock. Other claims: not of these two papers, but of "
    "the library itself, of a method used here, or of a later paper."
)


@dataclass(frozen=True)
class Claim:
    """One statement, of a paper or of the library, beside its criterion, which is stated nowhere else.

    Attributes:
        statement: what the paper says, with the table, figure or section where it does.
        paper: its value.
        criterion: when it counts as reproduced, in words.
        passes: the same in code; it returns None where what it needs has not run, and `measured` then says
            why. None in its place for a claim that is only reported.
        measured: the value found, in words.
        trend: what passes is the paper's direction or order, on another model or text, and not its value:
            the verdict is then "in trend".
        kind: one of KINDS: what the verdict rests on, and whose claim it is.
    """

    statement: str
    paper: str
    criterion: str
    passes: Callable[[Result], bool | None] | None
    measured: Callable[[Result], str]
    trend: bool = False
    kind: str = MEASURED

    def verdict(self, result: Result | None) -> str:
        if result is None:
            return NOT_RUN
        if self.passes is None:
            return REPORTED
        passed = self.passes(result)
        if passed is None:
            return NOT_RUN
        return (IN_TREND if self.trend else REPRODUCED) if passed else NOT_REPRODUCED


@dataclass(frozen=True)
class Experiment:
    """One table or figure.

    Attributes:
        name: of the module, of its JSON file in out/ and on the command line.
        title: what it reproduces.
        minutes: what --quick and what --full takes on two CPU cores when nothing is remembered, to announce it.
        run: measure; returns what can be written as JSON. "seeds", if it is there, lists the seeds.
        claims: what is judged by the result.
        section: the result as Markdown.
        plots: draw the result into a folder; returns the files by their captions.
        errata: what of the paper does not add up, by the result: Markdown, a sentence or two each.
        lessons: what one learns that the paper does not say, by the result: a sentence each.
    """

    name: str
    title: str
    minutes: tuple[float, float]
    run: Callable[[Lab], Result]
    claims: Sequence[Claim]
    section: Callable[[Result], str]
    plots: Callable[[Result, Path], dict[str, Path]] = lambda result, folder: {}
    errata: Callable[[Result], Sequence[str]] = lambda result: ()
    lessons: Callable[[Result], Sequence[str]] = lambda result: ()


def seeds_in_words(result: Result) -> str:
    """The seeds of a result, or a dash where nothing is drawn."""
    return ", ".join(map(str, result.get("seeds", []))) or "-"


def table(header: Sequence[str], rows: Sequence[Sequence[object]], text: bool = False) -> str:
    """A Markdown table; the first column is text, the others are numbers, or all are text."""
    rule = [":--", *(":--" if text else "--:" for _ in header[1:])]
    lines = [header, rule, *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
