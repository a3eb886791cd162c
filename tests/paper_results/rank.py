from __future__ import annotations

from typing import Any

import pytest

from tests.paper_results import change
from tests.paper_results.layers import tuned


def passing() -> dict[str, Any]:
    return {
        "model": "own model",
        "task": "WordNet definitions",
        "seeds": [0, 1, 2],
        "ranks": {
            "all": {
                "4": tuned(17.6, 17.5, 17.4),
                "16": tuned(17.3, 17.5, 17.4),
                "64": tuned(17.3, 17.2, 17.4),
            },
            "q, v": {
                "1": tuned(19.4, 19.3, 19.2),
                "4": tuned(19.3, 19.2, 19.1),
                "16": tuned(19.1, 19.0, 19.2),
            },
        },
    }


BREAKING = [
    change("ranks", "all", "4", to=tuned(17.9, 17.8, 17.7)),
    change("ranks", "q, v", "1", to=tuned(19.7, 19.6, 19.5)),
]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    from paper_repro import rank
    from paper_repro.measures import tuned as measured_tuned

    monkeypatch.setattr(measured_tuned, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(measured_tuned, "FURTHEST", 2)
    monkeypatch.setattr(rank, "ALL_RANKS", (4, 8))
    monkeypatch.setattr(rank, "FEW_RANKS", (4, 8))
