"""Kinds of LoRA runs, each at the learning rate that suits it: what Figures 2 and 4 share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from paper_repro.harness.experiment import Result, seeds_in_words
from paper_repro.harness.lab import Lab
from paper_repro.measures.lora_runs import Run, Subject, after

RATES = (5e-3, 1e-2, 2e-2)


def tuned(lab: Lab, subject: Subject, run: Run, seeds: Sequence[int]) -> dict[str, Any]:
    """A kind of run at the one of RATES that suits it best, chosen with the first seed on the validation records.

    Returns:
        "rates", the validation loss of each; "learning_rate", the best; "is_at_edge", whether it is the lowest or
        the highest of those tried; "runs", as of `after`, one for each seed.
    """
    tried = {rate: replace(run, learning_rate=rate, seed=seeds[0]) for rate in RATES}
    losses = {rate: after(lab, subject, each)["validation_nll"] for rate, each in tried.items()}
    best = min(losses, key=losses.__getitem__)
    runs = [after(lab, subject, replace(tried[best], seed=seed)) for seed in seeds]
    return {
        "rates": {f"{rate:g}": loss for rate, loss in losses.items()},
        "learning_rate": best,
        "is_at_edge": best in (min(RATES), max(RATES)),
        "runs": runs,
    }


def perplexities(found: dict[str, Any]) -> list[float]:
    """Of what `tuned` returned, seed by seed."""
    return [run["held_out"]["perplexity"] for run in found["runs"]]


def rate_in_words(found: dict[str, Any]) -> str:
    return f"{found['learning_rate']:g}{'*' * found['is_at_edge']}"


def protocol_in_words(result: Result) -> str:
    """How the learning rates were chosen, and what is drawn."""
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    return (
        f"Seeds {seeds_in_words(result)}. The learning rate of each is the best of {rates} on further held-out "
        "records, with the first seed; an asterisk marks one at the edge of those tried: one beyond it might do "
        "better. Mean and standard deviation over seeds"
    )
