"""Grammar requests accept anywhere in their trees, beside free requests in the same batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import regex
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.harness import Outcome, Request, engine, run
from tests.engine.oracle import oracle_trees
from tests.engine.ties import assert_lossless, recorded_gaps
from tests.test_grammar_tree import Reasoner
from vllm_griffin.trace import read_trace

SPEC = {"num_speculative_tokens": 12, "tree_depth": 6, "tree_top_k": 4}
VOCABULARY = 2048
PATTERN = r"def [a-z_]{2,8}\(self(, [a-z]{1,6}){0,3}\):"
CHOICES = ["return None", "return self.value", "raise ValueError"]
EBNF = 'root ::= call ("." call)* ";"\ncall ::= [a-z_]+ "(" [0-9]? ")"'
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["self", "value"]}, "items": {"type": "array", "maxItems": 3}},
    "required": ["name", "items"],
    "additionalProperties": False,
}
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "regex": {"regex": PATTERN},
    "choice": {"choice": CHOICES},
    "ebnf": {"grammar": EBNF},
    "json": {"json": json.dumps(SCHEMA)},
}
# The same languages for a judge of its own; JSON is parsed.
PATTERNS = {
    "regex": PATTERN,
    "choice": "|".join(map(regex.escape, CHOICES)),
    "ebnf": r"[a-z_]+\([0-9]?\)(\.[a-z_]+\([0-9]?\))*;",
}
FREE = {
    "free": {"temperature": 0},
    "free-seeded": {"temperature": 1.0, "seed": 5},
    "bad-words": {"temperature": 0, "bad_words": ["self", "return"]},
}
SPINES = {"bad-words", "regex-penalty"}
PROMPT = list(range(300, 340))
# Trees are trimmed to the budget of tokens and by batch size. Grammars are compiled beside the steps, so
# how many requests run at a time hangs on the machine's speed: two must be too many for the cache.
TIGHT = {
    "max_num_batched_tokens": 64,
    "num_gpu_blocks_override": 6,
    "block_size": 32,
    "max_model_len": 128,
}
SIZES = {"num_speculative_tokens_per_batch_size": [[1, 3, 12], [4, 6, 7], [7, 16, 3]]}


def _request(name: str, arrival: int = 0) -> Request:
    """``name`` is a kind of FREE, or one of CONSTRAINTS with what else is asked for."""
    kind, _, more = name.partition("-")
    fields: dict[str, Any] = dict(FREE.get(name, {"temperature": 0}))
    if kind in CONSTRAINTS:
        fields["structured_outputs"] = StructuredOutputsParams(**CONSTRAINTS[kind])
    if more == "seeded":
        fields |= {"temperature": 1.0, "seed": 4}
    if more == "penalty":
        fields["repetition_penalty"] = 1.3
    prompt = PROMPT[: 20 + 2 * arrival]
    return Request(name, prompt, SamplingParams(max_tokens=24, **fields), arrival)


def _requests() -> list[Request]:
    constrained = [f"{kind}{more}" for kind in CONSTRAINTS for more in ("", "-seeded")]
    names = [*constrained, *FREE, "regex-penalty"]
    return [_request(name, i) for i, name in enumerate(names)]


def _run_reasoning(llm: LLM, free: list[int], monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """A grammar that begins in mid-output: at a token which the free text reaches."""
    end = next(i for i, token in enumerate(free) if i > 2 and token not in PROMPT + free[:i])
    monkeypatch.setattr(Reasoner, "end", free[end])
    manager = llm.llm_engine.engine_core.engine_core.structured_output_manager
    monkeypatch.setattr(manager, "reasoner_cls", Reasoner)
    request = _request("regex-reasoning")
    request.prompt = _request("free", list(FREE).index("free") + 2 * len(CONSTRAINTS)).prompt
    request.params.max_tokens = 48
    return run(llm, [request])


@pytest.fixture(scope="module")
def plain() -> tuple[Outcome, dict, Outcome]:
    """Without speculation: the batch, how close its decisions were, a request that reasons."""
    with recorded_gaps() as gaps, engine("tiny", skip_tokenizer_init=False) as llm:
        outcome = run(llm, _requests())
        with pytest.MonkeyPatch.context() as patch:
            return outcome, gaps, _run_reasoning(llm, outcome.tokens["free"], patch)


def _texts(plain: tuple) -> dict[str, list[int]]:
    outcome, _, reasoning = plain
    tokens = outcome.tokens | reasoning.tokens
    prompts = {r.name: r.prompt for r in _requests()}
    prompts["regex-reasoning"] = prompts["free"]
    return {name: prompts[name] + tokens[name] for name in tokens}


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_grammar_requests_are_lossless_on_their_trees(
    plain: tuple, tmp_path: Path, async_scheduling: bool
) -> None:
    expected, gaps, reasoning = plain
    trace = tmp_path / "trace.jsonl"
    options = {"skip_tokenizer_init": False, "async_scheduling": async_scheduling, **TIGHT}
    with (
        engine("tiny", SPEC | SIZES, trace=trace, **options) as llm,
        oracle_trees(_texts(plain), VOCABULARY),
        pytest.MonkeyPatch.context() as patch,
    ):
        griffin = run(llm, _requests())
        reasoned = _run_reasoning(llm, expected.tokens["free"], patch)
    assert_lossless(_requests(), expected, gaps, griffin)
    assert reasoned.tokens == reasoning.tokens
    for name, output in griffin.outputs.items():
        _check_language(name, output.outputs[0].text, output.outputs[0].finish_reason == "stop")
    off_spine = _off_spine(trace)
    assert not off_spine & SPINES
    assert off_spine >= {"regex", "ebnf", "json", "free", "regex-reasoning"}
    assert {"choice", "choice-seeded"} & off_spine
    assert griffin.metrics["vllm:num_preemptions"] > 0


def _off_spine(trace: Path) -> set[str]:
    """The requests that accepted a node beside their spine."""
    records = read_trace(trace)
    return {r.request_id for r in records if r.accepted != list(range(len(r.accepted)))}


def _check_language(name: str, text: str, complete: bool) -> None:
    kind = name.partition("-")[0]
    if kind in PATTERNS:
        assert regex.fullmatch(PATTERNS[kind], text, partial=not complete), (name, text)
    elif kind == "json" and complete:
        found = json.loads(text)
        assert found.keys() == {"name", "items"} and found["name"] in ("self", "value")
    elif kind == "json":
        assert text.lstrip().startswith("{"), text


def test_trees_cross_processes(plain: tuple, tmp_path: Path) -> None:
    """The engine core in a process of its own, which drafts for itself."""
    expected, gaps, _ = plain
    trace = tmp_path / "trace.jsonl"
    requests = [r for r in _requests() if not r.name.startswith("regex-")]
    with engine("tiny", SPEC, trace=trace, skip_tokenizer_init=False, processes=True) as llm:
        griffin = run(llm, requests)
    assert_lossless(requests, expected, gaps, griffin)
    assert _off_spine(trace) & (CONSTRAINTS.keys() | {"ebnf-seeded", "json-seeded"})


def test_another_backend_accepts_on_the_tree_too(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    requests = [r for r in _requests() if r.name != "regex-penalty"]
    options = {"skip_tokenizer_init": False, "structured_outputs_config": {"backend": "guidance"}}
    with recorded_gaps() as gaps, engine("tiny", **options) as llm:
        plain = run(llm, requests)
    texts = {r.name: r.prompt + plain.tokens[r.name] for r in requests}
    with (
        engine("tiny", SPEC, trace=trace, **options) as llm,
        oracle_trees(texts, VOCABULARY),
    ):
        griffin = run(llm, [r for r in _requests() if r.name in texts])
    assert_lossless(requests, plain, gaps, griffin)
    assert _off_spine(trace) >= {"regex", "ebnf", "json"}
