"""Section 4, in small: LoRA through NF4 + DQ against LoRA over the unquantized base, one seed each."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from paper_repro import assets, draw, model, perplexity, text
from paper_repro.experiment import Claim, Experiment, Result, table
from paper_repro.lab import OUT, Lab
from qlora import QLoRAConfig, files
from qlora.adapter_files import BASE_CONFIG
from qlora.data import Example, load_dataset
from qlora.generate import generate
from qlora.merging import merge, requantize
from qlora.peft_format import CONFIG, WEIGHTS
from qlora.pretrained import load_quantized, load_tokenizer, place, save_dense
from qlora.train import TrainConfig, train

SEED, RANK, ALPHA = 0, 16, 16
HELD_OUT, EVAL_BATCH, SAMPLE_TOKENS = 320, 16, 24
RECIPE = TrainConfig(
    learning_rate=1e-3,
    schedule="linear",
    warmup_steps=5,
    steps=100,
    micro_batch_size=16,
    gradient_accumulation_steps=1,
    max_length=128,
    max_grad_norm=1.0,
    gradient_checkpointing=False,
    precision="float32",
    seed=SEED,
    checkpoint_every=10,
    keep_checkpoints=1,
)
DENSE, NF4 = "dense", "nf4+dq"
BASES = {DENSE: None, NF4: "nf4"}  # the two arms differ in this alone
LABELS = {DENSE: "base", NF4: "NF4 + DQ"}
MERGED_DTYPE = torch.bfloat16


def lora_config(base: str) -> QLoRAConfig:
    return QLoRAConfig(rank=RANK, alpha=ALPHA, format=BASES[base])


@dataclass
class Arm:
    """One base with its adapter, on its way from untrained to merged."""

    lab: Lab
    task: text.Task
    base: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that determines the arm's results."""
        records = json.dumps([self.task.train, self.task.held_out, self.task.prompts])
        return {
            "model": assets.MODEL_SHA256,
            "data": hashlib.sha256(records.encode()).hexdigest(),
            "recipe": asdict(RECIPE),
            "lora": asdict(lora_config(self.base)),
            "evaluation": [EVAL_BATCH, SAMPLE_TOKENS],
        }

    @property
    def folder(self) -> Path:
        return self.lab.run_folder(f"finetune-{self.base}", self.settings)

    @cached_property
    def base_folder(self) -> Path:
        return model.model_folder(self.lab.folder)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base_folder)

    @cached_property
    def network(self) -> torch.nn.Module:
        torch.manual_seed(SEED)  # the adapter's first values: the same in both arms
        return load_quantized(self.base_folder, lora_config(self.base), precision="float32")[0]

    def measure(self) -> dict[str, Any]:
        """Before, after and, through 4 bits, merged; each is remembered by itself."""
        stages = {"before": self._before, "after": self._train}
        if self.base == NF4:
            stages |= {
                "merged": self._merge,
                "onto_original": self._merge_onto_original,
                "requantized": lambda: self._requantize(None),
                "requantized_onto_original": lambda: self._requantize(self.base_folder),
            }
        return {
            stage: self.lab.measure(
                f"finetune-{self.base}-{stage}",
                self.settings,
                lambda function=function: function(),
                (perplexity,),
            )
            for stage, function in stages.items()
        }

    def _before(self) -> dict[str, Any]:
        return self._evaluate(self.network, f"{LABELS[self.base]} before LoRA")

    def _train(self) -> dict[str, Any]:
        print(f"LoRA over {LABELS[self.base]}, {RECIPE.steps} steps", flush=True)
        examples = self._examples("train")
        train(self.network, examples, RECIPE, self.folder, resume=not self.lab.fresh)
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line) for line in lines]
        adapter = files.read_tensors(self.folder / WEIGHTS)
        return {
            **self._evaluate(self.network, f"{LABELS[self.base]} after LoRA"),
            "losses": [step["loss"] for step in steps],
            "step_seconds": sorted(step["seconds"] for step in steps)[len(steps) // 2],
            "tokens_trained": sum(step["tokens"] for step in steps),
            "adapter_bytes": (self.folder / WEIGHTS).stat().st_size,
            "adapter_parameters": sum(tensor.numel() for tensor in adapter.values()),
            "base_parameters": _base_parameters(self.network),
        }

    def _merge(self) -> dict[str, Any]:
        """Merge into 16 bits, write a model folder, read it with plain transformers and measure that."""
        from transformers import AutoModelForCausalLM

        merged = self.folder / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        print("Merging into a 16-bit model ...", flush=True)
        network = place(merge(self._trained(), MERGED_DTYPE), "cpu", MERGED_DTYPE)
        save_dense(network, self.base_folder, merged)
        plain = AutoModelForCausalLM.from_pretrained(
            merged, dtype=torch.float32, local_files_only=True
        )
        return self._perplexity(plain, "merged")

    def _merge_onto_original(self) -> dict[str, Any]:
        """Merge into 16 bits, over the weights that 4 bits were made of."""
        network = merge(self._trained(), MERGED_DTYPE, onto=self.base_folder)
        network = place(network, "cpu", MERGED_DTYPE).float()
        return self._perplexity(network, "merged onto the original")

    def _requantize(self, onto: Path | None) -> dict[str, Any]:
        """Quantize the sum again, in 4 bits as the base is."""
        network = self._trained()
        done = requantize(network, onto=onto)
        parts = ("error", "adapter", "kept")
        means = {part: sum(getattr(layer, part) for layer in done) / len(done) for part in parts}
        return {**self._perplexity(network, "merged and quantized again"), **means}

    def _trained(self) -> torch.nn.Module:
        """The base with the trained adapter, read anew."""
        config = lora_config(self.base)
        return load_quantized(self.base_folder, config, self.folder, precision="float32")[0]

    def _evaluate(self, network: torch.nn.Module, what: str) -> dict[str, Any]:
        samples = self._samples(network, what) if self.base == NF4 else []
        return {**self._perplexity(network, what), "samples": samples}

    def _perplexity(self, network: torch.nn.Module, what: str) -> dict[str, Any]:
        examples = sorted(self._examples("held_out"), key=len)
        batches = [examples[i : i + EVAL_BATCH] for i in range(0, len(examples), EVAL_BATCH)]
        return perplexity.measure(network, batches, what)

    def _samples(self, network: torch.nn.Module, what: str) -> list[str]:
        bar = tqdm(self.task.prompts, desc=f"samples, {what}", unit="prompt")
        return [
            generate(network, self.tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS).strip()
            for prompt in bar
        ]

    def _examples(self, part: str) -> list[Example]:
        """`train` or `held_out`, by way of a JSON Lines file, as any user of the library would."""
        path = self.lab.folder / "data" / f"{part}-{self.settings['data'][:12]}.jsonl"
        records = getattr(self.task, part)
        files.write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        return load_dataset(path, self.tokenizer, RECIPE.max_length)


def _base_parameters(network: torch.nn.Module) -> int:
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    quantized = [m.weight.numel for m in network.modules() if hasattr(m, "packed")]
    return frozen + sum(quantized)


def run(lab: Lab) -> Result:
    task = _task(lab)
    arms = {base: Arm(lab, task, base) for base in BASES}
    measured = {}
    for base, arm in arms.items():
        measured[base] = arm.measure()
        vars(arm).pop("network", None)  # free its memory before the next
    _copy_adapter(arms[NF4].folder, OUT / "adapter")
    return {
        "model": model.MODEL_NAME,
        "base_folder": str(arms[NF4].base_folder),
        "task": task.name,
        "examples": len(task.train),
        "seed": SEED,
        "lora": asdict(lora_config(NF4)),
        "recipe": asdict(RECIPE),
        "prompts": task.prompts,
        "answers": task.answers,
        "arms": measured,
    }


def _task(lab: Lab) -> text.Task:
    data_noun = assets.wordnet_file(lab.folder)
    count = RECIPE.steps * RECIPE.batch_size, HELD_OUT
    if data_noun is not None:
        return text.definition_task(data_noun, *count)
    print("So the model is fine-tuned on Wikipedia prose instead of definitions.", flush=True)
    return text.continuation_task(assets.wikipedia_file(lab.folder), *count)


def _copy_adapter(source: Path, target: Path) -> None:
    """Lay the adapter where a user finds it. Without its run folder there is none, only its numbers."""
    if (source / WEIGHTS).is_file():
        with files.new_folder(target) as folder:
            for name in (WEIGHTS, CONFIG, BASE_CONFIG):
                shutil.copy(source / name, folder)


RECOVERED_LEAST, MERGED_MOST = 0.6, 0.01


def _nll(result: Result, base: str, stage: str) -> float:
    return result["arms"][base][stage]["nll"]


def towards_lora(result: Result) -> float:
    """Share of the way from NF4 + DQ, untrained, to LoRA on the unquantized base."""
    start, goal = _nll(result, NF4, "before"), _nll(result, DENSE, "after")
    return (start - _nll(result, NF4, "after")) / (start - goal)


def gap_closed(result: Result) -> float:
    """Share of the gap between NF4 + DQ and its base that is gone when both have been fine-tuned."""
    before = _nll(result, NF4, "before") - _nll(result, DENSE, "before")
    after = _nll(result, NF4, "after") - _nll(result, DENSE, "after")
    return 1 - after / before


def _merge_change(result: Result) -> float:
    arm = result["arms"][NF4]
    return arm["merged"]["perplexity"] / arm["after"]["perplexity"] - 1


def _left(result: Result) -> float:
    arms = result["arms"]
    return arms[NF4]["after"]["perplexity"] / arms[DENSE]["after"]["perplexity"] - 1


CLAIMS = (
    Claim(
        statement="LoRA through NF4 + DQ reaches LoRA on the unquantized base (Tables 3 and 4)",
        paper="parity",
        criterion=f"at least {RECOVERED_LEAST:.0%} of the way in log-perplexity, from NF4 + DQ untrained to "
        "LoRA on the unquantized base",
        passes=lambda r: towards_lora(r) >= RECOVERED_LEAST,
        measured=lambda r: f"{towards_lora(r):.0%}",
    ),
    Claim(
        statement="Fine-tuning recovers what 4-bit quantization lost (section 4)",
        paper="all of it",
        criterion=f"at least {RECOVERED_LEAST:.0%} of the gap in log-perplexity between NF4 + DQ and the base "
        "is gone after both have been fine-tuned alike",
        passes=lambda r: gap_closed(r) >= RECOVERED_LEAST,
        measured=lambda r: f"{gap_closed(r):.0%}",
    ),
    Claim(
        statement="NF4 + DQ equals 16-bit LoRA (Tables 3 and 4)",
        paper="equal within noise, 7B and up",
        criterion="none: not expected at 135 M parameters and a base that had 4 bits before",
        passes=None,
        measured=lambda r: f"perplexity {_left(r):+.1%} above LoRA on the unquantized base",
    ),
    Claim(
        statement="The adapter can be merged into a 16-bit model (LoRA, section 4.1)",
        paper="exact up to rounding",
        criterion=f"plain transformers loads the merged model; its perplexity is within {MERGED_MOST:.0%} of "
        "the unmerged one's",
        passes=lambda r: abs(_merge_change(r)) <= MERGED_MOST,
        measured=lambda r: f"{_merge_change(r):+.2%}",
    ),
)


def section(result: Result) -> str:
    stages = ("after", "merged", "onto_original", "requantized", "requantized_onto_original")
    after, merged, onto, again, again_onto = (result["arms"][NF4][stage] for stage in stages)
    recipe, share = result["recipe"], after["adapter_parameters"] / after["base_parameters"]
    return f"""{result["task"]}, {result["examples"]:,} examples seen once, {recipe["steps"]} steps of \
{recipe["micro_batch_size"]} ({after["tokens_trained"]:,} tokens), LoRA rank {result["lora"]["rank"]} on all linear \
layers, learning rate {recipe["learning_rate"]} falling linearly, fp32 arithmetic. Both arms: the same data, order, \
seed and first adapter. **One seed ({result["seed"]})**: the spread over seeds is not measured here. Perplexity on \
{after["tokens"]:,} held-out tokens; no held-out example shares its headword or article with the training data. ± is \
the standard error over batches of them.

{show_perplexities(result)}

- **{towards_lora(result):.0%}** of the way from NF4 + DQ, untrained, to LoRA on the unquantized base. Much of this \
way is learning the form of the answers, which has nothing to do with quantization.
- **{gap_closed(result):.0%}** of the quantization gap is gone. This is the stricter measure: what both arms learn \
alike cancels out. {_left(result):.1%} of perplexity remain between them.
- The adapter: {after["adapter_parameters"]:,} parameters, {share:.1%} of the base; {after["adapter_bytes"]:,} bytes \
in `paper_repro/out/adapter`.
- Merged into bf16 and read by plain transformers: perplexity {merged["perplexity"]:.2f} \
({_merge_change(result):+.2%}). Over the weights that the base was quantized from, in place of what 4 bits left of \
them: {onto["perplexity"]:.2f}.
- Merged and quantized again to NF4 + DQ: {again["perplexity"]:.2f}, with {again["kept"]:.0%} of what the adapter had \
added; it is small ({again["adapter"]:.2%} of the weights), and the weights of a 4-bit base go back to the values \
where they were. Over the original weights, quantized then: {again_onto["perplexity"]:.2f}, with \
{again_onto["kept"]:.0%} kept.

Greedy continuations by the NF4 + DQ model; none of these prompts was trained on:

{show_samples(result)}

Try it yourself:

```
qlora generate {shlex.quote(result["base_folder"])} --adapter paper_repro/out/adapter \\
    --prompt {shlex.quote(result["prompts"][0])}
```"""


def show_perplexities(result: Result) -> str:
    arms, stages = result["arms"], ("before", "after")
    rows = [
        (label, *(f"{arms[base][stage]['perplexity']:.2f}" for stage in stages))
        for base, label in LABELS.items()
    ]
    gaps = [perplexity.gap(arms[NF4][stage], arms[DENSE][stage]) for stage in stages]
    rows.append(("gap, nats per token", *(f"{gap:.4f} ± {error:.4f}" for gap, error in gaps)))
    return table(["base under LoRA", "perplexity before", "perplexity after"], rows)


def show_samples(result: Result) -> str:
    before, after = (result["arms"][NF4][stage]["samples"] for stage in ("before", "after"))
    prompts = [prompt.replace("\n", " / ") for prompt in result["prompts"]]
    columns = zip(prompts, before, after, result["answers"], strict=True)
    rows = [[_cell(words) for words in row] for row in columns]
    return table(["prompt", "before", "after", "reference"], rows).replace("--:", ":--")


def _cell(words: str) -> str:
    return " ".join(words.replace("|", "/").split()) or "(nothing)"


def plots(result: Result, folder: Path) -> dict[str, Path]:
    curves = {LABELS[base]: arm["after"]["losses"] for base, arm in result["arms"].items()}
    path = draw.loss_curves(curves, folder / "loss.png")
    return {"Training loss of both arms, each step and its running mean": path}


EXPERIMENT = Experiment("finetune", "Fine-tuning through 4 bits", 6, run, CLAIMS, section, plots)
