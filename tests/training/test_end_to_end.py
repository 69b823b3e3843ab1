"""README's "Train a draft", cut short: data, train and eval on the tiny target, by their commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from vllm_griffin.cli import main

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "examples/models/target"


def run(*arguments: object) -> None:
    """In this process: another would import all that this one has."""
    result = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output[-3000:]


def acceptance(drafts: list[Path], prompts: Path, output: Path) -> dict[tuple[str, str], float]:
    """Acceptance length by draft and tree, in the engine at T=0."""
    run("eval", "--target", TARGET, "--prompts", prompts,
        "--limit", 4, "--max-tokens", 32, "--temperature", 0, "--output", output,
        *(option for draft in drafts for option in ("--draft", draft)))  # fmt: skip
    rows = json.loads((output / "evaluation.json").read_text())["rows"]
    return {(Path(row["draft"]).name, row["tree"]): row["acceptance_length"] for row in rows}


@pytest.mark.timeout(900)
def test_trained_draft_is_accepted_more(tmp_path: Path) -> None:
    """Its tree gains at least half a token a step over the untrained draft's, its chain something."""
    script = ROOT / "examples/models/make_tiny.py"
    subprocess.run(
        [sys.executable, script, "texts", "--files", "24", "--output", tmp_path], check=True
    )
    run("data", "--target", TARGET, "--input", tmp_path / "text.jsonl", "--length", 256,
        "--output", tmp_path / "data")  # fmt: skip
    train = ("train", "--target", TARGET, "--data", tmp_path / "data", "--vocabulary", 0,
             "--batch-tokens", 1024)  # fmt: skip
    run(*train, "--output", tmp_path / "trained", "--steps", 60)
    # A learning rate of nothing: the draft as it is before training.
    run(*train, "--output", tmp_path / "fresh", "--stages", "1:1", "--lr", 0, "--muon-lr", 0)
    drafts = [tmp_path / "trained", tmp_path / "fresh"]
    found = acceptance(drafts, tmp_path / "prompts.jsonl", tmp_path / "evaluated")
    assert found["trained", "59,6,10"] >= found["fresh", "59,6,10"] + 0.5, found
    assert found["trained", "chain:6"] > found["fresh", "chain:6"], found
