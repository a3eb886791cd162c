"""Codebooks from their definitions: each holds its conditions, and AF4 is the published one."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch

from paper_repro.measures import codebooks
from paper_repro.measures.codebooks import (
    AF4_PUBLISHED,
    CELLS,
    EDGES,
    KEPT,
    Mass,
    af4,
    least_absolute,
    lloyd_max,
    normal_mass,
    register,
    weights_mass,
)
from qlora import dequantize_4bit, quantize_4bit
from qlora.kernels.formats import FORMATS

CENTRES = (EDGES[1:] + EDGES[:-1]) / 2


@pytest.fixture(autouse=True)
def _formats_as_they_were() -> Iterator[None]:
    codebooks.normal_mass.cache_clear()
    with mock.patch.dict(FORMATS):
        yield


@pytest.mark.parametrize("blocksize", AF4_PUBLISHED)
def test_af4_is_the_published_one(blocksize: int) -> None:
    assert af4(blocksize) == pytest.approx(AF4_PUBLISHED[blocksize], abs=1e-5)


def test_the_mass_of_normal_blocks_is_that_of_draws() -> None:
    draws = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    drawn = weights_mass([draws], 64).cells.reshape(32, -1).sum(1)
    expected = normal_mass(64, 2).cells.reshape(32, -1).sum(1)
    assert drawn == pytest.approx(expected, abs=1.2e-3)
    assert expected.sum() == pytest.approx(1)
    assert expected == pytest.approx(expected[::-1])


def _error(values: tuple[float, ...], mass: Mass, power: int) -> float:
    """The expected error of rounding to the nearest value."""
    distance = np.abs(CENTRES[:, None] - np.array(values)).min(1)
    return float((distance**power * mass.cells).sum())


def test_no_step_of_a_value_makes_the_error_less() -> None:
    absolute, squared = normal_mass(64, 0), normal_mass(64, 2)
    for values, mass, power, kept in (
        (least_absolute(64), absolute, 1, KEPT),
        (lloyd_max(squared), squared, 2, KEPT),
        (lloyd_max(squared, ()), squared, 2, ()),
    ):
        least = _error(values, mass, power)
        assert least < _error(codebooks.NF4_VALUES, mass, power)
        for i, value in enumerate(values):
            if value not in kept:
                for step in (-0.003, 0.003):
                    moved = (*values[:i], value + step, *values[i + 1 :])
                    assert _error(moved, mass, power) > least


def test_af4_has_more_absolute_error_than_the_least() -> None:
    mass = normal_mass(64, 0)
    assert _error(af4(64), mass, 1) > 1.02 * _error(least_absolute(64), mass, 1)


def test_what_is_kept_stays() -> None:
    mass = normal_mass(256, 2)
    kept, free = lloyd_max(mass), lloyd_max(mass, ())
    assert set(KEPT) <= set(kept)
    assert max(map(abs, free)) < 1
    assert free == pytest.approx([-value for value in reversed(free)], abs=1e-6)
    assert list(kept) == sorted(kept)


def test_a_codebook_fitted_to_weights_has_less_squared_error_on_them() -> None:
    generator = torch.Generator().manual_seed(0)
    heavy = torch.randn(256, 256, generator=generator) ** 3
    fitted = register(lloyd_max(weights_mass([heavy], 64), ()))
    normal = register(lloyd_max(normal_mass(64, 2), ()))
    errors = {
        name: (dequantize_4bit(quantize_4bit(heavy, name, 64, False)) - heavy).square().mean()
        for name in ("nf4", normal, fitted)
    }
    assert errors[fitted] < 0.98 * min(errors["nf4"], errors[normal])


def test_a_short_block_counts_its_own_weights_alone() -> None:
    cells = weights_mass([torch.tensor([2.0, -1.0, 1.0])], 64).cells
    assert cells[[CELLS // 4, 3 * CELLS // 4, CELLS - 1]] == pytest.approx(1 / 3)
    assert cells.sum() == pytest.approx(1)


def test_a_name_stands_for_its_values_alone() -> None:
    one, other = af4(64), af4(4096)
    assert register(one) == register(one)
    assert register(one) != register(other)
    assert FORMATS[register(one)].values == pytest.approx(one, abs=1e-7)
