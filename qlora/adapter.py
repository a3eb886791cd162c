"""One adapter of one module, and what all modules share that hold adapters and switch between them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora.config import scaling_of

DEFAULT = "default"
"""The name of the adapter that `quantize_model` makes: PEFT's."""


def check_name(name: str) -> None:
    """Raise ValueError unless `name` can name an adapter: it becomes a part of parameter names."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(
            f"name of an adapter must have letters, digits, '_' and '-' only; got {name!r}"
        )
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"name of an adapter must not be an attribute of torch's; got {name!r}")


@dataclass(frozen=True)
class Start:
    """Where an adapter's first values are from, and how the base was changed for it: see QLoRAConfig."""

    init: str = "lora"
    iterations: int = 1


class Adapter(nn.Module):
    """The low-rank factors of one layer (LoRA, section 4.1), and its magnitude (DoRA, section 4.1).

    Attributes:
        lora_a, lora_b: parameters A [r, k] and B [n, r].
        magnitude: parameter fp32 [n], the length of each row of the adapted weight; None unless it is DoRA.
        alpha, rslora: the adapter's output is scaled by alpha / r, or by alpha / sqrt(r).
        dropout: probability that an element of the adapter's input is dropped in training.
        start: where its first values are from.
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
        start: Start = Start(),
    ) -> None:
        super().__init__()
        self.lora_a, self.lora_b = nn.Parameter(lora_a), nn.Parameter(lora_b)
        self.register_parameter("magnitude", None)
        if magnitude is not None:
            self.magnitude = nn.Parameter(magnitude)
        self.alpha, self.rslora, self.dropout = alpha, rslora, dropout
        self.start = start

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
        return scaling_of(self.rank, self.alpha, self.rslora)

    def reset(self) -> None:
        """Start anew: A uniform within 1 / sqrt(k), B zero, so that nothing is added to the base."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    @torch.no_grad()
    def fill(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Give the factors other values."""
        self.lora_a.copy_(lora_a)
        self.lora_b.copy_(lora_b)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """Casts keep the magnitude in fp32: a length rounded to bf16 would change what a fresh adapter adds."""
        before = [
            t.detach()
            for t in (self.magnitude, getattr(self.magnitude, "grad", None))
            if t is not None
        ]
        super()._apply(fn, recurse)
        if before and self.magnitude.dtype != before[0].dtype:
            self.magnitude.grad = None
            self.magnitude.data, *grad = (kept.to(self.magnitude.device) for kept in before)
            self.magnitude.grad = grad[0] if grad else None
        return self

    def extra_repr(self) -> str:
        dora = ", dora" if self.magnitude is not None else ""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}{dora}"


_Selection = tuple[dict[str, float], tuple[str | None, ...] | None, bool]
"""`active`, `rows` and `adapter_enabled` of a host."""


class AdapterHost(nn.Module):
    """A module that holds adapters by name, and knows which are in use.

    Attributes:
        adapters: the adapters by name: of kind `Adapter` in a linear layer, trained copies in a `SavedModule`.
        active: the weight of each adapter in use, by name; without those that this module does not have.
        rows: the adapter's name for each row of the batch, None for the base, where rows differ; else None.
        adapter_enabled: set to False to hear the base alone.
        chosen: what `choose` was last given, which use_adapter's blocks come back to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active: dict[str, float] = {}
        self.rows: tuple[str | None, ...] | None = None
        self._selected = self.active, self.rows
        self.adapter_enabled = True
        self.chosen: Mapping[str, float] = {}
        self._noted: _Selection | None = None

    def choose(self, weights: Mapping[str, float]) -> None:
        """Use adapters from now on: they become trainable and the others frozen."""
        self.chosen = weights
        self.select(weights)
        self.adapter_enabled = True
        for name, adapter in self.adapters.items():
            adapter.requires_grad_(name in weights)

    def select(
        self, weights: Mapping[str, float], rows: Sequence[str | None] | None = None
    ) -> None:
        """Use adapters by their weights, or for each row of the batch its own; those not here are passed over."""
        self.active = {name: weight for name, weight in weights.items() if name in self.adapters}
        self.rows = None
        if rows is not None:
            self.rows = tuple(name if name in self.adapters else None for name in rows)
        self._selected = self.active, self.rows

    def remove(self, name: str) -> None:
        """Drop an adapter, if it is here."""
        if name in self.adapters:
            del self.adapters[name]
            self.select(self.active, self.rows)

    def _check_recomputed(self) -> None:
        """For each forward pass: where gradient checkpointing repeats one, it must be with the same adapters.

        Otherwise gradients would be those of other adapters, or of none, without an error. A pass without gradients
        may be the first of a checkpointed one in torch's reentrant form, or have nothing to do with it: after one
        with other adapters nothing is known.

        Raises:
            RuntimeError: the pass is repeated with others.
        """
        if torch.compiler.is_compiling() or (self._noted is None and not torch.is_grad_enabled()):
            return
        now = *self._selected, self.adapter_enabled
        if torch._C._current_graph_task_id() == -1:  # not within a backward pass
            if torch.is_grad_enabled():
                self._noted = now
            elif self._noted != now:
                self._noted = None
        elif self._noted is not None and self._noted != now:
            raise RuntimeError(
                f"gradient checkpointing repeats a forward pass with {_in_words(now)} in use, which was made with "
                f"{_in_words(self._noted)}: backward belongs inside the use_adapter block, and before the next "
                "set_adapter"
            )

    def _rows_of(self, x: Tensor) -> dict[str, Tensor]:
        """The rows of the batch by the adapter that they are for: int64 indices, on x's device."""
        if x.dim() < 2 or x.shape[0] != len(self.rows):
            raise ValueError(
                f"an adapter for each of {len(self.rows)} rows needs an input of shape "
                f"[{len(self.rows)}, ...]; got {tuple(x.shape)}: name as many adapters as the batch has rows, with beam "
                "search each num_beams times; a layer that sees no rows of the batch cannot have an adapter for each"
            )
        names = dict.fromkeys(name for name in self.rows if name is not None)
        return {
            name: torch.tensor([i for i, own in enumerate(self.rows) if own == name]).to(x.device)
            for name in names
        }


def is_converted(model: nn.Module) -> bool:
    """Whether anything in the model can hold adapters: its base is frozen then."""
    return any(isinstance(module, AdapterHost) for module in model.modules())


def _in_words(selection: _Selection) -> str:
    active, rows, enabled = selection
    if not enabled:
        return "the base alone"
    if rows is not None:
        return f"{list(rows)} for the rows of the batch"
    return " and ".join(map(repr, active)) or "the base alone"
