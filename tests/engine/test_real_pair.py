"""SmolLM2-135M-Instruct with the shipped draft: losslessness on chat prompts.

Takes many minutes on a CPU: part of ``make test-full``.
"""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from vllm import SamplingParams

from tests.engine import harness
from tests.engine.harness import MODELS, ROOT, Request, engine, run
from tests.engine.ties import assert_lossless, recorded_gaps
from vllm_griffin.pretrained import smollm2_instruct

TREE = {"num_speculative_tokens": 59, "tree_depth": 6, "tree_top_k": 10}
NEW_TOKENS = 128


@pytest.fixture(scope="module")
def pair() -> str:
    harness.PAIRS["smollm2"] = (smollm2_instruct(), MODELS / "smollm2-griffin")
    return "smollm2"


def _chat_requests(target: Path) -> list[Request]:
    """20 greedy and 20 seeded requests, from three prompt sets by turns."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    sets = [
        (ROOT / "examples" / "prompts" / f"{name}.jsonl").read_text().splitlines()
        for name in ("mt_bench", "humaneval", "gsm8k")
    ]
    requests = []
    for i in range(40):
        turn = json.loads(sets[i % 3][i // 3])["turns"][0]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True, return_dict=False
        )
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False)
        if i % 2:
            params.temperature, params.seed = 1.0, 500 + i
            params.top_p, params.top_k = (1.0, 0.95, 0.8)[i % 3], (0, 20, 50)[i // 2 % 3]
        requests.append(Request(f"chat-{i}", prompt, params, arrival=i // 2))
    return requests


@pytest.mark.full
def test_40_chat_prompts_are_lossless(pair: str) -> None:
    requests = _chat_requests(harness.PAIRS[pair][0])
    limits = {"max_num_seqs": 8, "max_model_len": 2048, "max_num_batched_tokens": 1024}
    with recorded_gaps() as gaps, engine(pair, **limits) as llm:
        plain = run(llm, requests)
    with engine(pair, TREE, **limits) as llm:
        griffin = run(llm, requests)
    excused = assert_lossless(requests, plain, gaps, griffin)
    result = {
        "requests": len(requests),
        "differ": 0,
        "excused_near_ties": excused,
        "tokens": sum(map(len, griffin.tokens.values())),
        "acceptance_length": round(griffin.acceptance_length, 3),
        "plain_steps": plain.steps,
        "griffin_steps": griffin.steps,
    }
    print(result)
    assert griffin.acceptance_length > 1.5
