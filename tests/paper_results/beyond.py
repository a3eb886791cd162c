from __future__ import annotations

from typing import Any

import pytest

from paper_repro import beyond_errors, beyond_models
from paper_repro.measures import codebooks
from tests.paper_results import change, measured


def _errors(error: float, bits: float = 4.5, **more: Any) -> dict[str, Any]:
    return {
        "rmse": error,
        "mse": error**2,
        "mae": 0.8 * error,
        "scaled_mae": 0.3 * error,
        "bits": bits,
        **more,
    }


def _source() -> dict[str, Any]:
    sizes = [
        _errors(0.08 + 0.001 * i, 4 + b / 2**i, blocksize=32 * 2**i, double_quant=b < 0.5)
        for i in range(8)
        for b in (1, 0.25)
    ]
    codes = {code: _errors(0.092 - 0.001 * i) for i, code in enumerate(beyond_errors.CODES)}
    scales = {
        "fp32": _errors(0.0920, scale_rmse=0.0),
        "dynamic8": _errors(0.0921, 4.127, scale_rmse=0.002),
        "e4m3": _errors(0.0922, 4.127, scale_rmse=0.004),
    }
    return {"sizes": sizes, "codes": codes, "scales": scales}


def passing() -> dict[str, Any]:
    """AF4 is what its paper says."""
    normal = {
        str(size): {
            code: _errors(0.09 - 0.0001 * i * size / 64)
            for i, code in enumerate(beyond_errors.OF_NORMAL)
        }
        for size in beyond_errors.COMPARED
    }
    model = {
        variant: measured(18.5 - 0.001 * i, weight_rmse=0.09 - 0.001 * i)
        for i, variant in enumerate(beyond_models.VARIANTS)
    }
    return {
        "seeds": [0],
        "draws": 4096,
        "definitions": {
            str(size): {"af4": 2e-6, "least_absolute": 2e-6} for size in codebooks.AF4_PUBLISHED
        },
        "normal": normal,
        "sources": {name: _source() for name in (beyond_errors.NORMAL, *beyond_errors.SOURCES)},
        "models": {"own": {"base": measured(18.0), **model}},
    }


def _unclear(result: Any) -> None:
    """AF4 is better on the whole, and not on each article."""
    of = result["models"]["own"]
    (nll, tokens), second = of["nf4@4096"]["parts"]
    of["af4@4096"]["parts"] = [(nll + 0.02, tokens), (second[0] - 0.03, tokens)]


BREAKING = [
    change("definitions", "64", "least_absolute", to=0.04),
    None,
    change("normal", "1024", "af4", "scaled_mae", to=0.04),
    change("normal", "64", "af4", "scaled_mae", to=0.026),
    _unclear,
    change("models", "own", "af4@64", "perplexity", to=18.9),
]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beyond_errors, "DRAWS", (2**14, 2**14))
    monkeypatch.setattr(codebooks, "MAXIMA", 50)
    codebooks.normal_mass.cache_clear()
