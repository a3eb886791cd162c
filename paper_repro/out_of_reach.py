"""What the papers report and this package does not run, with the reason and what would run it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OutOfReach:
    """A result of the paper that is not run.

    Attributes:
        claim: table or figure, and what it shows.
        paper: the values.
        why: what is missing here.
        how: what would run it, where the parts are at hand.
    """

    claim: str
    paper: str
    why: str
    how: str


_LLAMA = "LLaMA weights are in no package"
_FINETUNE = (
    "`qlora finetune LLAMA_FOLDER DATA.jsonl --output DIR` (the Guanaco recipe is the default)"
)

CLAIMS = (
    OutOfReach(
        "Table 2 as it stands: Pile-CC perplexity, mean over OPT, BLOOM, LLaMA and Pythia, 125M to 13B",
        "Int4 34.34, E2M1 31.07, E3M0 29.48, NF4 + DQ 27.41",
        "models and text out of reach; SmolLM2 and Wikipedia stand in",
        "the same measurement on those model folders",
    ),
    OutOfReach(
        "Table 3: GLUE with RoBERTa-large, Super-NaturalInstructions RougeL with T5",
        "BF16 88.6, QLoRA FP4 88.6; T5-11B: BF16 62.0, NF4 + DQ 60.9",
        "weights and data out of reach",
        "`quantize_model` on the T5 or RoBERTa, then its usual training",
    ),
    OutOfReach(
        "Table 4: 5-shot MMLU after fine-tuning on Alpaca and FLAN v2",
        "mean BF16 53.0, Float4 52.2, NF4 + DQ 53.1",
        _LLAMA,
        f"{_FINETUNE}, then an MMLU harness on the merged model",
    ),
    OutOfReach(
        "Table 6: Guanaco against ChatGPT on the Vicuna prompts",
        "99.3 / 97.8 / 90.4 / 87.0 % for 65B / 33B / 13B / 7B",
        f"{_LLAMA}; judged by GPT-4",
        f"{_FINETUNE}; no judge is at hand",
    ),
    OutOfReach(
        "65B fine-tuned in less than 48 GB, 33B in 24 GB",
        "45.0 and 24.7 GB",
        "needs a GPU of that size",
        "one training step at batch 1, length 512 on such a GPU",
    ),
    OutOfReach(
        "Input gradients: 567 MB, 18 MB with gradient checkpointing (7B, batch 1, length 512)",
        "at least 20 times less",
        "needs a GPU",
        "one training step with `--gradient-checkpointing` and with `--no-gradient-checkpointing`",
    ),
)
