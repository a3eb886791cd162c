from __future__ import annotations

from typing import Any

import pytest

from paper_repro import latency
from paper_repro.measures.gpt2 import ADAPTER_H, ADAPTER_L, BASE, MERGED, UNMERGED
from tests.paper_results import change


def passing() -> dict[str, Any]:
    base = [1.0, 1.1, 0.9, 1.05, 1.0]
    times = {BASE: 1.0, MERGED: 1.01, UNMERGED: 1.03, ADAPTER_L: 1.06, ADAPTER_H: 1.08}
    point = {
        "seconds": {name: [ratio * own for own in base] for name, ratio in times.items()},
        "added": dict.fromkeys(times, 0) | {ADAPTER_L: 11 * 10**6},
        "base_parameters": 354 * 10**6,
        "same_layout": True,
        "apart": 1e-7,
        "adapted": 0.1,
    }
    return {"on_gpu": False, "seeds": [0], "points": {latency.JUDGED: point}}


BREAKING = [
    change("points", latency.JUDGED, "seconds", MERGED, to=[1.03] * 5),
    change("points", latency.JUDGED, "same_layout", to=False),
    change("points", latency.JUDGED, "seconds", ADAPTER_L, to=[1.02] * 5),
]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"layers": 2, "width": 64, "heads": 2, "context": 128}
    monkeypatch.setattr(latency, "SHAPE", sizes)
    monkeypatch.setattr(latency, "CPU_ROUNDS", (3, 3))
