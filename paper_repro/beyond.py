"""Beyond the paper: data types that came after it, block sizes, fitted codebooks and formats of the scales."""

from __future__ import annotations

from typing import Any

from paper_repro import beyond_errors, beyond_lessons, beyond_models, beyond_shown
from paper_repro.beyond_errors import BLOCKSIZE, NORMAL, SEED, SOURCES
from paper_repro.beyond_lessons import OWN, SAME_VALUES, deviation
from paper_repro.beyond_models import LARGEST
from paper_repro.harness.experiment import OTHER, Claim, Experiment, Result
from paper_repro.harness.lab import Lab
from paper_repro.harness.stats import Interval, gap


def run(lab: Lab) -> Result:
    sources = (NORMAL, *SOURCES, *lab.choose((), ("smollm2",)))
    return {
        "seeds": [SEED],
        "draws": lab.choose(*beyond_errors.DRAWS),
        "definitions": beyond_errors.measure_definitions(lab),
        "normal": beyond_errors.measure_normal(lab),
        "sources": {source: beyond_errors.measure_source(lab, source) for source in sources},
        "models": beyond_models.measure_models(lab),
    }


ALIKE, ALIKE_PERPLEXITY = 0.02, 0.01
LARGER = (1024, 4096)
AF4 = "Yoshida 2023 (arXiv 2306.06965)"


def _against_nf4(result: Result, size: int) -> float:
    """AF4's mean absolute error of scaled normal numbers, relative to NF4's; below 0 is better."""
    found = result["normal"][str(size)]
    return found["af4"]["scaled_mae"] / found["nf4"]["scaled_mae"] - 1


def _perplexity(result: Result, variant: str) -> float:
    return result["models"][OWN][variant]["perplexity"]


def _af4_above_nf4(result: Result, size: int) -> Interval:
    """Nats per token of our own model with AF4 above those with NF4."""
    found: dict[str, Any] = result["models"][OWN]
    return gap(found[f"af4@{size}"], found[f"nf4@{size}"])


def _perplexity_change(result: Result, size: int) -> float:
    return _perplexity(result, f"af4@{size}") / _perplexity(result, f"nf4@{size}") - 1


CLAIMS = (
    Claim(
        statement=f"{AF4}: AF4 is the code of least expected absolute error on scaled normal blocks, with "
        "-1, 0 and 1 kept",
        paper="16 values for each block size",
        criterion=f"its values for blocks of 64 and 4096 within {SAME_VALUES} of those of least error",
        passes=lambda r: deviation(r, "least_absolute") <= SAME_VALUES,
        measured=lambda r: f"off by up to {deviation(r, 'least_absolute'):.4f}",
        kind=OTHER,
    ),
    Claim(
        statement=f"{AF4}: AF4's values are medians between the midpoints to their neighbours, and beside 0 "
        "between a midpoint and 0 itself (so its code computes them)",
        paper="16 values for each block size",
        criterion="none: found by reading that code, when the definition did not give its values",
        passes=None,
        measured=lambda r: f"off by up to {deviation(r, 'af4'):.1e}",
        kind=OTHER,
    ),
    Claim(
        statement=f"{AF4}: at larger block sizes AF4 has a smaller absolute error than NF4",
        paper="better at larger block sizes",
        criterion="a smaller mean absolute error of scaled normal numbers in blocks of "
        f"{' and of '.join(map(str, LARGER))}",
        passes=lambda r: all(_against_nf4(r, size) < 0 for size in LARGER),
        measured=lambda r: ", ".join(f"{_against_nf4(r, s):+.1%} at {s}" for s in LARGER),
        kind=OTHER,
    ),
    Claim(
        statement=f"{AF4}: at small block sizes the two are alike",
        paper="similar",
        criterion=f"mean absolute errors of scaled normal numbers in blocks of {BLOCKSIZE} within {ALIKE:.0%} "
        "of each other",
        passes=lambda r: abs(_against_nf4(r, BLOCKSIZE)) <= ALIKE,
        measured=lambda r: f"AF4 {_against_nf4(r, BLOCKSIZE):+.1%}",
        kind=OTHER,
    ),
    Claim(
        statement=f"{AF4}: a language model in large blocks has a lower perplexity with AF4 than with NF4",
        paper="lower",
        criterion=f"our own model, blocks of {LARGEST}: nats with AF4 below those with NF4, the 95 % interval "
        "of the difference below zero",
        passes=lambda r: _af4_above_nf4(r, LARGEST).high < 0,
        measured=lambda r: f"AF4 {_af4_above_nf4(r, LARGEST)} nats per token above NF4",
        trend=True,
        kind=OTHER,
    ),
    Claim(
        statement=f"{AF4}: a language model in small blocks has about the same perplexity with both",
        paper="similar",
        criterion=f"our own model, blocks of {BLOCKSIZE}: perplexities within {ALIKE_PERPLEXITY:.0%}",
        passes=lambda r: abs(_perplexity_change(r, BLOCKSIZE)) <= ALIKE_PERPLEXITY,
        measured=lambda r: f"AF4 {_perplexity_change(r, BLOCKSIZE):+.2%}",
        trend=True,
        kind=OTHER,
    ),
)

EXPERIMENT = Experiment(
    "beyond",
    "Beyond the paper: AF4, block sizes, fitted codebooks, formats of the scales",
    (0.4, 12),
    run,
    CLAIMS,
    beyond_shown.section,
    beyond_shown.plots,
    beyond_lessons.errata,
    beyond_lessons.lessons,
)
