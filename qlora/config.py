"""`QLoRAConfig`: what is quantized how, and which layers get an adapter of which size."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch

from qlora.kernels import formats

ALL_LINEAR = "all-linear"

BASE_FIELDS = ("format", "blocksize", "double_quant", "scale_format")
"""The fields of QLoRAConfig that say how the base is quantized."""

ADAPTER_DTYPES = ("float32", "bfloat16")
INITS = ("lora", "pissa", "loftq")

MAX_RANK = 256
"""Of an adapter: what the kernels are tested for."""
_MAX_ITERATIONS = 100


@dataclass(frozen=True)
class QLoRAConfig:
    """Settings of `quantize_model` and of each layer. The defaults are the QLoRA paper's,
    but for the dropout, which it sets to 0.1 up to 13B and 0.05 above, and its published scripts to 0.05.

    Attributes:
        rank: r, the inner dimension of the adapter's factors, 1 to 256.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: probability that an element of the adapter's input is dropped in training, in [0, 1).
        target_modules: the linear layers that get an adapter: "all-linear", a sequence of names (a layer
            matches by its full name or the end of it after a dot, as "q_proj" or "attn.q_proj"; the experts of a
            mixture all together by "experts.down_proj", one by "experts.down_proj.3"), a regular expression that
            matches full names, or None for no adapter yet. Layers without an adapter are quantized all the same.
        format: the 4-bit data type of the base: "nf4", "fp4", "e2m1", "e3m0", "int4"; or None to leave the
            base dense: plain LoRA, the 16-bit baseline of the papers.
        blocksize: weights that share a scale, a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits.
        scale_format: the data type of double-quantized scales: "dynamic8" or "e4m3".
        adapter_dtype: what the adapter's factors and their gradients are held in, "float32" or "bfloat16", which
            saves 4 bytes per trained parameter (65B in 48 GB needs it).
        rslora: scale by alpha / sqrt(rank) instead, which keeps gradients from shrinking at high ranks
            (Kalajdzievski 2023).
        dora: train the length of each row of W + scaling * B A apart from its direction (Liu et al. 2024).
        init: the adapter's first values: "lora", where B is zero; or from the weight's singular vectors, which
            changes the base that is quantized: "pissa" takes the largest out of the weight (Meng et al. 2024),
            "loftq" those of the quantization error (Li et al. 2023).
        init_iterations: how often "pissa" and "loftq" quantize and decompose in turn, 1 to 100.
        rank_pattern, alpha_pattern: other ranks and alphas for some layers, by regular expressions that match
            a layer's name or the end of it after a dot ("^" in front asks for the whole name); the first that
            matches counts. Experts go by the name of their list, "experts.down_proj": they have one rank.
        modules_to_save: modules, by name as above, that are trained whole and saved with the adapter, as
            "lm_head" or a new "score" (PEFT's name for it).

    Raises:
        TypeError, ValueError: a value is not one of the allowed; the message names it.
    """

    rank: int = 64
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | Sequence[str] | None = field(default=ALL_LINEAR, hash=False)
    format: str | None = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    scale_format: str = "dynamic8"
    adapter_dtype: str = "float32"
    rslora: bool = False
    dora: bool = False
    init: str = "lora"
    init_iterations: int = 1
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    modules_to_save: Sequence[str] = field(default=(), hash=False)

    def __post_init__(self) -> None:
        kinds = {
            int: ("rank", "blocksize", "init_iterations"),
            bool: ("double_quant", "rslora", "dora"),
        }
        for kind, names in kinds.items():
            for name in names:
                if type(got := getattr(self, name)) is not kind:
                    raise TypeError(f"{name} must be of type {kind.__name__}; got {got!r}")
        _check_rank("rank", self.rank)
        _check_alpha("alpha", self.alpha)
        _check_number("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1; got {self.dropout}")
        self._check_patterns()
        self._check_names()
        self._check_base()
        _check_choice("adapter_dtype", self.adapter_dtype, ADAPTER_DTYPES)
        _check_choice("init", self.init, INITS)
        if not 1 <= self.init_iterations <= _MAX_ITERATIONS:
            allowed = f"from 1 to {_MAX_ITERATIONS}"
            raise ValueError(f"init_iterations must be {allowed}; got {self.init_iterations}")

    def _check_patterns(self) -> None:
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            patterns = getattr(self, name)
            if not isinstance(patterns, Mapping):
                raise TypeError(
                    f"{name} must be a mapping from names of layers to numbers; got {patterns!r}"
                )
            for pattern, value in patterns.items():
                check(f"{name}[{pattern!r}]", value)
                try:
                    re.compile(pattern)
                except (re.error, TypeError) as error:
                    raise ValueError(
                        f"{name} must have regular expressions; got {pattern!r} ({error})"
                    ) from error

    def _check_names(self) -> None:
        if not isinstance(self.target_modules, (str, Sequence, type(None))):
            raise TypeError(
                f"target_modules must be a string, a sequence of names or None; got {self.target_modules!r}"
            )
        _check_strings("target_modules", self.target_modules)
        if self.target_modules is not None and not self.target_modules:
            raise ValueError(
                f"target_modules must name at least one layer; got {self.target_modules!r}"
            )
        names = self.modules_to_save
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"modules_to_save must be a sequence of names; got {names!r}")
        _check_strings("modules_to_save", names)
        if self.target_modules is None and names:
            raise ValueError(
                f"modules_to_save must be empty where target_modules is None, as there is no adapter to save "
                f"them with; got {names!r}"
            )

    def _check_base(self) -> None:
        if self.format is not None:
            formats.check_format(self.format)
        formats.check_blocksize(self.blocksize)
        formats.check_scale_format(self.scale_format)

    @property
    def adapter_torch_dtype(self) -> torch.dtype:
        """The dtype that `adapter_dtype` names."""
        return getattr(torch, self.adapter_dtype)

    @property
    def scaling(self) -> float:
        """The factor of the adapter's output, alpha / rank (LoRA, section 4.1), where no pattern matches."""
        return scaling_of(self.rank, self.alpha, self.rslora)

    def rank_of(self, name: str) -> int:
        """The rank in the layer called `name`, of an expert the name of its list."""
        return _first_match(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """Alpha in the layer called `name`."""
        return _first_match(self.alpha_pattern, name, self.alpha)

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """Of the layer called `name`."""
        rank = self.rank_of(name)
        return rank, scaling_of(rank, self.alpha_of(name), self.rslora)


def scaling_of(rank: int, alpha: float, rslora: bool) -> float:
    """alpha / r (LoRA, section 4.1), or alpha / sqrt(r) (Kalajdzievski 2023, theorem 3.2)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def _first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a name, after a dot: PEFT's rule."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _check_strings(name: str, values: Sequence[str] | None) -> None:
    for value in values or ():
        if not isinstance(value, str):
            raise TypeError(f"{name} must hold names, which are strings; got {value!r}")


def _check_rank(name: str, rank: Any) -> None:
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{name} must be from 1 to {MAX_RANK}; got {rank!r}")


def _check_alpha(name: str, alpha: Any) -> None:
    _check_number(name, alpha)
    if not 0 < alpha < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {alpha!r}")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(allowed)}; got {value!r}")
