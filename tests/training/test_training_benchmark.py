"""`benchmarks/training.py` runs, at toy size; what it times is no result."""

import json
import subprocess
import sys
from pathlib import Path

from vllm_griffin.cli import main

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training.py"


def test_cost_by_passes(small_target: Path, small_data: Path, tmp_path: Path) -> None:
    common = ["--target", str(small_target), "--data", str(small_data)]
    draft, output = tmp_path / "draft", tmp_path / "training.json"
    train = ["train", *common, "--output", str(draft), "--stages", "1:1", "--vocabulary", "0"]
    main(train, standalone_mode=False)
    command = [sys.executable, SCRIPT, *common, "--init-from", draft, "--output", output]
    command += ["--passes", "1,2", "--steps", "1", "--rounds", "1", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(output.read_text())["rows"]
    assert [(row["passes"], row["mask"]) for row in rows] == [(1, True), (2, True), (2, False)]
    assert all(row["cost"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert rows[0]["cost"] == 1
    assert output.with_suffix(".md").read_text().startswith("| passes | mask |")
    assert output.with_suffix(".png").stat().st_size > 5000
