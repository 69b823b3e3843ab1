"""Speed and memory of training by number of passes.

    python benchmarks/training.py --target T --data DATA --init-from DRAFT --output docs/results/training.json

Every setting runs in a process of its own, several times, in turn; the median step counts. The draft should
be a trained one: an untrained one misses nearly all tokens, so that its alignment masks leave later passes
nothing to compute. Prints a table, writes JSON and a picture beside it.
"""

import resource
import statistics
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from common import write_table

HEAD = ("passes", "mask", "slots / s", "cost", "peak memory, MiB")


def measure(
    target: str,
    data: str,
    draft: str,
    passes: int,
    changes: dict[str, Any],
    steps: int,
    threads: int,
) -> dict[str, Any]:
    """Seconds of `steps` steps after one to warm up, their slots, and the process's peak memory."""
    import torch

    from vllm_griffin.data.shards import StoredStates
    from vllm_griffin.train.checkpoint import load_draft
    from vllm_griffin.train.loop import Trainer
    from vllm_griffin.train.settings import Settings
    from vllm_griffin.train.setup import load_target_parts

    if threads:
        torch.set_num_threads(threads)
    parts = load_target_parts(target)
    settings = Settings(stages=[(passes, 1000)], **changes)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            load_draft(draft, parts.embeddings),
            StoredStates(data),
            parts,
            settings,
            scratch,
            fresh=False,
        )
        _, *timed = trainer.timed_steps(0, 1 + steps)
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {
        "seconds": [seconds for seconds, _ in timed],
        "slots": [slots for _, slots in timed],
        "peak_bytes": gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


@click.command()
@click.option("--target", help="Default: SmolLM2-135M-Instruct.")
@click.option("--data", required=True, type=click.Path(exists=True))
@click.option("--init-from", required=True, type=click.Path(exists=True))
@click.option("--passes", default="1,2,3,4", show_default=True)
@click.option("--steps", default=3, show_default=True, help="Timed steps a round.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=0, help="Default: PyTorch's choice.")
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="JSON file to write."
)
def main(
    target: str | None,
    data: str,
    init_from: str,
    passes: str,
    steps: int,
    rounds: int,
    threads: int,
    output: Path,
) -> None:
    """Slots per second and peak memory of a training step, with and without alignment mask."""
    from vllm_griffin import provenance
    from vllm_griffin.whole_file import write_json

    if target is None:
        from vllm_griffin.pretrained import smollm2_instruct

        target = str(smollm2_instruct())
    settings = [
        (int(n), mask, {"align_top_k": 3 if mask else 0})
        for mask in (True, False)
        for n in passes.split(",")
        if mask or int(n) > 1
    ]
    if settings[0][0] != 1:
        raise click.UsageError("--passes begins with 1, which costs are relative to")
    made = provenance.describe()
    runs: dict[tuple[int, bool], list[dict[str, Any]]] = {(n, mask): [] for n, mask, _ in settings}
    context = get_context("spawn")
    for _ in range(rounds):
        for n, mask, changes in settings:
            # A process of its own: its peak memory is that of this setting.
            with context.Pool(1) as pool:
                task = (target, data, init_from, n, changes, steps, threads)
                runs[n, mask].append(pool.apply(measure, task))
    rows = [summary(n, mask, found) for (n, mask), found in runs.items()]
    for row in rows:
        row["cost"] = round(row["seconds_per_slot"] / rows[0]["seconds_per_slot"], 3)
    write_json(output, {"provenance": made, "rows": rows})
    write_table(output, made, HEAD, [cells(row) for row in rows])
    plot(rows, output.with_suffix(".png"))


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    mask = "-" if row["passes"] == 1 else "top 3" if row["mask"] else "none"
    slots, peak = 1 / row["seconds_per_slot"], row["peak_bytes"] / 2**20
    return [str(row["passes"]), mask, f"{slots:.0f}", f"{row['cost']:.2f}", f"{peak:.0f}"]


def summary(passes: int, mask: bool, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median over all timed steps of one setting."""
    pairs = zip(
        (x for r in runs for x in r["seconds"]), (x for r in runs for x in r["slots"]), strict=True
    )
    return {
        "passes": passes,
        "mask": mask,
        "seconds_per_slot": statistics.median(s / n for s, n in pairs),
        "peak_bytes": max(r["peak_bytes"] for r in runs),
        "runs": runs,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Cost relative to one pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5))
    for mask, label in ((True, "top-3 mask"), (False, "no mask")):
        shown = [r for r in rows if r["mask"] == mask or r["passes"] == 1]
        axes.plot([r["passes"] for r in shown], [r["cost"] for r in shown], "o-", label=label)
    axes.set(xlabel="passes", ylabel="time of a step, one pass = 1", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
