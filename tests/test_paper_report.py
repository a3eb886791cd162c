"""Numbers, criteria that can fail, and the report, from fixed results."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paper_repro import (
    bits,
    datatypes,
    finetune,
    perplexity,
    report,
)
from paper_repro.experiment import NOT_REPRODUCED, NOT_RUN, REPRODUCED
from paper_repro.registry import EXPERIMENTS
from qlora import files, shapes
from qlora.kernels.formats import FORMATS
from tests import tiny


def test_nf4_follows_from_normal_quantiles() -> None:
    expected = sorted(FORMATS["nf4"].values)
    assert datatypes.nf4_from_quantiles() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "base", "lora"),
    [
        ("7B", 3_865_592_704, 159_907_840),
        ("13B", 7_201_419_360, 250_347_520),
        ("33B", 17_414_091_152, 487_587_840),
        ("65B", 34_458_929_344, 799_539_200),
    ],
)
def test_bytes_of_llama(name: str, base: int, lora: int) -> None:
    hidden, layers, _, feed_forward = shapes.LLAMA[f"llama-{name.lower()}"]
    assert bits.llama_bytes(hidden, layers, feed_forward) == base
    assert 64 * layers * (8 * hidden + 3 * (hidden + feed_forward)) == lora


def test_bytes_count_short_blocks() -> None:
    assert bits.quantized_bytes(64 * 256 + 1) == 8193 + 257 + 4 * 2 + 4


def test_the_gap_is_paired() -> None:
    one = {"nll": 3.0, "parts": [(2.0, 10), (4.0, 10)]}
    other = {"nll": 2.5, "parts": [(1.5, 10), (3.5, 10)]}
    assert perplexity.gap(one, other) == (0.5, 0.0)


def test_perplexity_weights_parts_by_their_tokens() -> None:
    network, examples = tiny.llama(), tiny.examples(count=5)
    apart = perplexity.measure(network, [[example] for example in examples], "apart")
    together = perplexity.measure(network, [examples], "together")
    assert apart["tokens"] == together["tokens"]
    assert apart["nll"] == pytest.approx(together["nll"], rel=1e-5)


def _measured(ppl: float, **more: Any) -> dict[str, Any]:
    nll = torch.tensor(ppl).log().item()
    return {"nll": nll, "perplexity": ppl, "tokens": 8176, "parts": [(nll, 4088)] * 2, **more}


def _sizes(hidden: int, layers: int, feed_forward: int) -> dict[str, int]:
    linear = layers * (4 * hidden**2 + 3 * hidden * feed_forward)
    matrices = [hidden**2] * 4 + [hidden * feed_forward] * 3
    quantized = layers * sum(bits.quantized_bytes(numel) for numel in matrices)
    return {
        "parameters": linear,
        "linear_parameters": linear,
        "linear_bytes": quantized,
        "formula_bytes": quantized,
        "base_bytes": bits.llama_bytes(hidden, layers, feed_forward),
        "lora_parameters": 64 * layers * (8 * hidden + 3 * (hidden + feed_forward)),
    }


def _memory() -> dict[str, Any]:
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
            "steps": [{**step, "peak_bytes": int(total), "planned_bytes": int(1.01 * total)}],
            "measured_on": origin,
            "is_stale": False,
        }
        for size, total in totals.items()
    }
    models = {size: {**parts, "weights": int(total - 1e9)} for size, total in totals.items()}
    inputs = {"without": 567, "with": 18}
    single = [47_490_000_000, 48_200_000_000]
    return {"models": models, "65b in fp32": single, "inputs": inputs, "runs": runs}


def passing_results() -> dict[str, Any]:
    """A result of each experiment in which every claim holds."""
    mse = {"nf4": 0.00846, "e2m1": 0.0112, "int4": 0.0116, "fp4": 0.0149, "e3m0": 0.0354}
    llamas = {
        name.replace("llama", "LLaMA").replace("b", "B"): _sizes(hidden, layers, feed_forward)
        for name, (hidden, layers, _, feed_forward) in shapes.LLAMA.items()
    }
    variants = {"base": 18.2, "nf4": 23.4, "nf4+dq": 23.4, "fp4": 26.8, "int4": 27.2, "e2m1": 25.5}
    words = {"samples": ["some words | and more\nwords"]}
    trained = {
        **words,
        "losses": [3.0, 2.5, 2.4],
        "step_seconds": 1.5,
        "tokens_trained": 30000,
        "adapter_bytes": 19_600_000,
        "adapter_parameters": 4_884_480,
        "base_parameters": 134_515_008,
    }
    return {
        "datatypes": {
            "draws": 4_000_000,
            "blocksize": 64,
            "seed": 0,
            "mse": {**mse, "nf4+dq": 0.008463},
            "mean_square": 1.0,
            "nf4_deviation": 2e-7,
            "codebooks": {name: [-1.0, 0.0, 1.0] for name in datatypes.LABELS},
        },
        "bits": {"bits": {"nf4": 4.5, "nf4+dq": 4.126955}, "models": llamas},
        "memory": _memory(),
        "table2": {
            "model": "a model",
            "blocksize": 64,
            "perplexity": {
                name: _measured(value, weight_rmse=0.09)
                for name, value in {**variants, "e3m0": 45.0}.items()
            },
        },
        "finetune": {
            "model": "a model",
            "base_folder": "/cache/model",
            "task": "WordNet definitions",
            "examples": 1600,
            "seed": 0,
            "lora": {"rank": 16},
            "recipe": {"steps": 100, "micro_batch_size": 16, "learning_rate": 1e-3},
            "prompts": ["Define the noun: stork\nDefinition:"],
            "answers": ["large mostly Old World wading birds"],
            "arms": {
                "dense": {"before": _measured(49.8, **words), "after": _measured(15.3, **trained)},
                "nf4+dq": {
                    "before": _measured(74.0, **words),
                    "after": _measured(17.0, **trained),
                    "merged": _measured(17.01),
                    "onto_original": _measured(16.2),
                    "requantized": _measured(70.0, error=0.006, adapter=0.005, kept=0.01),
                    "requantized_onto_original": _measured(
                        17.3, error=0.09, adapter=0.005, kept=0.99
                    ),
                },
            },
        },
    }


def _set(*path: str, to: Any) -> Callable[[Any], None]:
    def change(result: Any) -> None:
        for key in path[:-1]:
            result = result[key]
        result[path[-1]] = to

    return change


# What makes each claim fail, in the order of the claims; None where there is nothing to fail.
BREAKING: dict[str, list[Callable[[Any], None] | None]] = {
    "datatypes": [
        _set("nf4_deviation", to=2e-6),
        _set("mse", "int4", to=0.0084),
        _set("mse", "nf4+dq", to=0.00855),
    ],
    "bits": [
        _set("bits", "nf4+dq", to=4.25),
        _set("models", "LLaMA-13B", "base_bytes", to=7_201_419_361),
        _set("models", "LLaMA-65B", "base_bytes", to=40e9),
        _set("models", "LLaMA-7B", "lora_parameters", to=159_907_841),
    ],
    "memory": [
        _set("models", "65b", "weights", to=47_100_000_000),
        _set("runs", "33b", "peak_bytes", to=24 * 2**30),
        _set("runs", "7b", "steps", to=[{"peak_bytes": 94, "planned_bytes": 100}]),
        _set("models", "65b", "parameters", to=65e9),
        _set("inputs", "with", to=30),
    ],
    "table2": [
        _set("perplexity", "int4", "perplexity", to=23.3),
        _set("perplexity", "nf4+dq", "perplexity", to=23.6),
        None,
    ],
    "finetune": [
        _set("arms", "nf4+dq", "after", "nll", to=3.7),
        _set("arms", "nf4+dq", "after", "nll", to=2.9),
        None,
        _set("arms", "nf4+dq", "merged", "perplexity", to=17.5),
    ],
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_criterion_passes_and_can_fail(name: str) -> None:
    result, claims = passing_results()[name], EXPERIMENTS[name].claims
    for claim, break_it in zip(claims, BREAKING[name], strict=True):
        assert claim.verdict(None) == NOT_RUN
        if break_it is None:
            assert claim.passes is None
            continue
        assert claim.verdict(result) == REPRODUCED, claim.statement
        broken = copy.deepcopy(result)
        break_it(broken)
        assert claim.verdict(broken) == NOT_REPRODUCED, claim.statement


def _write_results(folder: Path, results: dict[str, Any]) -> None:
    origin = {
        "device": "a processor",
        "cores": 2,
        "python": "3.12",
        "torch": "2.13",
        "commit": "abc",
    }
    origin["transformers"] = "5.23"
    for name, result in results.items():
        record = {"experiment": name, "measured_on": [origin], "seconds": 1.5, "result": result}
        files.write_json(folder / f"{name}.json", record)


def test_the_report_is_made_from_the_json_files_alone(tmp_path: Path) -> None:
    results = passing_results()
    results["table2"]["perplexity"]["int4"]["perplexity"] = 23.3
    _write_results(tmp_path, results)
    words = report.write(tmp_path).read_text()
    rows = [line for line in words.splitlines() if line.startswith("| ")]
    assert [line for line in rows if NOT_REPRODUCED in line] == [
        line for line in rows if line.startswith("| Table 2: NF4 + DQ has a lower")
    ]
    assert "4.127" in words
    assert "some words / and more words" in words
    assert f"{finetune.gap_closed(results['finetune']):.0%}" in words
    for image in ("codebooks.png", "bits.png", "memory.png", "perplexity.png", "loss.png"):
        assert f"({image})" in words
        assert (tmp_path / image).stat().st_size > 5000


def test_the_report_says_what_was_not_run(tmp_path: Path) -> None:
    results = passing_results()
    _write_results(tmp_path, {"bits": results["bits"]})
    words = report.write(tmp_path).read_text()
    assert "python -m paper_repro datatypes memory table2 finetune" in words
    assert "## Table 2" not in words
    assert words.count("| not run |") == sum(
        len(EXPERIMENTS[name].claims) for name in ("datatypes", "memory", "table2", "finetune")
    )


def test_what_needs_a_gpu_is_not_run_without_one() -> None:
    result, claims = passing_results()["memory"], EXPERIMENTS["memory"].claims
    for run in result["runs"].values():
        run["on_gpu"] = False
    without = [REPRODUCED, NOT_RUN, NOT_RUN, REPRODUCED, REPRODUCED]
    assert [claim.verdict(result) for claim in claims] == without
    assert EXPERIMENTS["memory"].section(result).count("extrapolated") == 4
    result["runs"] = {}
    assert [claim.verdict(result) for claim in claims] == without
    assert "No step was run" in EXPERIMENTS["memory"].section(result)


def test_a_run_with_other_code_proves_nothing() -> None:
    result, claims = passing_results()["memory"], EXPERIMENTS["memory"].claims
    for run in result["runs"].values():
        run["is_stale"] = True
    assert [claim.verdict(result) for claim in claims][1:3] == [NOT_RUN, NOT_RUN]
    assert "with other code than this report's" in EXPERIMENTS["memory"].section(result)


def test_one_model_beyond_its_limit_is_enough() -> None:
    result, claims = passing_results()["memory"], EXPERIMENTS["memory"].claims
    del result["runs"]["33b"]
    assert claims[1].verdict(result) == NOT_RUN
    assert "44.30 GB; needs a GPU: `memory --model 33b --run`" in claims[1].measured(result)
    result["runs"]["65b"]["peak_bytes"] = 48 * 10**9
    assert claims[1].verdict(result) == NOT_REPRODUCED


def test_recovery_by_both_measures() -> None:
    result = passing_results()["finetune"]
    for base, before, after in (("dense", 4.0, 2.5), ("nf4+dq", 4.5, 2.7)):
        result["arms"][base]["before"]["nll"] = before
        result["arms"][base]["after"]["nll"] = after
    assert finetune.towards_lora(result) == pytest.approx(0.9)  # 1.8 of 2.0
    assert finetune.gap_closed(result) == pytest.approx(0.6)  # 0.5 before, 0.2 after
