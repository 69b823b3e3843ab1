"""The speculative config: defaults, the largest tree, and every refusal by name."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm.config import SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_griffin.config import (
    REFUSED_FIELDS,
    GriffinSpeculativeConfig,
    check_engine,
    griffin_config,
    max_tree_nodes,
)

GOLDEN = Path(__file__).parent / "data" / "golden" / "a"


def make(spec: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """The engine's config for the golden pair, as ``LLM`` and ``vllm serve`` make it."""
    spec = {"method": "griffin", "model": str(GOLDEN / "draft")} | (spec or {})
    arguments = {
        "model": str(GOLDEN / "target"),
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "speculative_config": spec,
    } | kwargs
    return EngineArgs(**arguments).create_engine_config()


def draft_with(tmp_path: Path, **config: Any) -> str:
    """A copy of the golden draft with other entries in its config.json."""
    folder = tmp_path / "draft"
    shutil.copytree(GOLDEN / "draft", folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)


def test_the_papers_tree_is_the_default() -> None:
    spec = griffin_config(make())
    assert spec is not None
    assert (spec.num_speculative_tokens, spec.tree_depth, spec.tree_top_k) == (59, 6, 10)
    assert spec.use_eagle()
    assert "griffin" in repr(spec)


def test_a_draft_brings_its_tree(tmp_path: Path) -> None:
    tree = {"num_speculative_tokens": 20, "tree_depth": 4, "tree_top_k": 3}
    model = draft_with(tmp_path, tree=tree)
    spec = griffin_config(make({"model": model}))
    assert (spec.num_speculative_tokens, spec.tree_depth, spec.tree_top_k) == (20, 4, 3)
    spec = griffin_config(make({"model": model, "tree_top_k": 1}))
    assert (spec.num_speculative_tokens, spec.tree_depth, spec.tree_top_k) == (4, 4, 1)


def test_other_methods_stay_vllms_own() -> None:
    config = EngineArgs(
        model=str(GOLDEN / "target"),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=512,
        speculative_config={"method": "ngram", "num_speculative_tokens": 2},
    ).create_engine_config()
    assert type(config.speculative_config) is SpeculativeConfig


def test_spec_flags_are_honoured() -> None:
    spec = griffin_config(
        make({"tree_depth": 3}, spec_tokens=7),
    )
    assert (spec.num_speculative_tokens, spec.tree_depth) == (7, 3)
    with pytest.raises(ValueError, match=r"--spec-tokens .* mutually exclusive"):
        make({"num_speculative_tokens": 3}, spec_tokens=7)


@pytest.mark.parametrize(
    ("depth", "top_k", "most"), [(1, 10, 10), (6, 1, 6), (3, 4, 36), (6, 10, 510)]
)
def test_the_largest_tree(depth: int, top_k: int, most: int) -> None:
    assert max_tree_nodes(depth, top_k) == most
    shape = {"tree_depth": depth, "tree_top_k": top_k}
    budget = {"max_num_batched_tokens": 1024}
    spec = griffin_config(make(shape | {"num_speculative_tokens": most}, **budget))
    assert spec.tree_levels == min(depth, most)
    with pytest.raises(ValueError, match=rf"={most + 1} is above the {most} nodes"):
        make(shape | {"num_speculative_tokens": most + 1}, **budget)


OTHER_VALUES: dict[str, Any] = {
    "enforce_eager": True,
    "tensor_parallel_size": 1,
    "quantization": "fp8",
    "moe_backend": "triton",
    "attention_backend": "FLASH_ATTN",
    "kv_cache_dtype": "fp8",
    "max_model_len": 64,
    "code_revision": "main",
    "index_share_for_mtp_iteration": True,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 3,
    "suffix_decoding_max_tree_depth": 3,
    "suffix_decoding_max_cached_requests": 3,
    "suffix_decoding_max_spec_factor": 3.0,
    "suffix_decoding_min_token_prob": 0.5,
    "draft_load_config": {"load_format": "dummy"},
    "rejection_sample_method": "block",
    "synthetic_acceptance_rates": [0.5],
    "synthetic_acceptance_length": 2.0,
    "draft_sample_method": "probabilistic",
    "dspark_draft_topk": 3,
}


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_fields_that_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"speculative_config\['{name}'\].*griffin") as caught:
        make({name: OTHER_VALUES.get(name, True)})
    assert REFUSED_FIELDS[name] in str(caught.value)


def test_every_field_of_vllm_is_honoured_or_refused() -> None:
    honoured = {
        "num_speculative_tokens",
        "num_speculative_tokens_per_batch_size",
        "model",
        "method",
        "revision",
        "draft_tensor_parallel_size",
        "disable_eagle_block_drop",
    }
    set_by_vllm = {
        "target_model_config",
        "target_parallel_config",
        "draft_model_config",
        "draft_parallel_config",
    }
    fields = {f.name for f in dataclasses.fields(SpeculativeConfig)}
    assert fields == honoured | set_by_vllm | set(REFUSED_FIELDS)


ENGINE_FEATURES = [
    ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
    ({"tensor_parallel_size": 2}, "tensor parallelism"),
    ({"data_parallel_size": 2}, "data parallelism"),
    ({"enable_lora": True, "max_num_batched_tokens": 65536}, "LoRA"),
    ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
    ({"enable_prompt_embeds": True}, "prompt embeddings"),
    ({"max_num_batched_tokens": 40}, "max_num_batched_tokens"),
    ({"hf_overrides": {"sliding_window": 64, "use_sliding_window": True}}, "sliding-window"),
]


@pytest.mark.parametrize(("arguments", "message"), ENGINE_FEATURES, ids=lambda v: str(v)[:40])
def test_engine_features_that_are_refused_by_name(arguments: dict, message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        make(**arguments)


def test_routed_experts_are_refused() -> None:
    """vLLM itself refuses them for the test pair, which has no experts."""
    config = make()
    config.aux_output_config.enable_return_routed_experts = True
    with pytest.raises(ValueError, match=r"routed experts.*enable_return_routed_experts"):
        check_engine(config)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"tree_depth": 0}, "tree_depth"),
        ({"tree_top_k": -1}, "tree_top_k"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"tree_width": 3}, "tree_width"),
        ({"tree_depth": "deep"}, "tree_depth"),
        ({"model": None}, "needs 'model'"),
        ({"model": "/nowhere/draft"}, "/nowhere/draft"),
        ({"tree_top_k": 600, "num_speculative_tokens": 5}, "vocabulary of 512"),
        ({"draft_tensor_parallel_size": 3}, "draft_tensor_parallel_size"),
    ],
)
def test_bad_values(spec: dict, message: str) -> None:
    with pytest.raises(Exception, match=message):
        make(spec)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 128}, "hidden"),
        ({"vocab_size": 511}, "vocab"),
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tree": {"tree_depth": 0}}, "tree_depth"),
    ],
)
def test_a_draft_that_does_not_fit(config: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make({"model": draft_with(tmp_path, **config)})


def test_a_short_draft_context_is_raised_to_the_targets(tmp_path: Path) -> None:
    spec = griffin_config(make({"model": draft_with(tmp_path, max_position_embeddings=128)}))
    assert spec.draft_model_config.hf_config.max_position_embeddings == 512


def test_a_config_built_for_another_method_is_refused() -> None:
    with pytest.raises(ValueError, match="for method 'griffin' only"):
        GriffinSpeculativeConfig(method="eagle", model="x")


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([[1, 4, 60]], "per_batch_size asks for 60 nodes, num_speculative_tokens=59 is the most"),
        ([[2, 4, 6]], "first batch-size range must start at 1"),
        ([[1, 4, 6], [3, 8, 2]], "non-overlapping"),
        ([[1, 4, -1]], "must be >= 0"),
        ([[1, 4]], "per_batch_size.0.2\n  Field required"),
        ([], "must not be empty"),
    ],
)
def test_wrong_sizes_by_batch_are_named(schedule: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make({"num_speculative_tokens_per_batch_size": schedule})
