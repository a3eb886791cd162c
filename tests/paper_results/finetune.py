from __future__ import annotations

from typing import Any

import pytest

from paper_repro import finetune
from tests.paper_results import change, measured


def passing() -> dict[str, Any]:
    trained = {"losses": [3.0, 2.5, 2.4], "adapter_parameters": 4_884_480}
    return {
        "model": "a model",
        "task": "WordNet definitions",
        "seeds": [0, 1, 2],
        "lora": {"rank": 16},
        "recipe": {"steps": 100, "micro_batch_size": 16, "learning_rate": 1e-3},
        "prompts": ["Define the noun: stork\nDefinition:"],
        "answers": ["large mostly Old World wading birds"],
        "after": {
            "dense": {**trained, "held_out": measured(15.3)},
            "nf4+dq": {**trained, "held_out": measured(17.0)},
        },
        "samples": {
            "before": ["some words | and more\nwords"],
            "after": ["a bird"],
            "adapter_bytes": 19_600_000,
            "base_parameters": 134_515_008,
        },
        "own": [
            {"after": measured(p), finetune.MERGED: measured(p + 0.02)} for p in (17.3, 17.5, 17.7)
        ],
        finetune.MERGED: measured(17.01),
        finetune.ONTO: measured(16.2),
        finetune.AGAIN: measured(70.0, error=0.006, adapter=0.005, kept=0.01),
        finetune.AGAIN_ONTO: measured(17.3, error=0.09, adapter=0.005, kept=0.99),
    }


BREAKING = [change("own", 1, finetune.MERGED, "perplexity", to=17.8)]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "SAMPLE_TOKENS", 4)
