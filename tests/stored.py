"""A small stored result of the benchmarks, as it comes out of a file. Every number in it is made up."""

from __future__ import annotations

from typing import Any

from benchmarks import results


def timing(contender: str, p50_ms: float | None, ours_ms: float = 10.0, **more: Any) -> dict:
    """A contender's entry; one that was not timed has no `p50_ms`."""
    ratio = None if p50_ms is None else p50_ms / ours_ms
    target = more.get("target")
    return {
        "contender": contender,
        "status": "timed",
        "reason": "",
        "is_yardstick": False,
        "rounds": 9,
        **dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), p50_ms),
        "time_over_ours": ratio,
        "target": None,
        "meets_target": None if target is None or ratio is None else ratio >= target,
        "temporary_bytes": None,
        "peak_bytes": None,
    } | more


def case(group: str, name: str, *timings: dict, **more: Any) -> dict[str, Any]:
    return {
        "group": group,
        "name": name,
        "parameters": {"dtype": "float32"},
        "input_sets": 2,
        "clock": "eager",
        "bytes_moved": None,
        "operations": None,
        "required": False,
        "most_temporary_bytes": None,
        "timings": list(timings),
    } | more


def result(*cases: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """A result of these cases, by default of one that converts, one that multiplies and one of neither."""
    return {
        "schema": results.SCHEMA,
        "date": "2026-01-02",
        "commit": "0123456789ab",
        "complete": True,
        "device": {"type": "cpu", "name": "A CPU", "threads": 2}
        if device == "cpu"
        else {"type": "cuda", "name": "A GPU", "power_limit_w": 700.0},
        "versions": {"python": "3.12.1", "torch": "2.11.0", "triton": "3.6.0", "torchao": None},
        "settings": {"seconds": 4.0},
        "ceilings": {"copy_gb_per_s": 20.0, "product_tflop_per_s": {"float32": 0.1}},
        "cases": list(cases) or [converts(), multiplies(), neither()],
    }


def converts() -> dict[str, Any]:
    """50 MB in our 10 ms, where a copy takes 2.5."""
    return case(
        "dequantize",
        "1536 x 576, float32",
        timing("qlora", 10.0),
        timing("bitsandbytes", 15.0, target=1.3),
        timing("torchao", None, status="not installed", reason="torchao"),
        timing("copy of as many bytes", 2.5, is_yardstick=True, target=0.9),
        bytes_moved=50_000_000,
    )


def multiplies() -> dict[str, Any]:
    """0.8 GFLOP in our 10 ms, where 0.1 TFLOP/s take 8, on 20 MB, for which a copy's speed takes 1."""
    return case(
        "layer",
        "4096 x 4096, float32, 512 tokens",
        timing("qlora", 10.0),
        timing("PEFT over bitsandbytes", 9.0, target=1.0),
        timing("LoRA over dense", 8.5),
        timing("dense products alone", 8.0, is_yardstick=True),
        bytes_moved=20_000_000,
        operations=800_000_000,
        parameters={"dtype": "float32", "m": 512},
    )


def neither() -> dict[str, Any]:
    return case(
        "step",
        "SmolLM2-135M, float32",
        timing("qlora NF4+DQ", 1000.0, 1000.0),
        timing("LoRA over dense", 950.0, 1000.0, target=0.74),
    )
