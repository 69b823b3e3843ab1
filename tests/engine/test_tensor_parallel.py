"""Two ranks: equal decisions on both, and the outputs of the engine without speculation."""

from pathlib import Path

import pytest
import torch
from vllm import SamplingParams

from tests.engine.harness import Outcome, Request, engine, run
from tests.engine.test_invariants import heldout_requests
from tests.engine.ties import assert_lossless, recorded_gaps
from vllm_griffin.trace import read_trace

SPEC = {"num_speculative_tokens": 12, "tree_depth": 4, "tree_top_k": 4}
# Prompts take several chunks, requests share prefixes, and the cache is too small for all of them.
LIMITS = {
    "max_num_batched_tokens": 64,
    "max_model_len": 192,
    "num_gpu_blocks_override": 16,
    "block_size": 32,
}
TWO_RANKS = {"tensor_parallel_size": 2, "worker_extension_cls": "tests.engine.ranks.RankProbe"}
# No multiple of what vLLM pads a vocabulary to, and not in order.
REDUCED = sorted(range(1000), key=lambda i: i * 617 % 1000)
KINDS = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9},
    {"temperature": 0, "repetition_penalty": 1.2},
    {"temperature": 0.7, "seed": 6, "top_k": 8},
]


def _requests() -> list[Request]:
    requests = heldout_requests(8, 70, 16)
    for i, request in enumerate(requests):
        request.params = SamplingParams(
            max_tokens=16, ignore_eos=True, detokenize=False, **KINDS[i % len(KINDS)]
        )
    requests[5].prompt[:64] = requests[1].prompt[:64]
    return requests


def _unseeded() -> Request:
    """Its noise comes from each rank's own generator, so only the ranks can be compared."""
    params = SamplingParams(max_tokens=16, ignore_eos=True, detokenize=False, temperature=1.0)
    return Request("unseeded", _requests()[0].prompt, params)


class Runs:
    """Outcomes of the same requests, without and with griffin, on one rank and on two."""

    def __init__(self, trace: Path) -> None:
        requests = _requests()
        with recorded_gaps() as self.gaps, engine("tiny", **LIMITS) as llm:
            self.plain = run(llm, requests)
        with engine("tiny", tensor_parallel_size=2, **LIMITS) as llm:
            self.plain_two = run(llm, requests)
        with engine("tiny", SPEC, trace=trace, fresh=True, **LIMITS, **TWO_RANKS) as llm:
            llm.collective_rpc("record_decisions")
            self.griffin = run(llm, [*requests, _unseeded()])
            self.decided = llm.collective_rpc("decided")
            self.records = read_trace(trace)
            llm.collective_rpc("draft_from", args=(REDUCED,))
            self.logits = llm.collective_rpc("logits", args=(3,))
            self.reduced = run(llm, [*requests, _unseeded()])
            self.reduced_decided = llm.collective_rpc("decided")

    def check(self, outcome: Outcome) -> None:
        """Equal to both engines without speculation, near-ties apart."""
        outcome.tokens.pop("unseeded", None)
        for plain in (self.plain, self.plain_two):
            assert_lossless(_requests(), plain, self.gaps, outcome)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("trace") / "trace.jsonl")


def test_lossless(runs: Runs) -> None:
    runs.check(runs.griffin)
    assert runs.griffin.acceptance_length > 1.8
    assert runs.griffin.metrics["vllm:num_preemptions"] > 0


def test_ranks_decide_alike(runs: Runs) -> None:
    first, second = runs.decided
    assert {kind for kind, *_ in first} == {"walk", "tree"}
    assert first == second


def test_one_rank_writes_the_trace(runs: Runs) -> None:
    assert len(runs.records) == len({(r.request_id, r.position) for r in runs.records})
    # Also of a request that was preempted.
    assert len(runs.records) == len({(r.request_id, r.step) for r in runs.records})
    assert {r.request_id for r in runs.records} >= runs.griffin.tokens.keys()


def test_a_reduced_vocabulary_is_split_anew(runs: Runs) -> None:
    """The parts of the smaller head are not the parts of the target's."""
    for whole, reduced in runs.logits:
        wanted = torch.tensor(whole)[:, REDUCED]
        torch.testing.assert_close(torch.tensor(reduced), wanted)
    runs.check(runs.reduced)
    assert runs.reduced_decided[0] == runs.reduced_decided[1]
