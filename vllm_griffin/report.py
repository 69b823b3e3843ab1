"""What training runs logged, as curves (PNG) and a Markdown page."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_griffin.compat import INSTALL_TRAIN
from vllm_griffin.markdown import code_block

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, float]
BEST = "top3"


class ReportError(ValueError):
    """A run's log cannot be read; the message names the file and the line."""


def quality(row: Row) -> float:
    """What training keeps the draft by, of a row with `top3`; the more the better."""
    # Answers shorter than the passes have no roots: then the first pass's loss tells what is better.
    return row[BEST] if row[BEST] > 1 else -row.get("val_token0", math.inf)


@dataclass(frozen=True)
class Run:
    """One training run: its name, `run.json` (empty if it has none), and its log by step."""

    name: str
    record: dict[str, Any]
    rows: list[Row]

    @property
    def best(self) -> Row:
        """The row whose weights the run kept: the first of the highest `quality`; else the last."""
        scored = [row for row in self.rows if BEST in row]
        return max(scored, key=quality) if scored else self.rows[-1]


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        file: Its file name.
        title: Its heading.
        parts: (y label, log keys) of each row of plots; a key that ends in `*` stands for one per pass.
    """

    file: str
    title: str
    parts: tuple[tuple[str, tuple[str, ...]], ...]


PANELS = (
    Panel(
        "loss.png",
        "Losses per pass",
        (
            # Weighted and with all its terms while training, so on an axis of its own.
            ("head loss, as trained", ("token*",)),
            ("of it, cross-entropy", ("cross_entropy*",)),
            ("of it, top-10 term", ("top_ten*",)),
            ("of it, TVD", ("tvd*",)),
            ("of it, TVD++", ("tvd_plus*",)),
            ("soft cross-entropy", ("val_token*",)),
            ("feature loss (smooth L1)", ("feature*", "val_feature*")),
        ),
    ),
    Panel(
        "agreement.png",
        "Agreement per pass: the draft's best token is the target's",
        (("share of slots", ("agree*", "val_agree*")),),
    ),
    Panel(
        "mask.png",
        "Mask rate per pass: slots that the pass trains on",
        (("share of slots", ("mask*",)),),
    ),
    Panel(
        "acceptance.png",
        "Held out: tokens a chain of 6 accepts, and with the best three at each step",
        (("acceptance length", ("chain", "top3")),),
    ),
    Panel("lr.png", "Learning rate", (("learning rate", ("lr",)),)),
)


def read_log(file: Path) -> list[Row]:
    """The rows of a `log.jsonl`, by step. Of a step that a continued run logged again, the later row.

    Half a last line, which a killed process leaves, is left out.

    Raises:
        ReportError: The file is missing or empty, or a line is no JSON object of numbers with a `step`.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        raise ReportError(
            f"{file}: missing; a training run writes it at its first validation"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{file}: not readable ({error})") from error
    if lines and not lines[-1].endswith(("\n", "}")):
        lines.pop()
    rows: dict[float, Row] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = _parse(line, f"{file}, line {number}")
            rows[row["step"]] = row
    if not rows:
        raise ReportError(f"{file}: empty; a training run writes its first row when it validates")
    return [rows[step] for step in sorted(rows)]


def _parse(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ReportError(f"{where}: not JSON, cut short? ({error})") from error
    if not isinstance(row, dict):
        raise ReportError(f"{where}: expected a JSON object, found a {type(row).__name__}")
    for key, value in row.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ReportError(f"{where}: `{key}` must be a number, found {value!r}")
    if "step" not in row:
        raise ReportError(f"{where}: missing key `step`")
    return row


def read_run(folder: Path, name: str) -> Run:
    """A run's log, and its `run.json` if it has one.

    Raises:
        ReportError: As `read_log`, or `run.json` is not a JSON object.
    """
    file = folder / "run.json"
    record: Any = {}
    if file.is_file():
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ReportError(f"{file}: not readable as JSON ({error})") from error
        if not isinstance(record, dict):
            raise ReportError(f"{file}: expected a JSON object, found a {type(record).__name__}")
    return Run(name, record, read_log(folder / "log.jsonl"))


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Draw the runs beside each other.

    Args:
        folders: Output folders of `vllm-griffin train`.
        output: Where `report.md` and the pictures go.

    Returns:
        The page.

    Raises:
        ReportError: As `read_run`, or matplotlib is not installed.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    output.mkdir(parents=True, exist_ok=True)
    drawn = [panel for panel in PANELS if _draw(panel, runs, output)]
    page = output / "report.md"
    page.write_text("\n".join(_page(runs, drawn)) + "\n", encoding="utf-8")
    return page


def _draw(panel: Panel, runs: Sequence[Run], output: Path) -> bool:
    """Write a panel, a column per run; False if no run logged any of it."""
    parts = [
        (label, keys) for label, keys in panel.parts if any(_curves(run, keys) for run in runs)
    ]
    if not parts:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError(f"curves need matplotlib: {INSTALL_TRAIN}") from error
    figure = Figure(figsize=(5.5 * len(runs) + 1, 3.2 * len(parts) + 0.6), layout="constrained")
    axes = figure.subplots(len(parts), len(runs), squeeze=False, sharex="col", sharey="row")
    for (label, keys), row in zip(parts, axes, strict=True):
        row[0].set_ylabel(label)
        for run, place in zip(runs, row, strict=True):
            _plot(run, keys, place)
    for run, top, bottom in zip(runs, axes[0], axes[-1], strict=True):
        top.set_title(run.name)
        bottom.set_xlabel("step")
    # No date or version in the file, so that the same log gives the same bytes.
    figure.savefig(output / panel.file, dpi=100, metadata={"Software": None})
    return True


def _plot(run: Run, keys: Sequence[str], axes: "Axes") -> None:
    for key, colour in _curves(run, keys):
        points = [(row["step"], row[key]) for row in run.rows if key in row]
        batch = any(f"val_{key}" in row for row in run.rows)
        axes.plot(
            *zip(*points, strict=True),
            label=key,
            color=f"C{colour}",
            linestyle=":" if batch else "-",
            marker="." if len(points) < 30 else "",
        )
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")


def _curves(run: Run, keys: Sequence[str]) -> list[tuple[str, int]]:
    """(log key, number of its colour): passes have a colour each, whether trained or held out."""
    logged = {key for row in run.rows for key in row}
    found = []
    for number, key in enumerate(keys):
        if not key.endswith("*"):
            found += [(key, number)] if key in logged else []
            continue
        found += [(name, n) for name, n in _passes(logged, key.removesuffix("*"))]
    return found


def _passes(logged: set[str], prefix: str) -> Iterator[tuple[str, int]]:
    numbers = [key.removeprefix(prefix) for key in logged if key.startswith(prefix)]
    for n in sorted(int(text) for text in numbers if text.isdecimal()):
        yield f"{prefix}{n}", n


def _page(runs: Sequence[Run], panels: Sequence[Panel]) -> list[str]:
    lines = ["# Training " + ("run" if len(runs) == 1 else "runs"), ""]
    for run in runs:
        best, last = run.best, run.rows[-1]
        lines += [f"## {run.name}", ""]
        lines += code_block(run.record.get("command"))
        shown = ("commit", "seed", "started")
        facts = [f"{k} {run.record[k]}" for k in shown if run.record.get(k) is not None]
        lines += [", ".join(facts), ""] if facts else []
        lines += [
            f"| | last (step {last['step']:g}) | best held out (step {best['step']:g}) |",
            "|---|---|---|",
        ]
        keys = list(dict.fromkeys([*last, *best]))
        lines += [
            f"| {key} | {_number(last.get(key))} | {_number(best.get(key))} |"
            for key in keys
            if key != "step"
        ]
        lines.append("")
    for panel in panels:
        lines += [f"## {panel.title}", "", f"![{panel.title}]({panel.file})", ""]
    return [
        *lines,
        "Dotted: the training batch of that step, beside the same on held-out documents.",
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if math.isfinite(value) else str(value)
