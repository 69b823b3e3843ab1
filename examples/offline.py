"""GRIFFIN through vLLM's Python class, on SmolLM2-135M-Instruct.

On a machine without a GPU: VLLM_GRIFFIN_CPU=1 python examples/offline.py
"""

from pathlib import Path

from vllm import LLM, SamplingParams

from vllm_griffin.pretrained import smollm2_instruct

DRAFT = Path(__file__).parent / "models" / "smollm2-griffin"


def main(target: str | None = None, draft: str = str(DRAFT), dtype: str = "auto") -> str:
    """Answers one question; returns the answer."""
    llm = LLM(
        target or str(smollm2_instruct()),
        dtype=dtype,
        max_model_len=1024,
        # 15 nodes on 4 levels suit a small machine; without these fields the engine times
        # the draft's trees and takes the one that pays.
        speculative_config={
            "method": "griffin",
            "model": draft,
            "num_speculative_tokens": 15,
            "tree_depth": 4,
            "tree_top_k": 4,
        },
    )
    question = {"role": "user", "content": "Why is the sky blue? Answer in one sentence."}
    output = llm.chat([question], SamplingParams(temperature=0, max_tokens=64))[0]
    return output.outputs[0].text


if __name__ == "__main__":
    print(main())
