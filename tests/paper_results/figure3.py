from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from paper_repro import figure3
from paper_repro.measures import zero_shot
from tests.paper_results import change


def _part(model: str, task: str) -> dict[str, Any]:
    """Three of four questions right; NF4 alone makes every margin smaller by less than E2M1 does."""
    base = [0.5, 0.3, 0.2, -0.4]
    lower = {"base": 0.0, "nf4": 0.01, "nf4+dq": 0.01, "e2m1": 0.05, "fp4": 0.06, "int4": 0.07}
    types = {
        variant: {"margins": [margin - less for margin in base], "weight_rmse": 0.09}
        for variant, less in lower.items()
    }
    return {"model": model, "task": task, "types": types}


def passing() -> dict[str, Any]:
    return {"choices": 4, "seeds": [0], "parts": [_part(*asked) for asked in figure3.ASKED]}


def _margins(variant: str, to: list[float]) -> Callable[[Any], None]:
    return change("parts", 2, "types", variant, "margins", to=to)


BREAKING = [
    _margins("nf4+dq", to=[0.5, -0.3, -0.2, -0.4]),
    _margins("nf4+dq", to=[0.5, 0.3, -0.01, -0.4]),
]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tiny text says the same sentence over and over.
    halves = [(f"Sentence {i} begins", f" and number {i} ends.") for i in range(8)]
    monkeypatch.setattr(zero_shot, "continuations", lambda lab: halves)
    for asked in figure3.ASKED:
        monkeypatch.setitem(figure3.ASKED, asked, (3, 4))
