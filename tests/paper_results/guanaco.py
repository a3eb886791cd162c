from __future__ import annotations

from typing import Any

import pytest

from paper_repro import guanaco
from tests.paper import shrink_llama
from tests.paper_results import change

GIB = 2**30


def passing() -> dict[str, Any]:
    sizes = {"7b": 6, "13b": 11, "33b": 22, "65b": 42}
    own = guanaco.ADAPTER | guanaco.TRAINING
    own |= {"learning_rate": 2e-4, "dropout": 0.0, "precision": "auto"}
    return {
        "defaults": own,
        "plans": {size: {"total": n * GIB, "optimizer": GIB} for size, n in sizes.items()},
        "tiny": {
            "metrics": [{"loss": 6.0, "lr": 2e-4}] * guanaco.STEPS,
            "written": ["adapter_config.json", "adapter_model.safetensors"],
            "learned": 1e-2,
            "apart": 0.0,
            "parameters": 1000,
        },
        "seeds": [0],
    }


BREAKING = [
    change("defaults", "max_grad_norm", to=1.0),
    change("plans", "33b", "total", to=25 * GIB),
    change("tiny", "apart", to=1e-3),
]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_llama(monkeypatch)
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    monkeypatch.setattr(guanaco, "TINY", guanaco.TINY | tiny)
