"""Load and faults: a real server on loopback, many clients, and the plain engine's outputs beside theirs.

    python benchmarks/load.py                   (all parts)
    python benchmarks/load.py --part leaving    (one; the results of the others are kept)

`requests`: mixed sampling parameters, lengths and arrival, streams and whole answers, and a cache so
small that requests are preempted. `leaving`: the same with one client of ten leaving early. *Wrong* differs
from the engine without speculation (same runner, same seeds, float32) in tokens, text, finish reason or
log-probs; a first difference where that engine's own decision was closer than 1e-4 is a near-tie and
counted apart. *Lost* ended with an error or before its end; *hung* had no answer after 20 minutes.
Exits with 1 if a part fails. Writes JSON and Markdown.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import click

import tests.conftest  # noqa: F401 - the environment of an engine in this process
from tests.engine.harness import PAIRS
from tests.load.reference import kept
from tests.load.rounds import LIMITS, SPEC, flat, load_round
from tests.load.server import serve
from tests.load.traffic import heldout_tokens, visits
from vllm_griffin import provenance
from vllm_griffin.markdown import code_block, table

SEED = 6
LEAVING = 0.1
# Beside the package's builds, which git ignores.
REFERENCE = Path("build/load_reference.json")


def load(count: int, leaving: float, folder: Path) -> dict[str, Any]:
    """One round of the tiny pair."""
    target, draft = PAIRS["tiny"]
    clients = visits(heldout_tokens(target), count, SEED, leaving)
    wanted = kept(REFERENCE, "tiny", clients, max_num_seqs=32)
    spec = {"model": str(draft), **SPEC}
    with serve(target, spec, flat(LIMITS), folder / "server.log", None) as server:
        verdict, record = load_round(server, clients, wanted)
    record["ok"] = (
        verdict.clean and record["preempted"] > 0 and not any(record["left_over"].values())
    )
    return record


PARTS: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    "requests": lambda count, folder: load(count, 0.0, folder),
    "leaving": lambda count, folder: load(count, LEAVING, folder),
}


def page(parts: dict[str, dict[str, Any]]) -> str:
    """All results in Markdown, and where each comes from."""
    lines = ["# Load and faults", ""]
    for name, record in parts.items():
        origin = record["origin"]
        shown = {k: v for k, v in record.items() if k != "origin"}
        about = {k: origin[k] for k in ("started", "commit", "versions", "hardware")}
        lines += [f"## {name}", "", *table(shown), *code_block(origin["command"]), *table(about)]
    return "\n".join(lines)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/results/load.json"))
@click.option(
    "--part", "chosen", type=click.Choice(list(PARTS)), multiple=True, help="Default: all."
)
@click.option("--requests", default=2000, show_default=True, help="Of `requests` and `leaving`.")
def main(output: Path, chosen: tuple[str, ...], requests: int) -> None:
    """Runs the parts one after the other; each is written as soon as it has ended."""
    parts = json.loads(output.read_text()) if output.exists() else {}
    names = chosen or tuple(PARTS)
    for name in names:
        origin = provenance.describe(seed=SEED)
        with tempfile.TemporaryDirectory() as folder:
            record = PARTS[name](requests, Path(folder))
        parts[name] = record | {"origin": origin}
        print(f"{name}: {json.dumps(record, indent=1)}", flush=True)
        provenance.write(output, {n: parts[n] for n in PARTS if n in parts})
        output.with_suffix(".md").write_text(page(parts), encoding="utf-8")
    sys.exit(0 if all(parts[name]["ok"] for name in names) else 1)


if __name__ == "__main__":
    main()
