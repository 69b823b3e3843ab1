"""What must hold between trees, their spines, and vLLM's own chains."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer
from vllm import SamplingParams

from tests.engine.harness import MODELS, PAIRS, Outcome, Request, engine, run
from vllm_griffin.trace import TraceRecord, read_trace

GREEDY = {"temperature": 0, "ignore_eos": True, "detokenize": False}
TREE = {"num_speculative_tokens": 59, "tree_depth": 6, "tree_top_k": 10}
CHAIN = {"num_speculative_tokens": 6, "tree_depth": 6, "tree_top_k": 1}


def heldout_requests(count: int, prompt_tokens: int, new_tokens: int) -> list[Request]:
    """Prompts from source files that the tiny pair was not trained on."""
    import sysconfig

    tokenizer = AutoTokenizer.from_pretrained(PAIRS["tiny"][0])
    library = Path(sysconfig.get_path("stdlib"))
    names = (MODELS / "heldout.txt").read_text().split()
    texts = [(library / n).read_text() for n in names if (library / n).is_file()]
    params = SamplingParams(max_tokens=new_tokens, **GREEDY)
    requests = []
    for i in range(count):
        tokens = tokenizer(texts[i % len(texts)], add_special_tokens=False)["input_ids"]
        start = (i // len(texts)) * 500 % max(len(tokens) - prompt_tokens, 1)
        requests.append(Request(f"h{i}", tokens[start : start + prompt_tokens], params, i // 4))
    return requests


@pytest.fixture(scope="module")
def tree_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Request], Outcome, list]:
    requests = heldout_requests(12, 60, 48)
    trace = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    with engine("tiny", TREE, trace=trace) as llm:
        outcome = run(llm, requests)
    return requests, outcome, read_trace(trace)


def _spine_accepts(record: TraceRecord, text: list[int]) -> int:
    """How many tokens of the text the record's spine has right, counted by hand."""
    right = 0
    for row in range(1, len(record.tokens)):
        if record.parents[row] != row - 1 or record.position + row >= len(text):
            break
        if record.tokens[row] != text[record.position + row]:
            break
        right += 1
    return right


def test_a_tree_accepts_at_least_its_spine(tree_run: tuple) -> None:
    requests, outcome, records = tree_run
    texts = {r.name: r.prompt + outcome.tokens[r.name] for r in requests}
    gain = 0
    for record in records:
        accepted = len(record.accepted) - 1
        spine = _spine_accepts(record, texts[record.request_id])
        assert accepted >= spine, record
        gain += accepted - spine
    print(f"{len(records)} trees accepted {gain} tokens more than their spines")
    assert gain > 0


def test_trace_tells_what_was_accepted(tree_run: tuple) -> None:
    requests, outcome, records = tree_run
    texts = {r.name: r.prompt + outcome.tokens[r.name] for r in requests}
    for record in records:
        text = texts[record.request_id]
        path = [record.tokens[row] for row in record.accepted]
        expected = text[record.position : record.position + len(path) + 1]
        # The last step may run past the end of the request.
        assert [*path, record.bonus][: len(expected)] == expected
        depths = [record.depths[p] + 1 if p >= 0 else 0 for p in record.parents]
        assert depths == record.depths
        above = [record.scores[p] if p >= 0 else 0.0 for p in record.parents]
        assert all(s <= a for s, a in zip(record.scores, above, strict=True))
    drafts = outcome.metrics["vllm:spec_decode_num_drafts"]
    accepted = outcome.metrics["vllm:spec_decode_num_accepted_tokens"]
    # vLLM drops tokens past max_tokens from its count; the trace has them.
    assert len(records) <= drafts
    assert sum(len(r.accepted) - 1 for r in records) >= accepted


def test_tree_beats_chain_on_heldout_text(tree_run: tuple) -> None:
    requests, tree, _ = tree_run
    with engine("tiny", CHAIN) as llm:
        chain = run(llm, requests)
    print(
        f"acceptance length: tree {tree.acceptance_length:.2f}, chain {chain.acceptance_length:.2f}"
    )
    assert tree.acceptance_length >= 2.5
    assert tree.acceptance_length > chain.acceptance_length


def _progress(spec: dict, requests: list[Request]) -> tuple[dict[str, list[int]], Outcome]:
    """Request name -> new tokens of each step, and the outcome."""
    seen: dict[str, list[int]] = {}
    pair, method = "tiny-eagle", spec.get("method", "griffin")
    with engine(pair, spec | {"method": method}) as llm:
        step = llm.llm_engine.step

        def recording() -> list:
            outputs = step()
            for output in outputs:
                total = len(output.outputs[0].token_ids)
                before = seen.setdefault(output.request_id, [])
                before.append(total - sum(before))
            return outputs

        llm.llm_engine.step = recording
        outcome = run(llm, requests)
    return seen, outcome


@pytest.mark.skipif(not PAIRS["tiny-eagle"][1].is_dir(), reason="no EAGLE draft is shipped")
def test_a_chain_accepts_what_vllms_eagle_accepts() -> None:
    requests = heldout_requests(8, 50, 40)
    ours, mine = _progress(
        {"num_speculative_tokens": 5, "tree_depth": 5, "tree_top_k": 1}, requests
    )
    vllms, eagle = _progress({"method": "eagle", "num_speculative_tokens": 5}, requests)
    assert mine.tokens == eagle.tokens
    assert ours == vllms
    assert eagle.acceptance_length > 1.2
    print(f"acceptance length of both: {eagle.acceptance_length:.3f}")
