from __future__ import annotations

from typing import Any

import pytest

from tests.paper_results import change, measured

SEEDS = [0, 1, 2]
AFTER = {
    "dense": (15.30, 15.45, 15.40),
    "nf4+dq": (15.71, 15.88, 15.80),
    "fp4": (16.31, 16.49, 16.44),
    "int4": (16.42, 16.60, 16.50),
}


def passing() -> dict[str, Any]:
    before = {"dense": 49.8, "nf4+dq": 74.0, "fp4": 90.0, "int4": 95.0}
    whole = _model(before, AFTER)
    two = ("dense", "nf4+dq")  # of a quick run
    quick = _model({b: before[b] for b in two}, {b: AFTER[b] for b in two})
    return {"seeds": SEEDS, "rank": 16, "models": {"a model": quick, "another": whole}}


def _model(before: dict[str, float], after: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    return {
        "task": "WordNet definitions",
        "steps": 48,
        "batch": 16,
        "learning_rate": 1e-2,
        "before": {base: measured(value) for base, value in before.items()},
        "after": {
            base: [{"held_out": measured(value)} for value in values]
            for base, values in after.items()
        },
    }


BREAKING = [
    change("models", "another", "after", "fp4", 1, "held_out", "nll", to=2.7),
    None,
    change("models", "another", "after", "nf4+dq", 0, "held_out", "nll", to=2.95),
    None,
]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its runs are shrunk for all experiments that share them."""
