"""The training network: against the published network's outputs, and several passes against a loop."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.model.draft_files import CONFIG, PlainDraft, random_weights, write_draft
from vllm_griffin.model.checkpoint import DraftCheckpoint
from vllm_griffin.model.config import DraftConfig
from vllm_griffin.model.layout import DraftLayout
from vllm_griffin.train.checkpoint import condition, load_draft, published_state, save_draft
from vllm_griffin.train.network import Draft, NetworkConfig
from vllm_griffin.train.passes import multi_pass

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
GRIFFIN_KEYS = {
    "fc.fc.weight",
    "fc.fc.bias",
    "fc.post_attention_layernorm.weight",
    "fc.mlp.input_layernorm.weight",
    "fc.mlp.up_proj.weight",
    "fc.mlp.down_proj.weight",
    "layers.0.self_attn.q_proj.weight",
    "layers.0.self_attn.k_proj.weight",
    "layers.0.self_attn.v_proj.weight",
    "layers.0.self_attn.o_proj.weight",
    "layers.0.post_attention_layernorm.weight",
    "layers.0.mlp.gate_proj.weight",
    "layers.0.mlp.up_proj.weight",
    "layers.0.mlp.down_proj.weight",
}


def small_config(**changes) -> NetworkConfig:
    """A draft of a few thousand weights."""
    fields = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return NetworkConfig(**(fields | changes))


def packed(lengths: list[int], seed: int = 0) -> dict:
    """Random packed documents of the given lengths for `small_config`."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return {
        "features": torch.randn(total, 32, generator=generator),
        "tokens": torch.randint(50, (total,), generator=generator),
        "positions": torch.cat([torch.arange(n) for n in lengths]),
        "starts": [0, *torch.tensor(lengths).cumsum(0).tolist()],
    }


@pytest.mark.parametrize(("case", "prompts"), [("a", 3), ("b", 2)])
@torch.inference_mode()
def test_outputs_are_those_of_the_published_network(case: str, prompts: int) -> None:
    draft = load_draft(GOLDEN / case / "draft")
    expected = load_file(GOLDEN / case / "expected.safetensors")
    for j in range(prompts):
        ids = torch.cat([expected[f"{j}.input_ids"][1:], expected[f"{j}.root"]])
        predict, regress = draft(
            expected[f"{j}.features"], ids, torch.arange(len(ids)), [0, len(ids)]
        )
        torch.testing.assert_close(predict, expected[f"{j}.predict"], atol=1e-4, rtol=0)
        torch.testing.assert_close(regress, expected[f"{j}.regress"], atol=1e-4, rtol=0)


def test_rope_is_read_as_the_engine_reads_it() -> None:
    """Newer files have the base in `rope_parameters`; an older entry beside it does not count."""
    raw = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 50, "rope_theta": 10000.0}
    raw |= {
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }
    served = DraftConfig.from_dict(raw, "config.json").rope_parameters["rope_theta"]
    trained = NetworkConfig.from_dict(raw, fusion=True, two_heads=True).rope_theta
    assert trained == served == 5e5


@torch.inference_mode()
def test_packed_documents_do_not_see_each_other() -> None:
    draft = Draft(small_config())
    both = packed([5, 9])
    whole = draft(**both)
    for a, b in [(0, 5), (5, 14)]:
        part = {k: v[a:b] for k, v in both.items() if k != "starts"}
        alone = draft(**part, starts=[0, b - a])
        for x, y in zip(whole, alone, strict=True):
            torch.testing.assert_close(x[a:b], y)


def one_slot(
    draft: Draft, features: torch.Tensor, tokens: torch.Tensor, slot: int, known: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Draft slots up to `slot` as decoding does, the target's features known below `known` + 1.

    Returns the outputs of slots `known`, ..., `slot`, one at a time with everything recomputed.
    """
    inputs = [features[t] for t in range(known + 1)]
    predicts, regresses = [], []
    for last in range(known, slot + 1):
        stacked = torch.stack(inputs)
        predict, regress = draft(stacked, tokens[: last + 1], torch.arange(last + 1), [0, last + 1])
        predicts.append(predict[-1])
        regresses.append(regress[-1])
        inputs.append(regress[-1])
    return predicts, regresses


@pytest.mark.parametrize("config", [{}, {"fusion": False, "two_heads": False}])
@torch.inference_mode()
def test_passes_are_what_decoding_computes(config: dict) -> None:
    """Pass n at slot t is the draft's step n + 1 after features up to slot t - n, in any document."""
    torch.manual_seed(1)
    draft = Draft(small_config(**config))
    lengths = [1, 7, 2, 11]
    both = packed(lengths)
    outputs = list(multi_pass(draft, **both, passes=4))
    for a, b in zip(both["starts"][:-1], both["starts"][1:], strict=True):
        features, tokens = both["features"][a:b], both["tokens"][a:b]
        for n, (predict, regress) in enumerate(outputs):
            for t in range(n, b - a):
                predicts, regresses = one_slot(draft, features, tokens, t, t - n)
                torch.testing.assert_close(predict[a + t], predicts[-1], atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(regress[a + t], regresses[-1], atol=1e-5, rtol=1e-4)


def test_published_keys_and_round_trip(tmp_path: Path) -> None:
    draft = Draft(small_config())
    data = packed([20])
    condition(draft, data["features"], data["tokens"], initialise=True)
    assert set(published_state(draft)) == GRIFFIN_KEYS
    save_draft(draft, tmp_path, {"max_position_embeddings": 64}, torch.float32)
    loaded = load_draft(tmp_path, draft.embed_tokens.weight.detach())
    with torch.inference_mode():
        for x, y in zip(draft(**data), loaded(**data), strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_the_losses_vocabulary_goes_with_the_draft(tmp_path: Path) -> None:
    draft = Draft(small_config())
    save_draft(draft, tmp_path, {"max_position_embeddings": 64}, torch.float32, [1, 4])
    assert json.loads((tmp_path / "vocabulary.json").read_text()) == [1, 4]


def test_conditioning_a_loaded_draft_keeps_its_function() -> None:
    draft = Draft(small_config())
    data = packed([20])
    with torch.inference_mode():
        before = draft(**data)
    condition(draft, data["features"], data["tokens"], initialise=False)
    with torch.inference_mode():
        for x, y in zip(before, draft(**data), strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_eagle_layout(tmp_path: Path) -> None:
    draft = Draft(small_config(fusion=False, two_heads=False))
    state = published_state(draft)
    assert set(state) == {k for k in GRIFFIN_KEYS if not k.startswith("fc.")} | {"fc.weight"}
    assert state["layers.0.mlp.down_proj.weight"].shape == (32, 48)
    save_draft(draft, tmp_path, {"max_position_embeddings": 64}, torch.float32)
    loaded = load_draft(tmp_path, draft.embed_tokens.weight.detach())
    assert loaded.config == draft.config


def test_heads_need_not_share_out_the_hidden_size(tmp_path: Path) -> None:
    raw = {**CONFIG, "head_dim": 48}
    weights = random_weights(raw, DraftLayout())
    draft = load_draft(write_draft(tmp_path, raw, weights))
    assert draft.layer.self_attn.q_proj.weight.shape == (2 * 48, 64)
    features, tokens, at = torch.randn(5, 64), torch.arange(5), torch.arange(5)
    found = draft(features, tokens, at, [0, 5])
    wanted = PlainDraft(raw, weights)(tokens, features)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_plain_fusion_may_have_a_bias(tmp_path: Path) -> None:
    """As the engine reads it; it is saved again, and a new draft has none."""
    layout = DraftLayout(fusion=False, two_heads=False, fc_bias=True)
    weights = random_weights(CONFIG, layout)
    draft = load_draft(write_draft(tmp_path / "draft", CONFIG, weights))
    features, tokens, at = torch.randn(5, 64), torch.arange(5), torch.arange(5)
    condition(draft, features, tokens, initialise=False)
    found = draft(features, tokens, at, [0, 5])
    wanted = PlainDraft(CONFIG, weights)(tokens, features)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    save_draft(draft, tmp_path / "saved", CONFIG, torch.float32)
    saved = DraftCheckpoint.open(tmp_path / "saved")
    assert saved.validate() == replace(layout, own_embedding=False)
    assert torch.equal(dict(saved.weights())["fc.bias"], weights["fc.bias"])


def test_missing_key_is_named(tmp_path: Path) -> None:
    draft = Draft(small_config())
    save_draft(draft, tmp_path, {"max_position_embeddings": 64}, torch.float32)
    with pytest.raises(KeyError, match=r"embed_tokens\.weight"):
        load_draft(tmp_path)
