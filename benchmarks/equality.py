"""The equality matrix: every sampling parameter with griffin against the engine without speculation.

    python benchmarks/equality.py

Rows are parameters (``tests/engine/parameters.py``), columns are alone or mixed with the other rows in
one batch, trees of 12 or 59 nodes, 1 or 8 requests at a time. A cell counts requests and those that differ
from the plain engine's on the same runner with the same seeds: tokens, text, why they ended, log-probs
within 1e-4. A first difference where the plain engine's own decision was closer than 1e-4 is a near-tie
and counted apart. float32; exits with 1 if anything differs. Prints the table, and writes JSON and
Markdown.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import click

import tests.conftest  # noqa: F401 - the environment of an engine in this process
from tests.engine.compare import TOLERANCE
from tests.engine.equality import ALONE, BATCHES, BENCHES, MIXED, Cell, Matrix, fill, how
from vllm_griffin import provenance
from vllm_griffin.markdown import code_block, table
from vllm_griffin.whole_file import write_json

NODES = (12, 59)


def page(record: dict, matrix: Matrix, cells: Sequence[Cell]) -> str:
    """The matrix in Markdown, and where it comes from."""
    heads = [f"N {c.nodes}, {c.batch} at a time, {c.company}" for c in cells]
    lines = [
        "# Equality matrix",
        "",
        "Requests / requests that differ from the engine without speculation, for each sampling",
        f"parameter. Log-probabilities are equal within {TOLERANCE}. Last columns: near-ties (not",
        "counted as differences), and tokens accepted beside the spine, which proves that trees were",
        "at work.",
        "",
        "| parameter | verified on | " + " | ".join(heads) + " | near-ties | beside the spine |",
        "|---|---|" + "---|" * (len(cells) + 2),
    ]
    for row, counts in matrix.items():
        found = [counts[c.name] for c in cells]
        lines.append(
            f"| {row} | {how(row)} | "
            + " | ".join(f"{c.requests} / {c.differ}" for c in found)
            + f" | {sum(c.ties for c in found)} | {sum(c.off_spine for c in found)} |"
        )
    about = {
        k: record[k] for k in ("totals", "started", "seconds", "commit", "versions", "hardware")
    }
    return "\n".join([*lines, "", *code_block(record["command"]), *table(about)])


def totals(matrix: Matrix) -> dict[str, int]:
    """Over all cells."""
    counts = [count for row in matrix.values() for count in row.values()]
    return {
        "requests": sum(c.requests for c in counts),
        "differ": sum(c.differ for c in counts),
        "near_ties": sum(c.ties for c in counts),
    }


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("docs/results/equality.json")
)
@click.option("--requests", default=8, show_default=True, help="Requests of a row, 8 at a time.")
@click.option("--single", default=2, show_default=True, help="Requests of a row, one at a time.")
def main(output: Path, requests: int, single: int) -> None:
    """Runs the whole matrix."""
    record = provenance.describe(seed=0)
    began = time.perf_counter()
    cells = [Cell(n, b, company) for n in NODES for b in BATCHES for company in (ALONE, MIXED)]
    matrix: Matrix = {}
    with tempfile.TemporaryDirectory() as folder:
        for bench in BENCHES:
            fill(matrix, bench, cells, {1: single, 8: requests}, Path(folder))
            print(f"{bench.pair}{bench.suffix}: {totals(matrix)}", flush=True)
    record["seconds"] = round(time.perf_counter() - began)
    record["totals"] = totals(matrix)
    record["rows"] = {
        row: {n: asdict(c) for n, c in counts.items()} for row, counts in matrix.items()
    }
    write_json(output, record)
    text = page(record, matrix, cells)
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    sys.exit(1 if record["totals"]["differ"] else 0)


if __name__ == "__main__":
    main()
