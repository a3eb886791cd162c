"""Which memory a computation takes, told from the tensors that it makes: on any device, the meta device too.

On the meta device nothing is computed and nothing allocated, and yet the same tensors come and go as in a
real step, so that its peak is known before anything runs.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora import functional


class AllocationTrace(TorchDispatchMode):
    """Within the block, take down when the memory of each new tensor comes and goes.

    Only what lies on `device` is counted. What an operator takes and gives back inside (a kernel's scratch
    memory) is not seen, nor are tensors that were there before.

    Args:
        device: the kind of device, "meta" or "cpu" or "cuda".
        phase: a name that memory made from now on is filed under.
    """

    def __init__(self, device: str, phase: str = "") -> None:
        super().__init__()
        self.device, self.phase = device, phase
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._made: list[tuple[str, int]] = []  # phase and bytes of each storage
        self._events: list[tuple[int, int]] = []  # (storage, +1 or -1)

    def exclude(self, *tensors: Tensor) -> None:
        """Do not count these, which were there before the trace began."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = -1

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.device.type == self.device:
                self._see(result.untyped_storage())
        return results

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        number = self._known[storage] = len(self._made)
        self._made.append((self.phase, storage.nbytes()))
        self._events.append((number, 1))
        weakref.finalize(storage, self._events.append, (number, -1)).atexit = False

    def number(self, tensor: Tensor) -> int:
        """What the tensor's memory is called in `highest`; -1 if it is not counted."""
        return self._known.get(tensor.untyped_storage(), -1)

    def highest(self, numbers: Collection[int]) -> int:
        """The most bytes of these that were alive at once."""
        live = highest = 0
        for number, sign in self._events:
            if number in numbers:
                live += sign * self._made[number][1]
                highest = max(highest, live)
        return highest

    def peak(self, groups: Mapping[str, Iterable[Tensor]] | None = None) -> Counter[str]:
        """Bytes alive at the moment when they were the most, by phase.

        Args:
            groups: tensors to be counted under a name of their own instead, as far as they were alive then.
        """
        names = [phase for phase, _ in self._made]
        for name, tensors in (groups or {}).items():
            for tensor in tensors:
                if (number := self.number(tensor)) >= 0:
                    names[number] = name
        alive: Counter[str] = Counter()
        most: Counter[str] = Counter()
        live = highest = 0
        for number, sign in self._events:
            change = sign * self._made[number][1]
            live += change
            alive[names[number]] += change
            if live > highest:
                highest, most = live, alive.copy()
        return most

    def live(self) -> int:
        """Bytes alive now."""
        return sum(sign * self._made[number][1] for number, sign in self._events)


class FullBatch(TorchDispatchMode):
    """Answers what a model asks of a mask on the meta device, which has no values: all is true, nothing is padded."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """The memory of fused attention, without its values (Dao et al. 2022, FlashAttention, section 3.1).

    It keeps its inputs, its output and one fp32 number per query, and never the square of scores.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        same = query.shape[-1] == value.shape[-1]
        # Laid out as the query is: where heads lie side by side, they are joined without a copy.
        out = (
            torch.empty_like(query) if same else query.new_empty(*query.shape[:-1], value.shape[-1])
        )
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        # A mask of true and false becomes numbers to add.
        bias = mask.to(query.dtype) if mask is not None and mask.dtype == torch.bool else mask
        ctx.save_for_backward(query, key, value, out, log_sums, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


_scaled_dot_product_attention, _dropout = F.scaled_dot_product_attention, F.dropout


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **rest: Any,
) -> Tensor:
    if not query.is_meta:
        return _scaled_dot_product_attention(query, key, value, attn_mask, *args, **rest)
    return _FusedAttention.apply(query, key, value, attn_mask)


def _fused_dropout(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """What it kept is held as true and false, where the meta device holds numbers."""
    if x.is_meta and training and 0 < p < 1:
        return torch.native_dropout(x, p, True)[0]
    return _dropout(x, p, training, inplace)


# What autocast does on a GPU to the operations of language models; torch's header autocast_mode.h has all.
_IN_16_BITS = (
    *((functional, "in_autocast_dtype"), (F, "linear"), (F, "scaled_dot_product_attention")),
    *((torch, name) for name in ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum")),
    *((Tensor, name) for name in ("matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm")),
)
_IN_32_BITS = (
    *((F, name) for name in ("layer_norm", "softmax", "log_softmax", "softplus")),
    *((torch, name) for name in ("softmax", "log_softmax", "pow", "rsqrt", "exp", "cumsum")),
    *(
        (Tensor, name)
        for name in ("softmax", "log_softmax", "pow", "__pow__", "rsqrt", "exp", "cumsum")
    ),
)
_lock = RLock()


@contextmanager
def as_on_a_gpu(dtype: torch.dtype) -> Iterator[None]:
    """Within the block, the meta device makes the tensors that a GPU makes: fused attention, and autocast to `dtype`.

    Left alone it spells attention out, with all its scores, and knows no autocast. Functions are replaced, not
    intercepted by a mode: modes of that kind are off in the backward pass, where checkpointed blocks run again.
    What other threads compute meanwhile, on other devices, is left as it is.
    """
    with _lock, ExitStack() as stack:
        _replace(stack, F, "scaled_dot_product_attention", _attention)
        _replace(stack, F, "dropout", _fused_dropout)
        if dtype != torch.float32:
            for kind, places in ((dtype, _IN_16_BITS), (torch.float32, _IN_32_BITS)):
                for owner, name in places:
                    _replace(stack, owner, name, _cast_to(kind, getattr(owner, name)))
        yield


def _replace(stack: ExitStack, owner: Any, name: str, function: Callable[..., Any]) -> None:
    if name in vars(owner):
        stack.callback(setattr, owner, name, vars(owner)[name])
    else:  # it is a base class's
        stack.callback(delattr, owner, name)
    setattr(owner, name, function)


def _cast_to(dtype: torch.dtype, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with floating point arguments in `dtype`."""

    def cast(argument: Any) -> Any:
        castable = (
            isinstance(argument, Tensor) and argument.is_meta and argument.is_floating_point()
        )
        return argument.to(dtype) if castable else argument

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return call
