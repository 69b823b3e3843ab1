"""Memory profiling sees what a verification takes."""

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
