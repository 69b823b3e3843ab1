"""The benchmarks' commands run, at toy size; what they count is a test, what they time is none."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_griffin.tree import DraftTrees

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def benchmark(
    output: Path, script: str, *arguments: str, passed_on: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The JSON that a benchmark writes, beside its table."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--output", str(output)]
    command += ["--", *passed_on] if passed_on else []
    environment = os.environ | {"VLLM_GRIFFIN_CPU": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert output.with_suffix(".md").read_text().startswith("| ")
    return json.loads(output.read_text())


def test_a_step_of_ours_never_waits_for_the_device(tmp_path: Path) -> None:
    """Two requests with trees, on the code that a GPU runs, in fewer launches than its references need."""
    record = benchmark(tmp_path / "counts.json", "counts.py", "--tree", "7,3,3", "--steps", "2")
    rows = {row["part"]: row for row in record["rows"]}
    assert record["waits"] == {}
    assert rows["ours"]["waits"] == 0
    for part in ("draws and walk", "KV compaction", "draft: extend pass", "draft: tree levels"):
        assert rows[part]["launches"] > 0, part
    assert rows["all"]["launches"] > rows["ours"]["launches"]
    assert rows["all"]["launches"] > record["plain"]["launches"] > 0
    references = {row["part"]: row for row in record["references"]}
    assert references["ours"]["launches"] > 1.5 * rows["ours"]["launches"]


def test_what_counts_as_a_wait(monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from waits import is_wait

    x, mask = torch.arange(3), torch.tensor([True, False, True])
    waiting = [
        (torch.Tensor.item, (x[0],), {}),
        (torch.Tensor.tolist, (x,), {}),
        (torch.Tensor.__bool__, (x[0],), {}),
        (torch.nonzero, (x,), {}),
        (torch.where, (mask,), {}),
        (torch.Tensor.__getitem__, (x, mask), {}),
        (torch.Tensor.__getitem__, (x, (mask,)), {}),
        (torch.Tensor.repeat_interleave, (x, x), {}),
        (torch.Tensor.to, (x, "cpu"), {}),
        (torch.Tensor.__setitem__, (x, 1, 0), {}),
        (torch.Tensor.__setitem__, (x, x, 0), {}),
    ]
    free = [
        (torch.where, (mask, x, x), {}),
        (torch.Tensor.__getitem__, (x, x), {}),
        (torch.Tensor.__getitem__, (x, 0), {}),
        (torch.Tensor.repeat_interleave, (x, 2), {}),
        (torch.Tensor.repeat_interleave, (x, x), {"output_size": 3}),
        (torch.Tensor.to, (x, "cpu"), {"non_blocking": True}),
        (torch.Tensor.to, (x, torch.int32), {}),
        (torch.Tensor.add, (x, x), {}),
        (torch.Tensor.__setitem__, (x, slice(1, 2), 0), {}),
        (torch.Tensor.__setitem__, (x[None], 0, 0), {}),
        (torch.Tensor.__setitem__, (x, x, x), {}),
    ]
    assert all(is_wait(*call) for call in waiting)
    assert not any(is_wait(*call) for call in free)


def test_slots_change_hands_without_a_wait(monkeypatch: Any) -> None:
    """Also where a request arrives, and in plain steps, which the counted steps are not."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from torch.overrides import TorchFunctionMode
    from waits import is_wait

    class NoWaits(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            assert not is_wait(func, args, kwargs or {}), func
            return func(*args, **(kwargs or {}))

    trees = DraftTrees(3, 4, torch.device("cpu"))
    trees.num_nodes.fill_(4)
    with NoWaits():
        trees.reset(1, spine_only=True)
        trees.clear(torch.tensor([2]))
        trees.keep_to_spine(0)
    assert trees.num_nodes.tolist() == [4, 0, 0]
    assert trees.spine_only.tolist() == [True, True, False]


def test_decode_rates_of_a_shape(tmp_path: Path) -> None:
    """A toy Llama of random weights: both plain engines and a tree of forced acceptance, in turn."""
    record = benchmark(
        tmp_path / "shape.json",
        "generate.py",
        *("shape", "--eager", "--hidden", "64", "--intermediate", "96", "--layers", "2"),
        *("--heads", "2", "1", "--vocab", "640", "--context", "20", "--acceptance", "2.5"),
        *("--tree", "7,3,3", "--batches", "1,2", "--rounds", "1", "--max-tokens", "31"),
        *("--dtype", "float32", "--logs", str(tmp_path)),
    )
    rows = {(row["engine"].split(",")[0], row["batch"]): row for row in record["rows"]}
    assert len(record["rows"]) == 6
    for batch in (1, 2):
        tree = rows["tree 7", batch]
        assert 2.0 < tree["tokens_per_step"] < 3.0
        best = max((r for r in record["rows"] if r["batch"] == batch and r["engine"] != tree["engine"]),
                   key=lambda row: row["tokens_per_second"])  # fmt: skip
        assert (best["speedup"], best["paired_speedup"]) == (1, 1)
        # One round: both ratios are of the same two runs.
        assert tree["paired_speedup"] == pytest.approx(tree["speedup"])
        assert rows["no speculation", batch]["tokens_per_step"] == 1.0
        assert tree["speedup"] > 0
    assert (tmp_path / "shape.png").stat().st_size > 5000


def test_what_a_draft_has_to_read(tmp_path: Path) -> None:
    """Of Llama-3-8B: 7.50B numbers a step, and 12.5 h^2 of fusion."""
    record = benchmark(tmp_path / "cost.json", "draft_cost.py", "llama-3-8b", "--verify", "1")
    h, inner, keys = 4096, 14336, 1024
    layer = 2 * h * h + 2 * h * keys + 3 * h * inner
    read = record["weights"]
    assert read["plain"] == 32 * (layer + 2 * h) + h + 128256 * h
    # The token-enhanced head doubles the last projection.
    assert read["layer"] == layer + h * inner + h
    assert read["fusion"] == pytest.approx(12.5 * h * h, rel=1e-3)
    for row in record["rows"]:
        network = read["fusion"] + read["layer"] + row["draft_vocabulary"] * h
        assert row["cost"] == pytest.approx(6 * network / read["plain"])
        assert row["speedup"] == pytest.approx(5.38 / (1 + row["cost"]))
    assert [row["draft_vocabulary"] for row in record["rows"]] == [0, 8192, 128256]


def test_sizes_that_are_captured(monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from step import capture_sizes

    assert capture_sizes([1, 2, 64], 60) == [1, 2, 60, 64, 120, 3840]


def test_steps_by_batch_and_context(tmp_path: Path) -> None:
    """A toy Llama: a plain engine, vLLM's own chain and a tree, each by itself."""
    record = benchmark(
        tmp_path / "step.json",
        "step.py",
        *("--shape", "toy", "--eager", "--tree", "7,3,3=2.5", "--acceptance", "9", "--chain", "3"),
        *("--chain-acceptance", "2", "--batches", "2", "--contexts", "20,40", "--steps", "4"),
        *("--baseline", "V2"),
        *("--rounds", "1", "--dtype", "float32", "--logs", str(tmp_path)),
    )
    rows = {(row["engine"], row["batch"], row["context"]): row for row in record["rows"]}
    assert len(rows) == len(record["rows"]) == 3 * 2
    for batch, context in ((2, 20), (2, 40)):
        plain = rows["plain, runner V2", batch, context]
        assert plain["draft_ms"] is None
        base = plain["step_ms"]
        tree = rows["tree 7,3,3", batch, context]
        chain = rows["vLLM's EAGLE, chain of 3", batch, context]
        assert 0 < tree["draft_ms"] < tree["step_ms"] and 0 < chain["draft_ms"] < chain["step_ms"]
        assert tree["speedup"] == pytest.approx(2.5 * base / tree["step_ms"])
        assert tree["verify"] + tree["draft"] == pytest.approx(tree["step_ms"] / base)
    assert (tmp_path / "step.png").stat().st_size > 5000


def test_times_of_kernels(tmp_path: Path) -> None:
    """Every op at toy size; on a CPU that is no result."""
    record = benchmark(
        tmp_path / "kernels.json",
        "kernels.py",
        *("--hidden", "64", "--layers", "2", "--heads", "4", "2", "--head-dim", "32"),
        *("--tree", "7,3,3", "--batches", "1,2", "--contexts", "20,40", "--repeats", "2"),
        *("--block-size", "32", "--vocabulary", "500", "--dtype", "float32"),
    )
    rows = record["rows"]
    assert {row["op"] for row in rows} == {
        *("tree attention", "advance frontier", "order tree", "walk", "path ranks"),
        *("KV compaction", "fusion norms", "top tokens"),
    }
    attention = [row for row in rows if row["op"] == "tree attention"]
    assert [(row["batch"], row["context"]) for row in attention] == [
        (batch, context) for batch in (1, 2) for context in (20, 40)
    ]
    # keys and values of the context, then queries, outputs, the tree's own keys and values, its bits
    assert attention[0]["bytes"] == 4 * (2 * 20 * 2 * 32 + 2 * 8 * 4 * 32 + 2 * 8 * 2 * 32) + 64
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in rows)
    assert all(row["chain_ms"] > 0 and row["prefix_ms"] > 0 for row in attention)


def test_servers_under_load(tmp_path: Path) -> None:
    """The tiny pair: a plain server and a tree see the same requests."""
    models = ROOT / "examples" / "models"
    record = benchmark(
        tmp_path / "serve.json",
        "serve.py",
        *("--target", str(models / "target"), "--draft", str(models / "griffin")),
        *("--tree", "12,4,4", "--baseline", "V2", "--rates", "inf", "--logs", str(tmp_path)),
        *("--server-arguments", "--enforce-eager --dtype float32 --max-model-len 256"),
        passed_on=(
            *("--dataset-name", "random", "--random-input-len", "20", "--num-warmups", "1"),
            *("--random-output-len", "24", "--num-prompts", "6", "--ignore-eos"),
        ),
    )
    plain, tree = record["rows"]
    assert (plain["engine"], tree["engine"]) == ("no speculation, runner V2", "tree 12,4,4")
    assert all((row["completed"], row["failed"]) == (6, 0) for row in (plain, tree))
    assert "spec_decode_acceptance_length" not in plain
    assert tree["spec_decode_acceptance_length"] > 1
