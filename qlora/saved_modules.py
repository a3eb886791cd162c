"""`SavedModule`: a module that an adapter trains as a whole, PEFT's `modules_to_save`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapter import AdapterHost
from qlora.functional import in_autocast_dtype
from qlora.model_parts import rename_ties, replace_module


class SavedModule(AdapterHost):
    """A frozen module, and for each adapter that trains it whole a copy of its own.

    Attributes:
        original: the module as it was.
        adapters: the copies, by the adapter's name.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original.requires_grad_(False)
        self.train(original.training)

    def add(
        self,
        name: str,
        values: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take in a copy under an adapter's name.

        Args:
            name: the adapter's.
            values: in place of the original's.
            dtype: what the copy is trained in, whatever dtype the model computes in.

        Raises:
            ValueError: the values are not the module's by name and shape.
        """
        trained = copy.deepcopy(self.original).requires_grad_(True).to(dtype)
        if values is not None:
            try:
                trained.load_state_dict(values)
            except RuntimeError as error:
                raise ValueError(" ".join(str(error).split())) from error
        self.adapters[name] = trained

    @property
    def module(self) -> nn.Module:
        """The copy in use, or the original."""
        for name in self.active if self.adapter_enabled else ():
            return self.adapters[name]
        return self.original

    @property
    def weight(self) -> nn.Parameter:
        """The weight in use: models look at that of their embeddings."""
        return self.module.weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module in use gives; where rows have adapters of their own, one input [rows, ...]."""
        self._check_recomputed()
        if self.rows is None or not self.adapter_enabled:
            module = self.module
            same = module is self.original
            return module(*args, **kwargs) if same else self._cast(module, *args, **kwargs)
        if len(args) != 1:
            raise ValueError(
                f"a module that is trained whole must have one input by position where rows have adapters of "
                f"their own; got {len(args)}"
            )
        (x,) = args
        y = self.original(x, **kwargs)
        for name, rows in self._rows_of(x).items():
            y = y.index_copy(
                0, rows, self._cast(self.adapters[name], x[rows], **kwargs).to(y.dtype)
            )
        return y

    def _cast(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A copy's output in the dtype in which the original would give it; autocast sees to its own."""
        floats = [x for x in (*args, *kwargs.values()) if _is_float(x)]
        own, usual = (next(m.parameters()).dtype for m in (module, self.original))
        if own == usual or any(in_autocast_dtype(x) is not x for x in floats):
            return module(*args, **kwargs)
        y = module(*_in_dtype(args, own), **_in_dtype(kwargs, own))
        return _in_dtype(y, floats[0].dtype if floats else usual)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _in_dtype(values: Any, dtype: torch.dtype) -> Any:
    """With all floating tensors in it cast, also those in tuples, lists and dicts."""
    if type(values) in (tuple, list):
        return type(values)(_in_dtype(value, dtype) for value in values)
    if type(values) is dict:
        return {name: _in_dtype(value, dtype) for name, value in values.items()}
    return values.to(dtype) if _is_float(values) else values


def as_saved_module(model: nn.Module, name: str) -> SavedModule:
    """The SavedModule called `name`, which takes a plain module's place in the model."""
    module = model.get_submodule(name)
    if isinstance(module, SavedModule):
        return module
    wrapped = SavedModule(module)
    replace_module(model, module, wrapped)
    rename_ties(model, name, f"{name}.original")
    return wrapped
