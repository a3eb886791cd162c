"""Guanaco's recipe (QLoRA, section 5 and table 9): what it is here, what it takes, and a run of it in small."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from paper_repro.harness.experiment import ARITHMETIC, OTHER, Claim, Experiment, Result, table
from paper_repro.harness.lab import Lab
from paper_repro.measures import small_llama
from qlora import QLoRAConfig, shapes
from qlora.fit import CARDS, GIB, RESERVE
from qlora.memory import plan_memory
from qlora.recipe import TrainConfig

ADAPTER = {
    "rank": 64,
    "alpha": 16,
    "target_modules": "all-linear",
    "format": "nf4",
    "double_quant": True,
}
TRAINING = {
    "batch_size": 16,
    "steps": 1875,
    "max_length": 512,
    "optimizer": "paged_adamw_32bit",
    "beta2": 0.999,
    "max_grad_norm": 0.3,
    "weight_decay": 0.0,
    "schedule": "constant",
    "group_by_length": True,
    "gradient_checkpointing": True,
}
"""As the paper has it for OASST1, by the library's names."""
BY_SIZE = {
    "7b": {"learning_rate": 2e-4, "dropout": 0.1},
    "13b": {"learning_rate": 2e-4, "dropout": 0.1},
    "33b": {"learning_rate": 1e-4, "dropout": 0.05},
    "65b": {"learning_rate": 1e-4, "dropout": 0.05},
}
"""What differs from one size to another; of the dropout the text, the published scripts have 0.05 for all."""
SIXTEEN_BIT = {"33b", "65b"}
"""Sizes with the adapters in 16 bits, which the cards below ask for."""
FITS = {"33b": 24, "65b": 48}
"""GB of the cards that the paper names."""
SHOWN_CARDS = [card for card in CARDS if card in (24, 48, 80)]

TINY = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
STEPS, SEED, SAME = 3, 0, 1e-6


def settings(size: str) -> tuple[QLoRAConfig, TrainConfig]:
    """The recipe of a size: the library's defaults, and what `flags` says."""
    given = flags(size)
    rate = given.pop("learning_rate", TrainConfig().learning_rate)
    return QLoRAConfig(**given), TrainConfig(learning_rate=rate)


def flags(size: str) -> dict[str, Any]:
    """The settings of a size that are not the library's defaults."""
    defaults = asdict(QLoRAConfig()) | asdict(TrainConfig())
    wanted = dict(BY_SIZE[size])
    if size in SIXTEEN_BIT:
        wanted["adapter_dtype"] = "bfloat16"
    return {name: value for name, value in wanted.items() if value != defaults[name]}


def command(size: str) -> str:
    """What trains it, with the weights and the data in these places."""
    shown = {name: f"{v:g}" if isinstance(v, float) else v for name, v in flags(size).items()}
    given = "".join(f" --{name.replace('_', '-')} {value}" for name, value in shown.items())
    return f"qlora finetune ./llama-{size} oasst1.jsonl --output ./guanaco-{size}{given}"


def run(lab: Lab) -> Result:
    key = {"llamas": {name: list(shape) for name, shape in shapes.LLAMA.items()}}
    plans = {
        size: lab.measure(f"guanaco-{size}", {**key, "size": size}, lambda size=size: _plan(size))
        for size in BY_SIZE
    }
    return {"defaults": _defaults(), "plans": plans, "tiny": _tiny(lab), "seeds": [SEED]}


def _defaults() -> dict[str, Any]:
    """The library's own, by the recipe's names."""
    adapter, training = QLoRAConfig(), TrainConfig()
    both = {name: getattr(adapter, name) for name in (*ADAPTER, "dropout")}
    return both | {
        name: getattr(training, name) for name in (*TRAINING, "learning_rate", "precision")
    }


def _plan(size: str) -> dict[str, int]:
    adapter, training = settings(size)
    plan = plan_memory(shapes.model_config(f"llama-{size}"), adapter, training)
    return {**asdict(plan), "total": plan.total}


def _tiny(lab: Lab) -> dict[str, Any]:
    """A few steps of the 7B's recipe."""
    adapter, training = settings("7b")
    training = replace(training, steps=STEPS, seed=SEED)
    return lab.measure(
        "guanaco-tiny",
        {"model": TINY, "steps": STEPS, "seed": SEED},
        lambda: small_llama.run(TINY, adapter, training, lab.device),
        (small_llama,),
    )


def _other(result: Result) -> dict[str, tuple[Any, Any]]:
    """The recipe's fields that the defaults have otherwise: the paper's value, and the default."""
    paper = ADAPTER | TRAINING | {"learning_rate": BY_SIZE["7b"]["learning_rate"]}
    own = result["defaults"]
    return {name: (value, own[name]) for name, value in paper.items() if own[name] != value}


def _free(result: Result, size: str, card: int) -> int:
    """Bytes that a card has to spare when all that can be paged out is; below 0 it is too small."""
    plan = result["plans"][size]
    return card * GIB - RESERVE - plan["total"] + plan["optimizer"]


def _fits(result: Result, size: str, card: int) -> str:
    free, states = _free(result, size, card), result["plans"][size]["optimizer"]
    if free < 0:
        return "no"
    return "yes" if free >= states else f"{(states - free) / GIB:.1f} GiB paged out"


def _ran(result: Result) -> bool:
    tiny = result["tiny"]
    steps = tiny["metrics"]
    return (
        len(steps) == STEPS
        and all(step["lr"] == BY_SIZE["7b"]["learning_rate"] for step in steps)
        and "adapter_model.safetensors" in tiny["written"]
        and tiny["apart"] <= SAME < tiny["learned"]
    )


CLAIMS = (
    Claim(
        statement="The library's defaults are Guanaco's recipe for 7B and 13B on OASST1, but for the dropout (Table 9, "
        "section 5)",
        paper=f"{len(ADAPTER) + len(TRAINING) + 1} settings",
        criterion="all are equal; but for the dropout, about which the paper and its scripts disagree",
        passes=lambda r: not _other(r),
        measured=lambda r: (
            (
                ", ".join(f"{n} {own} for {paper}" for n, (paper, own) in _other(r).items())
                or "equal"
            )
            + f"; dropout {r['defaults']['dropout']:g} for .1 or .05: --dropout"
        ),
        kind=ARITHMETIC,
    ),
    Claim(
        statement="Guanaco 33B trains on a card of 24 GB, 65B on one of 48 GB: the whole recipe, one example at a time",
        paper=", ".join(f"{size.upper()} on {card} GB" for size, card in FITS.items()),
        criterion=f"planned peak less the states that can be paged out, and {RESERVE / GIB:g} GiB for CUDA, within "
        "so many GiB",
        passes=lambda r: all(_free(r, size, card) >= 0 for size, card in FITS.items()),
        measured=lambda r: ", ".join(
            f"{size.upper()} {r['plans'][size]['total'] / GIB:.1f} GiB: {_fits(r, size, card)}"
            for size, card in FITS.items()
        ),
        trend=True,
        kind=ARITHMETIC,
    ),
    Claim(
        statement="The recipe runs from the base to the saved adapter (a small random LLaMA, random tokens)",
        paper="-",
        criterion=f"{STEPS} steps at the learning rate, and the saved adapter, loaded anew, answers as the trained "
        f"model: within {SAME:g} relative RMSE, and further from the base than that",
        passes=_ran,
        measured=lambda r: (
            f"{len(r['tiny']['metrics'])} steps, answers {r['tiny']['apart']:.1e} apart, "
            f"{r['tiny']['learned']:.1e} from the base"
        ),
        kind=OTHER,
    ),
)


def section(result: Result) -> str:
    own = result["defaults"]
    paper = ADAPTER | TRAINING | {"learning_rate": "2e-4 (33B, 65B: 1e-4)"}
    paper |= {"dropout": ".1 up to 13B, .05 above; scripts .05", "precision": "bfloat16"}
    names = [(f"`{name}`", value, own[name]) for name, value in paper.items()]
    plans = [
        (
            size.upper(),
            f"{BY_SIZE[size]['learning_rate']:g}",
            f"{BY_SIZE[size]['dropout']:g}",
            "16 bits" if size in SIXTEEN_BIT else "32 bits",
            f"{plan['total'] / GIB:.1f}",
            *(_fits(result, size, card) for card in SHOWN_CARDS),
        )
        for size, plan in result["plans"].items()
    ]
    header = ["", "learning rate", "dropout", "adapters", "planned, GiB"]
    header += [f"fits {card} GiB" for card in SHOWN_CARDS]
    losses = ", ".join(f"{step['loss']:.3f}" for step in result["tiny"]["metrics"])
    commands = "\n".join(command(size) for size in BY_SIZE)
    return "\n\n".join(
        (
            "LLaMA's weights and OASST1 are out of reach, so the recipe is checked, planned and run in small. "
            '`precision` "auto" is bfloat16 on a GPU.',
            table(["setting", "paper", "default"], names, text=True),
            "What a step takes by the memory planner: micro-batches of 1 example of 512 tokens, accumulated over 16. "
            f"A card keeps {RESERVE / GIB:g} GiB for CUDA; optimizer states may be paged out to the host.",
            table(header, plans),
            f"The commands, with the weights and the data at hand:\n\n```\n{commands}\n```",
            f"The 7B's recipe on {TINY['num_hidden_layers']} layers of width {TINY['hidden_size']} "
            f"({result['tiny']['parameters']:,} trained parameters), {STEPS} steps of 16 examples: loss {losses}. "
            "Random tokens teach nothing; what is shown is that every setting works together.",
        )
    )


EXPERIMENT = Experiment("guanaco", "The Guanaco recipe", (0.2, 0.2), run, CLAIMS, section)
