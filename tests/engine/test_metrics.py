"""Counters and log line against the trace of the same run, request by request."""

import contextlib
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from unittest import mock

import pytest
from vllm import LLM, SamplingParams
from vllm.config.logging import LoggingConfig
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.llm_engine import LLMEngine

from tests.engine.harness import ROOT, Outcome, Request, engine, run
from vllm_griffin.metrics.logger import METRICS
from vllm_griffin.trace import TraceRecord, read_trace

N, D, K = 12, 4, 4
SPEC = {"num_speculative_tokens": N, "tree_depth": D, "tree_top_k": K}
SIZES = {"num_speculative_tokens_per_batch_size": [[1, 1, N], [2, 3, 5], [4, 9, 0]]}
GRAMMAR = StructuredOutputsParams(regex=r"def [a-z_]{2,8}\(self(, [a-z]{1,6}){0,3}\):")
PROMPT = list(range(300, 360))
# name -> prompt length, arrival, sampling; the context ends at 64 tokens
KINDS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "greedy": (20, 0, {"temperature": 0}),
    "seeded": (21, 2, {"temperature": 1.0, "seed": 5}),
    "penalty": (22, 4, {"temperature": 0, "presence_penalty": 1.0}),
    "grammar": (23, 6, {"temperature": 0, "ignore_eos": False, "structured_outputs": GRAMMAR}),
    "trimmed": (40, 8, {"temperature": 0, "max_tokens": 24}),
    "one-token": (1, 3, {"temperature": 0}),
}
# name -> arguments of the engine, fields of its speculative config
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sync": ({}, {}),
    "async, sizes by batch": ({"async_scheduling": True}, SIZES),
    "async, processes": ({"async_scheduling": True, "processes": True}, {}),
}


@dataclass
class Run:
    """One engine's run, and what it said of it."""

    name: str
    requests: list[Request]
    outcome: Outcome
    # by request: the verified trees whose step vLLM counts
    trees: dict[str, list[TraceRecord]]
    metrics: dict[str, Any]
    log: list[str]

    @property
    def records(self) -> list[TraceRecord]:
        return [record for records in self.trees.values() for record in records]

    def per_step(self, request: str) -> tuple[list[int], list[int]]:
        """vLLM's own account of one request: accepted and drafted tokens of each step."""
        metrics = self.outcome.outputs[request].outputs[0].spec_decode_metrics
        return metrics.per_step_accepted, metrics.per_step_drafted


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


# The engine leaves the level and the handler of `vllm_log` as they are.
KEEP_LOGGING = {"logging_config": LoggingConfig(configure_logging=False)}


@contextlib.contextmanager
def vllm_log() -> Iterator[list[str]]:
    """What vLLM logs in this process at its default level; its engines need KEEP_LOGGING."""
    logger, handler = logging.getLogger("vllm"), Lines()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def read_metrics(llm: LLM) -> dict[str, Any]:
    """Name -> value; a list for counters that are told apart by position or rank."""
    metrics: dict[str, Any] = {}
    for metric in llm.get_metrics():
        value = getattr(metric, "value", getattr(metric, "values", None))
        if metric.labels.keys() & {"position", "rank"}:
            metrics.setdefault(metric.name, []).append(value)
        else:
            metrics[metric.name] = value
    return metrics


@pytest.fixture(scope="module", params=RUNS)
def griffin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    arguments, fields = RUNS[request.param]
    requests = []
    for name, (length, arrival, sampling) in KINDS.items():
        params = SamplingParams(**({"max_tokens": 20, "ignore_eos": True} | sampling))
        requests.append(Request(name, PROMPT[:length], params, arrival))
    trace = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    arguments = arguments | KEEP_LOGGING | {"max_model_len": 64, "skip_tokenizer_init": False}
    arguments |= {"per_request_spec_decode_metrics": "detailed", "trace": trace}
    with (
        vllm_log() as log,
        # On a slow machine the interval's own lines would come in between.
        mock.patch.object(LLMEngine, "do_log_stats_with_interval"),
        engine("tiny", SPEC | fields, **arguments) as llm,
    ):
        outcome = run(llm, requests)
        llm.llm_engine.do_log_stats()
        metrics = read_metrics(llm)
        llm.llm_engine.do_log_stats()
    lengths = {r.name: len(r.prompt) + len(outcome.tokens[r.name]) for r in requests}
    trees = defaultdict(list)
    for record in read_trace(trace):
        # Async scheduling starts a step before it knows that a request has ended.
        if record.position + 1 < lengths[record.request_id]:
            trees[record.request_id].append(record)
    return Run(request.param, requests, outcome, trees, metrics, log)


def accepted(record: TraceRecord) -> int:
    return len(record.accepted) - 1


def ranks(record: TraceRecord) -> list[int]:
    """Ranks of the accepted nodes among their siblings, by the draft's score."""
    found = []
    for node in record.accepted[1:]:
        siblings = [i for i, p in enumerate(record.parents) if p == record.parents[node]]
        found.append(1 + sorted(siblings, key=lambda i: -record.scores[i]).index(node))
    return found


def on_spine(record: TraceRecord) -> int:
    """Accepted nodes on the best chain of the tree."""
    spine = [0]
    while children := [i for i, p in enumerate(record.parents) if p == spine[-1]]:
        spine.append(max(children, key=lambda i: record.scores[i]))
    return sum(1 for _ in takewhile(lambda node: node in spine, record.accepted[1:]))


def test_runs_are_of_every_kind(griffin: Run) -> None:
    """What the other tests compare is there: branches, trimmed trees, several sizes, free steps."""
    records = griffin.records
    sizes = Counter(record.num_drafted for record in records)
    assert {accepted(record) for record in records} >= {0, 1, 2}
    assert any(max(ranks(record), default=1) > 1 for record in records)
    assert any(max(record.depths) < D for record in records)
    assert sizes[N] and any(0 < size < 5 for size in sizes)
    assert griffin.name != "async, sizes by batch" or sizes[5]
    assert all(on_spine(r) == accepted(r) for r in griffin.trees["penalty"])


def test_vllms_counts_of_each_request_are_the_traces(griffin: Run) -> None:
    for request in griffin.requests:
        per_step, drafted = griffin.per_step(request.name)
        trees = griffin.trees[request.name]
        padded = len(per_step) - len(trees)
        # A prompt that vLLM filled up with drafts before there was a tree.
        has_padding = request.name == "one-token" and "sizes" not in griffin.name
        assert padded == has_padding, request.name
        assert per_step == [0] * padded + [accepted(tree) for tree in trees]
        if request.name != "grammar":
            assert drafted == [N] * padded + [tree.num_drafted for tree in trees]


def test_vllms_counters_are_the_sums_of_the_trace(griffin: Run) -> None:
    spec = {
        name.removeprefix("vllm:spec_decode_num_"): value
        for name, value in griffin.metrics.items()
        if name.startswith("vllm:spec_decode")
    }
    steps = [griffin.per_step(request.name) for request in griffin.requests]
    paths = [accepted(record) for record in griffin.records]
    assert spec == {
        "drafts": sum(len(per_step) for per_step, _ in steps),
        "draft_tokens": sum(sum(drafted) for _, drafted in steps),
        "accepted_tokens": sum(paths),
        "accepted_tokens_per_pos": [sum(p > d for p in paths) for d in range(D)],
    }


def test_our_counters_are_the_sums_of_the_trace(griffin: Run) -> None:
    records = griffin.records
    by_rank = Counter(rank for record in records for rank in ranks(record))
    ours = {m.name: griffin.metrics[m.name] for m in METRICS}
    assert ours == {
        "vllm:griffin_num_trees": len(records),
        "vllm:griffin_num_tree_nodes": sum(record.num_drafted for record in records),
        "vllm:griffin_num_accepted_tokens_beyond_spine": sum(
            accepted(record) - on_spine(record) for record in records
        ),
        "vllm:griffin_num_trees_per_pos": [
            sum(max(record.depths) > position for record in records) for position in range(D)
        ],
        "vllm:griffin_num_accepted_tokens_per_rank": [by_rank[rank] for rank in range(1, K + 1)],
    }


def test_log_line_follows_vllms_own(griffin: Run) -> None:
    vllms = [i for i, line in enumerate(griffin.log) if line.startswith("SpecDecoding metrics")]
    ours = [i for i, line in enumerate(griffin.log) if line.startswith("Draft tree metrics")]
    # Nothing was drafted between the two times that the statistics were logged.
    assert len(vllms) == 1 and ours == [vllms[0] + 1]
    counts = griffin.metrics
    drafts = counts["vllm:spec_decode_num_drafts"]
    per_pos = counts["vllm:spec_decode_num_accepted_tokens_per_pos"]
    length = 1 + sum(per_pos) / drafts
    assert f"Mean acceptance length: {length:.2f}," in griffin.log[vllms[0]]
    rates = ", ".join(f"{n / drafts:.3f}" for n in per_pos)
    assert f"Per-position acceptance rate: {rates}, Avg" in griffin.log[vllms[0]]

    trees, nodes = counts["vllm:griffin_num_trees"], counts["vllm:griffin_num_tree_nodes"]
    gain = counts["vllm:griffin_num_accepted_tokens_beyond_spine"] / trees
    depths = zip(per_pos, counts["vllm:griffin_num_trees_per_pos"], strict=True)
    shares = [n / sum(per_pos) for n in counts["vllm:griffin_num_accepted_tokens_per_rank"]]
    assert griffin.log[ours[0]] == (
        f"Draft tree metrics: Gain over spine: {gain:.2f} tokens per tree, "
        f"Nodes verified per accepted token: {nodes / sum(per_pos):.1f}, "
        f"Per-depth acceptance rate: {', '.join(f'{a / b:.3f}' for a, b in depths)}, "
        f"Accepted tokens by sibling rank: {', '.join(f'{x:.3f}' for x in shares)}"
    )


def test_dashboard_and_document_name_metrics_that_exist(griffin: Run) -> None:
    dashboard = json.loads((ROOT / "examples" / "grafana" / "draft_trees.json").read_text())
    panels = dashboard["panels"]
    queries = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    found = set(re.findall(r"vllm:\w+", queries + json.dumps(dashboard["templating"])))
    assert found and all(name.endswith("_total") for name in found)
    document = (ROOT / "docs" / "metrics.md").read_text()
    named = set(re.findall(r"vllm:\w+", document)) | found
    assert {name.removesuffix("_total") for name in named} <= griffin.metrics.keys()
    assert {metric.name for metric in METRICS} <= named


@pytest.mark.parametrize("griffin", ["sync"], indirect=True)
def test_a_plain_engine_has_none_of_ours(griffin: Run) -> None:
    """In the process that ran griffin, with its patches in place."""
    request = Request("plain", PROMPT[:20], SamplingParams(max_tokens=4, detokenize=False))
    with vllm_log() as log, engine("golden-a", **KEEP_LOGGING) as llm:
        run(llm, [request])
        llm.llm_engine.do_log_stats()
        names = read_metrics(llm)
    assert "vllm:generation_tokens" in names
    assert not [n for n in names if "griffin" in n or "spec_decode" in n]
    assert [line for line in log if "Avg generation throughput" in line]
    assert not [line for line in log if "metrics:" in line]
