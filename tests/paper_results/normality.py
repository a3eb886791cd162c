from __future__ import annotations

from typing import Any

import pytest

from paper_repro import normality
from paper_repro.materials import weights
from tests.paper_results import change


def _kind(rejected: int, control: int) -> dict[str, Any]:
    counts = {"rows": 600, "tested": 300, "lengths": [384]}
    return {
        **counts,
        "weights": {"row": rejected, "block": 24},
        "control": {"row": control, "block": 15},
        "bonferroni": {"weights": 3, "control": 0},
    }


def passing() -> dict[str, Any]:
    models = {
        name: {kind: _kind(30 + 10 * i, 12 + i) for kind in normality.KINDS}
        for i, name in enumerate(weights.LABELS)
    }
    return {"seeds": [0], "level": 0.05, "rows": 300, "models": models}


def _control_rejects_much(result: Any) -> None:
    for of in result["models"].values():
        change("feed-forward input", "control", "row", to=90)(of)


BREAKING = [_control_rejects_much, None]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normality, "ROWS", 40)
