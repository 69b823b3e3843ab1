"""The curves of runs: what is drawn, and what is said of a log that cannot be read."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from vllm_griffin.cli import main
from vllm_griffin.report import PANELS, ReportError, Run, _curves, read_log, write_report

PNG = b"\x89PNG"


def row(step: int, passes: int, **changes: float) -> dict[str, float]:
    """As the training loop logs it."""
    made: dict[str, float] = {"step": step, "passes": passes, "loss": 4.0, "lr": 1e-3}
    for n in range(passes):
        made |= {
            f"token{n}": 3.0 / step,
            f"feature{n}": 0.4,
            f"agree{n}": 0.5,
            f"mask{n}": 0.9 / (n + 1),
        }
    for n in range(3):
        made |= {f"val_token{n}": 3.1, f"val_feature{n}": 0.41, f"val_agree{n}": 0.49}
    return made | {"chain": 1.8, "top3": 2.0 + step / 1000} | changes


def write_run(folder: Path, rows: list, record: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
    return folder


RECORD = {
    "command": "vllm-griffin train --target T --data D --output O",
    "seed": 0,
    "commit": "abc",
}


def test_one_run(tmp_path: Path) -> None:
    rows = [row(100, 1), row(200, 3, top3=3.5), row(300, 3, top3=3.25, chain=1.25)]
    folder = write_run(tmp_path / "run", rows, RECORD)
    page = write_report([folder], tmp_path / "out")
    text = page.read_text()
    assert RECORD["command"] in text and "commit abc, seed 0" in text
    assert "| | last (step 300) | best held out (step 200) |" in text
    assert "| top3 | 3.25 | 3.5 |" in text
    assert "| chain | 1.25 | 1.8 |" in text
    for panel in PANELS:
        assert f"]({panel.file})" in text
        assert (tmp_path / "out" / panel.file).read_bytes().startswith(PNG)


def test_the_first_of_equal_bests_is_the_one_that_was_kept() -> None:
    rows = [row(1, 1, top3=2.0), row(2, 1, top3=2.5), row(3, 1, top3=2.5)]
    assert Run("r", {}, rows).best["step"] == 2
    assert Run("r", {}, [{"step": 1.0}, {"step": 2.0}]).best["step"] == 2
    losses = [row(step, 1, top3=1.0, val_token0=loss) for step, loss in ((1, 3.0), (2, 2.0))]
    assert Run("r", {}, losses).best["step"] == 2


def test_every_pass_has_a_curve_and_its_colour() -> None:
    run = Run("r", {}, [row(1, 1), row(2, 12)])
    assert _curves(run, ("agree*", "val_agree*")) == [
        *((f"agree{n}", n) for n in range(12)),
        *((f"val_agree{n}", n) for n in range(3)),
    ]
    assert _curves(run, ("lr", "nothing")) == [("lr", 0)]


def test_terms_of_the_head_loss_have_curves_of_their_own(tmp_path: Path) -> None:
    from matplotlib.image import imread

    terms = {"cross_entropy0": 1.0, "top_ten0": 0.5, "tvd0": 0.25, "tvd_plus0": 0.125}
    rows = [[row(1, 1), row(2, 1)], [row(1, 1) | terms, row(2, 1) | terms]]
    for name, logged in zip(("without", "with"), rows, strict=True):
        write_report([write_run(tmp_path / name, logged)], tmp_path / f"{name}-out")
    heights = [imread(tmp_path / f"{x}-out" / "loss.png").shape[0] for x in ("without", "with")]
    assert heights[1] - heights[0] == pytest.approx(4 * 320, abs=5)
    run = Run("r", {}, rows[1])
    assert _curves(run, ("tvd*",)) == [("tvd0", 0)]
    assert _curves(run, ("tvd_plus*",)) == [("tvd_plus0", 0)]


def test_what_was_not_logged_is_not_drawn(tmp_path: Path) -> None:
    rows = [{"step": 1, "token0": 2.0}, {"step": 2, "token0": 1.0}]
    page = write_report([write_run(tmp_path / "run", rows)], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["loss.png", "report.md"]
    assert "mask.png" not in page.read_text()


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    from matplotlib.image import imread

    one = write_run(tmp_path / "griffin", [row(100, 3)], RECORD)
    other = write_run(tmp_path / "hass", [row(100, 1), row(200, 1)])
    write_report([one], tmp_path / "one")
    page = write_report([one, other], tmp_path / "both")
    narrow, wide = (imread(tmp_path / name / "loss.png") for name in ("one", "both"))
    assert wide.shape[0] == narrow.shape[0] and wide.shape[1] > 1.5 * narrow.shape[1]
    assert "## griffin" in page.read_text() and "## hass" in page.read_text()


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / seed / "run", [row(1, 1)]) for seed in ("s0", "s1")]
    text = write_report(folders, tmp_path / "out").read_text()
    assert all(f"## {folder}" in text for folder in folders)


def test_the_same_log_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [row(100, 3), row(200, 3)], RECORD)
    made = [write_report([folder], tmp_path / name).parent for name in ("a", "b")]
    first, second = ({p.name: p.read_bytes() for p in d.iterdir()} for d in made)
    assert first == second


def test_a_step_that_was_logged_again_counts_once(tmp_path: Path) -> None:
    rows = [row(100, 1), row(200, 1, chain=1.0), row(200, 1, chain=2.0), row(150, 1)]
    log = read_log(write_run(tmp_path / "run", rows) / "log.jsonl")
    assert [r["step"] for r in log] == [100, 150, 200]
    assert log[-1]["chain"] == 2.0


def test_half_a_last_line_is_of_a_killed_run(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "ch')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "log.jsonl: missing; a training run writes it"),
        ("", "log.jsonl: empty;"),
        ("\n \n", "log.jsonl: empty;"),
        ('{"step": 1}\n{"step": 2, "ch\n', r"log.jsonl, line 2: not JSON, cut short\?"),
        ('{"step": 1, "ch', "log.jsonl: empty;"),
        ('{"step": 1}\n\n[3]\n', "log.jsonl, line 3: expected a JSON object, found a list"),
        ('{"token0": 1}\n', "log.jsonl, line 1: missing key `step`"),
        ('{"step": 1, "chain": "x"}\n', "log.jsonl, line 1: `chain` must be a number, found 'x'"),
        ('{"step": true}\n', "log.jsonl, line 1: `step` must be a number"),
    ],
)
def test_logs_that_cannot_be_read(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ReportError, match=message) as caught:
        write_report([tmp_path], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_run_record_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    write_run(tmp_path, [row(1, 1)])
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ReportError, match=r"run.json: "):
        write_report([tmp_path], tmp_path / "out")


def test_the_command(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [row(100, 2), row(200, 2, agree1=float("nan"))], RECORD)
    done = CliRunner().invoke(main, ["report", str(folder)])
    assert done.exit_code == 0, done.output
    assert done.output.strip() == str(folder / "report" / "report.md")
    assert "| agree1 | nan | nan |" in (folder / "report" / "report.md").read_text()
    done = CliRunner().invoke(main, ["report", str(folder), str(folder)])
    assert done.exit_code == 2 and "several runs need --output" in done.output
    (folder / "log.jsonl").write_text("nonsense\n")
    done = CliRunner().invoke(main, ["report", str(folder)])
    assert done.exit_code == 1 and "line 1" in done.output and "Traceback" not in done.output
