"""The quantized model in transformers and accelerate: `Trainer`, `generate`, checkpoints, offloading, DDP."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import qlora
from tests import parallel, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]

IDS = tiny.tokens()
ROWS = [
    {"input_ids": row, "labels": row} for row in (torch.arange(2, 18) + i % 3 for i in range(16))
]
LLAMA_FACTORS = 28  # A and B of seven linear layers in each of two blocks


def model(**settings: Any) -> nn.Module:
    return tiny.quantized(tiny.llama(), **{"dropout": 0.1} | settings)


def arguments(path: Path, **settings: Any) -> TrainingArguments:
    usual = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(output_dir=str(path), **usual | settings)


def trainer(net: nn.Module, path: Path, bits: int | None = None, **settings: Any) -> Trainer:
    """With PagedAdamW, if its bits are given, else with the Trainer's own AdamW."""
    optimizers = (None, None)
    if bits is not None:
        trainable = [p for p in net.parameters() if p.requires_grad]
        optimizers = (qlora.PagedAdamW(trainable, lr=1e-2, bits=bits), None)
    return Trainer(
        net,
        arguments(path, **settings),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        optimizers=optimizers,
    )


def losses(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def changed(net: nn.Module, before: dict[str, Tensor]) -> list[str]:
    now = net.state_dict()
    assert now.keys() == before.keys()
    return [name for name, value in before.items() if not torch.equal(now[name], value)]


# --- Trainer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"bf16": True}, {"label_smoothing_factor": 0.1}, {"load_best_model_at_end": True}],
    ids=["plain", "bf16", "label smoothing", "best model"],
)
def test_the_trainer_trains_the_adapters_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    net = model()
    before = state(net)
    evaluated = {"eval_strategy": "steps", "eval_steps": 3} if len(settings) else {}
    run = trainer(net, tmp_path, **settings, **evaluated)
    first = run.evaluate()["eval_loss"]
    run.train()
    assert losses(run)[-1] < 0.7 * losses(run)[0]
    assert run.evaluate()["eval_loss"] < 0.7 * first
    names = changed(net, before)
    assert len(names) == LLAMA_FACTORS
    assert all("lora_" in name for name in names)
    trained = [p for p in net.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}


def test_sizes() -> None:
    """What transformers says of a model's size counts the packed weights as bytes, not as parameters."""
    net = model()
    assert net.num_parameters(only_trainable=True) == sum(
        p.numel() for name, p in net.named_parameters() if "lora_" in name
    )
    assert net.num_parameters() == sum(p.numel() for p in net.parameters())
    assert net.get_memory_footprint() == sum(t.nbytes for t in (*net.parameters(), *net.buffers()))


@pytest.mark.parametrize(
    ("bits", "settings"),
    [
        (None, {}),
        (32, {}),
        (8, {}),
        (None, {"dora": True, "modules_to_save": ["lm_head"]}),
        (None, {"format": "fp4", "double_quant": False}),
    ],
    ids=["AdamW", "PagedAdamW", "PagedAdamW, 8 bits", "dora and modules_to_save", "fp4"],
)
def test_a_checkpoint_resumes(tmp_path: Path, bits: int | None, settings: dict[str, Any]) -> None:
    """With the numbers of the run that was not interrupted: weights, losses and dropout."""
    whole = trainer(model(**settings), tmp_path, bits)
    whole.train()
    resumed = trainer(model(**settings), tmp_path, bits)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    assert changed(resumed.model, state(whole.model)) == []


def test_a_checkpoint_of_another_data_type_is_refused(tmp_path: Path) -> None:
    trainer(model(), tmp_path, max_steps=3).train()
    other = trainer(model(format="fp4"), tmp_path)
    with pytest.raises(ValueError, match=r"state_dict must hold a weight with .*fp4.* got .*nf4"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_is_a_state_dict_that_loads_strictly(tmp_path: Path) -> None:
    """In shards too."""
    net = tiny.adapted()
    trainer(net, tmp_path).save_model(str(tmp_path / "whole"))
    net.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    parts = {key: value for shard in shards for key, value in load_file(shard).items()}
    for stored in (load_file(tmp_path / "whole" / "model.safetensors"), parts):
        other = tiny.quantized(tiny.llama(seed=9))
        other.load_state_dict(stored)
        assert torch.equal(tiny.logits(other, IDS), tiny.logits(net, IDS))


def test_trls_sft_trainer(tmp_path: Path) -> None:
    import datasets
    import trl

    talk = [
        [
            {"role": "user", "content": f"say {i % 3}"},
            {"role": "assistant", "content": "abc"[i % 3] * 6},
        ]
        for i in range(16)
    ]
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = "</s>"
    usual = arguments(tmp_path).to_dict()
    names = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_steps",
        "save_steps",
        "logging_steps",
    )
    settings = {name: usual[name] for name in names}
    config = trl.SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    runs = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        net = model()
        before = state(net)
        run = trl.SFTTrainer(
            net,
            args=config,
            train_dataset=datasets.Dataset.from_dict({"messages": talk}),
            processing_class=tokenizer,
        )
        run.train(resume_from_checkpoint=checkpoint)
        names = changed(net, before)
        assert len(names) == LLAMA_FACTORS
        assert all("lora_" in name for name in names)
        runs.append((losses(run), state(net)))
    assert runs[0][0][-1] < 0.8 * runs[0][0][0]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


def test_plain_transformers_refuses_what_it_would_start_at_random(tmp_path: Path) -> None:
    """An unmerged model that is saved as a whole is a state dict, and no folder to load."""
    tiny.adapted().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


class SaveAdapter(TrainerCallback):
    """What a user writes to have the adapter by itself, in PEFT's format, beside each checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        if state.is_world_process_zero:
            place = Path(args.output_dir, f"checkpoint-{state.global_step}", "adapter")
            qlora.save_adapter(model, place)


def test_a_callback_saves_the_adapter_with_each_checkpoint(tmp_path: Path) -> None:
    run = trainer(model(), tmp_path)
    run.add_callback(SaveAdapter)
    run.train()
    for step in (3, 6):
        assert {"model.safetensors", "optimizer.pt", "adapter"} <= {
            path.name for path in (tmp_path / f"checkpoint-{step}").iterdir()
        }
    other = model(target_modules=None)
    qlora.load_adapter(other, tmp_path / "checkpoint-6" / "adapter")
    assert torch.equal(tiny.logits(other.eval(), IDS), tiny.logits(run.model.eval(), IDS))
    other = model()
    qlora.load_adapter(other, tmp_path / "checkpoint-3" / "adapter")
    assert not torch.equal(tiny.logits(other.eval(), IDS), tiny.logits(run.model, IDS))


# --- generate ---------------------------------------------------------------------------------------

PROMPT = tiny.tokens(3, 9)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 50},
    "beams": {"do_sample": False, "num_beams": 3},
}


def generated(
    net: nn.Module, ids: Tensor = PROMPT, mask: Tensor | None = None, **way: Any
) -> Tensor:
    torch.manual_seed(0)
    mask = torch.ones_like(ids) if mask is None else mask
    lengths = {"min_new_tokens": 10, "max_new_tokens": 10, "pad_token_id": tiny.EOS}
    return net.generate(ids, attention_mask=mask, **lengths, **way)


@pytest.mark.parametrize("way", WAYS)
def test_generating_with_any_cache_and_without(way: str) -> None:
    net = tiny.adapted()
    expected = generated(net, **WAYS[way])
    assert expected.shape == (3, 19)
    assert torch.equal(generated(net, **WAYS[way], use_cache=False), expected)
    assert torch.equal(generated(net, **WAYS[way], cache_implementation="static"), expected)
    merged = qlora.merge(copy.deepcopy(net))
    assert torch.equal(generated(merged, **WAYS[way]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generating_for_prompts_of_different_lengths(dtype: torch.dtype) -> None:
    """Padded on the left, as transformers has it: each row is answered as if it were alone."""
    net = tiny.adapted().to(dtype)
    ids, mask = PROMPT.clone(), torch.ones_like(PROMPT)
    ids[0, :4], mask[0, :4] = tiny.EOS, 0
    together = generated(net, ids, mask, do_sample=False)
    assert torch.equal(together[1:], generated(net, PROMPT[1:], do_sample=False))
    assert torch.equal(together[:1, 9:], generated(net, PROMPT[:1, 4:], do_sample=False)[:, 5:])


def test_generating_with_adapters_on_and_off() -> None:
    net = tiny.adapted()
    adapted = generated(net, do_sample=False)
    base = generated(tiny.quantized(tiny.llama()), do_sample=False)
    assert not torch.equal(adapted, base)
    with qlora.disable_adapters(net):
        assert torch.equal(generated(net, do_sample=False), base)
    with qlora.use_adapter(net, ["default", None, "default"]):
        mixed = generated(net, do_sample=False)
    assert torch.equal(mixed[[0, 2]], adapted[[0, 2]])
    assert torch.equal(mixed[1], base[1])
    assert torch.equal(generated(net, do_sample=False), adapted)


# --- accelerate and DistributedDataParallel ---------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepared_by_accelerate(tmp_path: Path, precision: str) -> None:
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
    )
    net = model()
    before = state(net)
    trainable = [p for p in net.parameters() if p.requires_grad]
    prepared, optimizer = accelerator.prepare(net, qlora.PagedAdamW(trainable, lr=1e-2))
    seen = []
    for _ in range(6):
        with accelerator.accumulate(prepared):
            loss = prepared(IDS, labels=IDS).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < 0.9 * seen[0]
    names = changed(accelerator.unwrap_model(prepared), before)
    assert len(names) == LLAMA_FACTORS
    assert all("lora_" in name for name in names)

    accelerator.save_state(str(tmp_path))
    trained = state(net)
    tiny.randomize_adapter(net)
    accelerator.load_state(str(tmp_path))
    assert changed(net, trained) == []
    accelerate.state.AcceleratorState._reset_state(True)


HALF_ON_DISK = {
    **dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu"),
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
}
OFFLOADS: dict[str, Callable[..., nn.Module]] = {
    "cpu": lambda net, path, **options: accelerate.cpu_offload(net, "cpu", **options),
    "disk": lambda net, path, **options: accelerate.disk_offload(net, path, "cpu", **options),
    "device map": lambda net, path, **options: accelerate.dispatch_model(
        net, HALF_ON_DISK, main_device="cpu", offload_dir=path, **options
    ),
}


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("way", OFFLOADS)
@pytest.mark.parametrize("settings", [{}, {"dora": True}], ids=["lora", "dora"])
def test_offloaded_by_accelerate(
    tmp_path: Path, way: str, buffers: bool, settings: dict[str, Any]
) -> None:
    """Packed weights are buffers: they leave the device where `offload_buffers` says so."""
    net = tiny.adapted(**settings)
    expected = tiny.logits(net, IDS)
    net = OFFLOADS[way](net, str(tmp_path), offload_buffers=buffers)
    layer = net.model.layers[1].mlp.up_proj
    assert layer.adapters["default"].lora_a.is_meta
    assert layer.packed.is_meta == buffers
    for _ in range(2):
        assert torch.equal(tiny.logits(net, IDS), expected)


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """The second gets the first one's base and adapter; both make the step of the whole batch."""
    other = torch.multiprocessing.get_context("spawn").Process(
        target=parallel.train, args=(1, tmp_path)
    )
    other.start()
    parallel.train(0, tmp_path)
    other.join()
    assert other.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    net = tiny.adapted().train()
    parallel.step(net, net, tiny.tokens(4))
    for name, value in net.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value)
