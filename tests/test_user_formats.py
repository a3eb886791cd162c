"""Data types of one's own: what is refused, and random codebooks through the reference, the CPU path and the kernels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qlora
from qlora.adapter_files import read_config
from qlora.kernels import cpu, formats, linear, nf4, reference
from qlora.kernels.formats import FORMATS
from qlora.kernels.user_formats import check_stored, register_format, stored_codebook
from qlora.pretrained import load_quantized, quantize_folder
from qlora.recipe import TrainConfig
from qlora.train import train
from tests import strategies as qst
from tests import test_functional, test_linear, tiny
from tests.on_device import DEVICES, assert_identical, launch

SYMMETRIC = [(2 * i - 15) / 15 for i in range(16)]
"""Sixteen equal steps, no zero."""

STEP = 0.032  # of the grid that random values lie near, more than 4 / 127


@st.composite
def codebooks(draw: st.DrawFn) -> list[float]:
    """2 to 16 different values near a grid, some as near to each other as they may be; in any order, with repeats."""
    places = st.integers(-30, 30)
    if draw(st.booleans()):
        places = st.integers(-4, 11)  # neighbours on the grid
    offsets = st.sampled_from([-0.016, 0.016, 0.0]) | st.integers(-160, 160).map(lambda i: i * 1e-4)
    chosen = draw(st.lists(places, min_size=1, max_size=15, unique=True))
    values = [place * STEP + draw(offsets) for place in chosen]
    values.append(draw(st.sampled_from([-1.0, 1.0])))
    missing = 16 - len(values)
    values += draw(st.lists(st.sampled_from(values), min_size=missing, max_size=missing))
    return draw(st.permutations(values))


def registered(values: list[float]) -> str:
    """The name of a format with these values, another one for others: tables are kept by name."""
    name = "own-" + format(abs(hash(tuple(torch.tensor(values).tolist()))), "x")
    register_format(name, values)
    return name


def around(x: Tensor, steps: int = 20) -> Tensor:
    """Each fp32 value, and its neighbours on both sides."""
    above, below = [x], [x]
    for _ in range(steps):
        above.append(above[-1].nextafter(torch.tensor(torch.inf)))
        below.append(below[-1].nextafter(torch.tensor(-torch.inf)))
    return torch.cat([*above, *below[1:]])


# --- What is refused --------------------------------------------------------------------------------


def changed(position: int, value: float) -> list[float]:
    return [*SYMMETRIC[:position], value, *SYMMETRIC[position + 1 :]]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (SYMMETRIC[:15], ValueError, r"16 numbers; got 15: \[-1.0, "),
        ([*SYMMETRIC, 0.5], ValueError, "16 numbers; got 17"),
        (changed(3, float("nan")), ValueError, r"finite and in \[-1, 1\]; got \[nan\]"),
        (changed(3, float("-inf")), ValueError, r"finite and in \[-1, 1\]; got \[-inf\]"),
        (changed(3, 1.001), ValueError, r"finite and in \[-1, 1\]; got \[1.001\]"),
        ([0.7] * 16, ValueError, "two different ones in fp32; got 0.699999.* 16 times"),
        ([1.0, 1 - 1e-12] * 8, ValueError, "two different ones in fp32; got 1.0 16 times"),
        ([v * 0.49 for v in SYMMETRIC], ValueError, "1/2 or more.*at most 0.49.*divide"),
        (
            [*SYMMETRIC[:13], 0.001, 0.002, 0.003],
            ValueError,
            "midpoints of 0.001.*, 0.002.* and 0.003.* fall into the same of 128",
        ),
        (["one"] * 16, TypeError, "values must be 16 numbers; got"),
        (0.5, TypeError, "values must be 16 numbers; got 0.5"),
    ],
)
def test_what_is_refused_says_which_values(
    values: list[float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        register_format("refused", values)
    assert "refused" not in FORMATS


@pytest.mark.parametrize("name", ["", "a b", "../up", "ä", "x" * 65, "end\n", None, 4])
def test_names_are_those_that_files_may_have(name: str) -> None:
    with pytest.raises(ValueError, match="1 to 64 letters, digits, '_' or '-'; got"):
        register_format(name, SYMMETRIC)


@pytest.mark.parametrize("name", ["nf4", "int4", "none"])
def test_built_in_names_stay(name: str) -> None:
    with pytest.raises(ValueError, match=f"must not be that of a built-in format.*'{name}'"):
        register_format(name, SYMMETRIC)


def test_a_name_stands_for_one_codebook() -> None:
    register_format("twice", SYMMETRIC)
    for again in (tuple(SYMMETRIC), np.array(SYMMETRIC), torch.tensor(SYMMETRIC), iter(SYMMETRIC)):
        register_format("twice", again)
    with pytest.raises(
        ValueError, match=r"'twice' is registered with other values, .*another name"
    ):
        register_format("twice", SYMMETRIC[::-1])
    assert FORMATS["twice"].values == tuple(torch.tensor(SYMMETRIC).tolist())


def test_an_unknown_name_says_how_to_make_it_known() -> None:
    with pytest.raises(ValueError, match=r"qlora.register_format\(name, values\); got 'unknown'"):
        formats.check_format("unknown")


def test_a_file_is_held_to_the_values_beside_the_name() -> None:
    register_format("stored", SYMMETRIC)
    held = json.loads(json.dumps(stored_codebook("stored")))
    check_stored("stored", held)
    check_stored("nf4", stored_codebook("nf4"))
    check_stored(None, stored_codebook(None))
    with pytest.raises(ValueError, match="'stored' stands for other values than in the file"):
        check_stored("stored", held[::-1])
    with pytest.raises(ValueError, match=r"'stored' stands for other values .* none there"):
        check_stored("stored", None)
    with pytest.raises(ValueError, match=r"'nf4' stands for other values .* built in here"):
        check_stored("nf4", held)
    with pytest.raises(ValueError, match=r"format must be one of nf4.*'absent'"):
        check_stored("absent", None)
    with pytest.raises(
        ValueError, match=r"call qlora.register_format\('absent', \[-1.0, "
    ) as error:
        check_stored("absent", held)
    call = re.search(r"register_format\('absent', (.*)\) first", str(error.value))
    register_format("absent", json.loads(call.group(1)))
    check_stored("absent", held)


# --- Any codebook, everywhere -----------------------------------------------------------------------


@settings(max_examples=40)
@given(codebooks())
def test_a_cell_and_one_comparison_give_the_rank(values: list[float]) -> None:
    """What is not refused is found by the kernels' look-up, around each threshold and over the whole range."""
    fmt = FORMATS[registered(values)]
    thresholds = torch.cat([fmt.thresholds, torch.tensor([torch.inf])])
    x = torch.cat([around(thresholds[thresholds.isfinite()]), torch.linspace(-1, 1, 2001)])
    base = fmt.cell_ranks[formats.cell(x)].long()
    assert torch.equal(base + (x > thresholds[base]), torch.bucketize(x, fmt.thresholds))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=30)
@given(codebooks(), qst.tensors(), qst.small_blocksizes, qst.dtypes)
def test_codes_and_values_are_the_same_everywhere(
    device: str, values: list[float], x: Tensor, blocksize: int, dtype: torch.dtype
) -> None:
    """Bit for bit: the reference, which takes the nearest value, the CPU path and the kernel."""
    name = registered(values)
    packed, absmax = reference.quantize_4bit(x, name, blocksize)
    assert_identical(cpu.quantize_4bit(x, name, blocksize), (packed, absmax))
    assert_identical(launch(device, nf4.quantize_4bit, x, name, blocksize), (packed, absmax))

    arguments = (packed, absmax, None, None, name, blocksize, "", list(x.shape), dtype)
    dense = reference.dequantize_4bit(*arguments)
    assert_identical(cpu.dequantize_4bit(*arguments), dense)
    assert_identical(launch(device, nf4.dequantize_4bit, *arguments), dense)

    normalized, _ = reference.normalize(reference.to_blocks(x, blocksize))
    normalized = normalized.view(-1)[: x.numel(), None].double()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: x.numel()].long()
    table = torch.tensor(values, dtype=torch.float32).double()
    distance = (normalized - table[codes, None]).abs()
    assert (distance[:, 0] <= (normalized - table).abs().amin(1) + 2**-24).all()


@settings(max_examples=20)
@given(codebooks(), qst.dtypes, qst.seeds)
def test_a_layer_and_its_gradients(values: list[float], dtype: torch.dtype, seed: int) -> None:
    made = test_functional.layer(
        9, n=20, k=64, rank=4, dtype=dtype, seed=seed, format=registered(values)
    )
    test_functional.assert_layer_follows_the_oracle(made, made())


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=12)
@given(codebooks(), qst.dtypes, st.sampled_from([2, 20]), st.integers(0, 1000))
def test_the_kernels_of_a_layer(
    device: str, values: list[float], dtype: torch.dtype, m: int, seed: int
) -> None:
    """Two tokens are looked up in registers, in 16 bits; more of them in shared memory."""
    layer = test_linear.Layer(m=m, n=40, k=96, dtype=dtype, format=registered(values), seed=seed)
    test_linear._check(device, linear, layer)


def test_weights_of_zero() -> None:
    """They stay zeros if the codebook has one, and zero blocks do in any case while scales are not quantized."""
    zeros = torch.zeros(100)
    register_format("without-zero", SYMMETRIC)
    register_format("with-zero", [*SYMMETRIC[:15], -0.0])
    assert str(FORMATS["with-zero"].values[15]) == "0.0", "without its sign"
    for name in ("with-zero", "without-zero"):
        packed, absmax = reference.quantize_4bit(zeros, name, 64)
        rest = (name, 64, "", [100], torch.float32)
        assert reference.dequantize_4bit(packed, absmax, None, None, *rest).eq(0).all()
    x = torch.tensor([1.0, 0.0, -0.5])
    packed, absmax = reference.quantize_4bit(x, "with-zero", 64)
    rest = ("with-zero", 64, "", [3], torch.float32)
    assert reference.dequantize_4bit(packed, absmax, None, None, *rest)[1] == 0


# --- From a model to files and back -----------------------------------------------------------------


def assert_refused_under_another_meaning(name: str, read: Callable[[], object]) -> None:
    """Where `name` is not known, and where it stands for other values."""
    values = list(FORMATS[name].values)
    with mock.patch.dict(FORMATS):
        del FORMATS[name]
        with pytest.raises(ValueError, match=r"qlora\.register_format"):
            read()
        register_format(name, values[::-1])
        with pytest.raises(ValueError, match=f"{re.escape(str(values))[:20]}"):
            read()
    read()


def test_training_an_adapter_and_merging_it(tmp_path: Path) -> None:
    register_format("trained", SYMMETRIC)
    model = tiny.quantized(tiny.llama(), format="trained")
    recipe = TrainConfig(steps=3, learning_rate=1e-2, gradient_accumulation_steps=1)
    train(model, tiny.examples(), recipe, tmp_path, progress=False)
    expected = tiny.logits(model, tiny.tokens())
    assert not torch.equal(expected, tiny.logits(tiny.quantized(tiny.llama()), tiny.tokens()))

    config = read_config(tmp_path)
    assert config.format == "trained"
    again = tiny.llama()
    qlora.quantize_model(again, config)

    def load() -> None:
        qlora.load_adapter(again, tmp_path)

    assert_refused_under_another_meaning("trained", load)
    assert torch.equal(tiny.logits(again, tiny.tokens()), expected)
    assert_refused_under_another_meaning("trained", lambda: read_config(tmp_path))
    merged = tiny.logits(qlora.merge(model), tiny.tokens())
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_a_quantized_folder_and_a_state_dict(tmp_path: Path) -> None:
    register_format("kept", SYMMETRIC)
    source, config = tiny.model_folder(tmp_path / "dense"), qlora.QLoRAConfig(format="kept", rank=4)
    quantize_folder(source, tmp_path / "kept", config)
    model, _ = load_quantized(tmp_path / "kept", config)
    expected, _ = load_quantized(source, config)
    assert torch.equal(tiny.logits(model, tiny.tokens()), tiny.logits(expected, tiny.tokens()))
    state = {name: value.clone() for name, value in expected.state_dict().items()}
    with mock.patch.dict(FORMATS):
        del FORMATS["kept"]
        register_format("kept", SYMMETRIC[::-1])
        with pytest.raises(ValueError, match=r"state_dict must hold a weight with .*'codebook'"):
            model.load_state_dict(state)
    model.load_state_dict(state)
    assert_refused_under_another_meaning(
        "kept", lambda: load_quantized(tmp_path / "kept", qlora.QLoRAConfig(format="kept"))
    )
