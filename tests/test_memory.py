"""The planner against the objects that it plans, and against the tensors of real steps."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM, MambaConfig

from qlora import QLoRAConfig, quantize_model, trace
from qlora.evaluation import module_modes
from qlora.kernels import tuning
from qlora.memory import CUBLAS_WORKSPACE, optimizer_bytes, plan_memory, static_bytes
from qlora.pretrained import place
from qlora.recipe import OPTIMIZERS, TrainConfig
from qlora.recompute import recomputing
from qlora.shapes import model_config
from qlora.trace import AllocationTrace
from qlora.train import make_optimizer, train_step
from tests import tiny

RECIPE = TrainConfig(
    micro_batch_size=2, gradient_accumulation_steps=1, max_length=128, precision="float32"
)
LORA = QLoRAConfig(rank=4, blocksize=32)


def step(model: torch.nn.Module, optimizer: Any, recipe: TrainConfig) -> None:
    """An optimizer step on full batches."""
    ids = tiny.tokens(rows=recipe.micro_batch_size, length=recipe.max_length)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    batches = [batch] * recipe.gradient_accumulation_steps
    adapters = [p for p in model.parameters() if p.requires_grad]
    train_step(model, optimizer, adapters, batches, recipe, 0)


def traced(model: torch.nn.Module, recipe: TrainConfig) -> int:
    """Bytes of what a second optimizer step makes, at their most."""
    optimizer = make_optimizer(model, recipe)
    with module_modes(model, training=True), recomputing(model, recipe.gradient_checkpointing):
        step(model, optimizer, recipe)
        with AllocationTrace("cpu") as seen:
            seen.exclude(*model.parameters(), *model.buffers())
            step(model, optimizer, recipe)
    return sum(seen.peak().values())


def states(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the memory that the states lie in."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name != "step" or not hasattr(optimizer, "state_bytes")  # ours is on the CPU
    }
    return sum(storages.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adapter_dtype": "bfloat16", "double_quant": False},
        {"target_modules": ["q_proj", "down_proj"], "blocksize": 64},
        {"format": None},
    ],
)
def test_what_stays_is_what_the_objects_take(settings: dict[str, Any], optimizer: str) -> None:
    lora, recipe = replace(LORA, **settings), replace(RECIPE, optimizer=optimizer)
    model = tiny.llama()
    plan = plan_memory(model.config, lora, recipe)
    quantize_model(model, lora)
    place(model, "cpu", torch.float32)
    made = make_optimizer(model, recipe)
    step(model, made, recipe)
    assert static_bytes(model) == {
        name: getattr(plan, name) for name in ("weights", "scales", "dense", "adapters")
    }
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    assert plan.base + plan.adapters == sum(t.nbytes for t in tensors.values())
    assert plan.optimizer == states(made)
    assert plan.gradients <= plan.adapters


def gpt2() -> torch.nn.Module:
    """Without dropout: with it a CPU has no fused attention, and holds what was kept in numbers."""
    config = tiny.gpt2().config
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    return type(tiny.gpt2())(config)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("make", [tiny.llama, gpt2])
def test_what_comes_and_goes_is_what_a_step_makes(
    make: Any, checkpointing: bool, accumulation: int
) -> None:
    """In fp32, where autocast has nothing to do."""
    recipe = replace(
        RECIPE, gradient_checkpointing=checkpointing, gradient_accumulation_steps=accumulation
    )
    model = make()
    plan = plan_memory(model.config, LORA, recipe)
    quantize_model(model, LORA)
    made = plan.gradients + plan.activations + plan.temporaries - CUBLAS_WORKSPACE
    assert made == pytest.approx(traced(model, recipe), rel=0.005)


def gptj() -> torch.nn.Module:
    """Computes attention in fp32 and spells it out; autocast brings the products back to bf16."""
    sizes = {"vocab_size": 258, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPTJForCausalLM(GPTJConfig(**sizes, **dropout, rotary_dim=8))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("make", [tiny.llama, gptj])
def test_autocast_counts(make: Any, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what a CPU's autocast does: it casts to bf16 as a GPU's does, and leaves to fp32 what is in bf16."""
    monkeypatch.setattr(trace, "_IN_32_BITS", ())
    recipe = replace(RECIPE, precision="bfloat16", gradient_checkpointing=checkpointing)
    model = make()
    plan = plan_memory(model.config, LORA, recipe)
    quantize_model(model, LORA)
    place(model, "cpu", torch.bfloat16)
    made = plan.gradients + plan.activations + plan.temporaries - CUBLAS_WORKSPACE
    assert made == pytest.approx(traced(model, recipe), rel=0.02)


def test_checkpointing_batches_and_lengths_count() -> None:
    config = tiny.llama(num_hidden_layers=8).config
    plan = plan_memory(config, LORA, RECIPE)
    without = plan_memory(config, LORA, replace(RECIPE, gradient_checkpointing=False))
    longer = plan_memory(config, LORA, replace(RECIPE, max_length=256))
    wider = plan_memory(config, LORA, replace(RECIPE, micro_batch_size=4))
    assert without.activations > 3 * plan.activations
    assert longer.activations + longer.temporaries > plan.activations + plan.temporaries
    assert wider.total == pytest.approx(longer.total, rel=0.02)
    assert without.total > plan.total


def test_offloaded_checkpoints_are_not_on_the_device() -> None:
    config = tiny.llama(num_hidden_layers=8).config
    recipe = replace(RECIPE, gradient_accumulation_steps=2)
    kept = plan_memory(config, LORA, recipe)
    offloaded = plan_memory(config, LORA, replace(recipe, offload_checkpoints=True))
    block_input = 4 * 2 * 128 * 64
    assert 5 * block_input < kept.total - offloaded.total <= 8 * block_input


def test_gradients_stay_between_micro_batches() -> None:
    """Then the fullest moment is the one with all checkpoints."""
    config = tiny.llama(num_hidden_layers=8).config
    recipe = replace(RECIPE, gradient_accumulation_steps=4)
    plan = plan_memory(config, replace(LORA, rank=128), recipe)
    assert plan.gradients == plan.adapters
    assert plan.activations >= 8 * 4 * 2 * 128 * 64


def test_a_slab_of_decoded_weight_from_many_tokens_on() -> None:
    """As large as the slab, or as the largest weight."""
    small = tiny.llama(max_position_embeddings=tuning.MANY_TOKENS).config
    for config, slab in ((model_config("llama-7b", 1), tuning.SLAB_BYTES), (small, 4 * 64 * 96)):
        few, many = (
            plan_memory(config, LORA, replace(RECIPE, micro_batch_size=1, max_length=length))
            for length in (tuning.MANY_TOKENS - 1, tuning.MANY_TOKENS)
        )
        token = (few.activations + few.temporaries - CUBLAS_WORKSPACE) / (tuning.MANY_TOKENS - 1)
        grown = many.activations + many.temporaries - few.activations - few.temporaries
        assert grown == pytest.approx(slab + token, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own_states_have_the_parameters_dtype(dtype: torch.dtype) -> None:
    assert optimizer_bytes([100, 10], "adamw_torch", dtype) == 2 * 110 * dtype.itemsize + 8


def test_the_papers_headline() -> None:
    """QLoRA, abstract: 65B on one card of 48 GB; it takes adapters in 16 bits."""
    recipe = TrainConfig(gradient_accumulation_steps=1)
    half = plan_memory(model_config("llama-65b"), QLoRAConfig(adapter_dtype="bfloat16"), recipe)
    rotary_tables = 2 * 4 * 64
    assert half.base - rotary_tables == 34_458_929_344
    assert half.total < 48e9
    assert plan_memory(model_config("llama-65b"), QLoRAConfig(), recipe).total > 47e9


def test_a_length_beyond_the_models() -> None:
    with pytest.raises(ValueError, match="max_length must be at most 256 for this model; got 512"):
        plan_memory(tiny.llama().config, LORA, TrainConfig())


def test_a_model_that_is_none_of_ours() -> None:
    """Its mixer multiplies by the weight itself."""
    config = MambaConfig(vocab_size=258, hidden_size=64, num_hidden_layers=1)
    with pytest.raises(ValueError, match="a step of MambaForCausalLM cannot be worked out"):
        plan_memory(config, LORA, RECIPE)


def large_llama() -> torch.nn.Module:
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6}
    return tiny.llama(**sizes, vocab_size=32000, max_position_embeddings=512)


def large_gpt2() -> torch.nn.Module:
    """With layer norms, which autocast computes in fp32."""
    sizes = {"n_embd": 1600, "n_layer": 6, "n_head": 25, "vocab_size": 32000, "n_positions": 512}
    return GPT2LMHeadModel(GPT2Config(**sizes))


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("make", [large_llama, large_gpt2])
def test_within_5_percent_of_torchs_peak_on_a_gpu(make: Any, checkpointing: bool) -> None:
    """Beyond the states, which are in unified memory that torch does not count."""
    recipe = TrainConfig(
        micro_batch_size=8,
        gradient_accumulation_steps=1,
        precision="bfloat16",
        gradient_checkpointing=checkpointing,
    )
    lora = QLoRAConfig(adapter_dtype="bfloat16")
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # they are part of the plan
    before = torch.cuda.memory_allocated()
    model = make().cuda()
    plan = plan_memory(model.config, lora, recipe)
    quantize_model(model, lora)
    place(model, "cuda", torch.bfloat16)
    optimizer = make_optimizer(model, recipe)
    with module_modes(model, training=True), recomputing(model, checkpointing):
        step(model, optimizer, recipe)
        torch.cuda.reset_peak_memory_stats()
        step(model, optimizer, recipe)
    peak = torch.cuda.max_memory_allocated() - before
    assert plan.total - plan.optimizer == pytest.approx(peak, rel=0.05)
