"""Tiny models of the classes that people use, and inputs for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 64
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def llama(**settings: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(**SIZES, **HEADS, num_key_value_heads=2, intermediate_size=48, **settings)
    )


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS, **sizes, tie_word_embeddings=True))


def gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **HEADS, intermediate_size=48))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
    return OPTForCausalLM(OPTConfig(**SIZES, **HEADS, **sizes, dropout=0.0))


def bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=1))


def bert_mlm() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SIZES, **HEADS, **NO_DROPOUT, intermediate_size=48))


def bert_classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(**SIZES, **HEADS, **NO_DROPOUT, intermediate_size=48, num_labels=3)
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            **sizes,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            tie_word_embeddings=True,
        )
    )


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    layers = {f"{part}_layers": 2 for part in ("encoder", "decoder")}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    ffn = {f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    positions = {"max_source_positions": 10, "max_target_positions": 32, "num_mel_bins": 8}
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCABULARY, d_model=32, **layers, **heads, **ffn, **ids, **positions
        )
    )


# Each class: how to make it, and how many linear layers are converted.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "llama": (llama, 2 * 7),
    "qwen3": (qwen3, 2 * 7),
    "gpt_neox": (gpt_neox, 2 * 4),
    "opt": (opt, 2 * 6 + 2),  # and the projections from and to smaller embeddings
    "bloom": (bloom, 2 * 4),
    "gpt2": (gpt2, 2 * 4),
    "bert_mlm": (bert_mlm, 2 * 6 + 1),
    "bert_classifier": (bert_classifier, 2 * 6 + 2),  # the pooler, and the classifier: no embedding
    "t5": (t5, 2 * 6 + 2 * 10),
    "whisper": (whisper, 2 * 6 + 2 * 10),
}
GENERATIVE = sorted(set(MODELS) - {"bert_mlm", "bert_classifier"})


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def inputs(name: str) -> dict[str, Tensor]:
    """With labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (2, 9), generator=generator)
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 20, generator=generator), "labels": ids}
    if name == "bert_classifier":
        return {"input_ids": ids, "labels": torch.tensor([0, 2])}
    return {"input_ids": ids, "labels": ids}
