"""A small language model of our own, trained in fp32 and never quantized: `python -m paper_repro.materials.own_model`.

SmolLM2's weights arrive on a 4-bit lattice. This model's do not: a LLaMA in small, trained from nothing on the
Wikipedia text, minutes on two cores. It is kept in the user's cache; a run that was killed goes on.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from paper_repro.harness.digests import code_digest, digest_of
from paper_repro.harness.lab import Lab
from paper_repro.materials import assets, text, wikitext
from qlora import files
from qlora.recipe import TrainConfig, learning_rate

NAME, SEED = "own model", 0
ADAM = {"betas": (0.9, 0.95), "weight_decay": 0.1}
MOMENTS = ("exp_avg", "exp_avg_sq")
MOST_NORM, SAVE_EVERY = 1.0, 200


@dataclass(frozen=True)
class Size:
    """Shape of the model, and how it is trained: `batch` windows of `context` tokens in each of `steps`."""

    hidden: int
    layers: int
    feed_forward: int
    vocabulary: int
    learning_rate: float
    steps: int
    context: int = 256
    batch: int = 8


CPU = Size(128, 4, 352, vocabulary=512, learning_rate=6e-3, steps=1600)
GPU = Size(384, 8, 1024, vocabulary=1024, learning_rate=2e-3, steps=6000, batch=32)


def own_folder(lab: Lab) -> Path:
    """The model with its tokenizer, as an ordinary Hugging Face folder; trained where it is not there yet."""
    size = GPU if lab.device.type == "cuda" else CPU
    code = code_digest(map(Path, (__file__, text.__file__, wikitext.__file__)))
    key = {**asdict(size), "text": assets.WIKIPEDIA_SHA256, "code": code}
    name = f"own-{digest_of(key | {'device': str(lab.device)})[:12]}"
    folder = lab.folder / "models" / name
    if not folder.is_dir():
        prose = text.articles(assets.wikipedia_file(lab.folder)).train
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(folder.parent)
        tokenizer = train_tokenizer(prose, size.vocabulary)
        tokens = torch.tensor([i for ids in tokenizer(prose)["input_ids"] for i in (*ids, 0)])
        run = lab.folder / "runs" / f"{name}.safetensors"
        network = train(new_model(size), tokens, size, run, lab.device)
        with files.new_folder(folder) as temporary:
            network.cpu().save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        run.unlink(missing_ok=True)
    return folder


def train_tokenizer(prose: list[str], vocabulary: int) -> Any:
    """Byte pairs of the text. Token 0 ends an article."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(prose, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>")


def new_model(size: Size) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(
    network: torch.nn.Module, tokens: torch.Tensor, size: Size, run: Path, device: torch.device
) -> torch.nn.Module:
    """Train all weights by AdamW, the learning rate up and down once; `run` holds the latest state.

    Which windows a step sees depends on its number alone, so that a run that goes on ends as one in one piece.
    """
    network.to(device).train()
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), **ADAM)
    course = TrainConfig(
        size.learning_rate, schedule="cosine", warmup_steps=size.steps // 20, steps=size.steps
    )
    first = _restore(run, parameters, optimizer)
    bar = tqdm(range(first, size.steps), "training our own model", size.steps, initial=first)
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(course, step)
        generator = torch.Generator().manual_seed(SEED + step)
        starts = torch.randint(len(tokens) - size.context, (size.batch,), generator=generator)
        windows = torch.stack([tokens[i : i + size.context] for i in starts]).to(device)
        loss = network(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), MOST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
            _save(run, parameters, optimizer, step + 1)
    return network


def _save(
    run: Path,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    tensors = {"step": torch.tensor(step)}
    for name, parameter in parameters.items():
        tensors[name] = parameter.detach()
        for moment in MOMENTS:
            tensors[f"{moment} {name}"] = optimizer.state[parameter][moment]
    run.parent.mkdir(parents=True, exist_ok=True)
    files.write_tensors(run, tensors)


def _restore(
    run: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> int:
    """Take up the state in `run`, if there is one; returns the number of steps that it has behind it."""
    if not run.is_file():
        return 0
    tensors = files.read_tensors(run)
    step = tensors["step"]
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])
        moments = {moment: tensors[f"{moment} {name}"].to(parameter.device) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": step.float(), **moments}
    return int(step)


def main() -> int:
    with Lab().lock() as lab:
        folder = own_folder(lab)
    print(f"{NAME}: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
