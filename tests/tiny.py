"""Small models, a small tokenizer and small data that the tests train on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import qlora
from qlora.data import Example

BOS, EOS = 0, 1
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = {
        "vocab_size": 258,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": 0.1,  # logits large enough for a model to be sure of something
    }
    return LlamaForCausalLM(LlamaConfig(**config | settings)).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Its linear layers are transformers' Conv1D, with the weight the other way round."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 258, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=BOS, eos_token_id=EOS)).eval()


def quantized(model: torch.nn.Module, **settings: Any) -> torch.nn.Module:
    """The model, quantized in place, with a small adapter that starts the same every time."""
    torch.manual_seed(1)
    qlora.quantize_model(model, qlora.QLoRAConfig(**{"rank": 4, "alpha": 8} | settings))
    return model


def randomize_adapter(model: torch.nn.Module, seed: int = 2) -> torch.nn.Module:
    """Adapters that do something: a new adapter's B is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.05 * values)
    return model


def adapted(make: Callable[[], torch.nn.Module] = llama, **settings: Any) -> torch.nn.Module:
    """A quantized model with an adapter that does something."""
    return randomize_adapter(quantized(make(), **settings))


def tokens(rows: int = 2, length: int = 12, seed: int = 3) -> torch.Tensor:
    return torch.randint(2, 258, (rows, length), generator=torch.Generator().manual_seed(seed))


def examples(count: int = 12, seed: int = 4) -> list[Example]:
    """Of different lengths, with masked prompts of different lengths, easy to learn."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        prompt = torch.randint(2, 258, (3 + i % 5,), generator=generator)
        completion = torch.full((2 + (7 * i) % 9,), 20 + i % 3)
        ids = torch.cat([prompt, completion])
        labels = torch.cat([torch.full_like(prompt, -100), completion])
        made.append(Example(ids, labels))
    return made


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def model_folder(path: Path, model: torch.nn.Module | None = None) -> Path:
    """A Hugging Face model folder."""
    (model or llama()).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
