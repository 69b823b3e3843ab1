"""README's "Train a draft", cut short: data, train and eval on the tiny target, as commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGET = "examples/models/target"


def run(*arguments: object) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def acceptance(draft: Path, prompts: Path, output: Path) -> dict[str, float]:
    """Acceptance length by tree, in the engine at T=0."""
    run("-m", "vllm_griffin.cli", "eval", "--target", TARGET, "--draft", draft, "--prompts", prompts,
        "--limit", 8, "--max-tokens", 48, "--temperature", 0, "--output", output)  # fmt: skip
    rows = json.loads((output / "evaluation.json").read_text())["rows"]
    return {row["tree"]: row["acceptance_length"] for row in rows}


@pytest.mark.timeout(900)
def test_trained_draft_is_accepted_more(tmp_path: Path) -> None:
    """Its tree gains at least half a token a step over the untrained draft's, its chain something."""
    command = ("-m", "vllm_griffin.cli")
    run("examples/models/make_tiny.py", "texts", "--files", 24, "--output", tmp_path)
    run(*command, "data", "--target", TARGET, "--input", tmp_path / "text.jsonl", "--length", 256,
        "--output", tmp_path / "data")  # fmt: skip
    train = (*command, "train", "--target", TARGET, "--data", tmp_path / "data", "--vocabulary", 0,
             "--batch-tokens", 1024)  # fmt: skip
    run(*train, "--output", tmp_path / "trained", "--steps", 100)
    # A learning rate of nothing: the draft as it is before training.
    run(*train, "--output", tmp_path / "fresh", "--stages", "1:1", "--lr", 0, "--muon-lr", 0)
    prompts = tmp_path / "prompts.jsonl"
    trained = acceptance(tmp_path / "trained", prompts, tmp_path / "evaluated")
    fresh = acceptance(tmp_path / "fresh", prompts, tmp_path / "evaluated_fresh")
    assert trained["59,6,10"] >= fresh["59,6,10"] + 0.5, (trained, fresh)
    assert trained["chain:6"] > fresh["chain:6"], (trained, fresh)
