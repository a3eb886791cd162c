from __future__ import annotations

from typing import Any

import pytest

from paper_repro import forgetting
from paper_repro.forgetting import BASE
from tests.paper_results import change


def passing() -> dict[str, Any]:
    nats = {
        BASE: {"definitions": 3.25, "nouns": 4.1, "encyclopedia": 2.75},
        "definitions": {"definitions": 2.86, "nouns": 4.6, "encyclopedia": 3.4},
        "nouns": {"definitions": 4.2, "nouns": 2.4, "encyclopedia": 3.9},
    }
    run = {
        "nats": nats,
        "again": nats["definitions"],
        "base_again": nats[BASE],
        "base_is_untouched": True,
        "trained": True,
        "adapter_bytes": {"definitions": 640_000, "nouns": 640_000},
    }
    return {"model": "own model", "seeds": [0, 1, 2], "runs": [run] * 3}


BREAKING = [
    change("runs", 1, "base_is_untouched", to=False),
    change("runs", 1, "nats", "nouns", "definitions", to=2.8),
]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "SEEDS", [0, 1])
    monkeypatch.setattr(forgetting, "WINDOWS", (2, 48))
