"""Mixtures of experts whose weights transformers stacks in 3-D parameters: a linear layer for each expert.

transformers 5 holds the experts of a block (Mixtral, Qwen3-MoE, DeepSeek, gpt-oss, ...) in one module with two
parameters, for all experts at once. `QLoRAExperts` takes its place: an ordinary layer per expert and projection, so
that all that looks for layers by name finds them, as `model.layers.0.mlp.experts.down_proj.3`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from qlora.model_parts import plain_name

# Whose decorator says what a module of experts computes.
_TRANSFORMERS = "transformers.integrations.moe"


class ExpertLinear(nn.Module):
    """One projection of one expert, as a linear layer to convert: views of the stacked parameters.

    Attributes:
        weight: [n, k].
        bias: [n] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias


class QLoRAExperts(nn.Module):
    """The experts of a block as single layers, in place of transformers' module of stacked parameters.

    It computes what that does in its eager form: each token's sum of its experts' outputs, in the order of the
    experts. Only experts that were chosen run, and only they get gradients. A forward pass waits for the device
    once, to learn how many tokens each expert has. How long the loop is depends on that, so `torch.compile` runs
    it as it is, between graphs.

    Attributes:
        projections: names of the two lists of layers, "gate_up_proj" (or "up_proj" where there is no gate) and
            "down_proj"; entry e of each is expert e's layer.
        num_experts: E.
    """

    def __init__(self, experts: nn.Module) -> None:
        """Lists without layers yet; `experts` (see `is_experts`) is not changed, nor are its weights kept."""
        super().__init__()
        self.projections = projections(experts)
        self.num_experts: int = experts.num_experts
        for name in self.projections:
            self.add_module(name, nn.ModuleList())
        # In a tuple it is no submodule: it has nothing to train, move or save.
        self._original = (_without_parameters(experts),)
        self.train(experts.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum over the chosen experts e of weight_e * down_e(act(gate_up_e(x))).

        Args:
            hidden_states: x [m, k].
            top_k_index: [m, top_k], the experts of each token; numbers from E on stand for none.
            top_k_weights: [m, top_k], the weights of their outputs.

        Returns:
            [m, k], in the dtype of `hidden_states`.
        """
        rows = self._rows()
        run = self._forward_all if rows is None else partial(self._forward_rows, rows)
        if torch.compiler.is_compiling():
            run = torch.compiler.disable(run)
        return run(hidden_states, top_k_index, top_k_weights)

    def _rows(self) -> tuple[str | None, ...] | None:
        """The adapter's name for each row of the batch, where rows differ: a layer knows it if it has that adapter."""
        known = [layer.rows for layer in self._layers() if getattr(layer, "rows", None) is not None]
        if not known:
            return None
        return tuple(next(filter(None, names), None) for names in zip(*known, strict=True))

    def _layers(self) -> list[nn.Module]:
        return [layer for name in self.projections for layer in getattr(self, name)]

    def _forward_rows(
        self, rows: tuple[str | None, ...], hidden_states: Tensor, *routing: Tensor
    ) -> Tensor:
        """The layers see an expert's tokens, not rows of the batch: so the rows of one adapter after the other."""
        if not rows or len(hidden_states) % len(rows):
            raise ValueError(
                f"an adapter for each of {len(rows)} rows needs as many tokens in each;"
                f" got {len(hidden_states)} tokens in all"
            )
        numbers = torch.arange(len(hidden_states)).view(len(rows), -1)
        out = torch.empty_like(hidden_states)
        for name in dict.fromkeys(rows):
            own = [number for number, other in enumerate(rows) if other == name]
            tokens = numbers[own].flatten().to(hidden_states.device)
            with self._using(name):
                part = self._forward_all(hidden_states[tokens], *(each[tokens] for each in routing))
            out = out.index_copy(0, tokens, part)
        return out

    @contextmanager
    def _using(self, name: str | None) -> Iterator[None]:
        """Within the block, all rows of the batch have this adapter, or none.

        Not by `select`: what a recomputed pass is held to is the selection for the rows, which is not another one.
        """
        before = [(layer, layer.active, layer.rows) for layer in self._layers()]
        try:
            for layer, _, _ in before:
                layer.active, layer.rows = ({name: 1.0} if name in layer.adapters else {}), None
            yield
        finally:
            for layer, active, rows in before:
                layer.active, layer.rows = active, rows

    def _forward_all(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        chosen, order = top_k_index.reshape(-1).sort(stable=True)
        counts = _counts(chosen, self.num_experts)
        tokens = order // top_k_index.shape[-1]
        # Gathered and split as a whole: the gradient of a part alone is as large as that of all.
        parts = zip(
            hidden_states[tokens].split(counts),
            top_k_weights.reshape(-1, 1)[order].split(counts),
            tokens.split(counts),
            strict=True,
        )
        up, down = (getattr(self, name) for name in self.projections)
        out = torch.zeros_like(hidden_states)
        for expert, (x, weights, rows) in zip(range(self.num_experts), parts, strict=False):
            if len(rows):
                y = down[expert](self._activate(up[expert](x)))
                out.index_add_(0, rows, (y * weights).to(out.dtype))
        return out

    def _activate(self, x: Tensor) -> Tensor:
        """The original's own: many clamp, some interleave gate and up."""
        original = self._original[0]
        return original._apply_gate(x) if original.has_gate else original.act_fn(x)

    def split(self, name: str, stacked: Tensor) -> dict[str, Tensor]:
        """The parts of a stacked parameter or bias of transformers' module, by their names in this one."""
        return split_stacked(self._original[0], name, stacked)

    @property
    def is_dense(self) -> bool:
        """Whether all layers are plain linear ones, as merging leaves them."""
        return all(type(layer) is nn.Linear for layer in self._layers())

    def to_dense(self) -> nn.Module:
        """transformers' module again, with the weights of the layers stacked, if `is_dense`."""
        original = self._original[0]
        dense = _without_parameters(original)
        for name in self.projections:
            layers = list(getattr(self, name))
            weights = [
                layer.weight.mT if original.is_transposed else layer.weight for layer in layers
            ]
            _set_frozen(dense, name, torch.stack(weights))
            if original.has_bias:
                _set_frozen(dense, f"{name}_bias", torch.stack([layer.bias for layer in layers]))
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"


def projections(experts: nn.Module) -> tuple[str, str]:
    """Names of the two stacked weights, in the order in which they are applied."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def is_experts(module: nn.Module) -> bool:
    """Whether this is an experts module of transformers that `QLoRAExperts` computes the same as.

    Its decorator `use_experts_implementation` states on each module what its parameters mean, for implementations
    of its own that replace the loop. All that these rely on is checked; what differs in another way is not taken.
    """
    decorated = getattr(type(module).forward, "__globals__", {}).get("__name__") == _TRANSFORMERS
    if not decorated or "forward" in vars(module):
        return False
    otherwise = ("_is_expert_parallel", "has_post_expert_norm")
    if any(getattr(module, name, False) for name in otherwise):
        return False
    names = projections(module)
    expected = dict.fromkeys(names, 3)
    if module.has_bias:
        expected |= {f"{name}_bias": 2 for name in names}
    found = dict(module.named_parameters())
    return (
        found.keys() == expected.keys()
        and next(module.buffers(), None) is None
        and all(parameter.is_floating_point() for parameter in found.values())
        and all(found[name].dim() == dim for name, dim in expected.items())
        and all(len(parameter) == module.num_experts for parameter in found.values())
    )


def expert_linears(experts: nn.Module) -> dict[str, ExpertLinear]:
    """The layers to convert of a module that `is_experts`, by their names in `QLoRAExperts`."""
    linears = {}
    parts: dict[str, Tensor] = {}
    for name, parameter in experts.named_parameters():
        parts |= split_stacked(experts, name, parameter.detach())
    for projection in projections(experts):
        for i in range(experts.num_experts):
            name = f"{projection}.{i}"
            linear = ExpertLinear(parts[f"{name}.weight"], parts.get(f"{name}.bias"))
            linears[name] = linear.train(experts.training)
    return linears


def with_siblings(chosen: Collection[str], linears: Mapping[str, nn.Module]) -> set[str]:
    """The chosen layers, and all others of the modules of experts that some of them are in: these go together."""
    experts = {
        name: _module(name) for name, layer in linears.items() if isinstance(layer, ExpertLinear)
    }
    modules = {experts[name] for name in chosen if name in experts}
    return {*chosen, *(name for name, module in experts.items() if module in modules)}


def place_experts(model: nn.Module, layers: Iterable[str]) -> None:
    """Put a `QLoRAExperts` wherever some of these layers of `expert_linears` are to be set, in place."""
    modules = {_module(name) for name in layers}
    placed: dict[nn.Module, QLoRAExperts] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name in modules and is_experts(module):
            if module not in placed:
                placed[module] = QLoRAExperts(module)
            model.set_submodule(name, placed[module])


def restore_experts(model: nn.Module) -> nn.Module:
    """Replace every `QLoRAExperts` whose layers are `nn.Linear` by now by transformers' own module, in place."""
    dense: dict[QLoRAExperts, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, QLoRAExperts) and module.is_dense:
            if module not in dense:
                dense[module] = module.to_dense()
            model.set_submodule(name, dense[module])
    return model


def stack_sizes(model: nn.Module) -> dict[str, int]:
    """How many experts there are, by the name of the stack: `model.layers.0.mlp.experts.gate_up_proj`."""
    return {
        plain_name(f"{name}.{projection}"): module.num_experts
        for name, module in model.named_modules()
        if isinstance(module, QLoRAExperts)
        for projection in module.projections
    }


def _module(layer: str) -> str:
    """The experts' module, of a layer's name."""
    return ".".join(layer.split(".")[:-2])


def _counts(chosen: Tensor, num_experts: int) -> list[int]:
    """How many entries of the sorted numbers each expert has, and last how many are no expert's."""
    if chosen.is_meta:  # no values: evenly spread, which takes the same memory
        even, more = divmod(len(chosen), num_experts)
        return [even + (expert < more) for expert in range(num_experts)] + [0]
    numbers = torch.arange(num_experts + 1, device=chosen.device, dtype=chosen.dtype)
    bounds = [*torch.searchsorted(chosen, numbers).tolist(), len(chosen)]
    return [end - start for start, end in pairwise(bounds)]


def split_stacked(experts: nn.Module, name: str, stacked: Tensor) -> dict[str, Tensor]:
    """The parts of a stacked parameter or bias of a module that `is_experts`, by their names in `QLoRAExperts`."""
    projection = name.removesuffix("_bias")
    if name != projection:
        return {f"{projection}.{i}.bias": part for i, part in enumerate(stacked.unbind())}
    weights = stacked.mT if experts.is_transposed else stacked
    return {f"{projection}.{i}.weight": part for i, part in enumerate(weights.unbind())}


def _without_parameters(experts: nn.Module) -> nn.Module:
    bare = copy.copy(experts)
    bare._parameters = dict.fromkeys(experts._parameters)
    return bare


def _set_frozen(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=False))
