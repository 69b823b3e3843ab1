"""``vllm-griffin eval`` as a user calls it."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from tests.engine.harness import GOLDEN, MODELS
from vllm_griffin.cli import main
from vllm_griffin.data.chat import load_tokenizer
from vllm_griffin.evaluate import engine, run
from vllm_griffin.evaluate.kept import KeptSteps
from vllm_griffin.evaluate.outputs import read_outputs
from vllm_griffin.model.config import tree_acceptance
from vllm_griffin.trace import TraceRecord
from vllm_griffin.tree_shape import TreeShape

TARGET, DRAFT, EAGLE = (str(MODELS / name) for name in ("target", "griffin", "eagle"))


@pytest.fixture
def prompts(tmp_path):
    rows = [
        {"question_id": 5 + i, "turns": [text]}
        for i, text in enumerate(
            ["def read(path):\n", "import os\n\nfor name in", "class Tree:\n    def "]
        )
    ]
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def invoke(*arguments):
    return CliRunner().invoke(main, ["eval", *map(str, arguments)], catch_exceptions=False)


def usual(prompts, *more):
    return invoke(
        "--target", TARGET, "--draft", DRAFT, "--prompts", prompts, "--max-tokens", 20, *more
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's memory")
def test_engines_take_a_part_of_the_memory_and_run_here(monkeypatch):
    # Without a size, vLLM wants nearly all of a CPU's memory, and fails where other programs run.
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    engine.prepare_process()
    assert 1 <= int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) <= 4
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_trees_that_are_kept_differ_in_size(prompts, tmp_path):
    draft = shutil.copytree(DRAFT, tmp_path / "draft")
    trees = ("--tree", "7,3,3", "--tree", "7,2,4", "--write-trees")
    result = invoke("--target", TARGET, "--draft", draft, "--prompts", prompts, *trees)
    assert result.exit_code == 2
    assert "one tree of a size: 2 have 7 nodes" in result.output


@pytest.mark.parametrize("draft", sorted(MODELS.glob("*/config.json")), ids=lambda p: p.parent.name)
def test_shipped_drafts_have_one_tree_of_a_size(draft):
    trees = tree_acceptance(json.loads(draft.read_text()), str(draft)) or {}
    assert len({TreeShape.parse(tree).nodes for tree in trees}) == len(trees)


def test_replay_makes_outputs_once_and_compares_drafts(tmp_path, prompts):
    outputs, folder = tmp_path / "stored.jsonl", tmp_path / "result"
    arguments = [prompts, "--draft", EAGLE, "--tree", "20,4,5", "--replay", outputs]
    result = usual(*arguments, "--limit", 1)
    assert result.exit_code == 0, result.output
    assert len(read_outputs(outputs)) == 2
    result = usual(*arguments, "--output", folder)
    assert result.exit_code == 0, result.output
    stored = read_outputs(outputs)
    assert sorted(o.key for o in stored) == [("code", i, t) for i in (5, 6, 7) for t in (0.0, 1.0)]
    assert all(o.seed == o.id and o.max_tokens == 20 and o.tail_token_ids for o in stored)
    record = json.loads((folder / "evaluation.json").read_text())
    assert (record["mode"], record["dtype"]) == ("replay", "float32")
    assert record["draft_vocab_sizes"] == [None, None]
    assert record["provenance"]["versions"]["torch"]
    rows = record["rows"]
    assert [(r["temperature"], r["draft"]) for r in rows] == [
        (t, d) for t in (0.0, 1.0) for d in (DRAFT, EAGLE)
    ]
    for row in rows:
        accepted, steps = map(sum, zip(*row["per_prompt"], strict=True))
        assert (accepted, steps) == (row["accepted"], row["steps"])
        assert row["acceptance_length"] == round(1 + accepted / steps, 4)
        assert ("against_first" in row) == (row["draft"] == EAGLE)
    assert (folder / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    before = outputs.read_bytes()
    # All is stored: nothing is made again, so no engine is needed.
    assert usual(*arguments).exit_code == 0
    assert outputs.read_bytes() == before
    result = usual(*arguments, "--max-tokens", 30)
    assert result.exit_code == 1
    assert "was made with --max-tokens 20" in result.output
    prompts.write_text(prompts.read_text().replace("import os", "import sys"))
    result = usual(*arguments)
    assert result.exit_code == 1
    assert "the output of prompt 6 of code at T=0 belongs to another prompt" in result.output


def test_engine_and_replay_agree(tmp_path, prompts):
    lengths = []
    for more in ([], ["--replay", tmp_path / "o.jsonl", "--check-engine", 1]):
        result = usual(prompts, "--tree", "chain:3", *more, "--output", tmp_path)
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / "evaluation.json").read_text())
        lengths.append([(r["accepted"], r["steps"], r["misaligned"]) for r in record["rows"]])
    assert lengths[0] == lengths[1]
    (check,) = record["engine_check"]
    assert check["prompts"] == 2
    assert check["steps"] > 10
    assert check["differing_steps"] == check["differing_trees"] == check["differing_answers"] == 0
    assert "0 steps, 0 trees and 0 answers differ" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tree", "59,6"], "neither nodes,depth,top_k"),
        (["--tree", "chain:20", "--replay", "x.jsonl"], "a replay knows 16 levels"),
        (["--draft", "nowhere/at/all"], "nowhere/at/all"),
        (["--draft", str(GOLDEN / "a" / "draft")], "hidden_size"),
        (["--check-engine", "2"], "give --replay"),
        (["--replay", "x.jsonl", "--dtype", "bfloat16"], "leave --dtype out"),
        (["--write-card"], "needs a result of the engine and --output"),
        (["--target", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_what_a_user_gets_wrong(prompts, arguments, message):
    result = usual(prompts, *arguments)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())


def test_a_template_for_targets_without_one(prompts, tmp_path, monkeypatch, capsys):
    """The tiny target has none, which is said."""
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages[0]['content'] }} # answer")
    asked = []

    def evaluation(request):
        asked.append(request)
        raise ValueError("enough")

    monkeypatch.setattr(run, "Evaluation", evaluation)
    assert "enough" in usual(prompts, "--chat-template", file).output
    monkeypatch.undo()
    (request,) = asked
    tokenizer = load_tokenizer(str(TARGET))
    found = [
        run.Evaluation(r).prompts[0].tokens for r in (request, replace(request, chat_template=None))
    ]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found]
    assert texts == ["def read(path):\n # answer", "def read(path):\n"]
    assert capsys.readouterr().err.count("note: the target has no chat template") == 1


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        (
            "vllm_griffin.evaluate.run.evaluate_in_engine",
            torch.OutOfMemoryError("CUDA out of memory"),
            "lower --batch, or give --dtype bfloat16",
        ),
        (
            "vllm_griffin.evaluate.run.evaluate_in_engine",
            ImportError("loading a GPTQ quantized model requires gptqmodel"),
            "requires gptqmodel",
        ),
        (
            "vllm_griffin.evaluate.engine.prepare_environment",
            RuntimeError("VLLM_GRIFFIN_CPU=1 needs Triton"),
            "needs Triton",
        ),
        ("vllm.LLM", RuntimeError("CUDA driver is too old"), "CUDA driver is too old"),
    ],
)
def test_what_the_machine_lacks(prompts, monkeypatch, where, error, said):
    def lacking(*_arguments, **_named):
        raise error

    monkeypatch.setattr(where, lacking)
    result = usual(prompts, "--tree", "chain:3")
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())


def test_without_vllm_it_says_how_to_install_it(prompts, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    result = usual(prompts, "--tree", "chain:3")
    assert result.exit_code == 1
    assert "this needs vLLM (pip install" in " ".join(result.output.split())


ROW = {
    "draft": DRAFT,
    "prompts_of": "code",
    "temperature": 0.0,
    "tree": "chain:3",
    "acceptance_length": 2.346,
    "acceptance_length_95": [2.0, 3.0],
    "per_depth": [0.7],
    "misaligned": [0.1],
    "drafted_per_accepted": 2.0,
}


def test_a_killed_evaluation_goes_on(prompts, tmp_path, monkeypatch):
    """With the answers it had; what another evaluation had kept there is no answer of this one."""
    arguments = ("--tree", "7,3,3", "--batch", 1, "--output")
    whole = tmp_path / "whole"
    assert usual(prompts, *arguments, whole).exit_code == 0

    append, asked = KeptSteps.append, []

    def append_and_die(*given):
        append(*given)
        raise KeyboardInterrupt

    def evaluate(settings, draft, tree, wanted, *more):
        asked.append(len(wanted))
        return engine.evaluate_in_engine(settings, draft, tree, wanted, *more)

    monkeypatch.setattr(run, "evaluate_in_engine", evaluate)
    folder = tmp_path / "killed"
    monkeypatch.setattr(KeptSteps, "append", append_and_die)
    assert usual(prompts, *arguments, folder).exit_code != 0
    kept = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    # The first four of three prompts at two temperatures; the others are another run's or another text's.
    missing = {(p, t) for p in (5, 6, 7) for t in (0.0, 1.0)} - {
        (row["id"], row["temperature"]) for row in kept
    }
    assert len(missing) == 2
    with (folder / "steps.jsonl").open("a") as file:
        for name, (number, temperature) in zip(("run", "prompt"), missing, strict=True):
            foreign = {"id": number, "temperature": temperature, "steps": [], name: "other"}
            file.write(json.dumps(kept[0] | foreign) + "\n")
        file.write('{"run": "')
    monkeypatch.setattr(KeptSteps, "append", append)
    assert usual(prompts, *arguments, folder).exit_code == 0
    assert asked == [6, 2]
    results = [json.loads((d / "evaluation.json").read_text()) for d in (whole, folder)]
    assert results[0]["rows"] == results[1]["rows"]
    assert not (folder / "steps.jsonl").exists()


def test_steps_of_another_evaluation_are_told_apart(prompts, tmp_path, monkeypatch):
    """By all that decides them, a few weights in the middle of a draft among it."""
    monkeypatch.setattr("vllm_griffin.model.files.SAMPLE", 64)
    changed = shutil.copytree(DRAFT, tmp_path / "draft")
    weights = load_file(changed / "model.safetensors")
    weights["layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, changed / "model.safetensors")
    tree, made = TreeShape(7, 3, 3), {"commit": "abc", "versions": {}, "hardware": {}}
    usual = run.Request(
        TARGET, (DRAFT, str(changed)), (prompts,), (0.0,), (tree,), None, 20, "float32", 8
    )

    def key(request=usual, draft=DRAFT, shape=tree, made=made):
        return json.dumps(run.Evaluation(request)._run(draft, shape, made), sort_keys=True)

    keys = [
        key(),
        key(draft=str(changed)),
        key(shape=TreeShape(7, 3, 4)),
        key(replace(usual, max_tokens=21)),
        key(replace(usual, batch=4)),
        key(made=made | {"commit": "def"}),
        key(made=made | {"hardware": {"gpu": "H100"}}),
    ]
    assert key() == keys[0]
    monkeypatch.setenv("VLLM_GRIFFIN_KERNELS", "triton")
    keys.append(key())
    assert len(set(keys)) == 8


def test_what_is_no_kept_step_is_named(prompts, tmp_path):
    (tmp_path / "steps.jsonl").write_text('{"run": 1}\n')
    result = usual(prompts, "--tree", "7,3,3", "--output", tmp_path)
    assert result.exit_code == 1
    assert "steps.jsonl, line 1: not what an evaluation keeps" in " ".join(result.output.split())


def test_a_folder_that_takes_no_result_is_refused_before_it_is_made(prompts, monkeypatch):
    monkeypatch.setattr(run, "Evaluation", None)
    result = usual(prompts, "--output", "/proc/nowhere/result")
    assert result.exit_code == 1
    assert "--output /proc/nowhere/result takes no files" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("vllm_griffin.whole_file.write_json", "the result, as JSON, is above"),
        ("vllm_griffin.evaluate.plot.draw", "evaluation.json is written, its picture is not"),
    ],
)
def test_a_disk_that_fills_up_costs_no_result(prompts, tmp_path, monkeypatch, where, said):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.Evaluation, "in_engine", lambda *_: [ROW])
    monkeypatch.setattr(where, full)
    result = usual(prompts, "--output", tmp_path)
    assert result.exit_code == 1
    shown = " ".join(result.output.split())
    assert "2.35 [2.00, 3.00]" in shown and "No space left" in shown and said in shown
    assert ('"acceptance_length": 2.346' in shown) == ("is above" in said)


def test_malformed_prompts(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"turns": ["a"]}\n{"turns": 3}\n')
    result = usual(path)
    assert result.exit_code == 1
    assert "line 2" in result.output
    path.write_text(json.dumps({"turns": ["x = 1\n" * 2000]}) + "\n")
    result = usual(path)
    assert result.exit_code == 1
    assert "prompt 0 of bad has" in result.output


def test_counters_must_be_the_traces():
    record = TraceRecord("0", 0, 4, [1, 2, 3], [-1, 0, 1], [0, 1, 2], [0.0, -1.0, -2.0], [0, 1], 9)
    right = {"steps": 2, "drafted": 4, "accepted": 2, "per_depth": [2, 0], "preemptions": 0}
    engine.check_counters(right, [record, record])
    for change in ({"steps": 3}, {"drafted": 5}, {"accepted": 1}, {"per_depth": [1, 1]}):
        with pytest.raises(engine.EngineError, match="differ from the trace"):
            engine.check_counters(right | change, [record, record])
    with pytest.raises(engine.EngineError, match="preempted"):
        engine.check_counters(right | {"preemptions": 1}, [record, record])


def test_help_needs_neither_torch_nor_vllm():
    result = invoke("--help")
    assert result.exit_code == 0
    assert "Acceptance length is 1 + accepted / verify steps" in result.output


def test_the_process_is_prepared_before_triton_comes() -> None:
    """Its interpreter is chosen when Triton is imported."""
    code = "import sys, vllm_griffin.evaluate.engine; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
