"""Tables and picture of a study from its finished rows."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 2000

# Accepted tokens and verify steps per prompt: [seeds, prompts, 2], by prompt set.
Counts = dict[str, np.ndarray]


def write_summary(results: Path) -> None:
    """Write ``README.md`` and ``acceptance.png`` into a folder of finished rows; nothing if there is none."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*-*.json"))]
    if not records:
        return
    by_row: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_row[record["row"]].append(record)
    settings = list(
        dict.fromkeys(
            (row["temperature"], row["tree"]) for r in records for row in r["evaluation"]["rows"]
        )
    )
    parts = [_heading(results, records)]
    averages: dict[tuple[float, str], dict[str, tuple[float, float, float]]] = {}
    for setting in settings:
        counts = {name: _counts(found, *setting) for name, found in by_row.items()}
        averages[setting] = {name: interval(c, average) for name, c in counts.items()}
        parts.append(_table(setting, counts, by_row))
    parts.append(_misaligned(by_row, settings[0]))
    parts.append(_training(by_row))
    (results / "README.md").write_text("\n\n".join(parts) + "\n")
    _plot(averages, results / "acceptance.png")


def _counts(records: list[dict[str, Any]], temperature: float, tree: str) -> Counts:
    seeds = [
        {
            row["prompts_of"]: row["per_prompt"]
            for row in record["evaluation"]["rows"]
            if (row["temperature"], row["tree"]) == (temperature, tree)
        }
        for record in records
    ]
    return {name: np.array([s[name] for s in seeds], dtype=float) for name in seeds[0]}


def lengths(counts: np.ndarray) -> np.ndarray:
    """Pooled acceptance length of each seed [seeds] from counts [seeds, prompts, 2]."""
    accepted, steps = counts.sum(axis=1).T
    return 1 + accepted / steps


def average(counts: Counts) -> float:
    """Mean over seeds and prompt sets of the pooled acceptance length."""
    return float(np.mean([lengths(c) for c in counts.values()]))


def interval(
    counts: Counts, value: Callable[[Counts], float], seed: int = 0
) -> tuple[float, float, float]:
    """A value with its 95 % interval, seeds and the prompts of each set resampled."""
    random = np.random.default_rng(seed)
    drawn = [value(_resample(counts, random)) for _ in range(RESAMPLES)]
    return (value(counts), *np.percentile(drawn, [2.5, 97.5]).tolist())


def _resample(counts: Counts, random: np.random.Generator) -> Counts:
    runs = len(next(iter(counts.values())))
    seeds = random.integers(0, runs, runs)
    return {
        name: c[seeds][:, random.integers(0, c.shape[1], c.shape[1])] for name, c in counts.items()
    }


def ratio(
    here: Counts, there: Counts, seeds_here: Sequence[int], seeds_there: Sequence[int]
) -> tuple[float, float, float] | None:
    """Average acceptance length of `here` over that of `there`, paired by seed and prompt.

    Only the seeds that both have count. None if there are none or the prompts differ.
    """
    both = sorted(set(seeds_here) & set(seeds_there))
    if not both or any(here[name].shape[1] != there[name].shape[1] for name in here):
        return None
    runs = [seeds_here.index(seed) for seed in both]
    other_runs = [seeds_there.index(seed) for seed in both]
    # The last axis holds both sides, so that both are drawn together.
    paired = {
        name: np.concatenate([here[name][runs], there[name][other_runs]], axis=2) for name in here
    }

    def value(counts: Counts) -> float:
        first = average({name: c[..., :2] for name, c in counts.items()})
        return first / average({name: c[..., 2:] for name, c in counts.items()})

    return interval(paired, value)


def _heading(results: Path, records: list[dict[str, Any]]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in records[0]["training"]["versions"].items())
    machines = {
        f"{h['cpu']}, {h['cores']} cores, GPU {h['gpu']}": None
        for h in (record["training"]["hardware"] for record in records)
    }
    return (
        f"# Alignment study, {results.name}\n\n"
        f"Written by `benchmarks/alignment/study.py`; each row's JSON has its command, settings and curves. "
        f"Hardware: {'; '.join(machines)}. {versions}.\n\n"
        "Acceptance length is 1 + accepted / verify steps, pooled per prompt set; the average is that of the "
        "sets. Intervals (95 %) are a bootstrap over prompts and seeds, ratios are paired.\n\n"
        "![acceptance](acceptance.png)"
    )


def _table(
    setting: tuple[float, str],
    counts: dict[str, Counts],
    by_row: dict[str, list[dict[str, Any]]],
) -> str:
    sets = list(next(iter(counts.values())))
    bases = [name for name in ("EAGLE-2", "HASS", "default") if name in counts]
    head = ["row", "seeds", *sets, "average", *(f"over {name}" for name in bases)]
    lines = [f"## T={setting[0]:g}, tree {setting[1]}", "", *_head(head)]
    seeds = {name: [record["seed"] for record in records] for name, records in by_row.items()}
    for name, found in counts.items():
        cells = [name, ", ".join(map(str, seeds[name]))]
        cells += [f"{lengths(found[s]).mean():.2f}" for s in sets]
        value, low, high = interval(found, average)
        cells.append(f"**{value:.3f}** [{low:.2f}, {high:.2f}]")
        for base in bases:
            pair = (found, counts[base], seeds[name], seeds[base])
            against = ratio(*pair) if base != name else None
            cells.append("" if against is None else "{:+.1f} % [{:+.1f}, {:+.1f}]".format(
                *(100 * (x - 1) for x in against)))  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _misaligned(by_row: dict[str, list[dict[str, Any]]], setting: tuple[float, str]) -> str:
    """Misaligned-token rate per forward, mean over seeds and sets."""
    rates = {}
    for name, records in by_row.items():
        rows = [
            row["misaligned"]
            for record in records
            for row in record["evaluation"]["rows"]
            if (row["temperature"], row["tree"]) == setting
        ]
        rates[name] = np.mean(np.array(rows, dtype=float), axis=0)
    forwards = [f"forward {n}" for n in range(2, 2 + len(next(iter(rates.values()))))]
    lines = [
        f"## Misaligned-token rate, %, T={setting[0]:g}, tree {setting[1]}",
        "",
        *_head(["row", *forwards]),
    ]
    for name, values in rates.items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * v:.0f}" for v in values) + " |")
    return "\n".join(lines)


def _training(by_row: dict[str, list[dict[str, Any]]]) -> str:
    """What each row was trained with, and its held-out figures."""
    head = ["row", "stages after the trunk", "minutes", "chain", "top3", "agree 0, 1, 2"]
    lines = ["## Training: time after the trunk, and held-out documents (mean over seeds)", ""]
    lines += _head(head)
    for name, records in by_row.items():
        last = [record["log"][-1] for record in records]
        stages = records[0]["training"]["settings"]["stages"]

        def mean(key: str, last: list[dict[str, float]] = last) -> float:
            return float(np.mean([row[key] for row in last]))

        agree = " ".join(f"{mean(f'val_agree{n}'):.3f}" for n in range(3))
        steps = ", ".join(f"{steps} of {passes}" for passes, steps in stages)
        lines.append(
            f"| {name} | {steps} | {mean('seconds') / 60:.0f} | {mean('chain'):.3f} | "
            f"{mean('top3'):.3f} | {agree} |"
        )
    return "\n".join(lines)


def _head(cells: list[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]


def _plot(
    averages: dict[tuple[float, str], dict[str, tuple[float, float, float]]], path: Path
) -> None:
    """Average acceptance length of every row, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(next(iter(averages.values())))
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.45 * len(names)))
    height = 0.8 / len(averages)
    for number, ((temperature, tree), values) in enumerate(averages.items()):
        shown = np.array([values[name] for name in names])
        axes.barh(
            np.arange(len(names)) + number * height,
            shown[:, 0],
            height,
            xerr=[shown[:, 0] - shown[:, 1], shown[:, 2] - shown[:, 0]],
            label=f"T={temperature:g}, {tree}",
        )
    axes.set_yticks(np.arange(len(names)) + 0.4 - height / 2, names)
    axes.invert_yaxis()
    axes.set(xlabel="acceptance length", xlim=(1, None))
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
