from __future__ import annotations

from typing import Any

import pytest

from tests.paper_results import change, measured


def tuned(*perplexities: float, parameters: int = 157_696) -> dict[str, Any]:
    """What `tuned.tuned` returns."""
    runs = [{"held_out": measured(p), "adapter_parameters": parameters} for p in perplexities]
    chosen = {"learning_rate": 0.01, "is_at_edge": True}
    return {"rates": {"0.01": 2.9, "0.02": 2.95}, **chosen, "runs": runs}


def passing() -> dict[str, Any]:
    return {
        "model": "own model",
        "task": "WordNet definitions",
        "seeds": [0, 1, 2],
        "rank": 16,
        "targets": {
            "all": tuned(17.3, 17.5, 17.4),
            "feed-forward": tuned(17.4, 17.3, 17.5, parameters=92_160),
            "attention": tuned(18.4, 18.5, 18.7, parameters=65_536),
            "q, v": tuned(19.1, 19.3, 19.2, parameters=32_768),
        },
    }


BREAKING = [
    change("targets", "q, v", "runs", 1, "held_out", "perplexity", to=17.8),
    None,
]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    from paper_repro.measures import tuned as measured_tuned

    monkeypatch.setattr(measured_tuned, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(measured_tuned, "FURTHEST", 2)
