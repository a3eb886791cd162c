from __future__ import annotations

from typing import Any

import pytest

from paper_repro import paged
from tests.paper import shrink_llama
from tests.paper_results import change


def passing() -> dict[str, Any]:
    return {
        "parameters": 1000,
        "state_bytes": 8000,
        "identical": True,
        "errors": {"ours": 2e-6, "torch": 2e-6},
        "gpu": {
            "seconds": {"paged": [1.02, 1.0, 1.01], "regular": [1.0, 1.0, 1.0]},
            "makes_room": True,
        },
        "large": {"total": 50 * 2**30, "optimizer": 6 * 2**30, "accumulated": 42 * 2**30},
        "seeds": [0],
    }


BREAKING = [
    change("identical", to=False),
    change("errors", "ours", to=5e-6),
    change("gpu", "seconds", "paged", to=[1.1, 1.0, 1.2]),
    change("gpu", "makes_room", to=False),
    None,
]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_llama(monkeypatch)
    monkeypatch.setattr(paged, "STEPS", 3)
