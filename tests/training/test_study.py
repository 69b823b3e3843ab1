"""The alignment study, at toy size: it must not rot, and its statistics must be right."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest

STUDY = Path(__file__).parents[2] / "benchmarks" / "alignment"
TARGET = Path(__file__).parents[2] / "examples" / "models" / "target"


@pytest.fixture
def alignment(monkeypatch: pytest.MonkeyPatch):
    """Puts the study's modules where they can be imported."""
    monkeypatch.syspath_prepend(str(STUDY))
    yield
    for name in ("study", "rows", "summary"):
        sys.modules.pop(name, None)


def test_toy_study(alignment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows that share nothing but their seed; a second run trains nothing."""
    import study
    from rows import real_rows

    from vllm_griffin.cli import main

    text = [{"id": i, "text": "import os\n" * 8 + f"x = {i}\n"} for i in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    prompts = [{"question_id": i, "turns": [f"def f{i}(x):\n    return"]} for i in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    data = tmp_path / "data"
    main(
        [
            "data",
            "--target",
            str(TARGET),
            "--input",
            str(tmp_path / "text.jsonl"),
            "--output",
            str(data),
        ],
        standalone_mode=False,
    )
    evaluation = ["--prompts", str(tmp_path / "p.jsonl"), "--temperature", "0", "--tree", "12,3,4"]
    evaluation += ["--tree", "chain:3", "--max-tokens", "12", "--replay", str(tmp_path / "o.jsonl")]
    common = ["--vocabulary", "0", "--batch-tokens", "256"]
    later = ["--muon-lr", "0.006"]
    results = tmp_path / "results"
    toy = study.Study(TARGET, tmp_path / "work", results, (2, 2), common, later, evaluation)
    rows = [row for row in real_rows(2.0) if row.name in ("EAGLE-2", "GRIFFIN")]

    def in_this_process(*arguments: object) -> None:
        main([*map(str, arguments)], standalone_mode=False)

    # Each of the six commands would import all that this process has.
    monkeypatch.setattr(study, "vllm_griffin", in_this_process)
    toy.run(rows, {"": data}, {0})
    for row in rows:
        record = json.loads((results / f"{study.slug(row.name)}-0.json").read_text())
        assert record["training"]["settings"]["stages"] == [[row.passes, 2]]
        assert record["training"]["settings"]["muon_lr"] == 0.006
        trunk = tmp_path / "work" / f"trunk-{row.trunk}-data-0" / "run.json"
        assert json.loads(trunk.read_text())["settings"]["muon_lr"] == 0.02
        assert record["training"]["init_from"].endswith(f"trunk-{row.trunk}-data-0")
    shown = (results / "README.md").read_text()
    assert "| GRIFFIN | 0 |" in shown and "## T=0, tree chain:3" in shown
    assert (results / "acceptance.png").read_bytes().startswith(b"\x89PNG")

    def refuse(*arguments: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(study, "vllm_griffin", refuse)
    toy.run(rows, {"": data}, {0})
    # Nor does one that asks for other steps take these results for its own.
    for changed, folder in (
        (replace(toy, steps=(2, 3)), "--results"),
        (replace(toy, steps=(3, 2)), "--results"),
        (replace(toy, steps=(3, 2), results=tmp_path / "others"), "--work"),
    ):
        with pytest.raises(click.ClickException, match=f"steps .* give {folder} another folder"):
            changed.run(rows, {"": data}, {0})


def test_intervals(alignment: None) -> None:
    """Against plain sums, and a paired ratio without noise where one side is the other with a token more."""
    from summary import average, interval, ratio

    steps = np.array([[[3.0, 4.0], [10.0, 5.0]], [[5.0, 4.0], [8.0, 5.0]]])
    counts = {"a": steps, "b": steps[:, :1]}
    wanted = ((1 + 13 / 9) + (1 + 13 / 9) + (1 + 3 / 4) + (1 + 5 / 4)) / 4
    assert average(counts) == pytest.approx(wanted)
    value, low, high = interval(counts, average)
    assert low < value < high
    more = {name: c + [1, 0] * c[..., 1:] for name, c in counts.items()}
    found = ratio(more, counts, [0, 1], [0, 1])
    # Drawn together, (x + 1) / x of the same resampled x.
    assert found == pytest.approx([(x + 1) / x for x in (value, high, low)], rel=1e-6)
    # By seed, wherever its run stands: two rows that share one, and two that share none.
    only = {name: c[1:] for name, c in more.items()}
    one = average({name: c[1:] for name, c in counts.items()})
    paired = ratio(only, counts, [2], [0, 2])
    assert paired is not None and paired[0] == pytest.approx((one + 1) / one)
    assert ratio(only, counts, [2], [0, 1]) is None
