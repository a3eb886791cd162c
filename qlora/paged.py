"""`PagedAdamW`: AdamW whose state lies in CUDA unified memory, out of the way when memory is short.

QLoRA, section 3, "Paged Optimizers": the state is needed once a step, and where activations need the room the
driver moves it to the host. Parameters share flat buffers of state ("buckets"): one kernel updates a bucket,
while the next one is brought back to the GPU on another stream.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora import paged_checks as checks
from qlora.buckets import Bucket, new_bucket, parts, state_bytes
from qlora.kernels import ops
from qlora.kernels.reference_adamw import SCALARS, adamw_scalars

__all__ = ["PagedAdamW", "state_bytes"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Work:
    """What a step does with a bucket: for each parameter its gradient or None, and a row of scalars.

    `steps`: numbers of steps so far, of the parameters with a gradient.
    """

    bucket: Bucket
    grads: list[Tensor | None]
    steps: list[Tensor]
    scalars: Tensor
    rng: Tensor | None


class PagedAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, its state in unified memory on a GPU.

    Takes the place of `torch.optim.AdamW`: the same hyperparameters, the same numbers but for the last bit, and a
    `state_dict` that loads into it and from it (bits=32). On the CPU the state is in plain memory; all else is
    the same, bit for bit. Parameters are fp32, bf16 or fp16; the arithmetic is fp32.

    Args:
        params: parameters, or groups of them, as for any optimizer of torch.
        lr: learning rate, a number or a tensor of one.
        betas: decay of the mean gradient and of the mean squared gradient.
        eps: term against division by zero.
        weight_decay: decoupled weight decay.
        amsgrad: must be False.
        bits: of the state: 32, or 8 with a scale for each 256 elements (block-wise dynamic quantization).
        stochastic_rounding: round bf16 parameters up or down at random, in proportion to the distances, so that
            steps smaller than half of their last bit are not lost. Draws a seed from torch's CPU generator
            at each step; which number an element gets follows from its bucket, so a resumed run repeats them
            if all parameters got their first gradient in the same step, as they do in `train`.
        paged: False for plain GPU memory.

    Raises:
        TypeError, ValueError: an argument is not one of the allowed; the message names it.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        bits: int = 32,
        stochastic_rounding: bool = False,
        paged: bool = True,
    ) -> None:
        checks.check_bits(bits)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
        }
        checks.check_group(defaults)
        self.bits, self.stochastic_rounding, self.paged = bits, stochastic_rounding, paged
        self._homes: dict[Tensor, Bucket] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's: the group's parameters get their state in the first step with a gradient."""
        super().add_param_group(param_group)
        try:
            checks.check_group(param_group)
            checks.check_parameters(param_group["params"], self.stochastic_rounding)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    # --- The step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update each parameter that has a gradient; the others and their state stay as they are.

        Args:
            closure: computes the loss and the gradients anew; the loss is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = self._params()
        checks.check_gradients(params)
        self._drop_cleared_state()
        self._check_state(params)
        self._add_state([p for p in params if p.grad is not None and p not in self._homes])
        works = self._works()
        for device in dict.fromkeys(work.bucket.device for work in works):
            self._update(device, [work for work in works if work.bucket.device == device])
        return loss

    def _update(self, device: torch.device, works: Sequence[_Work]) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for work in _prefetched(works, device) if device.type == "cuda" else works:
                buffers = work.bucket.buffers
                ops.adamw(
                    list(work.bucket.views),
                    work.grads,
                    buffers["exp_avg"],
                    buffers["exp_avg_sq"],
                    buffers.get("exp_avg_absmax"),
                    buffers.get("exp_avg_sq_absmax"),
                    work.scalars,
                    work.rng,
                )
                # A tensor and an alpha, as torch's AdamW has it: a number would be made into a tensor for each.
                torch._foreach_add_(work.steps, torch.tensor(1.0, device="cpu"), alpha=1.0)

    def _works(self) -> list[_Work]:
        """The buckets in which something has a gradient."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        seeds = torch.randint(2**31, (2,), device="cpu") if self.stochastic_rounding else None
        works = []
        for position, bucket in enumerate(self._buckets()):
            grads = [
                p.grad if p in groups and self._homes.get(p) is bucket else None
                for p in bucket.views
            ]
            wanted = [p for p, g in zip(bucket.views, grads, strict=True) if g is not None]
            if not wanted:
                continue
            steps = [bucket.views[p]["step"] for p in wanted]
            scalars = torch.zeros(len(grads), len(SCALARS), dtype=torch.float32, device="cpu")
            scalars[[g is not None for g in grads]] = _scalars([groups[p] for p in wanted], steps)
            rng = None
            if seeds is not None and bucket.is_rounded:
                # Other random numbers in each bucket.
                rng = seeds + torch.tensor([0, position], device="cpu")
            works.append(_Work(bucket, grads, steps, scalars, rng))
        return works

    def _buckets(self) -> list[Bucket]:
        """Those that hold some parameter's state."""
        return list(dict.fromkeys(self._homes.values()))

    def _drop_cleared_state(self) -> None:
        """Parameters whose state the caller cleared start afresh."""
        self._homes = {p: bucket for p, bucket in self._homes.items() if self.state.get(p)}

    def _check_state(self, params: Sequence[Tensor]) -> None:
        """It is the buckets' own, as what is put in its place would not be used, and fits its parameter."""
        for i, param in enumerate(params):
            state = self.state.get(param)
            if not state:
                continue
            bucket = self._homes.get(param)
            views = bucket.views[param] if bucket else {}
            if not (len(state) >= len(views) > 0 and all(map(is_, views.values(), state.values()))):
                raise RuntimeError(
                    f"the state of parameter {i} was replaced: change its tensors in place, or use "
                    "load_state_dict"
                )
            checks.check_form(i, param, bucket.made_for[param])

    # --- The state ----------------------------------------------------------------------------------

    @property
    def state_bytes(self) -> int:
        """Bytes that the states take now; a parameter without a gradient so far has none."""
        numels = (p.numel() for bucket in self._buckets() for p in bucket.views)
        return state_bytes(numels, self.bits)

    @torch.no_grad()
    def evict(self) -> None:
        """Move the states to the host, in the order of the current stream; they come back with the next step.

        nvidia-smi and `torch.cuda.mem_get_info` may go on counting their room as taken until something else wants
        it: the driver keeps the emptied pages, and gives them to whoever allocates next. Nothing happens on the CPU
        or with paged=False.
        """
        for bucket in self._buckets():
            if bucket.paged:
                bucket.evict(torch.cuda.current_stream(bucket.device))

    @torch.no_grad()
    def prefetch(self) -> None:
        """Bring the states onto the GPU, in the order of the current stream: for a step that is near.

        Nothing happens on the CPU or with paged=False.
        """
        for bucket in self._buckets():
            if bucket.paged:
                bucket.prefetch(torch.cuda.current_stream(bucket.device))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy a state in: this class's, or `torch.optim.AdamW`'s where bits=32.

        Torch's own method would cast states to the dtype of the parameter, 8-bit codes too.

        Raises:
            TypeError, ValueError: it does not fit; the message says what, and nothing is changed.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        checks.check_keys(state_dict)
        groups, own = deepcopy(state_dict["param_groups"]), self.param_groups
        checks.check_groups(groups, own)
        ids = [number for group in groups for number in group["params"]]
        params = dict(zip(ids, self._params(), strict=True))
        loaded = {}
        for number, state in state_dict["state"].items():
            if number not in params:
                raise ValueError(f"state_dict: parameter {number} has state, and is in no group")
            if state:
                name = f"parameter {number}"
                checks.check_state(name, state, params[number], self.bits)
                loaded[params[number]] = state
        for group, present in zip(groups, own, strict=True):
            group["params"] = present["params"]
            if "param_names" in present:
                group.setdefault("param_names", present["param_names"])
        self.param_groups = groups
        self._copy_in(loaded)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("bits", "stochastic_rounding", "paged")}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies of the optimizer, which get buffers of their own."""
        super().__setstate__(state)
        self._copy_in({p: state for p, state in self.state.items() if state})

    @torch.no_grad()
    def _copy_in(self, loaded: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """New states with these values, in place of all that there were."""
        self._homes, self.state = {}, defaultdict(dict)
        self._add_state([p for p in self._params() if p in loaded])
        for param, values in loaded.items():
            for name, tensor in self.state[param].items():
                value = values[name]
                if isinstance(value, Tensor):
                    tensor.copy_(value.reshape(tensor.shape))
                else:
                    tensor.fill_(value)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _add_state(self, params: Sequence[Tensor]) -> None:
        """Fresh state for parameters that have none."""
        for part in parts(params, self.bits):
            paged = self.paged and part[0].is_cuda
            if self.paged and not paged:
                _say_not_paged()
            bucket = new_bucket(part, self.bits, paged)
            for param, views in bucket.views.items():
                self._homes[param] = bucket
                self.state[param] = dict(views)


@cache
def _say_not_paged() -> None:
    """Once in a process."""
    _log.info("PagedAdamW: no paging on the CPU, the optimizer's state is in plain memory")


def _scalars(groups: Sequence[Mapping[str, Any]], steps: Sequence[Tensor]) -> Tensor:
    """The op's scalars, fp32 [n, 7]: for each parameter the step after those that its state has seen.

    A row is computed once for all parameters of one group and one number of steps, not for each of hundreds.
    """
    rows: list[list[float]] = []
    numbers: dict[tuple[int, float], int] = {}
    index = []
    for group, seen in zip(groups, torch.stack(steps).tolist(), strict=True):
        key = id(group), seen
        if key not in numbers:
            numbers[key] = len(rows)
            rows.append(_row(group, int(seen) + 1))
        index.append(numbers[key])
    return torch.from_numpy(np.array(rows, dtype=np.float32)[index])


def _row(group: Mapping[str, Any], step: int) -> list[float]:
    beta1, beta2 = map(float, group["betas"])
    lr, eps, decay = (float(group[name]) for name in ("lr", "eps", "weight_decay"))
    return adamw_scalars(lr, beta1, beta2, eps, decay, step)


def _prefetched(works: Sequence[_Work], device: torch.device) -> Iterator[_Work]:
    """Yield each work when what is launched next on the current stream will find its bucket on the GPU.

    The first is fetched at once, beside whatever is still queued: a prefetch changes no values and is coherent
    with running kernels. The next one is fetched on a second stream while this one is being updated, and not
    before the one before it is done: two at most are wanted at a time, however far the host is ahead of the GPU.
    """
    stream, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)

    def fetch(work: _Work) -> torch.cuda.Event:
        if work.bucket.paged:
            work.bucket.prefetch(side)
        return side.record_event()

    ready = fetch(works[0])
    for work, following in zip_longest(works, works[1:]):
        here = ready
        if following:
            side.wait_stream(stream)
            ready = fetch(following)
        stream.wait_event(here)
        yield work
