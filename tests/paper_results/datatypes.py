from __future__ import annotations

from typing import Any

import pytest

from paper_repro import datatypes
from paper_repro.measures.quantiles import equation_4
from tests.paper_results import change

MSE = {"nf4": 0.00846, "e2m1": 0.0112, "int4": 0.0116, "fp4": 0.0149, "e3m0": 0.0354}


def _errors(numel: int, scale: float = 1.0) -> dict[str, Any]:
    """Of a tensor whose weights have this mean square."""
    mse = {name: scale * error for name, error in (MSE | {"nf4+dq": 0.008463}).items()}
    return {"numel": numel, "mean_square": scale, "mse": mse}


def passing() -> dict[str, Any]:
    return {
        "blocksize": 64,
        "seeds": [0],
        "normal": _errors(4_000_000),
        "weights": {
            name: {"a": _errors(4096, 0.01), "b": _errors(8192)} for name in datatypes.SOURCES
        },
        "nf4_deviation": 2e-7,
        "codebooks": {name: [-1.0, 0.0, 1.0] for name in MSE},
        "equation_4": equation_4(),
    }


BREAKING = [
    change("nf4_deviation", to=2e-6),
    change("normal", "mse", "int4", to=0.0084),
    change("normal", "mse", "nf4+dq", to=0.00855),
    change("weights", "whisper", "b", "mse", "e2m1", to=0.0084),
]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datatypes, "DRAWS", 64_000)
