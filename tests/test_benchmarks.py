"""The benchmarks' commands run, at toy size; what they count is a test, what they time is none."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def benchmark(output: Path, script: str, *arguments: str) -> dict[str, Any]:
    """The JSON that a benchmark writes, beside its table."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--output", str(output)]
    environment = os.environ | {"VLLM_GRIFFIN_CPU": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert output.with_suffix(".md").read_text().startswith("| ")
    return json.loads(output.read_text())


def test_a_step_of_ours_never_waits_for_the_device(tmp_path: Path) -> None:
    """Two requests with trees, on the code that a GPU runs."""
    record = benchmark(tmp_path / "counts.json", "counts.py", "--tree", "7,3,3", "--steps", "2")
    rows = {row["part"]: row for row in record["rows"]}
    assert record["waits"] == {}
    assert rows["ours"]["waits"] == 0
    for part in ("draws and walk", "KV compaction", "draft: extend pass", "draft: tree levels"):
        assert rows[part]["launches"] > 0, part
    assert rows["all"]["launches"] > rows["ours"]["launches"]


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
    ]
    assert all(is_wait(*call) for call in waiting)
    assert not any(is_wait(*call) for call in free)


def test_decode_rates_of_a_shape(tmp_path: Path) -> None:
    """A toy Llama of random weights: both plain engines and a tree of forced acceptance, in turn."""
    record = benchmark(
        tmp_path / "shape.json",
        "generate.py",
        *("shape", "--eager", "--hidden", "64", "--intermediate", "96", "--layers", "2"),
        *("--heads", "2", "1", "--vocab", "640", "--context", "20", "--acceptance", "2.5"),
        *("--tree", "7,3,3", "--batches", "1,2", "--rounds", "2", "--max-tokens", "41"),
        *("--dtype", "float32", "--logs", str(tmp_path)),
    )
    rows = {(row["engine"].split(",")[0], row["batch"]): row for row in record["rows"]}
    assert len(record["rows"]) == 6
    for batch in (1, 2):
        tree = rows["tree 7", batch]
        assert 2.0 < tree["tokens_per_step"] < 3.0
        assert rows["no speculation", batch]["tokens_per_step"] == 1.0
        assert tree["speedup"] > 0
    assert (tmp_path / "shape.png").stat().st_size > 5000
