"""Model Runner V2 on the CPU against vLLM's own CPU runner, and against itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for CPUs")

TARGET = Path(__file__).parents[1] / "data" / "golden" / "a" / "target"
PROMPTS = [list(range(3, 3 + length)) for length in (1, 5, 30, 90)]

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    model, prompts, settings = json.loads(sys.stdin.read())
    llm = LLM(model=model, skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
              max_model_len=192, max_num_seqs=8, max_num_batched_tokens=64)
    outputs = []
    for values in settings:
        params = SamplingParams(max_tokens=16, ignore_eos=True, detokenize=False, **values)
        answers = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        outputs.append([list(answer.outputs[0].token_ids) for answer in answers])
    print(json.dumps(outputs))
    llm.llm_engine.engine_core.shutdown()

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


def generate(prompts, settings, **variables):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([str(TARGET), prompts, settings]),
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    # An engine in a process of its own prints to the same place.
    return json.loads(next(line for line in result.stdout.splitlines() if line[:2] == "[["))


@pytest.fixture(scope="module")
def in_process():
    return generate(PROMPTS, [GREEDY, *SEEDED])


def test_greedy_tokens_are_those_of_the_other_runner(in_process):
    without = {"VLLM_GRIFFIN_CPU": "0", "TRITON_INTERPRET": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    assert generate(PROMPTS, [GREEDY], **without)[0] == in_process[0]


def test_an_engine_process_of_its_own_gives_the_same(in_process):
    """And a request of its own the same as in a batch."""
    alone = generate(PROMPTS[2:3], [GREEDY, *SEEDED], VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert [tokens[0] for tokens in alone] == [tokens[2] for tokens in in_process]


def test_seeded_settings_differ(in_process):
    drawn = [tuple(map(tuple, tokens)) for tokens in in_process]
    assert len(set(drawn)) == len(drawn)
