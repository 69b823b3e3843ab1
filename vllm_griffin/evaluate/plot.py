"""An evaluation as a picture: acceptance lengths as bars, acceptance per depth as lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_griffin.evaluate.report import short_names

LINES = ("-", "--", ":", "-.")


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Write a PNG with a column per tree and temperature.

    Above, a bar of acceptance length per prompt set and draft, with its 95 % interval; below, the share of
    verify steps that accepted at least d tokens, a colour per draft and a line style per prompt set.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys((row["tree"], row["temperature"]) for row in rows))
    names = short_names(list(dict.fromkeys(row["draft"] for row in rows)))
    sets = list(dict.fromkeys(row["prompts_of"] for row in rows))
    figure = Figure(figsize=(max(6.0, 4.2 * len(columns)), 7.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(columns), squeeze=False, sharey="row")
    for (tree, temperature), (above, below) in zip(columns, axes.T, strict=True):
        chosen = [r for r in rows if (r["tree"], r["temperature"]) == (tree, temperature)]
        above.set_title(f"tree {tree}, T={temperature:g}")
        _bars(above, chosen, list(names), sets)
        _lines(below, chosen, list(names), sets)
    axes[0, 0].set_ylabel("acceptance length")
    axes[1, 0].set_ylabel("share of steps that accept at least d")
    handles = [(f"C{i}", "-", name) for i, name in enumerate(names.values())]
    handles += [("grey", LINES[i % len(LINES)], name) for i, name in enumerate(sets)]
    figure.legend(
        handles=[axes[1, 0].plot([], [], color=c, linestyle=s, label=n)[0] for c, s, n in handles],
        loc="outside lower center",
        ncols=max(len(names), len(sets)),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _bars(axes: Any, rows: Sequence[dict[str, Any]], drafts: list[str], sets: list[str]) -> None:
    width = 0.8 / len(drafts)
    for row in rows:
        length = row["acceptance_length"]
        if length is None:
            continue
        i = drafts.index(row["draft"])
        place = sets.index(row["prompts_of"]) + (i - (len(drafts) - 1) / 2) * width
        low, high = row["acceptance_length_95"]
        axes.bar(
            place,
            length,
            0.92 * width,
            color=f"C{i}",
            yerr=[[max(0.0, length - low)], [max(0.0, high - length)]],
            capsize=3,
        )
    axes.set_xticks(range(len(sets)), sets)
    axes.set_ylim(bottom=1)


def _lines(axes: Any, rows: Sequence[dict[str, Any]], drafts: list[str], sets: list[str]) -> None:
    for row in rows:
        shares = [0.0 if share is None else share for share in row["per_depth"]]
        style = LINES[sets.index(row["prompts_of"]) % len(LINES)]
        colour = f"C{drafts.index(row['draft'])}"
        axes.plot(range(1, 1 + len(shares)), shares, marker=".", color=colour, linestyle=style)
    axes.set_xlabel("depth d")
    axes.set_ylim(0, 1)
