"""What a server does with requests in flight: priorities, streams, aborts, pauses, beams."""

import copy
from collections.abc import Callable, Iterator

import pytest
from vllm import LLM
from vllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

from tests.engine.harness import Outcome, Request, add, engine, run
from tests.engine.test_invariants import heldout_requests
from tests.engine.ties import assert_lossless, recorded_gaps

SPEC = {"num_speculative_tokens": 12, "tree_depth": 4, "tree_top_k": 4}
# Four requests run at a time, and the cache is too small for four at full length.
LIMITS = {
    "max_num_batched_tokens": 64,
    "max_model_len": 192,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 14,
    "block_size": 32,
    "skip_tokenizer_init": False,
}
NEW_TOKENS = 40
BEAMS = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)


def _requests() -> list[Request]:
    requests = heldout_requests(8, 60, NEW_TOKENS)
    for i, request in enumerate(requests):
        request.params = SamplingParams(
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            detokenize=False,
            temperature=float(i % 2),
            seed=i,
            output_kind=RequestOutputKind.DELTA,
        )
    return requests


def _beams(llm: LLM) -> list[tuple[list[int], float]]:
    prompts = [{"prompt_token_ids": request.prompt} for request in _requests()[:2]]
    answers = llm.beam_search(prompts, BEAMS)
    return [(s.tokens, s.cum_logprob) for answer in answers for s in answer.sequences]


@pytest.fixture(scope="module")
def plain() -> tuple[Outcome, dict, list]:
    """The plain engine's outputs, how close its decisions were, and its beams."""
    with engine("tiny", **LIMITS) as llm, recorded_gaps() as gaps:
        outcome = _serve(llm, _requests())
        return outcome, dict(gaps), _beams(llm)


@pytest.fixture(scope="module")
def llm(plain: tuple) -> Iterator[LLM]:
    """After the plain engine has ended: one process holds one at a time."""
    with engine("tiny", SPEC, async_scheduling=True, scheduling_policy="priority", **LIMITS) as llm:
        yield llm


def _serve(
    llm: LLM, requests: list[Request], meanwhile: Callable[[Outcome], None] = lambda _: None
) -> Outcome:
    """Adds all requests and collects what the engine streams; ``meanwhile`` runs before each step."""
    outcome = Outcome(tokens={r.name: [] for r in requests})
    for request in requests:
        add(llm, copy.deepcopy(request))
    while llm.llm_engine.has_unfinished_requests():
        meanwhile(outcome)
        for output in llm.llm_engine.step():
            outcome.tokens[output.request_id] += output.outputs[0].token_ids
            outcome.outputs.setdefault(output.request_id, []).append(output)
        outcome.steps += 1
    return outcome


def test_streams_add_up(llm: LLM, plain: tuple) -> None:
    found = _serve(llm, _requests())
    assert_lossless(_requests(), plain[0], plain[1], found)
    parts = [len(part.outputs[0].token_ids) for part in found.outputs["h0"]]
    assert sum(parts) == NEW_TOKENS
    assert max(parts) > 1, "a stream whose steps accept nothing proves nothing"


def test_priorities(llm: LLM, plain: tuple) -> None:
    """Who arrives last goes first, and takes the place of one that runs already."""
    requests = _requests()
    for i, request in enumerate(requests):
        request.priority, request.arrival = -i, 3 * i
        request.params.output_kind = RequestOutputKind.CUMULATIVE
    before = _preemptions(llm)
    found = run(llm, requests)
    assert_lossless(requests, plain[0], plain[1], found)
    order = list(found.tokens)
    assert order.index("h7") < order.index("h3")
    assert _preemptions(llm) > before


def _preemptions(llm: LLM) -> int:
    return next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def test_an_abort_leaves_the_others_alone(llm: LLM, plain: tuple) -> None:
    """Two that run are aborted; others take their slots."""
    requests = _requests()

    def abort(outcome: Outcome) -> None:
        if len(outcome.tokens["h1"]) > 5:
            llm.llm_engine.abort_request(["h0", "h1"])

    found = _serve(llm, requests, abort)
    for name in ("h0", "h1"):
        assert 0 < len(found.tokens.pop(name)) < NEW_TOKENS
    rest = [r for r in requests if r.name in found.tokens]
    assert_lossless(rest, plain[0], plain[1], found)
    assert llm.reset_prefix_cache(), "a block is still held"


def test_caches_are_reset_under_running_requests(llm: LLM, plain: tuple) -> None:
    def reset(outcome: Outcome) -> None:
        if outcome.steps in (6, 12, 13):
            assert llm.reset_prefix_cache(reset_running_requests=True)

    found = _serve(llm, _requests(), reset)
    assert_lossless(_requests(), plain[0], plain[1], found)


@pytest.mark.parametrize("level", [0, 1])
def test_a_nap_in_the_middle(llm: LLM, plain: tuple, level: int) -> None:
    """On CPUs vLLM's sleep frees no memory; it pauses, and above level 0 it drops the caches."""

    def nap(outcome: Outcome) -> None:
        if outcome.steps == 6:
            llm.sleep(level=level, mode="keep")
            llm.wake_up()

    found = _serve(llm, _requests(), nap)
    assert_lossless(_requests(), plain[0], plain[1], found)


def test_beams_are_those_of_the_plain_engine(llm: LLM, plain: tuple) -> None:
    for (tokens, score), (expected, expected_score) in zip(_beams(llm), plain[2], strict=True):
        assert tokens == expected
        assert score == pytest.approx(expected_score, abs=1e-3)
