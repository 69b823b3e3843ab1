"""Data, training loop and command line on a target of a few thousand weights."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_griffin.train.__main__ import main
from vllm_griffin.train.data import Document, HiddenStates, extract, read_responses
from vllm_griffin.train.loop import Trainer, TrainingError
from vllm_griffin.train.settings import Settings
from vllm_griffin.train.setup import load_target_parts, new_draft


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with two layers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("target")
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shards(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden states of 60 random documents."""
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(1)
    documents = []
    for i in range(60):
        length = int(torch.randint(8, 30, (1,), generator=generator))
        tokens = torch.randint(60, (length,), generator=generator).tolist()
        documents.append(Document(i, tokens, 1 + i % 5))
    model = LlamaForCausalLM.from_pretrained(target).eval()
    extract(model, documents, folder, shard_documents=25, batch_tokens=100)
    return folder


def trainer(target: Path, shards: Path, folder: Path, **changes) -> Trainer:
    """A short run of one and of two passes."""
    fields = {"stages": [(1, 4), (2, 4)], "batch_tokens": 200, "vocabulary": 40, "save_every": 3}
    parts = load_target_parts(target)
    settings = Settings(**(fields | changes))
    data = HiddenStates(shards)
    torch.manual_seed(0)
    return Trainer(new_draft(parts), data, parts.head, settings, folder, parts.config)


def test_stored_states_are_the_targets(target: Path, shards: Path) -> None:
    data = HiddenStates(shards)
    model = LlamaForCausalLM.from_pretrained(target).eval()
    with torch.inference_mode():
        for i in [0, 24, 25, 59]:
            states = model(data.tokens[i][None], output_hidden_states=True).hidden_states[-1][0]
            torch.testing.assert_close(data.hidden[i].float(), states, atol=5e-3, rtol=1e-3)
    assert data.ids == list(range(60))
    assert data.split(True) == [19, 39, 59]


def test_batch_shifts_within_documents(shards: Path) -> None:
    data = HiddenStates(shards)
    batch = data.batch([3, 7], prompt_loss=False)
    a, b = data.tokens[3].tolist(), data.tokens[7].tolist()
    assert batch.tokens.tolist() == a[1:] + b[1:]
    assert batch.labels.tolist() == [*a[2:], -1, *b[2:], -1]
    assert batch.positions.tolist() == [*range(len(a) - 1), *range(len(b) - 1)]
    assert batch.prompt_len.tolist() == [4] * (len(a) - 1) + [3] * (len(b) - 1)
    torch.testing.assert_close(batch.features[len(a) - 1], data.hidden[7][0].float())
    torch.testing.assert_close(batch.wanted[len(a) - 2], data.hidden[3][-1].float())


@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
def test_resumed_run_equals_an_uninterrupted_one(
    target: Path, shards: Path, tmp_path: Path, optimiser: str
) -> None:
    whole = trainer(target, shards, tmp_path / "whole", optimiser=optimiser)
    whole.run(torch.float32)
    first = trainer(target, shards, tmp_path / "parts", optimiser=optimiser)
    broken = first._train_step

    def killed(*arguments):
        if first.step == 5:
            raise KeyboardInterrupt
        return broken(*arguments)

    first._train_step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = trainer(target, shards, tmp_path / "parts", optimiser=optimiser)
    assert second.step == 3
    second.run(torch.float32)
    for name in ["model.safetensors", "config.json"]:
        one, other = (tmp_path / part / name for part in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes()


def test_training_lowers_the_loss(target: Path, shards: Path, tmp_path: Path) -> None:
    run = trainer(target, shards, tmp_path, stages=[(1, 40)], batch_tokens=600, warmup=2)
    before = run.validate()["val_token0"]
    run.run()
    assert run.validate()["val_token0"] < before - 0.1


def test_bad_loss_stops_and_keeps_the_checkpoint(
    target: Path, shards: Path, tmp_path: Path
) -> None:
    run = trainer(target, shards, tmp_path, stages=[(1, 3)])
    run.run()
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    run = trainer(target, shards, tmp_path, stages=[(1, 6)])
    for i in range(60):
        run.data.hidden[i][:] = float("nan")
    with pytest.raises(TrainingError, match="step 3"):
        run.run()
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept


def test_malformed_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    good = json.dumps({"id": 1, "prompt_token_ids": [1, 2], "response_token_ids": [3]})
    path.write_text(good + "\n{}\n")
    with pytest.raises(ValueError, match="line 2"):
        read_responses(path)


def test_command_line(target: Path, tmp_path: Path) -> None:
    rows = [
        {"id": i, "prompt_token_ids": [1, 2, 3], "response_token_ids": [4 + i % 3, 5, 6, 7, 8]}
        for i in range(40)
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ["--target", str(target)]
    commands = [
        ["extract", *base, "--responses", str(tmp_path / "r.jsonl"), "--output", str(tmp_path / "d")],
        ["train", *base, "--data", str(tmp_path / "d"), "--output", str(tmp_path / "griffin"),
         "--stages", "1:2,2:1", "--batch-tokens", "64", "--vocabulary", "0"],
        ["train", *base, "--data", str(tmp_path / "d"), "--output", str(tmp_path / "eagle"),
         "--kind", "eagle", "--stages", "1:2", "--batch-tokens", "64", "--optimiser", "adamw"],
        ["replay", *base, "--draft", str(tmp_path / "griffin"), "--draft", str(tmp_path / "eagle"),
         "--data", str(tmp_path / "d"), "--tree", "12,3,4", "--limit", "4"],
    ]  # fmt: skip
    for command in commands:
        result = CliRunner().invoke(main, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    lines = [json.loads(x) for x in result.stdout.splitlines() if x.startswith("{")]
    assert [row["tree"] for row in lines] == ["12,3,4"] * 2
    assert all(1 <= row["acceptance_length"] <= 4 for row in lines)
    names = [
        json.loads((tmp_path / kind / "config.json").read_text())["architectures"][0]
        for kind in ("griffin", "eagle")
    ]
    assert names == ["GriffinForCausalLM", "EagleLlamaForCausalLM"]
