from __future__ import annotations

from typing import Any

import pytest

from paper_repro import embeddings
from tests.paper_results import change

COSINE = {
    "base": 1.0,
    "nf4": 0.976,
    "nf4+dq": 0.9759,
    "e2m1": 0.97,
    "int4": 0.954,
    "fp4": 0.947,
    "e3m0": 0.929,
}


def passing() -> dict[str, Any]:
    found = {
        name: {
            "cosine": [cosine, cosine**2, cosine**3],
            "rank": [1, 2, 3] if name == "base" else [1, 3, 2],
            "first": [0, 1, 2] if name == "base" else [0, 1, 1],
        }
        for name, cosine in COSINE.items()
    }
    return {
        "source": "words and what they mean",
        "blocksize": 64,
        "seeds": [0],
        "variants": found,
        "intervals": embeddings._intervals(found),
    }


BREAKING = [
    change("intervals", "cosine below", "e2m1", "low", to=-0.001),
    change("intervals", "cosine", "nf4+dq", "mean", to=0.94),
    None,
]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "TEXTS", (24, 30))
    monkeypatch.setattr(embeddings, "QUERIES", (12, 15))
