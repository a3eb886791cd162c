"""Kinds of LoRA runs, each at the learning rate that suits it: what Figures 2 and 4 share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from paper_repro.harness.experiment import Result, seeds_in_words
from paper_repro.harness.lab import Lab
from paper_repro.measures.lora_runs import Run, Subject, after

RATES = (5e-3, 1e-2, 2e-2)
STEP = 2  # from the best rate, where it is at an edge, to the next one beyond
FURTHEST = 8  # how many times below or above RATES the search may go


def tuned(lab: Lab, subject: Subject, run: Run, seeds: Sequence[int]) -> dict[str, Any]:
    """A kind of run at the learning rate that suits it best, chosen with the first seed on the validation records.

    RATES are tried first; as long as the best of those tried is at an edge, the next one beyond it is too.

    Returns:
        "rates", the validation loss of each, None where training diverged; "learning_rate", the best; "is_at_edge",
        whether it is still the lowest or the highest of those tried; "runs", as of `after`, one for each seed.
    """

    def at(rate: float, seed: int) -> dict[str, Any]:
        return after(lab, subject, replace(run, learning_rate=rate, seed=seed))

    def loss(rate: float) -> float:
        try:
            return at(rate, seeds[0])["validation_nll"]
        except FloatingPointError:
            return math.inf

    losses = {rate: loss(rate) for rate in RATES}
    while (further := _beyond(losses)) is not None:
        losses[further] = loss(further)
    best, runs = _at_best(losses, lambda rate: [at(rate, seed) for seed in seeds])
    return {
        "rates": {
            f"{rate:g}": value if math.isfinite(value) else None
            for rate, value in sorted(losses.items())
        },
        "learning_rate": best,
        "is_at_edge": best in (min(losses), max(losses)),
        "runs": runs,
    }


def _at_best(
    losses: dict[float, float], train: Callable[[float], list[dict[str, Any]]]
) -> tuple[float, list[dict[str, Any]]]:
    """The best rate and its runs; a rate at which one of the seeds diverges is not the best."""
    while math.isfinite(losses[best := min(losses, key=losses.__getitem__)]):
        try:
            return best, train(best)
        except FloatingPointError:
            losses[best] = math.inf
    raise FloatingPointError(
        f"training diverges at all learning rates: {', '.join(map(str, losses))}"
    )


def _beyond(losses: Mapping[float, float]) -> float | None:
    """The rate to try next: beyond the best one where that is at an edge, unless it is far from RATES."""
    best = min(losses, key=losses.__getitem__)
    if best == max(losses):
        further = best * STEP
    elif best == min(losses):
        further = best / STEP
    else:
        return None
    return further if min(RATES) / FURTHEST <= further <= max(RATES) * FURTHEST else None


def perplexities(found: dict[str, Any]) -> list[float]:
    """Of what `tuned` returned, seed by seed."""
    return [run["held_out"]["perplexity"] for run in found["runs"]]


def rate_in_words(found: dict[str, Any]) -> str:
    return f"{found['learning_rate']:g}{'*' * found['is_at_edge']}"


def protocol_in_words(result: Result) -> str:
    """How the learning rates were chosen, and what is drawn."""
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    return (
        f"Seeds {seeds_in_words(result)}. The learning rate of each is the best of {rates}, and of rates beyond, "
        "doubled or halved as long as the best is at an edge, by its loss on further held-out records, with the first "
        "seed; an asterisk marks one that is at an edge still: one beyond it might do better. Mean and standard "
        "deviation over seeds"
    )
