"""Small models in the forms in which MiniLM and Whisper arrive."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from paper_repro.materials import assets
from tests import tiny


def minilm(folder: Path) -> Path:
    """A Hugging Face folder of a sentence encoder: two BERT layers, one token per byte."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = BertConfig(**sizes, num_attention_heads=2, vocab_size=258, initializer_range=0.1)
    BertModel(config).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    return folder


WHISPER_SHAPES = {
    "decoder/embeddings/weight": (100, 64),
    "decoder/layer_0/ffn/layer_norm/gamma": (64,),
    "decoder/layer_0/ffn/linear_0/bias": (128,),
    "decoder/layer_0/ffn/linear_0/weight": (128, 64),
    "decoder/layer_0/self_attention/linear_0/weight": (192, 64),
    "decoder/layer_1/attention/linear_1/weight": (128, 64),
    "encoder/conv1/weight": (64, 8, 3),
    "encoder/layer_0/ffn/linear_0/weight": (128, 64),
}


def whisper(path: Path) -> Path:
    """A CTranslate2 file with variables as Whisper's, in fp16."""
    draw = np.random.default_rng(0).standard_normal
    variables = {name: draw(shape).astype(np.float16) for name, shape in WHISPER_SHAPES.items()}
    return write_ctranslate2(path, {**variables, "decoder/num_heads": np.int8(2)})


_KINDS = {np.dtype(np.float32): 0, np.dtype(np.int8): 1, np.dtype(np.float16): 4}


def write_ctranslate2(path: Path, variables: Mapping[str, np.ndarray]) -> Path:
    """Variables as CTranslate2's converter writes them, and no aliases."""
    parts = [struct.pack("<I", 6), _text("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, values in variables.items():
        parts += [_text(name), struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)]
        parts += [struct.pack("<BI", _KINDS[values.dtype], values.nbytes), values.tobytes()]
    path.write_bytes(b"".join([*parts, struct.pack("<I", 0)]))
    return path


def _text(words: str) -> bytes:
    return struct.pack("<H", len(words) + 1) + words.encode() + b"\0"


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put both in the places of those that are fetched."""
    encoder, decoder = minilm(folder / "minilm"), whisper(folder / "whisper.bin")
    monkeypatch.setattr(assets, "minilm_folder", lambda cache: encoder)
    monkeypatch.setattr(assets, "whisper_file", lambda cache: decoder)
