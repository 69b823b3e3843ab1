"""``vllm-griffin data`` as a user calls it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from tests.training.data_target import MARKED, chat_target
from vllm_griffin.cli import main
from vllm_griffin.data.chat import load_tokenizer
from vllm_griffin.data.documents import read_documents
from vllm_griffin.data.make import target_sizes
from vllm_griffin.data.settings import Settings
from vllm_griffin.data.shards import StoredStates

TINY = Path(__file__).parents[2] / "examples" / "models" / "target"
CHATS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "yes!"}]}
    for i in range(40)
]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["data", *map(str, arguments)])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def fail(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), result.exception  # no traceback
    return result.output


@pytest.fixture(scope="module")
def target(small_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_target(small_target, tmp_path_factory.mktemp("chat") / "target")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    return path


def test_target_by_its_name_on_the_hub(target: Path, chats: Path, tmp_path: Path) -> None:
    model = tmp_path / "hub" / "models--org--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    (model / "snapshots").mkdir()
    (model / "snapshots" / "abc").symlink_to(target.resolve())
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    for command in (
        ["data", "--input", chats, "--output", tmp_path / "data"],
        ["train", "--data", tmp_path / "data", "--output", tmp_path / "draft", "--stages", "1:2"],
    ):
        arguments = [sys.executable, "-m", "vllm_griffin.cli", *command, "--target", "org/tiny"]
        subprocess.run(list(map(str, arguments)), check=True, env=environment)
    assert (tmp_path / "draft" / "model.safetensors").is_file()


def test_chats_to_stored_states(target: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    output = succeed("--target", target, "--input", chats, "--output", out)
    assert "⟦yes!<|end|>⟧" in output
    assert "40 documents of 40 prompts" in output and "2 documents are held out" in output
    record = json.loads((out / "data.json").read_text())
    assert record["finished"] and record["versions"]["torch"] and record["command"]
    assert record["counts"] == {
        "documents": 40,
        "prompts": 40,
        "tokens": sum(len(d.tokens) for d in read_documents(out)),
        "assistant_tokens": 40 * 5,
        "held_out_documents": 2,
        "cut_documents": 0,
        "excluded_prompts": 0,
        "repeated_prompts": 0,
        "skipped": 0,
    }
    states = StoredStates(out)
    assert states.documents == read_documents(out)
    assert states.features(39).shape == (len(states.documents[39].tokens), 32)


def test_same_settings_go_on_and_others_are_refused(
    target: Path, chats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    common = ("--target", target, "--input", chats, "--output", out)
    succeed(*common)
    shard = out / "shard-00000.safetensors"
    before = shard.read_bytes()
    shard.unlink()
    succeed(*common, "--threads", 1)
    assert shard.read_bytes() == before
    assert "another --limit, --seed:" in fail(*common, "--seed", 1, "--limit", 3)
    chats.write_text(chats.read_text() + json.dumps({"text": "abc"}) + "\n")
    assert "another --input:" in fail(*common)


def test_data_of_other_weights_are_told(target: Path, chats: Path, tmp_path: Path) -> None:
    """`data` does not go on with them, `train` notes them; a folder with the same weights is the same."""
    mine, copy = (shutil.copytree(target, tmp_path / name) for name in ("mine", "copy"))
    made = ("--input", chats, "--output", tmp_path / "data")
    succeed("--target", mine, *made)

    def notes(target: Path, draft: str) -> bool:
        output = ["--output", str(tmp_path / draft), "--stages", "1:2"]
        train = ["train", "--data", str(tmp_path / "data"), "--target", str(target), *output]
        result = CliRunner().invoke(main, train)
        assert result.exit_code == 0, result.output
        return "was made for the target" in result.output

    assert not notes(mine, "a") and not notes(copy, "b")
    file = mine / "model.safetensors"
    weights = {name: tensor * 1.5 for name, tensor in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    assert "before its config or weights changed" in fail("--target", mine, *made)
    assert notes(mine, "c")


def test_errors_of_the_system_and_of_packages_are_said_in_words(
    target: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--target", target, "--input", chats, "--output")
    assert "No such file or directory" in fail(*common, "/proc/nowhere/data")

    def quantised(*_arguments: object) -> None:
        raise ImportError("loading a GPTQ quantized model requires gptqmodel")

    monkeypatch.setattr("vllm_griffin.data.hidden.load_target", quantised)
    assert "requires gptqmodel" in fail(*common, tmp_path / "data")


def test_a_folder_of_something_else_is_left_alone(
    target: Path, chats: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes").write_text("mine")
    output = fail("--target", target, "--input", chats, "--output", tmp_path / "data")
    assert "is not empty and holds no training data" in output
    # Half a record, of a run that was stopped at once, is nothing else.
    (tmp_path / "data" / "notes").rename(tmp_path / "data" / "data.partial")
    succeed("--target", target, "--input", chats, "--output", tmp_path / "data")


def test_online_stores_no_states(target: Path, chats: Path, tmp_path: Path) -> None:
    out, draft = tmp_path / "data", tmp_path / "draft"
    succeed("--target", target, "--input", chats, "--output", out, "--hidden-states", "online")
    assert sorted(p.name for p in out.iterdir()) == ["data.json", "documents.jsonl"]
    assert len(read_documents(out)) == 40
    folders = ["--target", str(target), "--data", str(out), "--output", str(draft)]
    result = CliRunner().invoke(main, ["train", *folders, "--stages", "1:2"])
    assert result.exit_code == 0, result.output
    assert (draft / "model.safetensors").is_file()


def test_lines_that_cannot_be_used(target: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "a.jsonl", tmp_path / "data"
    rows = [json.dumps(CHATS[0]), "{", json.dumps({"prompt": "no answer"}), ""]
    rows += [json.dumps({"prompt_token_ids": [1], "response_token_ids": [60]})]
    path.write_text("\n".join(rows) + "\n")
    common = ("--target", target, "--input", path, "--output", out)
    output = succeed(*common)
    for number, reason in {
        2: "not JSON",
        3: "no answer of an assistant (--generate makes one)",
        4: "empty line",
        5: "token id 60 is outside the target's 60",
    }.items():
        assert f"skipped {path}, line {number}: {reason}" in output
    assert "4 lines or chats could not be used" in output
    other = tmp_path / "other"
    stopped = fail("--target", target, "--input", path, "--output", other, "--on-error", "stop")
    assert f"{path}, line 2: not JSON" in stopped
    path.write_text("{\n")
    nothing = fail("--target", target, "--input", path, "--output", other)
    assert "there is nothing to train on" in nothing


def test_a_target_without_a_template(small_target: Path, chats: Path, tmp_path: Path) -> None:
    target = chat_target(small_target, tmp_path / "target", None)
    common = ("--target", target, "--input", chats, "--output", tmp_path / "data")
    assert "--chat-template FILE" in fail(*common)
    template = tmp_path / "template.jinja"
    template.write_text(MARKED)
    # The failed run made nothing, so it does not bind the folder to its settings.
    output = succeed(*common, "--chat-template", template)
    assert "⟦yes!⟧" in output


def test_tokens_that_the_target_lacks(target: Path, tmp_path: Path) -> None:
    """A tokenizer may have been given more than the embedding has."""
    wide = tmp_path / "target"
    shutil.copytree(target, wide)
    tokenizer = load_tokenizer(str(wide))
    tokenizer.add_tokens(["ZZ"] * (60 - len(tokenizer)) + [f"Z{i}Z" for i in range(80)])
    tokenizer.save_pretrained(wide)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abc", "ab Z79Z")))
    output = succeed("--target", wide, "--input", path, "--output", tmp_path / "data")
    assert "line 2: token id " in " ".join(output.split()) and "outside the target's 60" in output
    assert len(read_documents(tmp_path / "data")) == 1


def test_long_documents_are_cut_and_told(target: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "a.jsonl", tmp_path / "data"
    rows = [
        {"prompt_token_ids": [1] * 4, "response_token_ids": [2] * 10},
        {"prompt_token_ids": [2] * 4, "response_token_ids": [2] * 4},
        {"prompt_token_ids": [3] * 12, "response_token_ids": [2] * 4},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--target", target, "--input", path, "--output", out)
    output = succeed(*common, "--max-length", 8)
    assert [(len(d.tokens), d.answer) for d in read_documents(out)] == [(8, [(4, 8)])] * 2
    assert "1 documents were longer than --max-length" in output
    assert "line 3: its answer begins after 8 tokens" in output
    assert "over the target's 64 tokens" in fail(*common, "--max-length", 65)


def test_texts_are_cut_in_pieces_of_one_prompt(target: Path, tmp_path: Path) -> None:
    first, second, out = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "data"
    first.write_text("abcdefghij" * 2 + "xy")
    second.write_text("klm")
    succeed("--target", target, "--input", first, "--input", second, "--output", out, "--length", 5)
    found = read_documents(out)
    assert [(d.id, len(d.tokens)) for d in found] == [(0, 5)] * 4 + [(1, 3)]
    assert all(d.answer == [(0, len(d.tokens))] for d in found)


def test_evaluation_prompts_are_left_out(target: Path, chats: Path, tmp_path: Path) -> None:
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text("\n" + json.dumps({"turns": [" q3\n"]}) + "\n")
    out = tmp_path / "data"
    common = ("--target", target, "--input", chats, "--hidden-states", "online")
    output = succeed(*common, "--output", out, "--exclude", evaluation)
    assert "1 prompts are among those to exclude" in output
    assert "eval.jsonl, line 1: empty line" in " ".join(output.split())
    stopping = (*common, "--output", tmp_path / "no", "--on-error", "stop")
    assert "--on-error skip" in fail(*stopping, "--exclude", evaluation)
    assert [d.id for d in read_documents(out)] == [i for i in range(40) if i != 3]
    # As token ids too, which are compared with the rendered prompt.
    from vllm_griffin.data.chat import ChatTemplate, load_tokenizer

    prompt = ChatTemplate(load_tokenizer(str(target))).prompt([{"role": "user", "content": "q3"}])
    tokens = tmp_path / "tokens.jsonl"
    tokens.write_text(
        json.dumps({"prompt_token_ids": prompt, "response_token_ids": [2, 3]})
        + json.dumps({"prompt_token_ids": [1, 2], "response_token_ids": [2, 3]}).join("\n\n")
    )
    evaluation.write_text(json.dumps({"turns": ["q3"]}) + "\n")
    other = tmp_path / "other"
    succeed("--target", target, "--input", tokens, "--exclude", evaluation, "--output", other)
    assert [d.tokens for d in read_documents(other)] == [[1, 2, 2, 3]]


def test_limit_and_dry_run(target: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    output = succeed(
        "--target", target, "--input", chats, "--output", out, "--limit", 7, "--dry-run"
    )
    assert not out.exists()
    assert "7 documents of 7 prompts" in output and "none is held out" in output
    tokens = int(output.split(" tokens, ")[-2].split()[-1])
    assert f"hidden states: {tokens * 64 / 1024:.0f} KiB on disk; memory: about" in output


def test_a_yaml_file_gives_the_options(
    target: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "data.yaml"
    config.write_text(f"target: {target}\ninput: {chats}\nlimit: 5\nhidden-states: online\n")
    succeed("--config", config, "--output", tmp_path / "data", "--limit", 4)
    assert len(read_documents(tmp_path / "data")) == 4
    found: list[Settings] = []
    monkeypatch.setattr("vllm_griffin.data.make.make", found.append)
    config.write_text(config.read_text() + "generate: true\ntemperatures: [0, 1.5]\n")
    succeed("--config", config, "--output", tmp_path / "data")
    assert found[0].generate and found[0].temperatures == (0.0, 1.5) and found[0].limit == 5


def test_usage(target: Path, tmp_path: Path) -> None:
    common = ("--target", target, "--output", tmp_path / "data")
    assert "either --input FILE or --draw N" in fail(*common)
    output = fail(*common, "--draw", 1, "--temperatures", "0,warm")
    assert "numbers with commas between" in output
    assert "temperatures are 0 or more" in fail(*common, "--draw", 1, "--temperatures", "nan")
    assert "is neither a model folder nor" in fail(
        "--target", tmp_path, "--output", tmp_path / "x", "--draw", 1
    )


@pytest.mark.parametrize(
    ("given", "yaml", "said"),
    [
        (["--max-new-tokens", 9], "", "--max-new-tokens: give --generate or --draw"),
        ([], "temperatures: [0]\nmax-new-tokens: 9", "--temperatures, --max-new-tokens: give"),
        (["--prompt-tokens", 9], "", "--prompt-tokens: give --generate"),
        (["--draw", 1, "--prompt-tokens", 9], "", "--prompt-tokens: give --generate"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    chats: Path, tmp_path: Path, given: list, yaml: str, said: str
) -> None:
    (tmp_path / "c.yaml").write_text(yaml)
    source = [] if "--draw" in given else ["--input", chats]
    common = ("--config", tmp_path / "c.yaml", "--target", tmp_path, "--output", tmp_path / "data")
    assert said in " ".join(fail(*common, *source, *given).split())


def test_the_sample_is_coloured_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.training.data_target import tokenizer
    from vllm_griffin.data import show
    from vllm_griffin.data.documents import Document

    printed: list[str] = []
    monkeypatch.setattr(show.click, "echo", printed.append)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    made = tokenizer()
    show.sample(Document(0, made("abcd")["input_ids"], [(1, 3)]), made)
    assert printed[1] == "a\x1b[32mbc\x1b[0md\n"


def test_the_target_answers_through_vllm(tmp_path: Path) -> None:
    """Two engines: responses, and hidden states from vLLM, equal to Hugging Face's."""
    text, out = tmp_path / "a.py", tmp_path / "data"
    text.write_text(Path(__file__).read_text()[:1200])
    common = ("--target", TINY, "--input", text, "--generate", "--length", 100)
    common = (*common, "--prompt-tokens", 20, "--max-new-tokens", 6, "--max-length", 64)
    succeed(*common, "--output", out, "--hidden-states", "vllm")
    rows = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert len(rows) > 2 and [r["temperature"] for r in rows[:3]] == [0.0, 0.7, 1.0]
    stored = StoredStates(out)
    assert [d.tokens for d in stored.documents] == [
        r["prompt_token_ids"] + r["response_token_ids"] for r in rows
    ]
    assert stored.documents[0].answer == [(20, 20 + len(rows[0]["response_token_ids"]))]
    from vllm_griffin.data.hidden import hugging_face_states

    with hugging_face_states(str(TINY)) as states:
        wanted = states(stored.documents)
    for i, one in enumerate(wanted):
        assert (stored.features(i) - one.float()).abs().max() < 5e-3
    # The greedy answer is the argmax of the target's own logits.
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([stored.documents[0].tokens])).logits[0]
    assert logits[19:-1].argmax(-1).tolist() == rows[0]["response_token_ids"]


SIZES = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def random_target(folder: Path, kind: str, **fields: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.for_model(kind, **(SIZES | fields))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def test_a_target_that_vllm_runs_as_a_hugging_face_model(tmp_path: Path) -> None:
    """vLLM changes such a model's class; hidden states come from that class, in the same process."""
    target = random_target(tmp_path / "target", "smollm3", no_rope_layers=[1, 0])
    text = tmp_path / "a.py"
    text.write_text(Path(__file__).read_text()[:600])
    common = ("--target", target, "--input", text, "--length", 60, "--prompt-tokens", 20)
    succeed(*common, "--generate", "--max-new-tokens", 4, "--output", tmp_path / "data")
    assert StoredStates(tmp_path / "data").features(0).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("mistral", {"sliding_window": 64}, "a sliding window of 64 tokens"),
        ("gpt2", {}, "no model.embed_tokens.weight in its weights"),
    ],
)
def test_targets_that_cannot_be_served_are_refused_before_their_data(
    tmp_path: Path, chats: Path, kind: str, fields: dict[str, int], message: str
) -> None:
    target = random_target(tmp_path / "target", kind, **fields)
    printed = fail("--target", target, "--input", chats, "--output", tmp_path / "out")
    assert message in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 0}),
    ],
)
def test_a_window_that_is_not_used_is_none(
    tmp_path: Path, kind: str, fields: dict[str, Any]
) -> None:
    target = random_target(tmp_path / "target", kind, **fields)
    assert target_sizes(target).context == 256
