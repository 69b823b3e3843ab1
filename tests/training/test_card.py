"""The model card: figures where they belong, commands that can be typed, the same bytes each time."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from vllm_griffin.card import write_card
from vllm_griffin.convert import convert
from vllm_griffin.model.checkpoint import CheckpointError

MODELS = Path(__file__).parents[2] / "examples" / "models"
TARGET = "some-lab/Chat-1B"
RUN = {
    "command": f"vllm-griffin train --target {TARGET} --data data --output draft",
    "started": "2026-01-02T03:04:05+00:00",
    "seed": 11,
    "commit": "0123456789ab",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "hardware": {"cpu": "a CPU", "cores": 2, "gpu": None},
    "settings": {
        "stages": [[1, 700], [3, 300]],
        "align_top_k": 3,
        "token_weight": 0.1,
        "prompt_loss": False,
    },
    "target": TARGET,
    "data": {
        "command": "vllm-griffin data --input p.jsonl",
        "seed": 5,
        "settings": {"temperature": [0.0, 1.0], "draw": None, "exclude": []},
        "counts": {"tokens": 123456},
        "folder": "data",
    },
    "preset": "griffin",
    "init_from": None,
    "documents": 950,
    "held_out": 50,
}
LOG = [
    {
        "step": 500,
        "val_agree0": 0.1,
        "val_token0": 9.0,
        "val_feature0": 0.9,
        "chain": 1.1,
        "top3": 1.5,
    },
    {
        "step": 900,
        **{"val_agree0": 0.612, "val_token0": 2.5, "val_feature0": 0.3},
        **{"val_agree1": 0.511, "val_token1": 2.75, "val_feature1": 0.35},
        **{"chain": 1.91, "top3": 2.84},
    },
    {
        "step": 1000,
        "val_agree0": 0.2,
        "val_token0": 8.0,
        "val_feature0": 0.8,
        "chain": 1.9,
        "top3": 2.8,
    },
]
ROWS = [
    {
        "draft": "runs/draft",
        "prompts_of": "mt_bench",
        "prompts": 40,
        "temperature": 0.0,
        "tree": "59,6,10",
        "acceptance_length": 3.124,
        "acceptance_length_95": [3.011, 3.249],
        "per_depth": [0.81, 0.617, None],
        "steps": 1234,
    },
    {
        "draft": "runs/hass",
        "prompts_of": "mt_bench",
        "prompts": 40,
        "temperature": 1.0,
        "tree": "6,6,1",
        "acceptance_length": 9.87,
        "acceptance_length_95": [9, 10],
        "per_depth": [],
        "steps": 1,
    },
]


@pytest.fixture
def draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "draft"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(MODELS / "griffin" / name, folder / name)
    monkeypatch.chdir(tmp_path)
    return folder


def trained(folder: Path, **changes: object) -> Path:
    (folder / "run.json").write_text(json.dumps(RUN | changes))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LOG))
    return folder


def evaluation(folder: Path, rows: list | None = None) -> Path:
    file = folder / "evaluation.json"
    record = {"rows": ROWS if rows is None else rows, "mode": "engine"}
    record["provenance"] = {"command": "vllm-griffin eval --draft runs/draft"}
    file.write_text(json.dumps(record))
    return file


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_trained_and_evaluated_draft(draft: Path, tmp_path: Path) -> None:
    write_card(trained(draft), evaluation(tmp_path))
    text = card_of(draft)
    assert front_matter(text) == {
        "library_name": "vllm",
        "base_model": TARGET,
        "tags": ["speculative-decoding", "griffin", "vllm-griffin"],
    }
    for part in (
        f"# GRIFFIN draft for {TARGET}",
        "| parameters | 426,496 (bfloat16), LM head and embedding not counted |",
        "| default tree (nodes, depth, top-k) | 59, 6, 10 |",
        RUN["command"],
        "vllm-griffin data --input p.jsonl\nvllm-griffin train",
        "| documents to train on | 950 |",
        "| held out | 50 |",
        "| tokens | 123456 |",
        "| temperature | 0.0, 1.0 |",
        "| steps | 1000: 700 of 1 pass, then 300 of 3 passes |",
        "| align_top_k | 3 |",
        "| prompt_loss | no |",
        "| seed | 11 |",
        "| commit | 0123456789ab |",
        "| versions | python 3.11.7, torch 2.13.0 |",
        "| hardware | cpu a CPU, cores 2 |",
        "at step 900",
        "| best token is the target's | 0.612 | 0.511 |",
        "| soft cross-entropy | 2.500 | 2.750 |",
        "1.91 for a chain of 6, 2.84 with the three best",
        "| 40 of mt_bench | 0 | 59,6,10 | 3.12 [3.01, 3.25] | 0.81 0.62 - | 1234 |",
        "| mode | engine |",
        "vllm-griffin eval --draft runs/draft",
    ):
        assert part in text, part
    assert "exclude" not in text and "draw" not in text
    assert "9.87" not in text, "another draft's row"


def test_its_commands_can_be_typed(draft: Path) -> None:
    write_card(trained(draft))
    text = card_of(draft)
    (line,) = re.findall(r"^vllm serve .*$", text, re.MULTILINE)
    *command, spec = shlex.split(line)
    assert command == ["vllm", "serve", TARGET, "--speculative-config"]
    assert json.loads(spec) == {"method": "griffin", "model": "draft"}
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    made: list = []
    scope = {"LLM": lambda *a, **k: made.append((a, k))}
    exec(code.replace("from vllm import LLM", ""), scope)
    assert made == [((TARGET,), {"speculative_config": {"method": "griffin", "model": "draft"}})]


def test_a_speculators_folder_is_served_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    convert(MODELS / "eagle", MODELS / "target", Path("draft"), "speculators")
    text = card_of(tmp_path / "draft")
    assert "# EAGLE draft for target" in text
    assert front_matter(text)["tags"][1] == "eagle" and "base_model" not in front_matter(text)
    assert re.search(r"^vllm serve draft$", text, re.MULTILINE)
    assert 'LLM("draft")' in text
    assert "sha256 of model.safetensors" in text and "## Training" not in text
    write_card(Path("draft"))
    assert card_of(tmp_path / "draft") == text


def test_a_draft_with_nothing_beside_it(draft: Path) -> None:
    write_card(draft)
    text = card_of(draft)
    assert "| target | not recorded |" in text
    assert "# GRIFFIN draft\n" in text and "vllm serve TARGET" in text
    assert "Training" not in text and "base_model" not in text


def test_no_home_folder_is_named(draft: Path) -> None:
    home = "/" + "home/someone/.cache/chat"
    write_card(trained(draft, target=home, command=f"vllm-griffin train --target {home}"))
    text = card_of(draft)
    assert "someone" not in text
    assert "train --target ~/.cache/chat" in text and "vllm serve ~/.cache/chat" in text
    assert 'os.path.expanduser("~/.cache/chat")' in text and "import os\n" in text


def test_the_same_files_give_the_same_bytes(draft: Path, tmp_path: Path) -> None:
    write_card(trained(draft), evaluation(tmp_path))
    first = card_of(draft)
    write_card(draft, evaluation(tmp_path))
    assert card_of(draft) == first
    assert "README.partial" not in [p.name for p in draft.iterdir()]


def test_a_license_stays(draft: Path) -> None:
    (draft / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\nBy hand.\n")
    for _ in range(2):
        write_card(draft)
        assert front_matter(card_of(draft))["license"] == "apache-2.0"
    (draft / "README.md").write_text("license: is no front matter here\n")
    write_card(draft)
    assert "license" not in front_matter(card_of(draft))


def test_a_draft_of_the_same_name_elsewhere_is_another(draft: Path, tmp_path: Path) -> None:
    here = ROWS[0] | {"draft": "draft", "acceptance_length": 2.22}
    write_card(draft, evaluation(tmp_path, [ROWS[0], here]))
    assert "2.22" in card_of(draft) and "3.12" not in card_of(draft)


def test_evaluations_that_do_not_fit(draft: Path, tmp_path: Path) -> None:
    write_card(draft)
    before = card_of(draft)
    lacking = {k: v for k, v in ROWS[0].items() if k not in ("acceptance_length_95", "steps")}
    for rows, message in (
        ([ROWS[0], lacking], r"rows\[1\] has no `acceptance_length_95`, `steps`"),
        ([ROWS[1]], r"no row of the draft .*draft \(it has: runs/hass\)"),
        ([], r"no row of the draft .*draft \(it has: none\)"),
        ({}, "`rows` must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            write_card(draft, evaluation(tmp_path, rows))
    with pytest.raises(CheckpointError, match=r"evaluation.json: not readable as JSON"):
        (tmp_path / "evaluation.json").write_text("{")
        write_card(draft, tmp_path / "evaluation.json")
    assert card_of(draft) == before
