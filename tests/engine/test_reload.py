"""The target gets other weights while the engine runs."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from tests.engine import harness
from tests.engine.harness import PAIRS, Request, engine, random_prompt, run
from tests.engine.oracle import oracle_trees
from tests.engine.ties import assert_lossless, recorded_gaps

VOCABULARY = 512
RANKING = sorted(range(VOCABULARY), key=lambda i: i * 617 % VOCABULARY)
SPEC = {"num_speculative_tokens": 12, "tree_depth": 4, "tree_top_k": 4, "draft_vocab_size": 300}
PROBE = {"worker_extension_cls": "tests.engine.ranks.RankProbe"}


@pytest.fixture
def other_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The golden target with other weights, pair ``other``; pair ``ranked`` has the draft's ranking.

    (vLLM 0.32 does not reload a head on CPUs that is tied to the embedding, as the tiny pair's.)
    """
    target, draft = PAIRS["golden-a"]
    other = shutil.copytree(target, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for weight in weights.values():
        if weight.dim() > 1:
            weight += weight.std() * torch.randn(weight.shape, generator=generator)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    ranked = shutil.copytree(draft, tmp_path / "draft")
    (ranked / "vocabulary.json").write_text(json.dumps(RANKING))
    monkeypatch.setitem(harness.PAIRS, "ranked", (target, ranked))
    monkeypatch.setitem(harness.PAIRS, "other", (other, ranked))
    return other


INT8 = pytest.param(
    {"draft_quantization": "int8"},
    marks=pytest.mark.skipif(torch.cuda.is_available(), reason="8 bits are for CPUs"),
)


@pytest.mark.parametrize("quantised", [{}, INT8])
def test_a_reduced_head_follows_reloaded_weights(
    other_target: Path, quantised: dict[str, str]
) -> None:
    generator = torch.Generator().manual_seed(4)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, detokenize=False)
    requests = [
        Request(f"r{i}", random_prompt(generator, 20 + i, VOCABULARY), params) for i in range(3)
    ]
    with recorded_gaps() as gaps, engine("other") as llm:
        plain = run(llm, requests)
    texts = {r.name: r.prompt + plain.tokens[r.name] for r in requests}
    with engine("ranked", SPEC | quantised, **PROBE) as llm:
        before = run(llm, requests)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other_target)})
        llm.reset_prefix_cache()
        # Rounded numbers may be equal where exact ones are not.
        with nullcontext() if quantised else oracle_trees(texts, VOCABULARY):
            after = run(llm, requests)
        ((whole, reduced),) = llm.collective_rpc("logits", args=(3,))
    assert before.tokens != after.tokens
    assert_lossless(requests, plain, gaps, after)
    wanted = torch.tensor(whole)[:, sorted(RANKING[:300])]
    if quantised:
        assert not torch.equal(torch.tensor(reduced), wanted)
    close = {"atol": 0.05 * float(wanted.std()), "rtol": 0.05} if quantised else {}
    torch.testing.assert_close(torch.tensor(reduced), wanted, **close)
