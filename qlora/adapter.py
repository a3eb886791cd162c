"""One adapter of one module, and what all modules share that hold adapters and switch between them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

DEFAULT = "default"
"""The name of the adapter that `quantize_model` makes: PEFT's."""


def check_name(name: str) -> None:
    """Raise ValueError unless `name` can name an adapter: it becomes a part of parameter names."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(
            f"name of an adapter must have letters, digits, '_' and '-' only; got {name!r}"
        )
    if hasattr(nn.ModuleDict, name):
        raise ValueError(f"name of an adapter must not be a method of torch's; got {name!r}")


class Adapter(nn.Module):
    """The low-rank factors of one layer (LoRA, section 4.1), and its magnitude (DoRA, section 4.1).

    Attributes:
        lora_a, lora_b: parameters A [r, k] and B [n, r].
        magnitude: parameter fp32 [n], the length of each row of the adapted weight; None unless it is DoRA.
        alpha, rslora: the adapter's output is scaled by alpha / r, or by alpha / sqrt(r).
        dropout: probability that an element of the adapter's input is dropped in training.
        init, init_iterations: how it and its base started, see QLoRAConfig.
    """

    def __init__(
        self,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor | None = None,
        *,
        alpha: float,
        rslora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.lora_a, self.lora_b = nn.Parameter(lora_a), nn.Parameter(lora_b)
        self.register_parameter("magnitude", None)
        if magnitude is not None:
            self.magnitude = nn.Parameter(magnitude)
        self.alpha, self.rslora, self.dropout = alpha, rslora, dropout
        self.init, self.init_iterations = "lora", 1

    def forward(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and the magnitude: by a call, so that hooks which bring parameters to a device see them used."""
        return self.lora_a, self.lora_b, self.magnitude

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_a.shape[0]

    @property
    def scaling(self) -> float:
        """The factor of the adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def reset(self) -> None:
        """Start anew: A uniform within 1 / sqrt(k), B zero, so that nothing is added to the base."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    @torch.no_grad()
    def start(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Give the factors other first values."""
        self.lora_a.copy_(lora_a)
        self.lora_b.copy_(lora_b)

    def extra_repr(self) -> str:
        dora = ", dora" if self.magnitude is not None else ""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}{dora}"


class AdapterHost(nn.Module):
    """A module that holds adapters by name, and knows which are in use.

    Attributes:
        adapters: the adapters by name: of kind `Adapter` in a linear layer, trained copies in a `SavedModule`.
        active: the weight of each adapter in use, by name; without those that this module does not have.
        rows: the adapter's name for each row of the batch, None for the base, where rows differ; else None.
        adapter_enabled: set to False to hear the base alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active: dict[str, float] = {}
        self.rows: tuple[str | None, ...] | None = None
        self.adapter_enabled = True

    def select(
        self, weights: Mapping[str, float], rows: Sequence[str | None] | None = None
    ) -> None:
        """Use adapters by their weights, or for each row of the batch its own; those not here are passed over."""
        self.active = {name: weight for name, weight in weights.items() if name in self.adapters}
        self.rows = None
        if rows is not None:
            self.rows = tuple(name if name in self.adapters else None for name in rows)

    def remove(self, name: str) -> None:
        """Drop an adapter, if it is here."""
        if name in self.adapters:
            del self.adapters[name]
            self.active.pop(name, None)

    def _rows_of(self, x: Tensor) -> dict[str, Tensor]:
        """The rows of the batch by the adapter that they are for: int64 indices, on x's device."""
        if x.dim() < 2 or x.shape[0] != len(self.rows):
            raise ValueError(
                f"an adapter for each of {len(self.rows)} rows needs an input of shape "
                f"[{len(self.rows)}, ...]; got {tuple(x.shape)}: this layer sees no rows of the batch"
            )
        names = dict.fromkeys(name for name in self.rows if name is not None)
        return {
            name: torch.tensor([i for i, own in enumerate(self.rows) if own == name]).to(x.device)
            for name in names
        }
