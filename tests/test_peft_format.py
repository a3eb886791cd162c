"""PEFT's adapters and ours are the same files: both ways, on the model classes that people use."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qlora
from qlora.adapter_files import load_adapter, read_config, save_adapter
from qlora.adapters import hosts
from qlora.config import QLoRAConfig
from qlora.merging import merge
from qlora.peft_format import CONFIG, WEIGHTS, patterns
from tests import tiny as small
from tests.architectures import MODELS, inputs, tiny

# What PEFT has settings for, by our names; in every architecture each linear layer is a target.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "patterns": {
        "rank_pattern": {r".*(fc1|h_to_4h|up_proj|c_fc|wi)": 5},
        "alpha_pattern": {r".*(q_proj|c_attn|query_key_value|q)": 3},
    },
    "all of it": {"rslora": True, "dora": True, "rank_pattern": {r"1\..*": 2}},
}
THEIRS = {"rslora": "use_rslora", "dora": "use_dora"}


def output(model: nn.Module, name: str) -> Tensor:
    plain = model.base_model if isinstance(model, peft.PeftModel) else model  # for any task
    with torch.no_grad():
        return plain(**inputs(name)).logits


def randomized(model: nn.Module, seed: int = 2) -> nn.Module:
    """Adapters that do something, DoRA's magnitudes and whole modules included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "magnitude", "modules_to_save", ".adapters.")):
            noise = torch.randn(parameter.shape, generator=generator)
            is_factor = "lora_A" in name or "lora_B" in name or "lora_a" in name or "lora_b" in name
            with torch.no_grad():
                if is_factor:
                    parameter.copy_(0.2 * noise)
                else:
                    parameter.mul_(1 + 0.1 * noise)
    return model


def ours(model: nn.Module, **settings: Any) -> nn.Module:
    config = {"rank": 3, "alpha": 6, "blocksize": 32}
    qlora.quantize_model(model, QLoRAConfig(**config | settings))
    return model


def theirs(model: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    """A dense model with an adapter of PEFT's that does something, saved to a folder."""
    named = {THEIRS.get(name, name): value for name, value in settings.items()}
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear"} | named)
    wrapped = randomized(peft.get_peft_model(model, config)).eval()
    wrapped.save_pretrained(folder)
    return wrapped


def dense_base(model: nn.Module) -> nn.Module:
    """The model's base alone, dequantized, in a copy."""
    bare = copy.deepcopy(model)
    for host in hosts(bare).values():
        for name in list(host.adapters):
            host.remove(name)
    return merge(bare)


# --- Both ways --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("bert")])
def test_peft_loads_ours(tmp_path: Path, name: str, variant: str) -> None:
    """On the same base: the one that our model holds, dequantized."""
    model = randomized(ours(tiny(name), **VARIANTS[variant]))
    save_adapter(model, tmp_path)
    base = dense_base(model)
    before = output(base, name)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(output(loaded, name), output(model, name), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, output(model, name), atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("bert")])
def test_we_load_theirs(tmp_path: Path, name: str, variant: str) -> None:
    loaded = theirs(tiny(name), tmp_path, **VARIANTS[variant])
    model = tiny(name)
    qlora.quantize_model(model, QLoRAConfig(format=None, target_modules=None))
    load_adapter(model, tmp_path)
    torch.testing.assert_close(output(model, name), output(loaded, name), rtol=1e-4, atol=1e-5)
    save_adapter(model, tmp_path / "again")
    before, after = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    again = tiny(name)
    qlora.quantize_model(again, read_config(tmp_path / "again"))
    load_adapter(again, tmp_path / "again")
    assert torch.equal(output(again, name), output(model, name))


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["lm_head", "0.mlp.up_proj"]),
        *((name, ["lm_head"]) for name in ("qwen3", "opt", "bloom", "gpt2")),
    ],
)
def test_a_head_with_an_adapter(tmp_path: Path, name: str, targets: list[str]) -> None:
    """PEFT puts the head's own weight beside it, which is looked at and not taken."""
    loaded = theirs(tiny(name), tmp_path, target_modules=targets)
    model = ours(tiny(name), format=None, target_modules=None)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(output(model, name), output(loaded, name), rtol=1e-4, atol=1e-5)
    quantized = randomized(ours(tiny(name), target_modules=targets))
    save_adapter(quantized, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(dense_base(quantized), tmp_path / "ours").eval()
    torch.testing.assert_close(output(again, name), output(quantized, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens", "1.mlp.up_proj", "norm"]])
def test_modules_that_are_trained_whole(tmp_path: Path, saved: list[str]) -> None:
    targets = ["q_proj", "down_proj"]
    loaded = theirs(tiny("llama"), tmp_path, modules_to_save=saved, target_modules=targets)
    model = ours(tiny("llama"), format=None, target_modules=None)
    base = output(model, "llama")
    load_adapter(model, tmp_path)
    torch.testing.assert_close(output(model, "llama"), output(loaded, "llama"))
    with qlora.disable_adapters(model):
        assert torch.equal(output(model, "llama"), base)
    trained = randomized(ours(tiny("llama"), modules_to_save=saved, target_modules=targets))
    save_adapter(trained, tmp_path / "ours")
    bare = dense_base(trained)
    again = peft.PeftModel.from_pretrained(bare, tmp_path / "ours").eval()
    torch.testing.assert_close(output(again, "llama"), output(trained, "llama"))
    settings = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert all(any(full.endswith(name) for full in settings["modules_to_save"]) for name in saved)


def test_a_classifier_with_a_new_head(tmp_path: Path) -> None:
    loaded = theirs(
        tiny("bert_classifier"), tmp_path, task_type="SEQ_CLS", target_modules=["query", "value"]
    )
    model = ours(tiny("bert_classifier"), format=None, target_modules=None)
    load_adapter(model, tmp_path)
    name = "bert_classifier"
    torch.testing.assert_close(output(model, name), output(loaded, name))


@pytest.mark.parametrize("make", [lambda: {"target_modules": [r"c_attn", "c_fc"]}])
def test_fan_in_fan_out_set_or_not(tmp_path: Path, make: Callable[[], dict[str, Any]]) -> None:
    """GPT-2's layers lie the other way round; what the file says of that does not matter."""
    for i, fan_in_fan_out in enumerate((True, False)):
        folder = tmp_path / str(i)
        loaded = theirs(tiny("gpt2"), folder, fan_in_fan_out=fan_in_fan_out, **make())
        model = ours(tiny("gpt2"), format=None, target_modules=None)
        load_adapter(model, folder)
        torch.testing.assert_close(output(model, "gpt2"), output(loaded, "gpt2"))


# --- What the files say -----------------------------------------------------------------------------


def test_settings_survive(tmp_path: Path) -> None:
    """rsLoRA is written as such, and not as another alpha."""
    settings = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 0.5}}
    model = ours(tiny("llama"), rslora=True, dora=True, dropout=0.25, **settings)
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (3, 6, 0.25)
    assert (written["use_rslora"], written["use_dora"]) == (True, True)
    names = {key.replace("\\", "").rpartition(".")[2] for key in written["rank_pattern"]}
    assert (names, set(written["rank_pattern"].values())) == ({"v_proj"}, {2})
    assert set(written["alpha_pattern"].values()) == {0.5}
    config = read_config(tmp_path)
    assert (config.rank, config.alpha, config.rslora, config.dora) == (3, 6, True, True)
    assert config.rank_of("model.layers.0.self_attn.v_proj") == 2
    assert config.alpha_of("model.layers.1.self_attn.o_proj") == 0.5


def test_patterns_are_the_fewest() -> None:
    assert patterns({"a": 4, "b": 4, "c.d": 2}, {}) == (4, {r"^c\.d": 2})
    assert patterns({"a": 4, "e.up.0": 2, "e.up.1": 2, "b": 4, "c": 4}, {"e.up": 2}) == (
        4,
        {r"^e\.up": 2},
    )


def test_base_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """PEFT keeps embeddings beside an adapter if they were changed: then it fits no other model."""
    theirs(tiny("llama"), tmp_path, target_modules=["lm_head", "q_proj"])
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.lm_head.base_layer.weight"
    for change in (lambda t: t + 1, lambda t: t[:-1].clone()):
        save_file(tensors | {key: change(tensors[key])}, tmp_path / WEIGHTS)
        model = ours(tiny("llama"), target_modules=None)
        with pytest.raises(ValueError, match=r"brings a base weight for lm_head that is not"):
            load_adapter(model, tmp_path)
        assert qlora.adapter_names(model) == ()


def test_lora_on_an_embedding_is_refused_by_name(tmp_path: Path) -> None:
    theirs(tiny("llama"), tmp_path, target_modules=["embed_tokens", "q_proj"])
    model = ours(tiny("llama"), target_modules=None)
    with pytest.raises(ValueError, match=r"not in the model .*embed_tokens"):
        load_adapter(model, tmp_path)


def test_a_classifier_is_read_though_peft_lists_modules_that_it_has_not(tmp_path: Path) -> None:
    """For SEQ_CLS its list has "classifier" and "score", of which a model has one."""
    name = "bert_classifier"
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"])
    theirs = randomized(peft.get_peft_model(tiny(name), config)).eval()
    theirs.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / CONFIG).read_text())["modules_to_save"]) == {
        "classifier",
        "score",
    }
    config = read_config(tmp_path)
    assert config.modules_to_save == ("classifier",)
    model = tiny(name)
    qlora.quantize_model(model, dataclasses.replace(config, format=None))
    load_adapter(model.eval(), tmp_path)
    torch.testing.assert_close(output(model, name), output(theirs, name), rtol=1e-4, atol=1e-5)


class Nested(nn.Module):
    """Whose names are ends of others: "0" of "1.0", "fc" of "head.fc"."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 8)
        self.head = nn.ModuleDict({"fc": nn.Linear(8, 8)})
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head["fc"](self.fc(x).relu()).relu())


@pytest.mark.parametrize("targets", ["fc|last", r"fc|head\.fc", ".*"])
def test_names_that_are_ends_of_others(targets: str, tmp_path: Path) -> None:
    model = Nested()
    config = QLoRAConfig(
        format=None,
        rank=2,
        target_modules=targets,
        rank_pattern={"^fc": 4},
        alpha_pattern={"^fc": 3},
    )
    qlora.quantize_model(model, config)
    small.randomize_adapter(model)
    assert model.fc.rank == 4
    qlora.save_adapter(model, tmp_path)
    x = torch.randn(3, 8)
    theirs = peft.PeftModel.from_pretrained(Nested(), tmp_path)
    torch.testing.assert_close(theirs(x), model(x))
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path, tmp_path / "theirs"):
        ours = Nested()
        qlora.load_adapter(ours, folder)
        assert torch.equal(ours(x), model(x))
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_a_list_that_is_no_experts_is_not_meant_by_its_name(tmp_path: Path) -> None:
    """As in PEFT."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"fc": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))})

    settings = {"lora_alpha": 8, "target_modules": ["0", "1"], "rank_pattern": {"fc": 8}}
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, **settings))
    theirs.save_pretrained(tmp_path)
    model = make()
    qlora.load_adapter(model, tmp_path)
    assert [model["fc"][i].rank for i in range(2)] == [2, 2]
    qlora.add_adapter(model, QLoRAConfig(rank=2, rank_pattern={"fc": 8, "fc.1": 3}), "b")
    assert [model["fc"][i].adapters["b"].rank for i in range(2)] == [2, 3]


def test_weights_tied_by_peft_are_refused_by_its_settings_name(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        small.llama(tie_word_embeddings=True),
        peft.LoraConfig(
            r=2,
            target_modules=["q_proj"],
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
            task_type="CAUSAL_LM",
        ),
    )
    theirs.save_pretrained(tmp_path)
    model = small.llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"ensure_weight_tying = True .* it ties lm_head to what"):
        qlora.load_adapter(model, tmp_path)
    assert qlora.adapter_names(model) == ()
