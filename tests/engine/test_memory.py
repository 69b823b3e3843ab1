"""Memory profiling sees what a verification takes."""

import pytest
import torch

from tests.engine.harness import engine
from tests.engine.test_graphs import runner_of


def test_profiling_takes_the_logits_of_a_verification() -> None:
    spec = {"num_speculative_tokens": 12, "tree_depth": 4, "tree_top_k": 4}
    limits = {"max_model_len": 128, "max_num_seqs": 3, "max_num_batched_tokens": 128}
    with engine("golden-a", spec, **limits) as llm, torch.inference_mode():
        runner = runner_of(llm)
        rows, compute = [], runner.model.compute_logits

        def watched(hidden: torch.Tensor) -> torch.Tensor | None:
            rows.append(len(hidden))
            return compute(hidden)

        runner.model.compute_logits = watched
        runner.profile_run()
    # Of each request a root and 12 nodes, and then vLLM's own: a row of each request.
    assert rows == [3 * 13, 3]


def test_draft_logits_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a thousand trees that grow at once would take gigabytes from the KV cache."""
    with engine("golden-a", {"num_speculative_tokens": 4}) as llm, torch.inference_mode():
        speculator = runner_of(llm).speculator
        predict = torch.randn(10, speculator.hidden_size)
        logprobs, tokens = speculator._children(predict, 4)
        rows, compute = [], speculator.model.compute_logits

        def watched(predict: torch.Tensor) -> torch.Tensor | None:
            rows.append(len(predict))
            return compute(predict)

        monkeypatch.setattr(speculator.model, "compute_logits", watched)
        monkeypatch.setattr("vllm_griffin.runner.speculator.max_chunk_rows", lambda vocab: 3)
        parts = speculator._children(predict, 4)
    assert rows == [3, 3, 3, 1]
    torch.testing.assert_close(parts[0], logprobs)
    assert torch.equal(parts[1], tokens)
