"""What the papers report and this package does not run: the reason, what would run it, and the paper's values."""

from __future__ import annotations

from dataclasses import dataclass

from paper_repro.harness import published


@dataclass(frozen=True)
class OutOfReach:
    """A table of a paper that is not run, or several that show the same.

    Attributes:
        claim: the table, and what it shows.
        why: what is missing here.
        how: commands that would run it, as far as the library has the parts, and what is missing then.
        values: the table as it is printed, one of `published`.
        tables: how many tables of the paper these are.
    """

    claim: str
    why: str
    how: str
    values: str
    tables: int = 1


_LLAMA = "LLaMA's weights are in no package; nor are the data"
_MMLU = "`lm_eval --model hf --model_args pretrained=MERGED --tasks mmlu --num_fewshot 5` (lm-evaluation-harness)"
_MERGE = "`qlora merge llama-7b ADAPTER MERGED`"
_GLUE = (
    "no command: `qlora finetune` trains causal models; `qlora.quantize_model` and transformers' Trainer would "
    "(docs/trainer.md)"
)
_GPT3 = "GPT-3's weights are not public"

NOT_TRANSCRIBED = (
    "QLoRA's Tables 8, 10, 12 and 13 and LoRA's Tables 8 to 17 are not in this report at all."
)

CLAIMS = (
    OutOfReach(
        "QLoRA, Table 2 as it stands: Pile-CC perplexity, mean over OPT, BLOOM, LLaMA and Pythia, 125M to 13B",
        "the models and the text are in no package; other models and Wikipedia stand in",
        "`qlora evaluate MODEL pile-cc.jsonl --format nf4`, and int4, e2m1, e3m0, for each model",
        published.TABLE2,
    ),
    OutOfReach(
        "QLoRA, Table 3: GLUE with RoBERTa-large; RougeL on Super-NaturalInstructions with T5",
        "weights and data are in no package",
        _GLUE,
        published.TABLE3,
    ),
    OutOfReach(
        "QLoRA, Table 4: 5-shot MMLU after fine-tuning on Alpaca and FLAN v2, by data type",
        _LLAMA,
        "`qlora finetune llama-7b alpaca.jsonl --output ADAPTER --steps 10000`, with `--format none` for BF16 and "
        f"`--format fp4 --no-double-quant` for Float4; {_MERGE}; then {_MMLU}",
        published.TABLE4,
    ),
    OutOfReach(
        "QLoRA, Table 5: 5-shot MMLU by the data that was fine-tuned on",
        _LLAMA,
        "`qlora finetune llama-7b oasst1.jsonl --output ADAPTER` (1875 steps; `--steps 10000` for the other "
        f"data); {_MERGE}; then {_MMLU}",
        published.TABLE5,
    ),
    OutOfReach(
        "QLoRA, Table 6: score on the Vicuna prompts, in % of ChatGPT's",
        f"{_LLAMA}; GPT-4 judges",
        "`qlora finetune llama-65b oasst1.jsonl --output ADAPTER --learning-rate 1e-4 --dropout 0.05 "
        "--adapter-dtype bfloat16`; `qlora generate llama-65b --adapter ADAPTER --style chat --prompt PROMPT` for "
        "each of the 80 prompts; the judge is missing",
        published.TABLE6,
    ),
    OutOfReach(
        "QLoRA, Tables 1 and 7: Elo among models, start 1000, K = 32, mean over 10,000 orderings",
        f"{_LLAMA}; GPT-4 and people judge",
        "as for Table 6",
        published.ELO,
        tables=2,
    ),
    OutOfReach(
        "QLoRA, Table 9: hyperparameters for other data than OASST1, which the experiment `guanaco` has",
        _LLAMA,
        "`qlora finetune llama-33b alpaca.jsonl --output ADAPTER --steps 5000 --learning-rate 1e-4 --dropout 0.05 "
        "--gradient-accumulation-steps 32`, and so on; it cuts whole examples (`--max-length`), not source and target "
        "apart",
        published.TABLE9,
    ),
    OutOfReach(
        "QLoRA, Table 11: 5-shot MMLU by the number of examples and epochs",
        _LLAMA,
        "`qlora finetune llama-7b 50k.jsonl --output ADAPTER --steps 3125` (7B, to judge by Table 5's values) for one "
        "epoch of 50,000 examples, and so many times these steps as there are epochs and 50,000s; "
        f"{_MERGE}; then {_MMLU}",
        published.TABLE11,
    ),
    OutOfReach(
        "LoRA, Table 2: GLUE with RoBERTa and DeBERTa",
        "weights and data are in no package",
        _GLUE,
        published.LORA_TABLE2,
    ),
    OutOfReach(
        "LoRA, Table 3: E2E NLG with GPT-2",
        "weights and data are in no package",
        "`qlora finetune gpt2-medium e2e.jsonl --output ADAPTER --format none --rank 4 --alpha 32 --dropout 0.1 "
        "--target-modules c_attn --schedule linear --warmup-steps 500 --micro-batch-size 8 "
        "--gradient-accumulation-steps 1 --weight-decay 0.01 --steps 26290`, which is 5 epochs: GPT-2's c_attn is q, k "
        "and v in one matrix, and label smoothing, beam search and the scores are not in the library",
        published.LORA_TABLE3,
    ),
    OutOfReach("LoRA, Table 4: GPT-3 175B", _GPT3, "nothing here", published.LORA_TABLE4),
    OutOfReach(
        "LoRA, Table 5: which matrices of GPT-3 get an adapter",
        _GPT3,
        "the experiment `layers`, on a small model",
        published.LORA_TABLE5,
    ),
    OutOfReach(
        "LoRA, Table 6: rank on GPT-3",
        _GPT3,
        "the experiment `rank`, on a small model",
        published.LORA_TABLE6,
    ),
    OutOfReach(
        "LoRA, Table 7: what was learned for GPT-3's query matrix, beside the matrix itself",
        _GPT3,
        "no command; of an adapter of yours, `torch.linalg.svd(layer.merged_weight() - layer.base_weight())`",
        published.LORA_TABLE7,
    ),
    OutOfReach(
        "LoRA, Table 18: rank on GPT-2 M",
        "weights and data are in no package",
        "as for LoRA's Table 3, with other `--rank`; the experiment `rank`, on a small model",
        published.LORA_TABLE18,
    ),
)
