"""The command line, as a user meets it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from qlora import QLoRAConfig, pretrained, quantize_4bit
from qlora.__main__ import main
from qlora.flags import field_descriptions
from qlora.pretrained import load_quantized
from qlora.recipe import TrainConfig
from tests import tiny

ROOT = Path(__file__).parent.parent
RECIPE = [
    *("--rank", "4", "--alpha", "8", "--dropout", "0.1", "--learning-rate", "1e-2"),
    *("--micro-batch-size", "2", "--gradient-accumulation-steps", "2"),
    *("--max-length", "32", "--checkpoint-every", "10", "--device", "cpu"),
]
BARS = ("Loading weights:", "load and quantize:", "load:")
PROMPT = ["--prompt", "Hello", "--max-new-tokens", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and an adapter that has been trained on them."""
    path = tmp_path_factory.mktemp("cli")
    tiny.model_folder(path / "model")
    records = [{"prompt": f"{i % 10}+1=", "completion": f"{i % 10 + 1}."} for i in range(20)]
    tiny.write_lines(path / "data.jsonl", records)
    assert finetune(path, path / "adapter", "--steps", "40") == 0
    return path


def finetune(place: Path, output: Path, *options: str) -> int:
    return main(["finetune", *_finetune_arguments(place, output), *options])


def _finetune_arguments(place: Path, output: Path) -> list[str]:
    return [str(place / "model"), str(place / "data.jsonl"), "--output", str(output), *RECIPE]


def call(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qlora", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def mistake(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line that a mistake ends with."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    shown = captured.err.splitlines()
    lines = [line for line in shown if line and not line.startswith(BARS)]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("qlora: ")
    return lines[0]


# What the commands do


def test_finetune_evaluate_generate_merge(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merged model, loaded by plain transformers, is the one that was trained."""
    model, data, adapter = place / "model", place / "data.jsonl", place / "adapter"
    base = evaluated(capsys, model, data)
    trained = evaluated(capsys, model, data, "--adapter", adapter)
    assert trained < base / 10
    merged = tmp_path / "merged"
    assert main(["merge", str(model), str(adapter), str(merged), "--dtype", "float32"]) == 0
    assert evaluated(capsys, merged, data, "--format", "none") == pytest.approx(trained, rel=1e-3)

    prompt = ["--prompt", "3+1=", "--max-new-tokens", "8", "--device", "cpu"]
    assert main(["generate", str(model), "--adapter", str(adapter), *prompt]) == 0
    answer = capsys.readouterr().out.strip()
    plain = AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer("3+1=", return_tensors="pt").input_ids
    output = plain.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(output, skip_special_tokens=True).strip() == answer
    assert "." in answer


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: Any) -> float:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--device", "cpu"]) == 0
    words = capsys.readouterr().out.split()
    assert words[0] == "perplexity"
    return float(words[1].rstrip(","))


def test_finetune_says_what_it_did(place: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user runs it."""
    arguments = _finetune_arguments(place, tmp_path)
    done = call("finetune", *arguments, "--steps", "3", "--evaluation-data", place / "data.jsonl")
    assert done.returncode == 0, done.stderr
    for text in (
        "bits per parameter",
        "steps 3, last loss",
        "perplexity",
        f"written to {tmp_path}",
    ):
        assert text in done.stdout
    assert "train" in done.stderr, "a progress bar"


def test_the_base_is_rebuilt_as_it_was_trained(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--steps", "2", "--format", "int4", "--blocksize", "32", "--no-double-quant"]
    assert finetune(place, tmp_path, *options, "--target-modules", "q_proj", "up_proj") == 0
    base = json.loads((tmp_path / "qlora_config.json").read_text())
    del base["fingerprint"]
    assert base == {"format": "int4", "blocksize": 32, "double_quant": False}
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names} == {"q_proj", "up_proj"}
    model = (place / "model", place / "data.jsonl", "--adapter", tmp_path)
    same = evaluated(capsys, *model, "--format", "int4", "--blocksize", 32, "--no-double-quant")
    assert evaluated(capsys, *model) == same
    assert evaluated(capsys, *model, "--format", "nf4") != same


def test_merge_writes_16_bit_and_a_tokenizer(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "merged"
    assert main(["merge", str(place / "model"), str(place / "adapter"), str(out)]) == 0
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (place / "model" / name).read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["merged"]


def test_a_folder_in_4_bits_takes_the_models_place(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, data, quantized = place / "model", place / "data.jsonl", tmp_path / "quantized"
    base = ["--format", "int4", "--blocksize", "32", "--no-double-quant"]
    capsys.readouterr()
    assert main(["quantize", str(dense), str(quantized), *base, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    size = sum(path.stat().st_size for path in quantized.iterdir())
    assert f"written to {quantized}: {size:,} bytes" in captured.out
    assert "bits per parameter        5.000" in captured.out
    assert "adapter" not in captured.out
    assert "load and quantize: 100%" in captured.err

    results = []
    for model, options in ((dense, base), (quantized, [])):
        adapter, merged = tmp_path / f"{model.name}-adapter", tmp_path / f"{model.name}-merged"
        arguments = _finetune_arguments(place, adapter)
        assert main(["finetune", str(model), *arguments[1:], "--steps", "3", *options]) == 0
        assert main(["merge", str(model), str(adapter), str(merged)]) == 0
        capsys.readouterr()
        assert main(["generate", str(model), "--adapter", str(adapter), *PROMPT]) == 0
        results.append(
            (
                (adapter / "adapter_model.safetensors").read_bytes(),
                (merged / "model.safetensors").read_bytes(),
                (merged / "config.json").read_bytes(),
                capsys.readouterr().out,
                evaluated(capsys, model, data, *options),
                evaluated(capsys, model, data, "--adapter", adapter),
            )
        )
    assert results[0] == results[1]

    (adapter / "qlora_config.json").unlink()
    evaluated(capsys, quantized, data, "--adapter", adapter)
    assert main(["merge", str(quantized), str(adapter), str(tmp_path / "merged")]) == 0
    assert "does not say which base" not in capsys.readouterr().err, "the folder does"
    for command in (
        ("finetune", quantized, data, "--output", tmp_path / "new", "--blocksize", 64),
        ("evaluate", quantized, data, "--format", "none"),
        ("generate", quantized, *PROMPT, "--adapter", place / "adapter", "--double-quant"),
        ("merge", quantized, place / "adapter", tmp_path / "new", "--format", "nf4"),
    ):
        said = mistake(capsys, *command)
        assert f"{quantized}: is quantized already, with format='int4', blocksize=32" in said
    assert "dense model is needed" in mistake(capsys, "quantize", quantized, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("style", ["plain", "instruction", "chat"])
def test_sampling_is_repeated_by_its_seed(
    place: Path, capsys: pytest.CaptureFixture[str], style: str
) -> None:
    def sample(seed: int) -> str:
        options = ["--temperature", "1.5", "--top-p", "0.9", "--seed", str(seed), "--style", style]
        arguments = [str(place / "model"), "--prompt", "Hello", "--max-new-tokens", "12"]
        assert main(["generate", *arguments, *options]) == 0
        return capsys.readouterr().out

    first, again, other = sample(1), sample(1), sample(2)
    assert first == again != other


def test_a_killed_run_goes_on_to_the_same_result(place: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of training; the same command then ends where no kill would have."""
    output = tmp_path / "killed"
    arguments = [*_finetune_arguments(place, output), "--steps", "40"]
    command = [sys.executable, "-m", "qlora", "finetune", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _wait_for_steps(process, output / "metrics.jsonl", 13)
    os.kill(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert not (output / "adapter_model.safetensors").exists(), "the run was not at its end"

    assert finetune(place, output, "--steps", "40") == 0
    killed, whole = (
        load_file(folder / "adapter_model.safetensors") for folder in (output, place / "adapter")
    )
    assert killed.keys() == whole.keys()
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    losses = [
        [(record["step"], record["loss"]) for record in _metrics(folder)]
        for folder in (output, place / "adapter")
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 41))


def _wait_for_steps(process: subprocess.Popen[bytes], path: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline, "the run has not come that far in two minutes"
        time.sleep(0.002)


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_base_is_quantized_from_the_numbers_in_the_file(place: Path, precision: str) -> None:
    """Whatever the computation rounds to, so that an adapter meets the base it was trained on."""
    config = QLoRAConfig(rank=2)
    model, report = load_quantized(place / "model", config, precision=precision)
    name = "model.layers.1.mlp.up_proj"
    expected = quantize_4bit(load_file(place / "model" / "model.safetensors")[f"{name}.weight"])
    layer = model.get_submodule(name)
    assert torch.equal(layer.weight.packed, expected.packed)
    assert torch.equal(layer.weight.absmax, expected.absmax)
    assert len(report.quantized) == 14
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {getattr(torch, precision)}
    assert layer.lora_a.dtype == torch.float32


# What it teaches


@pytest.mark.parametrize("command", ["quantize", "finetune", "evaluate", "generate", "merge"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert f"example:\n  qlora {command} " in capsys.readouterr().out


def test_a_dense_base_is_not_offered_where_there_is_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = {}
    for command in ("quantize", "evaluate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        words[command] = " ".join(capsys.readouterr().out.split())
    assert "or none to leave the base dense" in words["evaluate"]
    assert "none" not in words["quantize"]
    assert '"int4" (default: nf4)' in words["quantize"]
    assert "unless transformers merges weights (mixtures of experts)" in words["quantize"]


def test_a_folder_that_is_read_as_a_whole_is_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96}
    kind = MixtralConfig(**sizes, num_attention_heads=4, num_hidden_layers=1, num_local_experts=2)
    folder = tiny.model_folder(tmp_path / "experts", MixtralForCausalLM(kind))
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    reason = "0.0 GB and more of memory: transformers merges or splits weights as it reads them"
    assert captured.err.count(f"qlora: warning: {folder}: read as a whole, {reason}") == 1
    assert "quantized layers          8\n" in captured.out  # two of them for each expert
    assert "not linear" not in captured.out


def test_every_setting_is_a_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Once each, but for mappings; and of the groups each is there."""
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    lines = capsys.readouterr().out.splitlines()
    settings = lines[: lines.index("when memory runs out, in this order:")]
    flags = [line.split()[0].rstrip(",") for line in settings if line.startswith("  -")]
    for config in (TrainConfig, QLoRAConfig):
        descriptions = field_descriptions(config)
        for item in fields(config):
            expected = 0 if item.name.endswith("_pattern") else 1
            assert flags.count(f"--{item.name.replace('_', '-')}") == expected, item.name
            assert len(descriptions[item.name]) > 10
    words = " ".join(" ".join(lines).split())
    assert "(default: 0.0002)" in words
    assert "(default: 1875)" in words
    assert "no adapter yet" not in words
    groups = [line[:-1] for line in lines if line.endswith(":") and line[:1].isalpha()]
    assert groups[-10:] == [
        *("options", "data", "adapter", "base", "training", "memory", "run"),
        *("when memory runs out, in this order", "when the loss is NaN or grows"),
        "when nothing is learned",
    ]


def test_help_is_quick() -> None:
    """transformers is not imported for it."""
    code = "import sys, qlora.__main__; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# Mistakes


def test_a_mistake_ends_with_one_line_and_status_2(place: Path) -> None:
    done = call("evaluate", "meta-llama/Llama-2-7b", place / "data.jsonl")
    assert done.returncode == 2
    assert done.stderr == (
        "qlora: meta-llama/Llama-2-7b: no such folder. A model is a local folder with config.json, "
        "*.safetensors and the tokenizer's files; models are not downloaded "
        "(--debug shows where)\n"
    )
    assert call("finetune").returncode == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps must be finite and at least 1; got 0"),
        (["--format", "nf3"], "nf3"),
        (["--blocksize", "48"], "48"),
        (["--rank", "0"], "rank"),
        (["--schedule", "step"], "schedule must be one of constant, linear, cosine; got 'step'"),
        (["--target-modules", "query"], "'query'"),
        (["--target-modules", "q_proj)"], "q_proj)"),
        (["--device", "tpu9"], "--device must be cpu, cuda"),
        (["--device", "meta"], "--device must be cpu, cuda, cuda:1, ...; got 'meta'"),
        (["--seed", "9" * 30], "seed must be at least 0 and below 2**63"),
        (["--evaluation-data", "nowhere.jsonl"], "nowhere.jsonl: no such data file"),
    ],
)
def test_wrong_options_are_named(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    arguments = _finetune_arguments(place, tmp_path / "output")
    assert message in mistake(capsys, "finetune", *arguments, *options)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--learnig-rate", "; did you mean --learning-rate?"),
        ("--modules_to_save=lm_head", "; did you mean --modules-to-save?"),
        ("--zzz", ""),
    ],
)
def test_a_misspelt_flag_is_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, meant: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        finetune(place, tmp_path / "output", option)
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"qlora finetune: error: unrecognized arguments: {option}{meant}"


def test_what_the_model_cannot_take_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tiny.model_folder(tmp_path / "small", tiny.llama(vocab_size=40))
    said = mistake(capsys, "generate", small, *PROMPT)
    assert "tokens must be below 40, the size of the model's embedding" in said
    model = tiny.model_folder(tmp_path / "model", tiny.gpt2())  # 128 positions
    data = tiny.write_lines(tmp_path / "data.jsonl", [{"text": "abc " * 100}])
    said = mistake(capsys, "evaluate", model, data, "--device", "cpu")
    assert "max_length must be at most 128 for this model" in said
    options = ["--device", "cpu", "--prompt", "a" * 128]
    said = mistake(capsys, "generate", model, *options)
    assert "prompt must have fewer tokens than the model's 128; got 128" in said
    options[-1] = "a" * 125
    assert main(["generate", str(model), *options]) == 0, "it stops at the last position"


def test_an_adapter_away_from_its_base(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, data = place / "adapter", place / "data.jsonl"
    gpt2 = tiny.model_folder(tmp_path / "gpt2", tiny.gpt2())
    said = mistake(capsys, "evaluate", gpt2, data, "--adapter", adapter, "--device", "cpu")
    assert f"{adapter}: the adapter does not fit {gpt2}" in said
    other = tiny.model_folder(tmp_path / "other", tiny.llama(seed=1))
    warning = f"qlora: warning: {adapter}: the adapter was trained on another base"
    for model, expected in ((place / "model", False), (other, True)):
        assert main(["evaluate", str(model), str(data), "--adapter", str(adapter)]) == 0
        assert (warning in capsys.readouterr().err) == expected

    silent = Path(shutil.copytree(adapter, tmp_path / "silent"))
    (silent / "qlora_config.json").unlink()
    for options, expected in (([], True), (["--format", "none"], False)):
        out = tmp_path / f"merged-{expected}"
        assert main(["merge", str(place / "model"), str(silent), str(out), *options]) == 0
        note = f"{silent} does not say which base it was trained on; nf4 is assumed (--format none"
        assert (note in capsys.readouterr().err) == expected


def test_errors_and_interruptions_end_without_a_traceback(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_with(error: BaseException) -> None:
        def raise_it(*_: Any) -> None:
            raise error

        monkeypatch.setattr(pretrained, "load_tokenizer", raise_it)

    end_with(TypeError("alpha must be a number"))
    assert "alpha must be a number" in mistake(capsys, "generate", place / "model", *PROMPT)
    end_with(KeyboardInterrupt())
    assert main(["generate", str(place / "model"), *PROMPT]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
    assert finetune(place, place / "adapter") == 130
    assert "goes on from its latest checkpoint" in capsys.readouterr().err


def test_other_mistakes_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, adapter = place / "model", place / "data.jsonl", place / "adapter"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    said = mistake(capsys, "merge", model, adapter, tmp_path / "full")
    assert "full: exists already and is not an empty folder" in said
    said = mistake(capsys, "merge", model, adapter, ".")
    assert "exists already and is not an empty folder" in said
    said = mistake(capsys, "finetune", model, data, "--output", data)
    assert "data.jsonl: exists already and is not a folder" in said
    said = mistake(capsys, "evaluate", model, data, "--adapter", tmp_path)
    assert "adapter_config.json: no such file" in said
    said = mistake(capsys, "evaluate", model, data, "--batch-size", 0)
    assert "batch_size must be at least 1" in said
    for option, value in (
        *(("--top-p", 0), ("--temperature", -1), ("--temperature", "nan")),
        *(("--max-new-tokens", 0), ("--seed", 2**63)),
    ):
        said = mistake(capsys, "generate", model, "--prompt", "a", option, value)
        assert f"{option[2:].replace('-', '_')} must be" in said
    said = mistake(capsys, "generate", model, "--prompt", "")
    assert "prompt must have at least one token" in said


def test_memory_says_what_a_step_takes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rank", "4", "--batch", "2", "--length", "64", "--dtype", "float32"]
    assert main(["memory", str(place / "model"), *options]) == 0
    out = capsys.readouterr().out
    assert "2 x 64 tokens in float32, 16 times a step; adapters of rank 4 in float32; paged_" in out
    assert "optimizer states" in out
    assert "8 GiB  fits, 6.9 GiB to spare" in out


def test_memory_explains_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert "llama-65b, a config.json or a folder with one; got nothing" in mistake(
        capsys, "memory", "nothing"
    )
    assert "max_length must be at most 2048" in mistake(
        capsys, "memory", "llama-7b", "--length", "4096"
    )
    assert "--batch must be at least 1; got 0" in mistake(
        capsys, "memory", "llama-7b", "--batch", "0"
    )
