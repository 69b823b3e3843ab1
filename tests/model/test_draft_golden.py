"""The draft in vLLM's layers against what the published network computes (tests/data/golden)."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

from vllm_griffin.model import layers
from vllm_griffin.model.checkpoint import DraftCheckpoint, DraftLayout

from .draft_files import GOLDEN, PlainDraft

CASES = [
    (case, prompt)
    for case in ("a", "b")
    for prompt in range(json.loads((GOLDEN / case / "case.json").read_text())["cases"])
]


@pytest.fixture(scope="module")
def expected():
    return {case: load_file(GOLDEN / case / "expected.safetensors") for case in ("a", "b")}


def prompt_of(expected, case, prompt):
    """Tokens one later [L] and features [L, h] of a golden prompt."""
    given = {name: expected[case][f"{prompt}.{name}"] for name in ("input_ids", "root", "features")}
    return torch.cat([given["input_ids"][1:], given["root"]]), given["features"]


@pytest.mark.parametrize(("case", "prompt"), CASES)
def test_outputs_are_the_published_ones(load, expected, case, prompt):
    draft = load(GOLDEN / case / "draft", case)
    tokens, features = prompt_of(expected, case, prompt)
    predict, regress = draft(tokens, torch.arange(len(tokens)), features)
    logprobs = draft.compute_logits(predict[-1:]).log_softmax(-1)[0]
    found = {"predict": predict, "regress": regress, "logprobs": logprobs}
    for name, value in found.items():
        published = expected[case][f"{prompt}.{name}"]
        torch.testing.assert_close(value, published, atol=1e-4, rtol=0, msg=lambda m, n=name: n + m)


def test_on_cuda_each_operation_is_one_kernel(load, expected, monkeypatch):
    """Whatever vLLM has turned off for the target that it compiles; two of the kernels work in place."""
    ran = []

    def rotate(self, positions, query, key):
        ran.append("rotate")
        for x, y in zip((query, key), self.forward_native(positions, query, key), strict=True):
            x.copy_(y)
        return query, key

    def activate(self, x):
        ran.append("activate")
        return self.forward_native(x)

    def add_and_norm(x, residual, weight, epsilon):
        ran.append("norm")
        residual += x
        x.copy_(residual * (residual.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight)

    monkeypatch.setattr(
        layers, "current_platform", SimpleNamespace(is_cuda=lambda: True, device_type="cuda")
    )
    monkeypatch.setattr(layers.ops, "fused_add_rms_norm", add_and_norm)
    monkeypatch.setattr(RotaryEmbedding, "forward_cuda", rotate)
    monkeypatch.setattr(SiluAndMul, "forward_cuda", activate)
    draft = load(GOLDEN / "a" / "draft", "a")
    tokens, features = prompt_of(expected, "a", 0)
    predict, regress = draft(tokens, torch.arange(len(tokens)), features)
    assert ran == ["rotate", "norm", "activate"]
    for value, name in ((predict, "predict"), (regress, "regress")):
        torch.testing.assert_close(value, expected["a"][f"0.{name}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("case", "prompt"), CASES)
def test_the_tests_own_network_is_the_published_one(expected, case, prompt):
    checkpoint = DraftCheckpoint.open(GOLDEN / case / "draft")
    network = PlainDraft(checkpoint.raw_config, dict(checkpoint.weights()))
    predict, regress = network(*prompt_of(expected, case, prompt))
    published = expected[case]
    torch.testing.assert_close(predict, published[f"{prompt}.predict"], atol=1e-4, rtol=0)
    torch.testing.assert_close(regress, published[f"{prompt}.regress"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["a", "b"])
def test_equal_embedding_is_dropped(load, targets, case):
    draft = load(GOLDEN / case / "draft", case)
    assert draft.layout == DraftLayout(own_embedding=True)
    assert draft.embed_tokens is targets[case].model.embed_tokens
    assert draft.lm_head is targets[case].lm_head


def test_keys_are_those_of_the_published_table():
    checkpoint = DraftCheckpoint.open(GOLDEN / "b" / "draft")
    h, i, q, kv, vocab = 128, 160, 128, 64, 512
    table = {
        "embed_tokens.weight": (vocab, h),
        "fc.fc.weight": (h, 2 * h),
        "fc.fc.bias": (h,),
        "fc.post_attention_layernorm.weight": (h,),
        "fc.mlp.input_layernorm.weight": (h,),
        "fc.mlp.up_proj.weight": (i, 2 * h),
        "fc.mlp.down_proj.weight": (h, i),
        "layers.0.self_attn.q_proj.weight": (q, h),
        "layers.0.self_attn.k_proj.weight": (kv, h),
        "layers.0.self_attn.v_proj.weight": (kv, h),
        "layers.0.self_attn.o_proj.weight": (h, q),
        "layers.0.post_attention_layernorm.weight": (h,),
        "layers.0.mlp.gate_proj.weight": (i, h),
        "layers.0.mlp.up_proj.weight": (i, h),
        "layers.0.mlp.down_proj.weight": (2 * h, i),
    }
    assert checkpoint.expected_shapes() == table
    assert {key: info.shape for key, info in checkpoint.tensors.items()} == table
