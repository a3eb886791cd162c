"""Every case of the benchmarks at a tiny size: ours and each peer that is installed are right, on the same bytes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qlora
from benchmarks import __main__ as program
from benchmarks import (
    ceilings,
    decoder_cases,
    dora_cases,
    kernel_cases,
    layer_cases,
    optimizer_cases,
    peers,
    results,
    step_cases,
    suite,
)
from benchmarks.harness import Case, Settings, Timing, _spoil, measure
from benchmarks.inputs import Inputs, Variant
from benchmarks.models import adapters
from qlora.kernels import formats

CPU = torch.device("cpu")
QUICKLY = Settings(seconds=0.0, min_rounds=1, max_rounds=1)
DTYPES = [torch.float32, torch.bfloat16]
TINY = (256, 128)
"""The smallest that torchao takes: 256 blocks, which its scales of scales need, and twice as many."""
GPU_CLOCKS = {
    "quantize": ("eager", "graph"),  # with the check for NaN, and without
    **dict.fromkeys(("dequantize", "forward", "layer", "crossover"), ("graph",)),
    "launch": ("host",),
    **dict.fromkeys(("decoder", "adamw", "step", "dora"), ("eager",)),
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "CONVERTED", {"cpu": [TINY]})
    monkeypatch.setattr(kernel_cases, "FORWARD", {"cpu": {m: [TINY] for m in (1, 8)}})
    monkeypatch.setattr(layer_cases, "LAYER", {"cpu": {8: [TINY]}})


def timings_of(case: Case) -> tuple[Timing, ...]:
    """Those of a case that is run once, all of whose contenders must be right."""
    timings = measure(case, QUICKLY, lambda call: call() and 1.0).timings
    assert timings[0].status == "timed", timings[0].reason
    assert {timing.status for timing in timings} <= {"timed", "not installed"}, timings
    assert set(case.targets) <= {timing.contender for timing in timings}
    return timings


@pytest.mark.usefixtures("tiny")
def test_all_kernel_cases_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "useful_dtypes", lambda device: DTYPES)
    path = tmp_path / "result.json"
    groups = "quantize,dequantize,forward,layer,adamw"
    arguments = ["--device", "cpu", "--quick", "--seconds", "0.001", "--only", groups]
    assert program.main([*arguments, "--output", str(path)]) == 0
    result = results.read(path)
    assert result["ceilings"].keys() == {"copy_gb_per_s", "product_tflop_per_s"}
    assert result["ceilings"]["product_tflop_per_s"].keys() == {"float32", "bfloat16"}
    cases = result["cases"]
    assert {case["group"] for case in cases} == set(groups.split(","))
    assert {case["parameters"]["dtype"] for case in cases} == {"float32", "bfloat16"}
    for case in cases:
        assert case["timings"][0]["status"] == "timed"
        assert {t["status"] for t in case["timings"]} <= {"timed", "not installed"}, case
    assert "quantize: 256 x 128, float32" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_dropout_is_drawn_again(dtype: torch.dtype) -> None:
    """The mask of every contender is known to its check, and the result of another mask is refused."""
    case = layer_cases.layer_case(Variant(CPU, dtype, *TINY, quick=True), 16, 0.25)
    assert case.name.endswith("16 tokens, rank 64, dropout 0.25")
    timings_of(case)
    one = case.inputs(0)
    for contender in case.contenders:
        if contender.check is not None and not contender.requires:
            result = contender.prepare(one)()  # not seeded
            with pytest.raises(AssertionError, match="error"):
                contender.check(one, result)


def test_a_wrong_gradient_is_refused() -> None:
    case = layer_cases.layer_case(Variant(CPU, torch.float32, *TINY, quick=True), 16, 0.0)
    one, ours = case.inputs(0), case.contenders[0]
    for index in range(4):
        result = ours.prepare(one)()
        result[index][0, 3] += 1.0
        with pytest.raises(AssertionError, match="error"):
            ours.check(one, result)


def test_torchao_is_held_to_its_own_bytes() -> None:
    pytest.importorskip("torchao")
    one = Inputs(CPU, torch.float32, *TINY, m=4, seed=0)
    oracle = peers.torchao_oracle(one.torchao)
    torch.testing.assert_close(one.torchao.get_original_weight(), oracle.float())
    assert (oracle - one.dense).abs().max() > 1e-3  # another tensor than ours
    with pytest.raises(AssertionError, match="its bytes"):
        kernel_cases._check_torchao_decoded(one, one.dense)
    with pytest.raises(AssertionError, match="error"):
        kernel_cases._check_torchao(one, one.x @ one.dense.mT)


# --- What a case says of itself ---------------------------------------------------------------------


def test_bytes_are_those_of_the_tensors() -> None:
    variant = Variant(CPU, torch.bfloat16, 320, 192, quick=False)
    one = Inputs(CPU, torch.bfloat16, 320, 192, m=8, seed=0)
    assert variant.nf4_bytes == one.quantized.nbytes
    assert variant.dense_bytes == one.dense.nbytes
    assert variant.nf4_bytes > formats.packed_bytes(320 * 192)
    layer = layer_cases.layer_case(variant, 8, 0.0)
    adapter = one.lora_a.nbytes + one.lora_b.nbytes
    activations = one.x.nbytes + one.grad_y.nbytes
    assert layer.bytes_moved == one.quantized.nbytes + 2 * (activations + adapter)
    forward = kernel_cases._forward_case(variant, 8)
    assert forward.bytes_moved == one.quantized.nbytes + activations
    assert forward.operations == 2 * 8 * 320 * 192


def test_operations_of_a_decoder_layer() -> None:
    """As counted by torch over the dense layer, whose adapters and attention it sees as well."""
    from torch.utils.flop_counter import FlopCounterMode

    shape, (sequences, length) = decoder_cases._TINY, decoder_cases._TINY_BATCH
    one = decoder_cases.DecoderInputs(CPU, torch.float32, shape, (sequences, length), 0)
    model, x = one.dense(), one.x.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=x, use_cache=False).last_hidden_state.backward(one.grad_y)
    ours = decoder_cases.operations(shape, sequences, length)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_input_sets_are_larger_than_a_cache(kind: str) -> None:
    """On a GPU: as many as move 256 MB together, at 4096 x 4096 and one token thirty."""
    variant = Variant(torch.device(kind), torch.bfloat16, 4096, 4096, quick=False)
    sets = kernel_cases._forward_case(variant, 1).input_sets
    assert sets == {"cpu": 2, "cuda": 31}[kind]
    large = Variant(torch.device(kind), torch.bfloat16, 28672, 8192, quick=False)
    assert kernel_cases._forward_case(large, 512).input_sets == 2


def test_the_gpu_has_the_cases_that_are_aimed_at() -> None:
    """Listed without a GPU: each target is one of a contender of its case, and decoding is replayed."""
    device = torch.device("cuda")
    cases = [*kernel_cases.kernel_cases(device, [torch.bfloat16], False)]
    cases += layer_cases.layer_cases(device, [torch.bfloat16], False)
    cases += decoder_cases.decoder_cases(device, [torch.bfloat16], False)
    cases += optimizer_cases.optimizer_cases(device, False)
    cases += step_cases.step_cases(device, [torch.bfloat16], False)
    cases += dora_cases.dora_cases(device, [torch.bfloat16], False)
    assert {case.group for case in cases} == set(suite.GROUPS)
    for case in cases:
        assert set(case.targets) <= {contender.name for contender in case.contenders}
        aimless = case.group in ("launch", "crossover") or case.name.startswith("SmolLM2-135M, 4")
        assert bool(case.targets) is not aimless, case.name
        assert case.clock in GPU_CLOCKS[case.group], case.name
        assert case.draws is bool(case.parameters.get("dropout"))
        assert not case.required
    assert len({(case.group, case.name) for case in cases}) == len(cases)
    decoded = [c for c in cases if c.group == "forward" and c.parameters["m"] == 1]
    assert {(c.parameters["n"], c.parameters["k"]) for c in decoded} == {
        *((4096, 4096), (11008, 4096), (8192, 8192), (28672, 8192))
    }
    assert len(cases) <= 51  # the time of a whole run


def test_the_targets_on_a_gpu() -> None:
    """As the project has set them; a run that is to count may not aim lower."""
    device = torch.device("cuda")
    aims: dict[str, dict[str, float]] = {}
    for case in suite.all_cases(device, [torch.bfloat16], list(suite.GROUPS), False):
        if case.targets:
            key = f"{case.group} {case.parameters['m']}" if "m" in case.parameters else case.group
            aims[key] = aims.get(key, {}) | case.targets
            if "m" in case.parameters and case.group in ("forward", "layer"):
                assert aims[key] == case.targets
    few = {"dense": 2.5, "bitsandbytes": 1.3}
    more = {"dense": pytest.approx(1 / 1.05), "bitsandbytes": 1.0}
    training = {
        "LoRA over dense, by hand": 0.90,
        "PEFT over bitsandbytes": 1.25,
        "dequantize + addmm": 1.1,
    }
    assert aims == {
        "quantize 1": {"copy of as many bytes": 0.80, "bitsandbytes": 2.0},
        "dequantize 1": {"copy of as many bytes": 0.90, "bitsandbytes": 1.3},
        "forward 1": {"dense": 3.2, "copy of as many bytes": 0.75, "bitsandbytes": 1.3},
        **{f"forward {m}": few for m in (2, 4, 16)},
        **{f"forward {m}": more for m in (32, 128, 512)},
        **{f"layer {m}": training for m in (2048, 8192, 16384)},
        "decoder": {"PEFT over bitsandbytes NF4+DQ": 1.3},
        "dora": {
            "qlora LoRA NF4+DQ": pytest.approx(1 / 1.3),
            "PEFT over bitsandbytes NF4+DQ": 1.0,
        },
        "adamw": {"not paged": 0.95, "torch fused": 1.0, "copy of as many bytes": 0.80},
    }
    assert kernel_cases.MOST_TEMPORARY_BYTES == 64 * 2**20


def test_the_kernels_between_which_the_tokens_decide() -> None:
    variant = Variant(CPU, torch.bfloat16, *TINY, quick=True)
    for names in sorted(set(kernel_cases.CROSSOVERS.values())):
        timings = timings_of(kernel_cases._crossover_case(variant, 8, names))
        assert [timing.contender for timing in timings] == ["qlora", *names]


def test_quantizing_on_the_device_alone() -> None:
    """The same parts as the public call's, as tensors that a graph can write anew."""
    variant = Variant(CPU, torch.float32, *TINY, quick=True)
    case = kernel_cases._quantize_on_device_case(variant, {})
    timings_of(case)
    one = case.inputs(0)
    ours = case.contenders[0]
    parts = ours.prepare(one)()
    q = one.quantized
    for part, expected in zip(
        parts, (q.packed, q.absmax, q.nested_absmax, q.nested_offset), strict=True
    ):
        assert torch.equal(part, expected)
    for tensor in parts:
        _spoil(tensor)
    with pytest.raises(AssertionError, match="error"):
        ours.check(one, parts)


def test_a_peak_counts_the_model_that_is_trained() -> None:
    (case,) = decoder_cases.decoder_cases(CPU, [torch.float32], quick=True)
    one = case.inputs(0)
    for contender in case.contenders:
        if all(find_spec(package) for package in contender.requires):
            assert adapters(contender.model(one)).keys() == adapters(one.ours).keys()


def test_quick_cases_have_no_targets() -> None:
    assert not Variant(CPU, torch.float32, *TINY, quick=True).case("a", (), {"b": 1}, 9).targets


def test_useful_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 is left out where it is slower."""
    for bf16, expected in ((2.0, DTYPES), (0.5, DTYPES[:1])):
        speed = {torch.float32: 1.0, torch.bfloat16: bf16}
        monkeypatch.setattr(suite, "product_tflop_per_s", lambda d, t, side, s=speed: s[t])
        assert suite.useful_dtypes(CPU) == expected
    assert suite.useful_dtypes(torch.device("cuda")) == [torch.bfloat16]


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy counts both directions, a product two operations for a multiplication and an addition."""

    def clock(call: Any) -> float:
        call()
        return 0.5

    monkeypatch.setattr(ceilings, "clock_for", lambda device: clock)
    measured = ceilings.measure(CPU, [torch.float32], quick=True)
    assert measured["copy_gb_per_s"] == pytest.approx(2 * 32 * 2**20 / 0.5 / 1e9)
    assert measured["product_tflop_per_s"] == {"float32": pytest.approx(2 * 512**3 / 0.5 / 1e12)}
    times = iter([0.5] * 8 + [0.25] * 8 + [0.5] * 8)
    monkeypatch.setattr(ceilings, "clock_for", lambda device: lambda call: next(times))
    measured = ceilings.measure(CPU, [torch.float32], quick=True)
    assert measured["copy_gb_per_s"] == pytest.approx(2 * 32 * 2**20 / 0.25 / 1e9)


# --- The optimizer ----------------------------------------------------------------------------------


def test_the_optimizers_bytes_and_shapes() -> None:
    """28 bytes for each element of the adapters that a real model gets."""
    config = {"hidden_size": 64, "intermediate_size": 160}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**config, vocab_size=32))
    qlora.quantize_model(model, qlora.QLoRAConfig(rank=8))
    shapes = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    assert sorted(optimizer_cases.adapter_shapes(config, 8)) == sorted(shapes)
    for kind, elements in {"cpu": 19_537_920, "cuda": 167_772_160}.items():
        (case,) = optimizer_cases.optimizer_cases(torch.device(kind), quick=False)
        assert case.bytes_moved == 28 * elements
        names = [contender.name for contender in case.contenders]
        assert ("not paged" in names) is ("bitsandbytes PagedAdamW" in names) is (kind == "cuda")


def test_a_wrong_step_of_the_optimizer_is_refused() -> None:
    (case,) = optimizer_cases.optimizer_cases(CPU, quick=True)
    one, ours = case.inputs(0), case.contenders[0]
    call = ours.prepare(one)
    ours.check(one, call())
    with pytest.raises(AssertionError, match="error"):
        ours.check(one, call())  # a step too many
    with pytest.raises(AssertionError, match="error"):
        ours.check(one, one.params)  # none


# --- Models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_decoder_layer_runs(dtype: torch.dtype) -> None:
    (case,) = decoder_cases.decoder_cases(CPU, [dtype], quick=True)
    assert case.parameters["tokens"] == 64
    timings_of(case)
    assert decoder_cases.decoder_cases(CPU, [dtype], quick=False) == []


def test_a_wrong_decoder_layer_is_refused() -> None:
    (case,) = decoder_cases.decoder_cases(CPU, [torch.float32], quick=True)
    one, ours = case.inputs(0), case.contenders[0]
    result = ours.prepare(one)()
    ours.check(one, result)
    for wrong in ([*result[:-1], -result[-1]], [result[0] * 1.01, *result[1:]]):
        with pytest.raises(AssertionError, match="error"):
            ours.check(one, wrong)
    with pytest.raises(AssertionError, match="all gradients"):
        ours.check(one, result[:-1])


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small Llama over few tokens."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    monkeypatch.setattr(step_cases, "SMOLLM2", step_cases.SMOLLM2 | sizes | heads)
    monkeypatch.setattr(step_cases, "LENGTH", 16)
    monkeypatch.setattr(step_cases, "cached_model", lambda: None)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_step_runs(dtype: torch.dtype) -> None:
    """All contenders agree with the fp64 oracle on the gradients of a small Llama."""
    case = step_cases.step_cases(CPU, [dtype], quick=False)[0]
    assert case.parameters["weights"] == "random"
    assert case.required
    assert case.targets == {
        "LoRA over dense": pytest.approx(1 / 1.35),
        "PEFT over bitsandbytes NF4+DQ": 1.0,
    }
    timings_of(case)


def test_a_wrong_step_is_found() -> None:
    """The check sees one wrong entry among all gradients."""
    right = [torch.tensor(1.0), torch.randn(8, 4)]
    one = SimpleNamespace(
        dtype=torch.float32, plain=right, oracle=[tensor.double() for tensor in right]
    )
    step_cases._check(one, right)
    wrong = right[1].clone()
    wrong[3, 2] *= -1
    with pytest.raises(AssertionError, match="error"):
        step_cases._check(one, [right[0], wrong])
    with pytest.raises(AssertionError, match="loss"):
        step_cases._check(one, [right[0] * 1.01, right[1]])


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("dtype", DTYPES)
def test_dora_runs_in_step_and_layer(dtype: torch.dtype) -> None:
    """All contenders agree with their fp64 oracle, ours and PEFT's with that of DoRA."""
    cases = [
        dora_cases.dora_cases(CPU, [dtype], quick=False)[0],
        dora_cases.dora_cases(CPU, [dtype], quick=True)[-1],
    ]
    assert [case.required for case in cases] == [True, False]
    assert [case.targets for case in cases] == [dora_cases.TARGETS, {}]
    for case in cases:
        assert {case.group} == {"dora"}
        assert [timing.contender for timing in timings_of(case)] == [
            *("qlora NF4+DQ", "qlora LoRA NF4+DQ", "PEFT over bitsandbytes NF4+DQ")
        ]


@pytest.mark.usefixtures("small_steps")
def test_the_case_of_dora_is_that_of_lora_with_magnitudes() -> None:
    """Same base, same batches, same first factors; a wrong gradient of the magnitudes alone is refused."""
    case = dora_cases.dora_cases(CPU, [torch.float32], quick=False)[0]
    one, (ours, plain, peer) = case.inputs(0), case.contenders
    assert torch.equal(one.dora.batches, one.lora.batches)
    own, other = adapters(one.dora.ours), adapters(one.lora.ours)
    for name, (lora_a, lora_b, magnitude) in own.items():
        assert magnitude.shape == lora_b.shape[:1]
        assert all(map(torch.equal, (lora_a, lora_b), other[name]))
        layers = (part.ours.get_submodule(name) for part in (one.dora, one.lora))
        assert torch.equal(*(layer.packed for layer in layers))
    exact = one.dora.exact().get_submodule(name)
    torch.testing.assert_close(exact.row_squares, exact.weight.square().sum(1), rtol=0, atol=0)
    assert exact.row_squares.dtype == torch.float64
    result = ours.prepare(one)()
    for contender, wrong in ((plain, result), (peer, plain.prepare(one)())):
        with pytest.raises(AssertionError, match=r"loss|expected"):
            contender.check(one, wrong)
    result[3] = result[3] * 1.01
    with pytest.raises(AssertionError, match="error"):
        ours.check(one, result)


def test_peft_is_trained_under_autocast_in_bf16_alone() -> None:
    for dtype, enabled in ((torch.bfloat16, True), (torch.float32, False)):
        with peers.autocast(CPU, dtype):
            assert torch.is_autocast_enabled("cpu") is enabled


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_a_layer_on_the_gpu(dropout: float) -> None:
    """Every contender is right there, with its own dropout, and what ours holds is known."""
    device = torch.device("cuda")
    variant = Variant(device, torch.bfloat16, 512, 256, quick=True)
    timings = timings_of(layer_cases.layer_case(variant, 128, dropout))
    assert 0 <= timings[0].temporary_bytes <= kernel_cases.MOST_TEMPORARY_BYTES


@pytest.mark.gpu
def test_a_step_of_the_optimizer_on_the_gpu() -> None:
    """Paged, not paged, in 8 bits, and the peers: all are right there."""
    (case,) = optimizer_cases.optimizer_cases(torch.device("cuda"), quick=True)
    timings_of(case)


@pytest.mark.gpu
def test_decoding_on_the_gpu_is_replayed() -> None:
    """Captured, replayed onto spoilt results, and right for every input set."""
    variant = Variant(torch.device("cuda"), torch.bfloat16, 512, 256, quick=True)
    case = kernel_cases._forward_case(variant, 1)
    assert case.clock == "graph"
    measured = measure(case, QUICKLY)
    assert measured.ours.status == "timed", measured.ours.reason
    assert measured.ours.p50_ms > 0
