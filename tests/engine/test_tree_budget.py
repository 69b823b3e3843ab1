"""One budget of nodes for all trees of a step: outputs stay, and the nodes are the best of all."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.worker.gpu.warmup import warmup_kernels

from tests.engine.compare import difference
from tests.engine.harness import Outcome, Request, add, engine, random_prompt, run, tree_paths
from tests.engine.oracle import oracle_trees
from tests.engine.test_invariants import heldout_requests
from tests.engine.test_requests import COMMON, KINDS, PAIR, SPINES, VOCABULARY
from tests.engine.ties import recorded_gaps
from vllm_griffin.runner import sampler
from vllm_griffin.runner.budget import NodeBudget
from vllm_griffin.trace import read_trace

NODES, MOST = 6, 14
SHAPE = {"tree_depth": 6, "tree_top_k": 4}
SPEC = {"num_speculative_tokens": MOST, "tree_budget": NODES} | SHAPE
# Long prompts take several chunks, and the cache is too small for all requests.
TIGHT = {
    "max_num_batched_tokens": 96,
    "num_gpu_blocks_override": 9,
    "block_size": 32,
    "max_model_len": 256,
}
PREFIXES = {"enable_prefix_caching": True}
# name -> engine arguments
SETTINGS: dict[str, dict[str, Any]] = {
    "sync": PREFIXES,
    "async": {"async_scheduling": True},
    "tight": TIGHT | PREFIXES,
    "tight async": TIGHT | PREFIXES | {"async_scheduling": True},
    "processes": {"processes": True},
    "triton": {"kernels": "triton"},
}
# A prompt of one token that joins others is scheduled with drafts that do not exist yet.
LENGTHS = (5, 90, 1, 150, 31, 64, 33, 150, 7, 120, 1)


@dataclasses.dataclass
class Step:
    """What one step shared out."""

    # [B]: drafts scheduled, nodes verified; and what each scheduled draft was worth
    drafts: list[int]
    nodes: list[int]
    worth: list[list[float]]


@contextlib.contextmanager
def recorded_steps() -> Iterator[list[Step]]:
    """Every step with drafts of the engines of this process."""
    steps: list[Step] = []
    original = NodeBudget.reallocate_drafts

    def recording(self: NodeBudget, req_ids: list[str], idx_mapping: torch.Tensor) -> Any:
        worth = self.trees.worth(idx_mapping).clamp(min=-1e30).tolist()
        cu_num_logits, query_start_loc, total = original(self, req_ids, idx_mapping)
        starts = query_start_loc[: 1 + len(req_ids)].diff().tolist()
        nodes = (cu_num_logits.diff() - 1).tolist()
        drafts = self._drafts.tolist()
        assert starts == (self._others + torch.tensor(nodes).numpy()).tolist()
        assert total == sum(nodes) == sum(min(n, NODES) for n in drafts)
        worth = [w[:n] for w, n in zip(worth, drafts, strict=True)]
        steps.append(Step(drafts, nodes, worth))
        return cu_num_logits, query_start_loc, total

    with mock.patch.object(NodeBudget, "reallocate_drafts", recording):
        yield steps


def _requests() -> list[Request]:
    """Every kind of request, ragged; two share a long prefix."""
    generator = torch.Generator().manual_seed(3)
    requests: list[Request] = []
    for i, ((name, fields), length) in enumerate(zip(KINDS.items(), LENGTHS, strict=True)):
        prompt = random_prompt(generator, length, VOCABULARY)
        if i == 7:
            prompt[:140] = requests[3].prompt[:140]
        requests.append(Request(name, prompt, SamplingParams(**(COMMON | fields)), arrival=i // 2))
    return requests


Plain = tuple[list[Request], Outcome, dict[tuple[str, int], float], dict[str, list[int]]]


@pytest.fixture(scope="module")
def plain() -> Plain:
    """The requests without speculation."""
    requests = _requests()
    with recorded_gaps() as gaps, engine(PAIR) as llm:
        outcome = run(llm, requests)
    return requests, outcome, gaps, {r.name: r.prompt + outcome.tokens[r.name] for r in requests}


def _assert_equal(
    requests: list[Request], expected: Outcome, gaps: dict[tuple[str, int], float], found: Outcome
) -> None:
    """Tokens, log-probabilities and reasons to finish."""
    for request in requests:
        outputs = (expected.outputs[request.name], found.outputs[request.name])
        differs = difference(request, *outputs, gaps)
        assert differs is None or differs.near_tie, f"{request.name}: {differs.what}"


@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_are_those_without_speculation(name: str, plain: Plain, tmp_path: Path) -> None:
    requests, expected, gaps, texts = plain
    if name == "triton":
        requests = [r for r in requests if len(r.prompt) < 10]
    trace = tmp_path / "trace.jsonl"
    with (
        recorded_steps() as steps,
        engine(PAIR, SPEC, trace=trace, **SETTINGS[name]) as llm,
        oracle_trees(texts, VOCABULARY),
    ):
        found = run(llm, requests)
    _assert_equal(requests, expected, gaps, found)
    records = read_trace(trace)  # which refuses what is no tree
    assert len({record.num_drafted for record in records} - {0, NODES, MOST}) > 2
    if "tight" in name:
        assert found.metrics["vllm:num_preemptions"] > 0
    if name == "processes":
        return
    assert found.acceptance_length > 1.5
    off_spine = {r.request_id for r in records if r.accepted != list(range(len(r.accepted)))}
    assert off_spine and (name == "triton" or any(r.request_id in SPINES for r in records))
    uneven = [step for step in steps if max(step.nodes) > NODES]
    assert len(uneven) > 3 and any(min(step.nodes) < NODES for step in uneven)
    for step in uneven:
        assert all(0 <= n <= most for n, most in zip(step.nodes, step.drafts, strict=True))
        taken = [w for ws, n in zip(step.worth, step.nodes, strict=True) for w in ws[:n]]
        left = [w for ws, n in zip(step.worth, step.nodes, strict=True) for w in ws[n:]]
        assert min(taken) >= max(left, default=min(taken)), "a better node was left out"


def test_history_readers_use_their_spine_and_leave_the_rest(plain: Plain, tmp_path: Path) -> None:
    requests, _, _, texts = plain
    trace = tmp_path / "trace.jsonl"
    with engine(PAIR, SPEC, trace=trace) as llm, oracle_trees(texts, VOCABULARY):
        run(llm, requests)
    records = [r for r in read_trace(trace) if r.request_id in SPINES]
    accepted = [r.accepted for r in records]
    assert all(path == list(range(len(path))) for path in accepted)
    assert any(len(path) > 1 for path in accepted)


def test_a_request_may_leave_at_any_time(plain: Plain) -> None:
    """Whose nodes the others had counted on."""
    requests, expected, gaps, texts = plain
    stay, leave = requests[::2], requests[1::2]
    found, left = Outcome(), []
    with engine(PAIR, SPEC) as llm, oracle_trees(texts, VOCABULARY):
        for request in requests:
            add(llm, request)
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                found.outputs.setdefault(output.request_id, output).add(output, aggregate=False)
            begun = {name for name, output in found.outputs.items() if not output.finished}
            leaving = [r.name for r in leave if r.name in begun - {*left}][:1]
            llm.llm_engine.abort_request(leaving)
            left += leaving
    assert len(left) > 2
    _assert_equal(stay, expected, gaps, found)


def test_several_chunks_of_logits_share_evenly(
    plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host cuts the chunks, so it has to know where a request begins."""
    requests, expected, gaps, texts = plain
    monkeypatch.setattr(sampler, "MAX_CHUNK_BYTES", 4 * 512 * 20)
    with (
        recorded_steps() as steps,
        engine(PAIR, SPEC) as llm,
        oracle_trees(texts, VOCABULARY),
    ):
        found = run(llm, requests)
    _assert_equal(requests, expected, gaps, found)
    even = [s for s in steps if sum(s.nodes) + len(s.nodes) > 20]
    assert even and all(s.nodes == [min(n, NODES) for n in s.drafts] for s in even)


GRAMMAR = StructuredOutputsParams(regex=r"def [a-z_]{2,8}\(self(, [a-z]{1,6}){0,3}\):")


def test_grammars_hold_along_a_share() -> None:
    """Their bitmasks come in the rows that were scheduled, of which a step may have fewer."""
    requests = heldout_requests(6, 30, 24)
    for i, request in enumerate(requests):
        fields: dict[str, Any] = {"temperature": i % 2, "seed": i, "max_tokens": 24}
        if i % 3:
            fields["structured_outputs"] = GRAMMAR
        request.params = SamplingParams(**fields)
    options = {"skip_tokenizer_init": False}
    with recorded_gaps() as gaps, engine("tiny", **options) as llm:
        expected = run(llm, requests)
    with recorded_steps() as steps, engine("tiny", SPEC, **options) as llm:
        found = run(llm, requests)
    _assert_equal(requests, expected, gaps, found)
    assert any(max(step.nodes) > NODES for step in steps)
    assert found.acceptance_length > 1.2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_counters_are_of_the_nodes_that_were_verified(asynchronous: bool, tmp_path: Path) -> None:
    requests = heldout_requests(6, 40, 20)
    trace = tmp_path / "trace.jsonl"
    arguments = {"async_scheduling": asynchronous, "per_request_spec_decode_metrics": "detailed"}
    with recorded_steps() as steps, engine("tiny", SPEC, trace=trace, **arguments) as llm:
        outcome = run(llm, requests)
    counts = outcome.metrics
    records = read_trace(trace)
    nodes = sum(record.num_drafted for record in records)
    assert nodes == sum(sum(step.nodes) for step in steps)
    if asynchronous:
        # Steps that were scheduled before a request's end was known: in the trace, and not counted.
        lengths = {r.name: len(r.prompt) + len(outcome.tokens[r.name]) for r in requests}
        records = [r for r in records if r.position + 1 < lengths[r.request_id]]
        nodes = sum(record.num_drafted for record in records)
    assert counts["vllm:griffin_num_tree_nodes"] == nodes
    assert counts["vllm:spec_decode_num_draft_tokens"] == nodes
    assert counts["vllm:griffin_num_trees"] == sum(record.num_drafted > 0 for record in records)
    for request in requests:
        metrics = outcome.outputs[request.name].outputs[0].spec_decode_metrics
        mine = [r.num_drafted for r in records if r.request_id == request.name]
        assert metrics.per_step_drafted == mine


def test_the_draft_drafts_what_it_would_alone(tmp_path: Path) -> None:
    """A share is a part of the same tree, so nothing of one request reaches another's draft cache."""
    requests = heldout_requests(8, 50, 24)
    trees = []
    for name, fields in (("whole", {}), ("shared", {"tree_budget": NODES})):
        trace = tmp_path / name
        spec = {"num_speculative_tokens": MOST} | SHAPE | fields
        with recorded_steps() as steps, engine("tiny", spec, trace=trace) as llm:
            run(llm, requests)
        trees.append({(r.request_id, r.position): r for r in read_trace(trace)})
    assert any(0 in step.nodes or 1 in step.nodes for step in steps), (
        "an extend pass longer than a share"
    )
    whole, shared = trees
    both = whole.keys() & shared.keys()
    assert len(both) > 10
    for key in both:
        paths = tree_paths(whole[key].tokens, whole[key].parents)
        assert tree_paths(shared[key].tokens, shared[key].parents) <= paths, key


def _accepted_length(llm: LLM, pairs: list[list[Request]]) -> float:
    """Pooled over batches of two that run one after the other."""
    for pair in pairs:
        outcome = run(llm, pair)
    return outcome.acceptance_length


def test_as_much_is_accepted_as_with_trees_of_their_own() -> None:
    """Two requests of which one is hard to draft for; the rows of a step are as many."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for i, easy in enumerate(heldout_requests(3, 60, 48)):
        params = SamplingParams(temperature=1.5, seed=i, max_tokens=48, ignore_eos=True)
        params.detokenize = False
        hard = Request(f"hard-{i}", random_prompt(generator, 40, 2048), params)
        pairs.append([dataclasses.replace(easy, arrival=0), hard])
    with engine("tiny", {"num_speculative_tokens": NODES} | SHAPE) as llm:
        each = _accepted_length(llm, pairs)
    spec = {"num_speculative_tokens": 2 * NODES, "tree_budget": NODES} | SHAPE
    with recorded_steps() as steps, engine("tiny", spec) as llm:
        shared = _accepted_length(llm, pairs)
    print(f"acceptance length: {each:.3f} each its own nodes, {shared:.3f} shared")
    # Rounding differs between machines, and with it which of two equals is drafted.
    assert shared > 0.97 * each
    assert all(sum(step.nodes) == NODES * len(step.nodes) for step in steps)


@pytest.mark.parametrize("fields", [{}, {"tree_budget": NODES}], ids=["whole trees", "budget"])
def test_vllms_warm_up_of_a_gpu_runs(fields: dict[str, int]) -> None:
    """It steps by itself, with drafts, and asks what stands in its manager's and its sampler's place."""
    with engine(PAIR, {"num_speculative_tokens": MOST} | SHAPE | fields) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        runner = worker.model_runner
        manager = runner.adaptive_verification
        assert isinstance(manager, NodeBudget) == bool(fields)
        warmup_kernels(runner, worker.execute_model, worker.sample_tokens)
        assert runner.adaptive_verification is manager
