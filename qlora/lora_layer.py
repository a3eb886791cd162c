"""`LoRALayer`: the adapters of a linear layer, what they add in a forward pass, and how they are merged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora.adapter import Adapter, AdapterHost, Start
from qlora.config import QLoRAConfig
from qlora.functional import without_autocast
from qlora.model_parts import is_conv1d, weight_shape

Factors = tuple[Tensor | None, Tensor | None, float, float]
"""A, B, scaling and dropout, as `qlora_linear` takes them."""

NO_FACTORS: Factors = (None, None, 1.0, 0.0)


class LoRALayer(AdapterHost):
    """What both linear layers share: their adapters, and how these are added and merged.

    Attributes:
        in_features, out_features: k and n.
        fan_in_fan_out: the layer replaced a Conv1D, whose weight is [k, n].
        bias: [n], frozen, or None.
        row_squares: fp32 [n], the squared length of each row of the base weight; None unless it has a DoRA adapter.
        start: that of the adapter which the base was changed for, if it was; the adapter may be gone.
    """

    bias: nn.Parameter | None

    _FLOAT32: tuple[str, ...] = ("row_squares",)

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.fan_in_fan_out = is_conv1d(linear)
        self.out_features, self.in_features = weight_shape(linear)
        bias = (
            None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        )
        self.register_parameter("bias", bias)
        self.register_buffer("row_squares", None)
        self.start = Start()

    # --- The adapters -----------------------------------------------------------------------------

    def new_adapter(
        self, config: QLoRAConfig, name: str = "", factors: tuple[Tensor, Tensor] | None = None
    ) -> Adapter:
        """A fresh adapter for this layer, which the model calls `name`; not yet one of its adapters.

        It starts at random, or from the factors A and B that `config.init` gave.
        """
        rank = config.rank_of(name)
        factory = {"device": self.device, "dtype": config.adapter_torch_dtype}
        adapter = Adapter(
            torch.empty(rank, self.in_features, **factory),
            torch.empty(self.out_features, rank, **factory),
            torch.empty(self.out_features, device=self.device) if config.dora else None,
            alpha=config.alpha_of(name),
            rslora=config.rslora,
            dropout=config.dropout,
            start=Start() if factors is None else Start(config.init, config.init_iterations),
        )
        adapter.reset()
        if factors is not None:
            adapter.fill(*factors)
        return adapter

    def add(self, name: str, adapter: Adapter, fresh: bool = False) -> None:
        """Take an adapter in under a name; the magnitude of a fresh one is worked out here.

        Raises:
            ValueError: its factors do not fit, or there is one of that name.
        """
        n, k, rank = self.out_features, self.in_features, adapter.rank
        for factor, shape in (("lora_a", (rank, k)), ("lora_b", (n, rank)), ("magnitude", (n,))):
            given = getattr(adapter, factor)
            if given is not None and given.shape != shape:
                raise ValueError(f"{factor} must have shape {shape}; got {tuple(given.shape)}")
        if name in self.adapters:
            raise ValueError(f"there is an adapter {name!r} already")
        self.adapters[name] = adapter
        self.base_changed()
        if fresh:
            self.reset_magnitude(name)

    @torch.no_grad()
    def reset_magnitude(self, name: str) -> None:
        """Give a DoRA adapter the length of each row of W + scaling * B A, so that it changes nothing."""
        adapter = self.adapters[name]
        if adapter.magnitude is not None:
            adapter.magnitude.copy_(
                _row_lengths(self._sum(adapter.lora_a, adapter.lora_b, adapter.scaling))
            )

    @torch.no_grad()
    def base_changed(self) -> None:
        """Work anew what is kept of the base weight."""
        if any(adapter.magnitude is not None for adapter in self.adapters.values()):
            squares = _row_lengths(self.base_weight()).square().float()
            self.register_buffer("row_squares", squares, persistent=False)

    @property
    def adapter(self) -> Adapter | None:
        """The adapter in use; None if none is. Several at once have no single answer: ValueError."""
        if len(self.active) > 1:
            names = ", ".join(self.active)
            raise ValueError(f"one adapter must be in use; got {names}: see layer.adapters")
        for name in self.active:
            return self.adapters[name]
        return None

    @property
    def lora_a(self) -> nn.Parameter | None:
        """A [r, k] of the adapter in use."""
        return None if (adapter := self.adapter) is None else adapter.lora_a

    @property
    def lora_b(self) -> nn.Parameter | None:
        """B [n, r] of the adapter in use."""
        return None if (adapter := self.adapter) is None else adapter.lora_b

    @property
    def rank(self) -> int:
        """r of the adapter in use; 0 if none is."""
        return 0 if (adapter := self.adapter) is None else adapter.rank

    @property
    def scaling(self) -> float:
        """The factor of the output of the adapter in use; 0 if none is."""
        return 0.0 if (adapter := self.adapter) is None else adapter.scaling

    @property
    def dropout(self) -> float:
        """The dropout of the adapter in use; 0 if none is."""
        return 0.0 if (adapter := self.adapter) is None else adapter.dropout

    # --- The weight -------------------------------------------------------------------------------

    @abstractmethod
    def base_weight(self) -> Tensor:
        """The base's dense weight [n, k] in fp32."""

    @property
    @abstractmethod
    def base_dtype(self) -> torch.dtype:
        """The dtype of the base's weight before it was quantized, or of a later `.to(dtype)`."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the base weight is."""

    @torch.no_grad()
    def merged_weight(self, base: Tensor | None = None) -> Tensor:
        """The weight with the adapters in use, dense [n, k], worked out in fp32.

        W + scaling * B A; for DoRA m (W + scaling * B A) / |W + scaling * B A|, row by row (DoRA, equation 5).

        Args:
            base: another W [n, k] to add to, as the one that was quantized. DoRA lengthens its rows as those of the
                own base, as m was learned for that: a fresh adapter leaves it as it is.
        """
        lora_a, lora_b, scaling, _ = self._factors()
        if lora_a is None:
            return self.base_weight() if base is None else base.float()
        weight = self._sum(lora_a, lora_b, scaling, base)
        if (dora := self._dora()) is not None:
            own = weight if base is None else self._sum(lora_a, lora_b, scaling)
            weight = weight * _ratio(dora.magnitude, _row_lengths(own))[:, None].float()
        return weight

    def _sum(
        self, lora_a: Tensor, lora_b: Tensor, scaling: float, base: Tensor | None = None
    ) -> Tensor:
        weight = self.base_weight() if base is None else base.float()
        return weight + scaling * (lora_b.float() @ lora_a.float())

    # --- Forward ----------------------------------------------------------------------------------

    @abstractmethod
    def _linear(self, x: Tensor, bias: Tensor | None, factors: Factors = NO_FACTORS) -> Tensor:
        """x W^T + bias + scaling * dropout(x) A^T B^T over the base weight."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., k] to [..., n]: x W^T + bias + scaling * dropout(x) A^T B^T, for the adapters in use."""
        self._check_recomputed()
        if not self.adapter_enabled:
            return self._linear(x, self.bias)
        if self.rows is not None:
            return self._forward_rows(x)
        if (dora := self._dora()) is None:
            return self._linear(x, self.bias, self._factors())
        y = self._linear(x, None, self._factors())
        y = y * self._dora_factor(dora, y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _forward_rows(self, x: Tensor) -> Tensor:
        """Each row of the batch with its own adapter; the base is decoded once for all."""
        groups = self._rows_of(x)
        late_bias = any(self.adapters[name].magnitude is not None for name in groups)
        y = self._linear(x, None if late_bias else self.bias)
        for name, rows in groups.items():
            adapter = self.adapters[name]
            lora_a, lora_b, magnitude = adapter()
            dropped = F.dropout(x[rows], adapter.dropout, self.training)
            h = F.linear(dropped.to(y.dtype), lora_a.to(y.dtype))
            z = y[rows] + adapter.scaling * F.linear(h, lora_b.to(y.dtype))
            if magnitude is not None:
                z = z * self._dora_factor(adapter, z.dtype)
            y = y.index_copy(0, rows, z.to(y.dtype))
        return y + self.bias.to(y.dtype) if late_bias and self.bias is not None else y

    def _factors(self) -> Factors:
        """Of the adapters in use; a weighted sum of adapters is one adapter, their factors side by side."""
        if not self.active:
            return NO_FACTORS
        used = [(self.adapters[name], weight) for name, weight in self.active.items()]
        adapter, weight = used[0]
        dropout = adapter.dropout if self.training else 0.0
        if len(used) == 1:
            lora_a, lora_b, _ = adapter()
            return lora_a, lora_b, weight * adapter.scaling, dropout
        factors = [(*adapter(), weight * adapter.scaling) for adapter, weight in used]
        lora_a = torch.cat([lora_a for lora_a, *_ in factors])
        lora_b = torch.cat([scaling * lora_b for _, lora_b, _, scaling in factors], dim=1)
        return lora_a, lora_b, 1.0, dropout

    def _dora(self) -> Adapter | None:
        """The adapter in use if it is DoRA, which is in use alone."""
        for name in self.active:
            if self.adapters[name].magnitude is not None:
                return self.adapters[name]
        return None

    def _dora_factor(self, adapter: Adapter, dtype: torch.dtype) -> Tensor:
        """m / |W + scaling * B A| [n]; the length is a constant to the gradient (DoRA, section 4.3)."""
        _, _, magnitude = adapter()
        return _ratio(magnitude, self._row_lengths(adapter, dtype)).to(dtype)

    @torch.no_grad()
    def _row_lengths(self, adapter: Adapter, dtype: torch.dtype) -> Tensor:
        """fp32 [n]: |W + s B A| for each row, without either product being made.

            |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T

        A w for all rows is the base layer applied to the r rows of A.
        """
        wide = torch.promote_types(dtype, torch.float32)
        lora_a, lora_b, _ = adapter()
        products = self._linear(lora_a.to(dtype), None).to(wide)  # [r, n]
        lora_a, lora_b = lora_a.to(wide), lora_b.to(wide)
        crossed = 2 * (products.mT * lora_b).sum(1)
        with without_autocast(lora_a.device.type):  # it would take matrices in bf16
            added = adapter.scaling * ((lora_b @ (lora_a @ lora_a.mT)) * lora_b).sum(1)
        return (self.row_squares + adapter.scaling * (crossed + added)).clamp_min(0).sqrt()

    # --- As a module ------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALayer:
        """Casts keep lengths and scales in fp32."""
        before = {name: getattr(self, name) for name in self._FLOAT32}
        super()._apply(fn, recurse)
        for name, kept in before.items():
            moved = getattr(self, name)
            if kept is not None and moved.dtype != kept.dtype:
                setattr(self, name, kept.to(moved.device))
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.base_changed()

    def extra_repr(self) -> str:
        bias = self.bias is not None
        used = ", ".join(self.active) or "none"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias},"
            f" active={used}"
        )


def _row_lengths(weight: Tensor) -> Tensor:
    """fp64 [n] of a weight [n, k]: rounded to fp32, they do not hang on the order in which a row is summed."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)


def _ratio(magnitude: Tensor, length: Tensor) -> Tensor:
    """magnitude / length; the magnitude itself where a row is zero, and has no direction."""
    return magnitude / torch.where(length > 0, length, 1.0)
