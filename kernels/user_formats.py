"""Data types of one's own: 16 values under a name, which then goes wherever a format is asked for.

All that a format needs follows from its values (`formats.Format`), so there is nothing else to write: the
reference, the CPU path and the kernels take any codebook, and training, files and merging know its name alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qlora.kernels import formats

BUILT_IN = tuple(formats.FORMATS)


def register_format(name: str, values: Iterable[float]) -> None:
    """Make a 4-bit data type of 16 values, which `name` then stands for wherever a format is asked for.

    A block is divided by its largest magnitude, and each weight becomes the nearest value; of two equally near
    the lower. Values may come in any order, which is that of the codes, and may repeat: then the lowest code is
    produced. Without a 0 among them, a weight of zero becomes the nearest value times its scale.

    The format holds for the process: a program that reads a file that names it registers it first.

    Args:
        name: letters, digits, "_" and "-", 64 at most; no built-in name, nor "none".
        values: 16 numbers in [-1, 1], rounded to fp32, at least one of them of magnitude 1/2 or more. Midpoints
            between neighbours decide, and must lie in different ones of `formats.CELLS` equal parts of [-1, 1].

    Raises:
        TypeError, ValueError: one of these does not hold, or the name stands for other values already; the message
            says which values.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise ValueError(f"name must be 1 to 64 letters, digits, '_' or '-'; got {name!r}")
    if name in (*BUILT_IN, "none"):
        raise ValueError(f"name must not be that of a built-in format, nor 'none'; got {name!r}")
    fmt = formats.Format(name, _checked_values(values))
    if (known := formats.FORMATS.setdefault(name, fmt)) != fmt:
        raise ValueError(
            f"format {name!r} is registered with other values, {list(known.values)}; got "
            f"{list(fmt.values)}; choose another name"
        )


def _checked_values(values: Iterable[float]) -> tuple[float, ...]:
    """As fp32 has them, without a negative zero."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise TypeError(f"values must be 16 numbers; got {values!r}") from error
    if len(numbers) != 16:
        raise ValueError(f"values must be 16 numbers; got {len(numbers)}: {numbers}")
    if outside := [number for number in numbers if not -1 <= number <= 1]:
        raise ValueError(f"values must be finite and in [-1, 1]; got {outside}")
    rounded = [number + 0.0 for number in _float32(numbers).tolist()]
    if len(set(rounded)) == 1:
        raise ValueError(f"values must have two different ones in fp32; got {rounded[0]} 16 times")
    if max(map(abs, rounded)) < 0.5:
        raise ValueError(
            "values must have one of magnitude 1/2 or more, as the largest weight of a block is at 1 or -1; "
            f"got at most {max(map(abs, rounded))}: divide them by their largest magnitude"
        )
    _check_distances(sorted(set(rounded)))
    return tuple(rounded)


def _check_distances(ascending: list[float]) -> None:
    """What `formats.Format.cell_ranks` needs, in terms of the values."""
    values = _float32(ascending)
    cells = formats.cell((values[:-1] + values[1:]) / 2).tolist()
    for i, (left, right) in enumerate(pairwise(cells)):
        if left == right:
            raise ValueError(
                f"values must not lie so close: the midpoints of {ascending[i]}, {ascending[i + 1]} and "
                f"{ascending[i + 2]} fall into the same of {formats.CELLS} parts of [-1, 1]; leave one of the three "
                f"out, or let the outer two differ by at least {4 / (formats.CELLS - 1):.4f}"
            )


def stored_codebook(format: str | None) -> list[float] | None:
    """What a file must say beside the name: the values of a registered format; None for a built-in one."""
    return None if format is None or format in BUILT_IN else list(formats.FORMATS[format].values)


def check_stored(format: str | None, codebook: Any) -> None:
    """Raise ValueError unless a file's `format` stands here for the values that the file has beside the name.

    Args:
        format: the name; None for a base that is not quantized.
        codebook: what `stored_codebook` gave where the file was written, or None if the file has nothing.
    """
    if format is not None and format not in formats.FORMATS and codebook is not None:
        raise ValueError(
            f"format {format!r} is not known here: call qlora.register_format({format!r}, {codebook}) first"
        )
    if format is not None:
        formats.check_format(format)
    if codebook != (own := stored_codebook(format)):
        raise ValueError(
            f"format {format!r} stands for other values than in the file: {own or 'built in'} here, "
            f"{codebook or 'none'} there"
        )


def _float32(values: list[float]) -> Tensor:
    """On the CPU, whatever torch's default device is."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")
