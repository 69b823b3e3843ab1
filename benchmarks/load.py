"""Load and faults: a real server on loopback, many clients, and the plain engine's outputs beside theirs.

    python benchmarks/load.py                   (all parts)
    python benchmarks/load.py --part leaving    (one; the results of the others are kept)

requests  2,000 clients of the tiny pair: mixed sampling parameters, lengths and arrival, streams and whole
          answers, and a cache so small that requests are preempted
leaving   the same, and one client of ten leaves early
smollm2   50 clients of SmolLM2-135M-Instruct and its draft, one of ten leaving
soak      the same 100 clients 48 times, with a trace: memory and trace must not grow
kill      the engine core, then a worker, is killed in mid-stream

*Wrong* differs from the engine without speculation (same runner, same seeds, float32) in tokens, text,
finish reason or log-probs. A first difference where that engine's own decision was closer than 1e-4 is a
near-tie and counted apart. *Lost* ended with an error or before its end, *hung* had no answer after 20
minutes. A server must be idle afterwards, with an empty cache, and still answer rightly. Exits with 1 if
a part fails. Writes JSON and Markdown.
"""

import json
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import click

import tests.conftest  # noqa: F401 - the environment of an engine in this process
from tests.engine.harness import MODELS, PAIRS
from tests.load.faults import ENGINE_CORE, WORKER, clean, kill, streams
from tests.load.reference import Expected, kept
from tests.load.rounds import LIMITS, SPEC, flat, load_round, soak
from tests.load.server import serve
from tests.load.traffic import Visit, chats, source_code, visits
from vllm_griffin import provenance
from vllm_griffin.markdown import code_block, table
from vllm_griffin.pretrained import smollm2_instruct
from vllm_griffin.whole_file import write_json

SEED = 6
LEAVING = 0.1
# Git ignores it.
REFERENCES = Path(".cache")
# What a soak may grow by: allocators are never quite still.
MEMORY_PER_REQUEST = 2048
TRACE_GROWTH = 0.05
COLUMNS = {
    "requests": "requests",
    "left": "left early",
    "wrong": "wrong",
    "near_ties": "near-ties",
    "lost": "lost",
    "hung": "hung",
    "preempted": "preemptions",
    "acceptance_length": "acceptance length",
    "seconds": "seconds",
}


def expected(pair: str, clients: list[Visit]) -> dict[str, Expected]:
    """The plain engine's outputs, kept for the next run of the same requests."""
    return kept(REFERENCES / f"load-{pair}-{len(clients)}.json", pair, clients, max_num_seqs=32)


def load(pair: str, clients: list[Visit], folder: Path) -> dict[str, Any]:
    """One round."""
    wanted = expected(pair, clients)
    target, draft = PAIRS[pair]
    log = folder / "server.log"
    with serve(target, {"model": str(draft), **SPEC}, flat(LIMITS), log, None) as server:
        verdict, record = load_round(server, clients, wanted)
    idle = not any(record["left_over"].values())
    return record | {"ok": verdict.clean and idle and record["preempted"] > 0}


def tiny(count: int, leaving: float, folder: Path) -> dict[str, Any]:
    """One round of the tiny pair."""
    return load("tiny", visits(source_code(PAIRS["tiny"][0]), count, SEED, leaving), folder)


def smollm2(folder: Path) -> dict[str, Any]:
    """One round of a real chat model."""
    target = smollm2_instruct()
    PAIRS["smollm2"] = (target, MODELS / "smollm2-griffin")
    return load("smollm2", visits(chats(target), 50, SEED, LEAVING, (16, 48)), folder)


def soak_part(folder: Path) -> dict[str, Any]:
    """Many rounds of one server of the tiny pair."""
    target, draft = PAIRS["tiny"]
    clients = visits(source_code(target), 100, SEED, LEAVING)
    wanted = expected("tiny", clients)
    trace, log = folder / "trace.jsonl", folder / "server.log"
    with serve(target, {"model": str(draft), **SPEC}, flat(LIMITS), log, trace) as server:
        record = soak(server, clients, wanted, 48, trace)
    still = record["memory_growth_bytes_per_request"] < MEMORY_PER_REQUEST
    still &= record["trace_growth"] < TRACE_GROWTH
    bad = any(record[what] for what in ("wrong", "lost", "hung", "rounds_not_idle"))
    return record | {"ok": still and not bad}


def kill_part(folder: Path) -> dict[str, Any]:
    """Two servers of the tiny pair, each loses one process."""
    target, draft = PAIRS["tiny"]
    spec = {"model": str(draft), **SPEC}
    records = {}
    for victim in (ENGINE_CORE, WORKER):
        log = folder / f"{victim[6:]}.log"
        with serve(target, spec, flat(LIMITS), log, None) as server:
            records[victim] = kill(server, streams(source_code(target), 6, 100), victim)
    return records | {"ok": all(map(clean, records.values()))}


PARTS: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    "requests": lambda count, folder: tiny(count, 0.0, folder),
    "leaving": lambda count, folder: tiny(count, LEAVING, folder),
    "smollm2": lambda _, folder: smollm2(folder),
    "soak": lambda _, folder: soak_part(folder),
    "kill": lambda _, folder: kill_part(folder),
}


def page(parts: dict[str, dict[str, Any]]) -> str:
    """All results in Markdown, and where each comes from."""
    counted = {name: record for name, record in parts.items() if "wrong" in record}
    lines = ["# Load and faults", "", "| part | " + " | ".join(COLUMNS.values()) + " |"]
    lines += ["|---|" + "---|" * len(COLUMNS)]
    for name, record in counted.items():
        lines.append(f"| {name} | " + " | ".join(str(record.get(c, "")) for c in COLUMNS) + " |")
    for name, record in parts.items():
        origin = record["origin"]
        rest = {k: v for k, v in record.items() if k not in (*COLUMNS, "origin")}
        about = {k: origin[k] for k in ("started", "commit", "versions", "hardware")}
        lines += ["", f"## {name}", "", *code_block(origin["command"]), *table(rest | about)[:-1]]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/results/load.json"))
@click.option(
    "--part", "chosen", type=click.Choice(list(PARTS)), multiple=True, help="Default: all."
)
@click.option(
    "--requests", default=2000, show_default=True, help="Clients of `requests` and `leaving`."
)
def main(output: Path, chosen: tuple[str, ...], requests: int) -> None:
    """Runs the parts one after the other; each is written as soon as it has ended."""
    # A benchmark that is ended ends its server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parts = json.loads(output.read_text()) if output.exists() else {}
    names = chosen or tuple(PARTS)
    for name in names:
        origin = provenance.describe(seed=SEED)
        with tempfile.TemporaryDirectory() as folder:
            record = PARTS[name](requests, Path(folder))
        print(f"{name}: {json.dumps(record, indent=1)}", flush=True)
        parts[name] = record | {"origin": origin}
        parts = {n: parts[n] for n in PARTS if n in parts}
        write_json(output, parts)
        output.with_suffix(".md").write_text(page(parts), encoding="utf-8")
    sys.exit(0 if all(parts[name]["ok"] for name in names) else 1)


if __name__ == "__main__":
    main()
