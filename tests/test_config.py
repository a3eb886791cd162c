"""`QLoRAConfig`: the paper's defaults, and the values that it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from qlora import QLoRAConfig
from qlora.config import ADAPTER_DTYPES
from qlora.kernels.formats import BLOCKSIZES, FORMATS, SCALE_FORMATS


def test_the_defaults_are_the_papers() -> None:
    """QLoRA, section 4 and appendix B: r 64, alpha 16, all linear layers, NF4 with double quantization."""
    assert dataclasses.asdict(QLoRAConfig()) == {
        "rank": 64,
        "alpha": 16,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "format": "nf4",
        "blocksize": 64,
        "double_quant": True,
        "scale_format": "dynamic8",
        "adapter_dtype": "float32",
        "rslora": False,
        "dora": False,
        "init": "lora",
        "init_iterations": 1,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": (),
    }
    assert QLoRAConfig().scaling == 0.25


def test_scaling_is_alpha_over_rank() -> None:
    """LoRA, section 4.1."""
    assert QLoRAConfig(rank=8, alpha=4).scaling == 0.5
    assert QLoRAConfig(rank=1, alpha=32).scaling == 32


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    """Kalajdzievski 2023, theorem 3.2."""
    assert QLoRAConfig(rank=64, alpha=16, rslora=True).scaling == 2.0


def test_the_first_pattern_that_matches_the_end_of_a_name_counts() -> None:
    config = QLoRAConfig(
        rank=8,
        alpha=16,
        rank_pattern={"q_proj": 4, "0.q_proj": 2, "mlp": 1},
        alpha_pattern={r"0\.(q|k)_proj": 3},
    )
    for name, expected in {
        "layers.0.q_proj": (4, 0.75),
        "layers.1.q_proj": (4, 4.0),
        "layers.0.k_proj": (8, 0.375),
        "layers.0.mlp.up_proj": (8, 2.0),
        "layers.0.mlp.1": (8, 2.0),
        "seq_proj": (8, 2.0),
    }.items():
        assert config.rank_and_scaling(name) == expected, name


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QLoRAConfig().rank = 8


def test_equal_configs_have_the_same_hash() -> None:
    for settings in ({}, {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}}):
        config = QLoRAConfig(**settings)
        assert hash(config) == hash(QLoRAConfig(**dataclasses.asdict(config)))
    assert QLoRAConfig(rank_pattern={"q_proj": 4}) != QLoRAConfig()
    assert len({QLoRAConfig(), QLoRAConfig(), QLoRAConfig(rank=8)}) == 2


@pytest.mark.parametrize(
    "settings",
    [
        *({"format": format} for format in (*FORMATS, None)),
        *({"blocksize": blocksize} for blocksize in BLOCKSIZES),
        *({"scale_format": scale_format} for scale_format in SCALE_FORMATS),
        *({"adapter_dtype": dtype} for dtype in ADAPTER_DTYPES),
        {"rank": 1},
        {"rank": 256},
        {"dropout": 0.99},
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.mlp\..*"},
        {"target_modules": None, "rslora": True, "dora": True},
        {"init": "loftq", "init_iterations": 100},
        {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {r"mlp\..*": 0.5}},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_allowed(settings: dict[str, Any]) -> None:
    QLoRAConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"adapter_dtype": "float16"},
            "adapter_dtype must be float32 or bfloat16; got 'float16'",
        ),
        ({"rank": 0}, "rank must be from 1 to 256; got 0"),
        ({"rank": 257}, "rank must be from 1 to 256; got 257"),
        ({"alpha": 0}, "alpha must be positive and finite; got 0"),
        ({"alpha": -1.0}, r"alpha must be positive and finite; got -1\.0"),
        ({"alpha": float("inf")}, "alpha must be positive and finite; got inf"),
        ({"alpha": float("nan")}, "alpha must be positive and finite; got nan"),
        ({"dropout": -0.1}, r"dropout must be at least 0 and below 1; got -0\.1"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1; got 1\.0"),
        ({"dropout": float("nan")}, "dropout must be at least 0 and below 1; got nan"),
        ({"target_modules": []}, r"target_modules must name at least one layer; got \[\]"),
        ({"target_modules": ""}, "target_modules must name at least one layer; got ''"),
        ({"init": "gaussian"}, "init must be lora or pissa or loftq; got 'gaussian'"),
        ({"init_iterations": 0}, "init_iterations must be from 1 to 100; got 0"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be from 1 to 256; got 0"),
        ({"rank_pattern": {"*": 8}}, r"rank_pattern must have regular expressions; got '\*' .*"),
        ({"alpha_pattern": {"q": 0}}, r"alpha_pattern\['q'\] must be positive and finite; got 0"),
        (
            {"target_modules": None, "modules_to_save": ["lm_head"]},
            r"modules_to_save must be empty where target_modules is None, .*; got \['lm_head'\]",
        ),
        ({"format": "int3"}, "format must be one of nf4, .*; got 'int3'"),
        ({"blocksize": 100}, "blocksize must be one of .*; got 100"),
        ({"scale_format": "fp8"}, "scale_format must be one of dynamic8, e4m3; got 'fp8'"),
        ({"scale_format": "", "double_quant": False}, "scale_format must be one of .*; got ''"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        QLoRAConfig(**settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("rank", value) for value in (8.0, "8", True, None)),
        *((name, value) for name in ("alpha", "dropout") for value in ("1", True, None)),
        ("blocksize", 64.0),
        ("double_quant", "no"),
        ("target_modules", 5),
        ("rslora", 1),
        ("dora", "yes"),
        ("init_iterations", 1.0),
        ("rank_pattern", ["q_proj"]),
        ("modules_to_save", "lm_head"),
    ],
)
def test_values_of_another_type_are_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be .*; got"):
        QLoRAConfig(**{name: value})


@pytest.mark.parametrize("argument", ["target_modules", "modules_to_save"])
def test_names_are_strings(argument: str) -> None:
    with pytest.raises(TypeError, match=f"{argument} must hold names, which are strings; got 3"):
        QLoRAConfig(**{argument: ["q_proj", 3]})
