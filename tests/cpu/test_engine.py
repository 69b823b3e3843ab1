"""Model Runner V2 on the CPU against vLLM's own CPU runner, and against itself."""

import json
import os
import subprocess
import sys

import pytest
import torch
from vllm import SamplingParams

from tests.engine.harness import PAIRS, engine

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for CPUs")

TARGET, _ = PAIRS["golden-a"]
PROMPTS = [list(range(3, 3 + length)) for length in (1, 5, 30, 90)]

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    model, prompts = json.loads(sys.stdin.read())
    llm = LLM(model=model, skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
              max_model_len=192, max_num_seqs=8, max_num_batched_tokens=64)
    params = SamplingParams(max_tokens=16, ignore_eos=True, detokenize=False, temperature=0)
    answers = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    print(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))

if __name__ == "__main__":
    main()
"""

GREEDY = {"temperature": 0.0}
SEEDED = [
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "seed": 3, "top_k": 5},
    {"temperature": 1.0, "seed": 7, "top_p": 0.8},
    {"temperature": 1.2, "seed": 5, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "seed": 2, "repetition_penalty": 1.3, "logprobs": 3},
]


def generate(prompts, **where):
    """Tokens of each setting's answers, by an engine of this process or of its own."""
    outputs = []
    limits = {"max_model_len": 192, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    with engine("golden-a", **limits, **where) as llm:
        for values in (GREEDY, *SEEDED):
            params = SamplingParams(max_tokens=16, ignore_eos=True, detokenize=False, **values)
            answers = llm.generate(
                [{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False
            )
            outputs.append([list(answer.outputs[0].token_ids) for answer in answers])
    return outputs


@pytest.fixture(scope="module")
def in_process():
    return generate(PROMPTS)


def test_greedy_tokens_are_those_of_the_other_runner(in_process):
    """Which a process takes for good."""
    without = {"VLLM_GRIFFIN_CPU": "0", "TRITON_INTERPRET": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([str(TARGET), PROMPTS]),
        env=os.environ | without,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == in_process[0]


def test_an_engine_process_of_its_own_gives_the_same(in_process):
    """And a request of its own the same as in a batch."""
    alone = generate(PROMPTS[2:3], processes=True)
    assert [tokens[0] for tokens in alone] == [tokens[2] for tokens in in_process]


def test_seeded_settings_differ(in_process):
    drawn = [tuple(map(tuple, tokens)) for tokens in in_process]
    assert len(set(drawn)) == len(drawn)
