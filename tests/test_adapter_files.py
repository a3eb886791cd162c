"""Adapters as files: saved, loaded, and refused where they do not fit."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qlora
from qlora.adapter_files import BASE_CONFIG, load_adapter, read_config, save_adapter
from qlora.adapter_settings import adapted_layers
from qlora.adapters import adapter_parameters, enable_adapters
from qlora.fingerprint import base_fingerprint
from qlora.merging import merge
from qlora.peft_format import CONFIG, WEIGHTS
from qlora.recipe import TrainConfig
from qlora.train import make_optimizer
from tests import tiny

IDS = tiny.tokens()


def values(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in adapter_parameters(model).values()]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(tiny.adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


def peft_adapter(model: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    """A model with an adapter that PEFT made, saved to `folder`."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings)
    wrapped = tiny.randomize_adapter(peft.get_peft_model(model, config)).eval()
    wrapped.save_pretrained(folder)
    return wrapped


# Round trips


@pytest.mark.parametrize("format", ["nf4", None])
def test_what_is_saved_is_loaded(tmp_path: Path, format: str | None) -> None:
    model = tiny.adapted(format=format)
    save_adapter(model, tmp_path)
    other = tiny.quantized(tiny.llama(), format=format, alpha=1)
    load_adapter(other, tmp_path)
    assert equal(values(other), values(model))
    assert torch.equal(tiny.logits(other, IDS), tiny.logits(model, IDS)), "scaling comes along"


def test_the_files_are_those_of_peft(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    prefix = "base_model.model.model.layers.1.mlp.down_proj."
    assert tensors[prefix + "lora_A.weight"].shape == (4, 96)
    assert tensors[prefix + "lora_B.weight"].shape == (64, 4)
    assert len(tensors) == 2 * 14
    config = json.loads((saved / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")
    projections = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == projections


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("targets", ["all-linear", r".*\.1\..*proj"])
def test_peft_loads_our_adapter(
    tmp_path: Path, make: Callable[[], nn.Module], targets: str
) -> None:
    """On the same base: the one that our model holds, dequantized."""
    model = tiny.adapted(make, target_modules=targets)
    save_adapter(model, tmp_path)
    base = merge(tiny.quantized(make()))
    before = tiny.logits(base, IDS)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(tiny.logits(theirs, IDS), tiny.logits(model, IDS))
    assert not torch.allclose(before, tiny.logits(model, IDS))


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {
            "target_modules": ["c_proj", "down_proj"],
            "layers_to_transform": [0],
            "lora_dropout": 0.1,
        },
        {"init_lora_weights": "gaussian"},
    ],
)
def test_we_load_an_adapter_of_peft(
    tmp_path: Path, make: Callable[[], nn.Module], settings: dict[str, Any]
) -> None:
    theirs = peft_adapter(make(), tmp_path, **settings)
    config = read_config(tmp_path)
    scaling = 8 / math.sqrt(4) if settings.get("use_rslora") else 8 / 4
    assert (config.rank, config.scaling, config.format) == (4, scaling, "nf4")
    assert config.dropout == settings.get("lora_dropout", 0)
    ours = tiny.quantized(make(), target_modules=config.target_modules, format=None)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(tiny.logits(ours, IDS), tiny.logits(theirs, IDS))


def test_the_base_that_an_adapter_was_trained_on_is_known(tmp_path: Path) -> None:
    settings = {"format": "int4", "blocksize": 32, "double_quant": False, "dropout": 0.05}
    for i, extra in enumerate(({}, {"double_quant": True, "scale_format": "e4m3"})):
        model = tiny.adapted(**settings | extra, target_modules=["q_proj", "mlp.up_proj"])
        save_adapter(model, tmp_path / str(i))
        again = tiny.llama()
        qlora.quantize_model(again, read_config(tmp_path / str(i)))
        load_adapter(again, tmp_path / str(i))
        assert torch.equal(tiny.logits(again, IDS), tiny.logits(model, IDS))
    save_adapter(tiny.adapted(format=None), tmp_path / "dense")
    assert read_config(tmp_path / "dense").format is None


@pytest.mark.parametrize("format", ["nf4", None])
def test_an_adapter_knows_the_base_it_was_trained_on(tmp_path: Path, format: str | None) -> None:
    save_adapter(tiny.adapted(format=format), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(tiny.quantized(tiny.llama(), format=format), tmp_path)
    for other in (tiny.quantized(tiny.llama(seed=1), format=format), tiny.adapted(format="fp4")):
        with pytest.warns(UserWarning, match="the adapter was trained on another base"):
            load_adapter(other, tmp_path)
    base = json.loads((tmp_path / BASE_CONFIG).read_text())
    del base["fingerprint"]
    (tmp_path / BASE_CONFIG).write_text(json.dumps(base))
    assert read_config(tmp_path).format == format
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(tiny.quantized(tiny.llama(seed=1), format=format), tmp_path)


def test_a_base_keeps_its_fingerprint_when_it_is_cast_to_compute() -> None:
    for format in ("nf4", None):
        model = tiny.adapted(format=format)
        before = base_fingerprint(adapted_layers(model, "default"))
        assert base_fingerprint(adapted_layers(model.to(torch.bfloat16), "default")) == before


def test_a_compiled_model_has_the_names_of_the_plain_one(tmp_path: Path, saved: Path) -> None:
    model = tiny.adapted()
    compiled = torch.compile(model, backend="eager")
    save_adapter(compiled, tmp_path)
    for name in (WEIGHTS, CONFIG, BASE_CONFIG):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()
    load_adapter(compiled, saved)
    assert adapter_parameters(compiled).keys() == adapter_parameters(model).keys()
    assert len(make_optimizer(compiled, TrainConfig()).param_groups[0]["params"]) == 28


def test_adapters_take_turns_on_one_base(tmp_path: Path) -> None:
    model = tiny.quantized(tiny.llama())
    base = tiny.logits(model, IDS)
    outputs = []
    for seed in (2, 3):
        save_adapter(tiny.randomize_adapter(model, seed), tmp_path / str(seed))
        outputs.append(tiny.logits(model, IDS))
    for seed, expected in ((2, outputs[0]), (3, outputs[1]), (2, outputs[0])):
        load_adapter(model, tmp_path / str(seed))
        assert torch.equal(tiny.logits(model, IDS), expected)
        enable_adapters(model, False)
        assert torch.equal(tiny.logits(model, IDS), base)
        enable_adapters(model)
    assert not torch.equal(outputs[0], outputs[1])


def test_loading_does_not_disturb_the_optimizer(saved: Path) -> None:
    model = tiny.quantized(tiny.llama())
    before = [id(parameter) for parameter in adapter_parameters(model).values()]
    load_adapter(model, saved)
    after = list(adapter_parameters(model).values())
    assert [id(parameter) for parameter in after] == before
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in after)


# Refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("bias", "all"),
        ("layer_replication", [[0, 1]]),
        ("use_qalora", True),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("trainable_token_indices", [1]),
        ("a_variant_of_tomorrow", True),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(saved: Path, field: str, value: Any) -> None:
    model = tiny.quantized(tiny.llama())
    before = values(model)
    edit_config(saved, **{field: value})
    with pytest.raises(ValueError, match=f"{CONFIG}: {field} = .* is not supported"):
        load_adapter(model, saved)
    with pytest.raises(ValueError, match=f"{field} = "):
        read_config(saved)
    assert equal(values(model), before)


def test_every_setting_of_a_plain_peft_config_is_allowed(saved: Path) -> None:
    """PEFT writes all its fields, most at values that mean nothing."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]).to_dict()
    edit_config(saved, **config | {"target_modules": ["q_proj"]})
    load_adapter(tiny.quantized(tiny.llama()), saved)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", None, "r must be an integer of at least 1; got None"),
        ("r", 4.0, "r must be an integer"),
        ("lora_alpha", "8", "lora_alpha must be a finite number"),
        ("lora_alpha", math.nan, "lora_alpha must be a finite number; got nan"),
        ("lora_alpha", math.inf, "lora_alpha must be a finite number; got inf"),
        ("r", 8, r"_proj must have rank 8, as .* says; its tensors have 4"),
        ("r", 300, "rank must be from 1 to 256; got 300"),
        ("rank_pattern", {"v_proj": 8}, r"v_proj must have rank 8, as .* says; its tensors have 4"),
        ("rank_pattern", {"*": 8}, "rank_pattern must have regular expressions"),
        ("alpha_pattern", {"v_proj": 0}, r"alpha_pattern\['v_proj'\] must be positive"),
        ("use_dora", True, "lora_magnitude_vector is missing"),
    ],
)
def test_wrong_values_are_named(saved: Path, field: str, value: Any, message: str) -> None:
    edit_config(saved, **{field: value})
    with pytest.raises(ValueError, match=message):
        load_adapter(tiny.quantized(tiny.llama()), saved)


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, rf"{WEIGHTS}: no such file"),
        (
            lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
            FileNotFoundError,
            "adapter_model.bin, which old versions of PEFT wrote, is a pickle .* save it again",
        ),
        *(
            (
                lambda f, dtype=dtype: _rewrite(f, lambda t: t.update({Q: t[Q].to(dtype)})),
                ValueError,
                f"{Q} must be float; got {dtype}",
            )
            for dtype in (torch.int64, torch.float8_e4m3fn)
        ),
        (lambda f: (f / CONFIG).unlink(), FileNotFoundError, rf"{CONFIG}: no such file"),
        (lambda f: (f / CONFIG).write_text("{"), ValueError, rf"{CONFIG}: not valid JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), ValueError, rf"{CONFIG}: expected a JSON object"),
        (
            lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-64]),
            ValueError,
            rf"{WEIGHTS}: truncated or not a safetensors file",
        ),
        (lambda f: (f / WEIGHTS).write_bytes(b""), ValueError, rf"{WEIGHTS}: truncated"),
        (lambda f: _rewrite(f, lambda t: t.pop(Q)), ValueError, f"{Q} is missing"),
        (
            lambda f: _rewrite(f, lambda t: [t.pop(Q), t.pop(Q.replace("_A", "_B"))]),
            ValueError,
            rf"2 missing .{Q}",
        ),
        (
            lambda f: _rewrite(f, lambda t: t.update({Q.replace("_A", "_C"): torch.ones(4)})),
            ValueError,
            "1 not in the model",
        ),
        (
            lambda f: _rewrite(f, lambda t: t.update(extra=torch.ones(1))),
            ValueError,
            r"1 not in the model \(extra\)",
        ),
        (
            lambda f: _rewrite(f, lambda t: t.update({Q: torch.ones(4, 32)})),
            ValueError,
            rf"{Q} has shape \(4, 32\), not \(4, 64\)",
        ),
        (
            lambda f: _rewrite(f, lambda t: t[Q].fill_(math.nan)),
            ValueError,
            f"{Q} holds NaN or infinite values",
        ),
    ],
)
def test_damage_is_named_and_changes_nothing(
    saved: Path, damage: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    model = tiny.quantized(tiny.llama())
    before = values(model)
    damage(saved)
    with pytest.raises(error, match=message):
        load_adapter(model, saved)
    assert equal(values(model), before)


def test_an_adapter_for_another_model_is_refused(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ValueError, match=r"another model or other layers: 14 not in the model"):
        load_adapter(tiny.quantized(tiny.gpt2()), saved)
    with pytest.raises(ValueError, match=r"another model: .* has shape \(64, 4\), not \(32, 4\)"):
        load_adapter(tiny.quantized(tiny.llama(hidden_size=32)), saved)
    with pytest.raises(ValueError, match="call quantize_model"):
        save_adapter(tiny.llama(), tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dropout": 0.5}, r"the same dropout; got 0\.0 in .* and 0\.5 in "),
        ({"blocksize": 32}, "the same blocksize; got 64 in .* and 32 in "),
        ({"double_quant": False}, "the same double_quant; got True in .* and False in "),
    ],
)
def test_layers_that_one_file_cannot_describe_are_not_saved(
    tmp_path: Path, setting: dict[str, Any], message: str
) -> None:
    model = tiny.adapted()
    config = qlora.QLoRAConfig(**{"rank": 4, "alpha": 8} | setting)
    other = qlora.QLoRALinear.from_linear(nn.Linear(64, 96), config)
    model.model.layers[1].mlp.up_proj = other
    first = "model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match=f"{message}model.layers.1.mlp.up_proj") as caught:
        save_adapter(model, tmp_path)
    assert first in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_an_adapter_is_filled_with_all_settings(tmp_path: Path) -> None:
    """Its dropout as well."""
    settings = {"rank": 4, "alpha": 2, "dropout": 0.25, "rslora": True}
    qlora.save_adapter(tiny.adapted(**settings), tmp_path / "one")
    model = tiny.adapted(rank=4)
    qlora.load_adapter(model, tmp_path / "one")
    qlora.save_adapter(model, tmp_path / "two")
    for name in ("adapter_config.json", "qlora_config.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_model_without_values_takes_no_adapter(tmp_path: Path) -> None:
    qlora.save_adapter(tiny.adapted(), tmp_path)
    with torch.device("meta"):
        model = tiny.llama()
    with pytest.raises(ValueError, match=r"model must have values; .*weight is on the meta device"):
        qlora.load_adapter(model, tmp_path)
    assert qlora.adapter_names(model) == ()


def test_one_module_in_two_places_is_adapted_in_both(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        shared = nn.Linear(8, 8)
        return nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))

    model = make()
    qlora.quantize_model(model, qlora.QLoRAConfig(format=None, rank=2))
    tiny.randomize_adapter(model)
    qlora.save_adapter(model, tmp_path)
    other = make()
    qlora.load_adapter(other, tmp_path)
    assert other[0] is other[2][0]
    x = torch.randn(3, 8)
    assert torch.equal(other(x), model(x))
    qlora.add_adapter(other, qlora.QLoRAConfig(rank=2), "b")
    assert list(other[0].adapters) == ["default", "b"]
    third = make()  # with another layer that is adapted, so that it can take one over a dense one
    third.append(nn.Linear(8, 8))
    qlora.quantize_model(third, qlora.QLoRAConfig(format=None, rank=2, target_modules=["3"]))
    qlora.add_adapter(third, qlora.QLoRAConfig(rank=2), "b")
    assert third[0] is third[2][0]
