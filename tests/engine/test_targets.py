"""Targets of other families or precision, made at random, with the golden draft."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from vllm import SamplingParams

from tests.engine import harness
from tests.engine.harness import GOLDEN, Request, engine, random_prompt, run
from tests.engine.oracle import oracle_trees
from tests.engine.ties import assert_lossless, recorded_gaps
from vllm_griffin.runner.speculator import TreeSpeculator

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
TARGETS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": False}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
    # Its LM head is the embedding, and its logits are scaled.
    "cohere": (CohereConfig, CohereForCausalLM, {"logit_scale": 0.25}),
    # vLLM runs it by its Transformers backend.
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {"pad_token_id": 0}),
    "int8": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": False}),
}
SPEC = {"num_speculative_tokens": 12, "tree_depth": 4, "tree_top_k": 4}


@pytest.fixture(params=TARGETS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    config_class, model_class, extra = TARGETS[request.param]
    torch.manual_seed(0)
    model = model_class(config_class(**(SHAPE | extra)))
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    if request.param == "int8":
        _quantise(tmp_path)
    harness.PAIRS[request.param] = (tmp_path, GOLDEN / "a" / "draft")
    return request.param


def _quantise(folder: Path) -> None:
    """The linear layers in 8 bits, weights and activations, in the layout of compressed-tensors."""
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("proj.weight")]:
        scale = weights[name].abs().amax(1, keepdim=True) / 127
        weights[name] = (weights[name] / scale).round().to(torch.int8)
        weights[f"{name}_scale"] = scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight_bits | {"strategy": "channel", "dynamic": False},
        "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_other_families_are_lossless(pair: str) -> None:
    generator = torch.Generator().manual_seed(2)
    requests = []
    for i, length in enumerate((3, 40, 70)):
        params = SamplingParams(
            temperature=float(i == 1), seed=i, max_tokens=12, ignore_eos=True, detokenize=False
        )
        prompt = random_prompt(generator, length, SHAPE["vocab_size"])
        requests.append(Request(f"{pair}-{i}", prompt, params, arrival=i))
    limits = {"max_model_len": 128, "max_num_seqs": 4}
    with recorded_gaps() as gaps, engine(pair, **limits) as llm:
        plain = run(llm, requests)
    texts = {r.name: r.prompt + plain.tokens[r.name] for r in requests}
    with engine(pair, SPEC, **limits) as llm, oracle_trees(texts, SHAPE["vocab_size"]):
        griffin = run(llm, requests)
    assert_lossless(requests, plain, gaps, griffin)
    assert griffin.acceptance_length > 1.2


def test_attention_that_knows_no_trees_is_refused() -> None:
    """vLLM chooses backends in more modules than ours takes the place of."""
    layers = {"layers.0.attn": SimpleNamespace(impl=object())}
    compilation = SimpleNamespace(static_forward_context=layers)
    own: Any = SimpleNamespace(vllm_config=SimpleNamespace(compilation_config=compilation))
    said = r"does not support attention by SimpleNamespace \(layers\.0\.attn\)"
    with pytest.raises(ValueError, match=said):
        TreeSpeculator.load_draft_model(own, torch.nn.Module(), set(layers))
