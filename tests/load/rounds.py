"""One round of load: the server, its clients, and what they and its counters say."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from tests.load.client import visit_all
from tests.load.reference import Expected, Verdict, judge
from tests.load.server import Server
from tests.load.traffic import Visit

# Sixteen run at a time, and the cache is too small for sixteen at full length.
LIMITS = {
    "--max-model-len": "192",
    "--max-num-seqs": "16",
    "--max-num-batched-tokens": "256",
    "--block-size": "32",
    "--num-gpu-blocks-override": "20",
}
SPEC = {"num_speculative_tokens": 12, "tree_depth": 4, "tree_top_k": 4}


def flat(options: Mapping[str, str]) -> list[str]:
    """For a command line."""
    return [part for option in options.items() for part in option]


def load_round(
    server: Server, visits: Sequence[Visit], wanted: Mapping[str, Expected]
) -> tuple[Verdict, dict[str, Any]]:
    """Sends all clients; afterwards the server must be idle, with an empty cache.

    Returns:
        The verdict, and a record of it with the server's counters of this round.
    """
    before, began = server.metrics(), time.perf_counter()
    answers = asyncio.run(visit_all(server.url, visits))
    seconds = time.perf_counter() - began
    verdict = judge(visits, answers, wanted)
    after = {name: value - before.get(name, 0) for name, value in server.metrics().items()}
    drafts = after["vllm:spec_decode_num_drafts_total"]
    record = asdict(verdict) | {
        "preempted": int(after["vllm:num_preemptions_total"]),
        "acceptance_length": round(
            1 + after["vllm:spec_decode_num_accepted_tokens_total"] / max(drafts, 1), 3
        ),
        "seconds": round(seconds, 1),
        "left_over": left_over(server, visits[0], wanted),
    }
    return verdict, record


def left_over(server: Server, visit: Visit, wanted: Mapping[str, Expected]) -> dict[str, float]:
    """What the server still holds after one more request, whose answer is checked too.

    Gauges are as old as the last step, hence the request.

    Raises:
        RuntimeError: the request's answer is not the expected one.
    """
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    patience = time.monotonic() + 30
    while True:
        answers = asyncio.run(visit_all(server.url, [Visit(visit.name, visit.body, 0.0)]))
        verdict = judge([visit], answers, wanted)
        if not verdict.clean:
            raise RuntimeError(f"after the load: {verdict.notes}")
        found = {name.removeprefix("vllm:"): server.metrics()[name] for name in names}
        # A request that was aborted last may be gone a moment later.
        if not any(found.values()) or time.monotonic() > patience:
            return found
        time.sleep(1)


def soak(
    server: Server,
    clients: Sequence[Visit],
    wanted: Mapping[str, Expected],
    rounds: int,
    trace: Path,
) -> dict[str, Any]:
    """The same clients again and again; memory and trace are looked at after each round.

    Returns:
        A record: counts of all rounds, bytes of memory after each and their `growth`, bytes of trace
        per request of each, and by what share the second half's are more than the first's.
    """
    totals: Counter[str] = Counter()
    memory, traced, began = [], [], time.perf_counter()
    for _ in range(rounds):
        before = trace.stat().st_size if trace.exists() else 0
        _, record = load_round(server, clients, wanted)
        totals.update({k: v for k, v in record.items() if isinstance(v, int)})
        totals["rounds_not_idle"] += any(record["left_over"].values())
        memory.append(server.memory())
        traced.append(round((trace.stat().st_size - before) / len(clients)))
    return dict(totals) | {
        "seconds": round(time.perf_counter() - began, 1),
        "memory_bytes": memory,
        "memory_growth_bytes_per_request": round(growth(memory) / len(clients)),
        "trace_bytes_per_request": traced,
        "trace_growth": round(fmean(traced[rounds // 2 :]) / fmean(traced[: rounds // 2]) - 1, 4),
    }


def growth(values: Sequence[float]) -> float:
    """Median step from a value to the next in the second half.

    What leaks with every request grows in every round; caches that fill, in some.
    """
    half = values[len(values) // 2 :]
    return median(b - a for a, b in pairwise(half))
