"""The codebooks, against the papers and against bitsandbytes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import pytest
import torch

from qlora.kernels import formats
from qlora.kernels.formats import FORMATS, SCALE_FORMATS

ROOT = Path(__file__).resolve().parents[1]


def _linspace(start: float, stop: float, count: int) -> list[float]:
    return [start + (stop - start) * i / (count - 1) for i in range(count)]


def test_nf4_is_derived_from_normal_quantiles() -> None:
    """QLoRA, section 3: 8 quantiles for the positive half, 7 for the negative, and an exact zero."""
    offset = 1 - (1 / 30 + 1 / 32) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in _linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in _linspace(offset, 0.5, 8)[:-1]]
    derived = sorted([*negative, 0.0, *positive])
    derived = torch.tensor([v / max(derived) for v in derived])
    torch.testing.assert_close(derived, torch.tensor(FORMATS["nf4"].values), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "magnitudes"),
    [
        ("fp4", [0, 0.00520833, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1]),
        ("e2m1", [0, 1 / 12, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1]),
        ("e3m0", [0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]),
    ],
)
def test_sign_magnitude_formats(name: str, magnitudes: list[float]) -> None:
    values = FORMATS[name].values
    assert sorted(values[:8]) == pytest.approx(magnitudes, abs=1e-8)
    assert [-v for v in values[:8]] == list(values[8:])


def test_e2m1_and_e3m0_codes_are_the_bits_of_the_number() -> None:
    for sign in (0, 1):
        for exponent in range(4):
            for mantissa in (0, 1):
                normal = 2.0 ** (exponent - 1) * (1 + mantissa / 2)
                value = (normal if exponent else mantissa / 2) / 6
                code = sign << 3 | exponent << 1 | mantissa
                assert FORMATS["e2m1"].values[code] == (-1) ** sign * value
    assert [FORMATS["e3m0"].values[e] for e in range(1, 8)] == [2.0 ** (e - 7) for e in range(1, 8)]


def test_int4_is_twos_complement() -> None:
    for code in range(16):
        assert FORMATS["int4"].values[code] == (code if code < 8 else code - 16) / 7


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_thresholds_are_the_midpoints_of_neighbours(name: str) -> None:
    fmt = FORMATS[name]
    values = sorted({v + 0.0 for v in fmt.values})
    finite = fmt.thresholds[fmt.thresholds.isfinite()]
    expected = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(finite, (expected[:-1] + expected[1:]) / 2)
    assert fmt.thresholds.shape == (15,)
    ranked = [fmt.values[code] for code in fmt.rank_to_code]
    assert ranked[: len(values)] == values
    assert len(ranked) == 16


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_format_reaches_both_ends_and_zero(name: str) -> None:
    values = FORMATS[name].values
    assert {-1.0, 0.0, 1.0} <= set(values)


def _floats_around(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Each fp32 value, and `steps` neighbouring floats on both sides of it."""
    above, below = [x], [x]
    for _ in range(steps):
        above.append(above[-1].nextafter(torch.tensor(torch.inf)))
        below.append(below[-1].nextafter(torch.tensor(-torch.inf)))
    return torch.cat([*above, *below[1:]])


CELL_EDGES = torch.tensor([(2 * i - 1) / (formats.CELLS - 1) - 1 for i in range(1, formats.CELLS)])


def _rank_by_cells(name: str, x: torch.Tensor) -> torch.Tensor:
    """The rank as the kernel finds it: a look-up and one comparison."""
    thresholds = torch.cat([FORMATS[name].thresholds, torch.tensor([torch.inf])])
    base = FORMATS[name].cell_ranks[formats.cell(x)].long()
    return base + (x > thresholds[base])


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_cell_and_one_comparison_give_the_rank(name: str) -> None:
    """Around each threshold, each cell edge, zero and the ends, and on a fine grid with random floats."""
    thresholds = FORMATS[name].thresholds
    special = torch.cat([thresholds[thresholds.isfinite()], CELL_EDGES, torch.tensor([-1.0, 0, 1])])
    grid = torch.linspace(-1, 1, 2**20 + 1)
    random = torch.rand(2**20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = torch.cat([_floats_around(special, 300), grid, random, random**9])
    assert torch.equal(_rank_by_cells(name, x), torch.bucketize(x, thresholds))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_no_cell_holds_two_thresholds(name: str) -> None:
    fmt = FORMATS[name]
    finite = fmt.thresholds[fmt.thresholds.isfinite()]
    assert len(set(formats.cell(finite).tolist())) == len(finite)
    assert fmt.cell_ranks.dtype == torch.uint8
    assert fmt.cell_ranks.shape == (formats.CELLS,)
    assert fmt.cell_ranks.tolist() == sorted(fmt.cell_ranks.tolist())


def test_cells_never_decrease_and_fill_their_range() -> None:
    """All of [-1, 1], what is a little beyond it, and every float next to an edge."""
    x = torch.cat([_floats_around(CELL_EDGES, 300), torch.linspace(-1.01, 1.01, 2**20)]).sort()[0]
    cells = formats.cell(x)
    assert (cells.diff() >= 0).all()
    assert cells.unique().tolist() == list(range(formats.CELLS))
    # Zero is a border: what is above it, and above the rounding of the sum, is in another cell.
    assert formats.cell(torch.tensor([-1e-6, 0.0, 1e-6])).tolist() == [63, 64, 64]


def test_a_format_with_two_thresholds_in_a_cell_is_refused() -> None:
    crowded = formats.Format(
        "crowded", tuple([-1.0, 0.0, 0.001, 0.002] + [i / 12 for i in range(1, 13)])
    )
    with pytest.raises(ValueError, match="'crowded' must lie in 15 different cells of 128"):
        crowded.cell_ranks  # noqa: B018


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_code_bytes_translate_both_nibbles(name: str) -> None:
    codes = FORMATS[name].rank_to_code
    table = formats.code_bytes(name, torch.device("cpu"))
    if table is None:
        assert name == "nf4"
        assert codes == tuple(range(16))
    else:
        assert table.tolist() == [codes[i // 16] * 16 + codes[i % 16] for i in range(256)]


def test_dynamic_map_follows_its_definition() -> None:
    values = SCALE_FORMATS["dynamic8"].values
    assert len(values) == len(set(values)) == 256
    assert sum(v < 0 for v in values) == 127
    assert values[127] == 0
    assert values[-1] == 1
    assert values[0] == pytest.approx(-0.99297, abs=1e-5)
    for value in values[:127]:
        assert -value in values
    # The finest decade holds one value, the coarsest 64.
    for i in range(7):
        decade = [v for v in values if 10.0 ** (i - 7) < v < 10.0 ** (i - 6)]
        assert len(decade) == 2**i


def test_e4m3_map_holds_the_finite_float8_values() -> None:
    values = SCALE_FORMATS["e4m3"].values
    distinct = sorted(set(values))
    assert len(distinct) == 253
    for value in distinct:
        assert torch.tensor(value * 448).to(torch.float8_e4m3fn).float() == pytest.approx(
            value * 448
        )
    assert math.copysign(1, values[126]) == 1
    assert values[126] == 0


@pytest.mark.parametrize("name", sorted(SCALE_FORMATS))
def test_scale_thresholds_are_midpoints(name: str) -> None:
    fmt = SCALE_FORMATS[name]
    values, thresholds = torch.tensor(fmt.values), fmt.thresholds
    assert thresholds.shape == (255,)
    between = values[1:] > values[:-1]
    assert torch.equal(thresholds[between], ((values[:-1] + values[1:]) / 2)[between])
    assert thresholds[~between].isinf().all()
    assert (thresholds[1:] >= thresholds[:-1]).all()


def test_codebooks_are_those_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    nf4 = bnb.get_4bit_type("nf4", device="cpu")
    fp4 = bnb.get_4bit_type("fp4", device="cpu")
    dynamic = bnb.create_dynamic_map(signed=True)
    cpu = torch.device("cpu")
    assert torch.equal(nf4, formats.codebook("nf4", cpu))
    assert torch.equal(fp4, formats.codebook("fp4", cpu))
    assert torch.equal(dynamic, formats.scale_codebook("dynamic8", cpu))
    for signed in (True, False):
        mapped = bnb.create_dynamic_map(signed=signed)
        assert torch.equal(mapped, formats.state_codebook(signed, cpu))


# --- Optimizer state --------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_a_states_cell_and_one_comparison_give_the_rank(signed: bool) -> None:
    """Around each threshold and each cell edge, at the ends, and on random floats of many magnitudes."""
    thresholds = formats.state_format(signed).thresholds
    assert thresholds.isfinite().all()
    edges = (torch.arange(0x3F81, dtype=torch.int32) << 16).view(torch.float32)
    edges = edges[(edges <= 1) & (edges > 1e-12)]
    special = torch.cat([thresholds, edges, torch.tensor([0.0, 1.0, 2.0**-31, 1e-45])])
    random = torch.rand(2**18, generator=torch.Generator().manual_seed(0))
    x = torch.cat([_floats_around(special, 2), random, random**8, torch.tensor([-0.0])])
    x = torch.cat([x, -x]) if signed else x[x >= 0]
    padded = torch.cat([thresholds, torch.tensor([torch.inf])])
    cells = formats.state_cell(x, signed)
    assert cells.min() >= 0
    assert cells.max() < formats.STATE_CELLS
    base = formats.state_cell_ranks(signed, torch.device("cpu"))[cells.long()].long()
    assert torch.equal(base + (x > padded[base]), torch.bucketize(x, thresholds))


@pytest.mark.parametrize("signed", [True, False])
def test_the_zero_of_a_state(signed: bool) -> None:
    code = formats.state_zero_code(signed)
    assert formats.state_format(signed).values[code] == 0
    assert code == (127 if signed else 0)


@pytest.mark.parametrize(("numel", "tiles"), [(0, 0), (1, 1), (1024, 1), (1025, 2)])
def test_tiles_of_a_state(numel: int, tiles: int) -> None:
    assert formats.STATE_TILE % formats.STATE_BLOCKSIZE == 0
    assert formats.state_tiles(numel) == tiles


@pytest.mark.parametrize(
    ("check", "bad", "allowed"),
    [
        (formats.check_format, "nf5", "nf4"),
        (formats.check_scale_format, "fp8", "e4m3"),
        (formats.check_blocksize, 48, "4096"),
        (formats.check_blocksize, 16, "32"),
    ],
)
def test_unknown_names_are_refused_with_what_is_allowed(check, bad, allowed) -> None:
    with pytest.raises(ValueError, match=str(bad)) as error:
        check(bad)
    assert allowed in str(error.value)


@pytest.mark.parametrize(
    "default", ["torch.set_default_dtype(torch.bfloat16)", "torch.set_default_device('meta')"]
)
def test_codebooks_do_not_hang_on_torchs_defaults(default: str) -> None:
    """Set before the first import, in a process of its own: a trap of the peers' readers."""
    program = f"""
import torch
{default}
from qlora.kernels import formats
cpu = torch.device("cpu")
for name in formats.SCALE_FORMATS:
    print([formats.scale_codebook(name, cpu).tolist(), formats.scale_thresholds(name, cpu).tolist()])
for name in formats.FORMATS:
    print([formats.codebook(name, cpu).tolist(), formats.thresholds(name, cpu).tolist()])
"""
    run = [sys.executable, "-c", program]
    printed = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    tables = [json.loads(line.replace("inf", "Infinity")) for line in printed.splitlines()]
    cpu = torch.device("cpu")
    scales = [
        [formats.scale_codebook(n, cpu).tolist(), formats.scale_thresholds(n, cpu).tolist()]
        for n in SCALE_FORMATS
    ]
    codes = [
        [formats.codebook(n, cpu).tolist(), formats.thresholds(n, cpu).tolist()] for n in FORMATS
    ]
    assert tables == scales + codes
