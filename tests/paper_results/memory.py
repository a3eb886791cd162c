from __future__ import annotations

from typing import Any

import pytest

from tests.paper import shrink_llama
from tests.paper_results import change


def passing() -> dict[str, Any]:
    """What the planner says of two parts of each model, and runs on a GPU that agree."""
    totals = {"7b": 6e9, "13b": 10e9, "33b": 23.5e9, "65b": 44.3e9}
    parts = dict.fromkeys(("scales", "dense", "adapters", "gradients", "activations"), 0)
    parts |= {"temporaries": 0, "optimizer": int(1e9), "parameters": 65_285_660_672}
    step = {"layers": 80, "step_seconds": 9.5, "resident_bytes": 3 << 30}
    origin = {"device": "a GPU", "commit": "abc"}
    runs = {
        size: {
            "on_gpu": True,
            "depth": 80,
            "peak_bytes": int(total),
            "steps": [
                {
                    **step,
                    "peak_bytes": int(total),
                    "planned_bytes": int(1.01 * total),
                    "requested_bytes": int(total - 1e9),
                    "allocated_bytes": int(total),
                }
            ],
            "measured_on": origin,
            "is_stale": False,
        }
        for size, total in totals.items()
    }
    models = {size: {**parts, "weights": int(total - 1e9)} for size, total in totals.items()}
    inputs = {"without": 567, "with": 18}
    single = [47_490_000_000, 48_200_000_000]
    return {"models": models, "65b in fp32": single, "inputs": inputs, "runs": runs}


BREAKING = [
    change("models", "65b", "weights", to=47_100_000_000),
    change("runs", "33b", "peak_bytes", to=24 * 2**30),
    change("runs", "7b", "steps", 0, "requested_bytes", to=5_006_000_000),
    change("runs", "7b", "steps", 0, "planned_bytes", to=6_400_000_000),
    change("models", "65b", "parameters", to=65e9),
    change("inputs", "with", to=30),
]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_llama(monkeypatch)
