"""Every layout of a draft, loaded from disk and run, against the plain network."""

import json
from types import SimpleNamespace

import pytest
import torch

from vllm_griffin.model.checkpoint import CheckpointError, DraftCheckpoint, DraftLayout

from .conftest import engine_config
from .draft_files import CONFIG, GOLDEN, PlainDraft, random_weights, write_draft

GRIFFIN = DraftLayout()
EAGLE = DraftLayout(fusion=False, two_heads=False, fc_bias=False)
# name -> (changes of the config, layout, form on disk)
VARIANTS = {
    "griffin": ({}, GRIFFIN, "safetensors"),
    "grouped-queries": ({"num_key_value_heads": 1}, GRIFFIN, "bin"),
    "kv-heads-not-named": ({"num_key_value_heads": None}, GRIFFIN, "sharded-safetensors"),
    "wide-heads": ({"num_attention_heads": 4, "head_dim": 32}, GRIFFIN, "sharded-bin"),
    "biases": ({"qkv_bias": True}, DraftLayout(qkv_bias=True), "safetensors"),
    "biases-unannounced": ({"num_key_value_heads": 1}, DraftLayout(qkv_bias=True), "bin"),
    "eagle": ({}, EAGLE, "safetensors"),
    "eagle-with-bias": ({}, DraftLayout(fusion=False, two_heads=False), "bin"),
    "without-fusion": ({}, DraftLayout(fusion=False, fc_bias=False), "safetensors"),
    "without-second-head": ({}, DraftLayout(two_heads=False), "safetensors"),
    "scaled-rope": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, GRIFFIN, "safetensors"),
    "new-rope-fields": (
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        GRIFFIN,
        "safetensors",
    ),
    "other-epsilon": ({"rms_norm_eps": 0.1}, GRIFFIN, "safetensors"),
    "short-context": ({"max_position_embeddings": 16}, GRIFFIN, "safetensors"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_computes_what_the_plain_network_does(load, tmp_path, name):
    changes, layout, form = VARIANTS[name]
    raw = CONFIG | changes
    weights = random_weights(raw, layout)
    draft = load(write_draft(tmp_path, raw, weights, form))
    assert draft.layout == layout
    torch.manual_seed(1)
    tokens, features = torch.randint(512, (21,)), torch.randn(21, 64)
    found = draft(tokens, torch.arange(21), features)
    for value, wanted in zip(found, PlainDraft(raw, weights)(tokens, features), strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-5)
    assert (found[0] is found[1]) != layout.two_heads


@pytest.mark.parametrize("layout", [GRIFFIN, EAGLE], ids=["griffin", "eagle"])
def test_tree_nodes_see_their_prefix_and_ancestors(load, tmp_path, layout):
    """Two requests, two levels of two nodes, against each node's path as one causal sequence."""
    from vllm_griffin.kernels.tree_attention import TreeContext
    from vllm_griffin.model.level import TreeLevel

    raw = CONFIG | {"num_key_value_heads": 1}
    weights = random_weights(raw, layout)
    draft, plain = load(write_draft(tmp_path, raw, weights)), PlainDraft(raw, weights)
    attention = draft.layers[0].self_attn.attn
    torch.manual_seed(2)
    lengths, pages = [5, 3], [[6, 1], [4]]
    prompts = [(torch.randint(512, (n,)), torch.randn(n, 64)) for n in lengths]
    for (tokens, features), attention.pages in zip(prompts, pages, strict=True):
        draft(tokens, torch.arange(len(tokens)), features)
    k_scratch, v_scratch = torch.full((2, 3 * 4, 1, 32), float("nan"))

    # Nodes 0 and 1 hang off the root; nodes 2 and 3 both off node 1 in the first request, and off
    # 0 and 1 in the second. Four scratch rows a request, at 4 and at 8.
    parents = [[-1, -1, 1, 1], [-1, -1, 0, 1]]
    tokens, fed = torch.randint(512, (2, 4)), torch.randn(2, 4, 64)
    paths = [[path_to(j, parents[b]) for j in range(4)] for b in range(2)]
    for depth in range(2):
        nodes = range(2 * depth, 2 * depth + 2)
        bits = [[[sum(1 << j for j in paths[b][node])] for node in nodes] for b in range(2)]
        context = TreeContext(
            block_table=torch.tensor([[6, 1], [4, 0]], dtype=torch.int32),
            prefix_lens=torch.tensor(lengths, dtype=torch.int32),
            q_start=torch.tensor([0, 2], dtype=torch.int32),
            num_rows=torch.tensor([2, 2], dtype=torch.int32),
            tail_start=torch.tensor([4, 8]),
            tail_bits=torch.tensor(bits),
        )
        write_rows = torch.tensor([4 + node for node in nodes] + [8 + node for node in nodes])
        level = TreeLevel(context, k_scratch, v_scratch, write_rows)
        positions = torch.tensor([lengths[b] + depth for b in range(2) for _ in nodes])
        rows = slice(2 * depth, 2 * depth + 2)
        found = draft(tokens[:, rows].flatten(), positions, fed[:, rows].flatten(0, 1), level)
        for row, (b, node) in enumerate((b, node) for b in range(2) for node in nodes):
            path = paths[b][node]
            wanted = plain(
                torch.cat([prompts[b][0], tokens[b, path]]),
                torch.cat([prompts[b][1], fed[b, path]]),
            )
            for value, exact in zip(found, wanted, strict=True):
                torch.testing.assert_close(value[row], exact[-1], atol=1e-4, rtol=1e-5)


def path_to(node: int, parents: list[int]) -> list[int]:
    return [] if node < 0 else [*path_to(parents[node], parents), node]


def test_own_embedding_is_kept_and_a_missing_one_taken(load, targets, tmp_path):
    weights = random_weights(CONFIG, GRIFFIN)
    own = load(write_draft(tmp_path / "own", CONFIG, weights))
    assert torch.equal(own.embed_tokens.weight, weights["embed_tokens.weight"])
    del weights["embed_tokens.weight"]
    none = load(write_draft(tmp_path / "none", CONFIG, weights))
    assert none.embed_tokens is targets["a"].model.embed_tokens
    assert none.lm_head is own.lm_head is targets["a"].lm_head


def test_rotary_buffers_of_old_checkpoints_are_ignored(load, tmp_path):
    weights = random_weights(CONFIG, GRIFFIN)
    weights["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    assert load(write_draft(tmp_path, CONFIG, weights, "bin")).layout == GRIFFIN


@pytest.mark.parametrize(
    ("architecture", "layout"),
    [("LlamaForCausalLM", GRIFFIN), ("EagleLlamaForCausalLM", EAGLE)],
)
def test_dummy_weights_need_only_a_config(load, tmp_path, architecture, layout):
    raw = CONFIG | {"architectures": [architecture], "qkv_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    draft = load(tmp_path, load_format="dummy")
    assert draft.layout.name == layout.name and draft.layout.qkv_bias
    predict, _ = draft(torch.tensor([3, 4]), torch.tensor([0, 1]), torch.randn(2, 64))
    assert predict.isfinite().all() and predict.abs().max() > 0


@pytest.mark.parametrize(("dtype", "digits"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision(process_group, targets, load, tmp_path, dtype, digits):
    weights = random_weights(CONFIG, GRIFFIN)
    draft = load(write_draft(tmp_path, CONFIG, weights), dtype=dtype)
    tokens, features = torch.randint(512, (9,)), torch.randn(9, 64)
    predict, _ = draft(tokens, torch.arange(9), features.to(getattr(torch, dtype)))
    wanted, _ = PlainDraft(CONFIG, weights)(tokens, features)
    assert predict.dtype == getattr(torch, dtype)
    assert (predict.float() - wanted).abs().max() < digits * wanted.abs().max()


@pytest.fixture
def build(process_group):
    """Build the module for a draft folder, without loading it."""
    from vllm.config import set_current_vllm_config

    from vllm_griffin.model.draft import GriffinDraftModel

    def build(folder):
        config = engine_config(GOLDEN / "a" / "target", folder)
        with set_current_vllm_config(config):
            return GriffinDraftModel(vllm_config=config)

    return build


def as_rank(monkeypatch, rank: int, ranks: int) -> None:
    from vllm.distributed import parallel_state

    group = SimpleNamespace(world_size=ranks, rank_in_group=rank)
    monkeypatch.setattr(parallel_state, "_TP", group)


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["split", "shared"])
@pytest.mark.parametrize("layout", [DraftLayout(qkv_bias=True), EAGLE], ids=["griffin", "eagle"])
def test_each_rank_loads_its_part(build, tmp_path, monkeypatch, layout, kv_heads):
    """A key head that cannot be split is on both ranks."""
    raw = CONFIG | {"num_key_value_heads": kv_heads}
    weights = random_weights(raw, layout)
    write_draft(tmp_path, raw, weights)
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        draft = build(tmp_path)
        draft.load_weights(DraftCheckpoint.open(tmp_path).weights())
        found = {name: p.detach() for name, p in draft.named_parameters()}
        assert draft.num_kv_heads == 1
        for name, wanted in rank_weights(weights, rank, kv_heads).items():
            assert torch.equal(found.pop(name), wanted), name
        assert not found


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [({}, 4, "2 attention heads"), ({"intermediate_size": 97}, 2, "intermediate_size 97")],
)
def test_what_ranks_cannot_share_is_refused(build, tmp_path, monkeypatch, changes, ranks, message):
    raw = CONFIG | changes
    write_draft(tmp_path, raw, random_weights(raw, GRIFFIN))
    as_rank(monkeypatch, 0, ranks)
    with pytest.raises(
        ValueError, match=rf"config\.json: .*{message}.*tensor_parallel_size {ranks}"
    ):
        build(tmp_path)


def rank_weights(
    weights: dict[str, torch.Tensor], rank: int, kv_heads: int
) -> dict[str, torch.Tensor]:
    """What rank `rank` of 2 holds, by vLLM's parameter names."""

    def half(key: str, dim: int = 0) -> torch.Tensor:
        shared = kv_heads == 1 and (".k_proj." in key or ".v_proj." in key)
        return weights[key] if shared else weights[key].chunk(2, dim)[rank]

    split_rows = {"embed_tokens.weight": 0, "fc.mlp.up_proj.weight": 0}
    split_columns = {"fc.mlp.down_proj.weight": 1}
    split_columns |= {"layers.0.self_attn.o_proj.weight": 1, "layers.0.mlp.down_proj.weight": 1}
    parts = {k: half(k, d) for k, d in (split_rows | split_columns).items() if k in weights}
    whole = [k for k in weights if k.startswith("fc.") and k not in parts]
    parts |= {k: weights[k] for k in [*whole, "layers.0.post_attention_layernorm.weight"]}
    # The linear over (embedding, feature) is two, of which the first has the bias.
    pair = "fc.fc" if "fc.fc.weight" in parts else "fc"
    columns = parts.pop(f"{pair}.weight").chunk(2, 1)
    parts |= {f"{pair}.token.weight": columns[0], f"{pair}.feature.weight": columns[1]}
    if f"{pair}.bias" in parts:
        parts[f"{pair}.token.bias"] = parts.pop(f"{pair}.bias")
    for kind in ("weight", "bias"):
        if f"layers.0.self_attn.q_proj.{kind}" in weights:
            qkv = [half(f"layers.0.self_attn.{x}_proj.{kind}") for x in "qkv"]
            parts[f"layers.0.self_attn.qkv_proj.{kind}"] = torch.cat(qkv)
    gate_up = [half(f"layers.0.mlp.{x}_proj.weight") for x in ("gate", "up")]
    parts["layers.0.mlp.gate_up_proj.weight"] = torch.cat(gate_up)
    return parts


def test_load_weights_wants_every_key_and_no_other(build, tmp_path):
    weights = random_weights(CONFIG, GRIFFIN)
    draft = build(write_draft(tmp_path, CONFIG, weights))
    assert draft.load_weights(weights.items()) == weights.keys()
    with pytest.raises(CheckpointError, match=r"missing key `fc\.fc\.bias`"):
        draft.load_weights((k, w) for k, w in weights.items() if k != "fc.fc.bias")
    with pytest.raises(CheckpointError, match=r"unexpected key `norm\.weight`"):
        draft.load_weights([*weights.items(), ("norm.weight", torch.ones(64))])
