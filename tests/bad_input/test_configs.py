"""Every wrong speculative config, flag, engine and variable is refused in one sentence at start-up.

Each table is name -> (what the user wrote, the sentence).
"""

import functools
from typing import Any, get_args

import pytest
from vllm.config.speculative import SpeculativeMethod

from tests.bad_input.sentences import assert_sentence
from tests.test_config import DRAFT, make
from vllm_griffin.config import REFUSED_FIELDS
from vllm_griffin.engine_features import check_engine

FIELD = "speculative_config"
SIZES = f"{FIELD}['num_speculative_tokens_per_batch_size']"
NO_INTEGER = "it must be a valid integer"
SIZES_FORM = (
    "it must be 'auto' or like [[1, 4, 59], [5, 16, 10]] (first and last batch size, nodes)"
)
KNOWN = (
    "disable_eagle_block_drop, draft_quantization, draft_tensor_parallel_size, draft_vocab_size, "
    "method, model, num_speculative_tokens, num_speculative_tokens_per_batch_size, "
    "rejection_sample_method, revision, synthetic_acceptance_length, synthetic_acceptance_rates, "
    "tree_acceptance, tree_budget, tree_depth, tree_top_k"
)
UNKNOWN = "is not a field of method 'griffin'"


def sizes(*schedule: Any) -> dict[str, Any]:
    return {"num_speculative_tokens_per_batch_size": list(schedule)}


AUTO = {"num_speculative_tokens_per_batch_size": "auto"}
SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "no levels": ({"tree_depth": 0}, f"{FIELD}['tree_depth']=0: it must be greater than 0"),
    "depth below 0": ({"tree_depth": -1}, f"{FIELD}['tree_depth']=-1: it must be greater than 0"),
    "depth a word": ({"tree_depth": "six"}, f"{FIELD}['tree_depth']='six': {NO_INTEGER}"),
    "depth true": ({"tree_depth": True}, f"{FIELD}['tree_depth']=True: {NO_INTEGER}"),
    "depth a fraction": ({"tree_depth": 1.5}, f"{FIELD}['tree_depth']=1.5: {NO_INTEGER}"),
    "no width": ({"tree_top_k": 0}, f"{FIELD}['tree_top_k']=0: it must be greater than 0"),
    "width a string": ({"tree_top_k": "4"}, f"{FIELD}['tree_top_k']='4': {NO_INTEGER}"),
    "width a float": ({"tree_top_k": 4.0}, f"{FIELD}['tree_top_k']=4.0: {NO_INTEGER}"),
    "wider than the vocabulary": (
        {"tree_top_k": 600, "num_speculative_tokens": 5},
        "tree_top_k=600 is above the vocabulary of 512 tokens: lower it",
    ),
    "no nodes": (
        {"num_speculative_tokens": 0},
        f"{FIELD}['num_speculative_tokens']=0: it must be greater than 0",
    ),
    "nodes below 0": (
        {"num_speculative_tokens": -59},
        f"{FIELD}['num_speculative_tokens']=-59: it must be greater than 0",
    ),
    "nodes true": (
        {"num_speculative_tokens": True},
        f"{FIELD}['num_speculative_tokens']=True: {NO_INTEGER}",
    ),
    "nodes a list": (
        {"num_speculative_tokens": [12]},
        f"{FIELD}['num_speculative_tokens']=[12]: {NO_INTEGER}",
    ),
    "more nodes than the tree has": (
        {"num_speculative_tokens": 10**9},
        "num_speculative_tokens=1000000000 is above the 510 nodes that tree_depth=6 and "
        "tree_top_k=10 can make (K + (D - 1) * K * K)",
    ),
    "more nodes than a step takes": (
        {"num_speculative_tokens": 10**6, "tree_depth": 10**9},
        "method 'griffin' does not support max_num_batched_tokens below 1 + "
        "num_speculative_tokens: raise max_num_batched_tokens or draft a smaller tree",
    ),
    "misspelt field": (
        {"tree_topk": 4},
        f"{FIELD}['tree_topk'] {UNKNOWN}: did you mean 'tree_top_k'?",
    ),
    "shortened field": ({"depth": 4}, f"{FIELD}['depth'] {UNKNOWN}: did you mean 'tree_depth'?"),
    "unknown field": ({"x": 4}, f"{FIELD}['x'] {UNKNOWN}: leave it out (known: {KNOWN})"),
    "the engine's own field": (
        {"draft_model_config": None},
        f"{FIELD}['draft_model_config'] {UNKNOWN}: ...",
    ),
    "one field twice": (
        {"tree-depth": 3, "tree_depth": 4},
        f"{FIELD}['tree_depth'] is given twice: leave one out",
    ),
    "no tokens to draft": (
        {"draft_vocab_size": 0},
        f"{FIELD}['draft_vocab_size']=0: it must be greater than 0",
    ),
    "another quantisation": (
        {"draft_quantization": "int4"},
        f"{FIELD}['draft_quantization']='int4': it must be 'int8'",
    ),
    "no budget": (
        {"tree_budget": 0},
        f"{FIELD}['tree_budget']=0: it must be greater than 0",
    ),
    "budget a word": ({"tree_budget": "batch"}, f"{FIELD}['tree_budget']='batch': {NO_INTEGER}"),
    "budget true": ({"tree_budget": True}, f"{FIELD}['tree_budget']=True: {NO_INTEGER}"),
    "budget of whole trees": (
        {"num_speculative_tokens": 12, "tree_budget": 12},
        "tree_budget=12 must be below num_speculative_tokens=12, the most nodes of one request",
    ),
    "budget and sizes by batch": (
        {"tree_budget": 5} | sizes([1, 4, 9], [5, 16, 7]),
        "tree_budget is not supported with num_speculative_tokens_per_batch_size: name one number of "
        "nodes, num_speculative_tokens",
    ),
    "budget and auto": (
        AUTO | {"tree_budget": 5, "tree_acceptance": {"9,3,3": 2.0}},
        "tree_budget is not supported with num_speculative_tokens_per_batch_size: name one number of "
        "nodes, num_speculative_tokens",
    ),
    "budget and forced acceptance": (
        {
            "tree_budget": 5,
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_length": 2.0,
        },
        "tree_budget is not supported with rejection_sample_method='synthetic': acceptance that is "
        "forced does not go by a tree's nodes",
    ),
    "draft vocabulary true": (
        {"draft_vocab_size": True},
        f"{FIELD}['draft_vocab_size']=True: {NO_INTEGER}",
    ),
    "inexact verification": (
        {"rejection_sample_method": "block"},
        f"{FIELD}['rejection_sample_method']='block' is not supported with method 'griffin': leave "
        "it at 'standard', which is exact, or take 'synthetic' for benchmarks",
    ),
    "forced acceptance in earnest": (
        {"synthetic_acceptance_length": 2.0},
        "synthetic_acceptance_rates and synthetic_acceptance_length are only valid with "
        "rejection_sample_method='synthetic'",
    ),
    "forced acceptance of what": (
        {"rejection_sample_method": "synthetic"},
        "rejection_sample_method='synthetic' requires exactly one of synthetic_acceptance_rates or "
        "synthetic_acceptance_length.",
    ),
    "longer than a path": (
        {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 8.0},
        "synthetic_acceptance_length must be in [1, 7], got 8.0.",
    ),
    "a rate for each level": (
        {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.5]},
        "synthetic_acceptance_rates must have length 6, got [0.5].",
    ),
    "auto without figures": (
        {"num_speculative_tokens_per_batch_size": "auto"},
        "num_speculative_tokens_per_batch_size='auto' needs tree_acceptance, which the draft's "
        "config.json does not have: measure it with `vllm-griffin eval --write-trees`",
    ),
    "no tree within bounds": (
        AUTO | {"tree_depth": 2, "tree_acceptance": {"9,3,3": 2.0}},
        "tree_acceptance has no tree within num_speculative_tokens=None, tree_depth=2, "
        "tree_top_k=None: it has 9,3,3",
    ),
    "two trees of a size": (
        AUTO | {"tree_acceptance": {"9,3,3": 2.0, "9,2,4": 1.9}},
        "tree_acceptance has two trees of 9 nodes: keep one",
    ),
    "figures of no tree": (
        {"tree_acceptance": {"9": 2.0}},
        "speculative_config: `tree_acceptance`: tree '9' is neither nodes,depth,top_k (59,6,10) nor "
        "chain:length (chain:6)",
    ),
    "no figures": (
        {"tree_acceptance": {}},
        "speculative_config: `tree_acceptance` must be an object with trees in it",
    ),
    "longer than the tree": (
        {"tree_acceptance": {"9,3,3": 4.5}},
        "speculative_config: `tree_acceptance` of 9,3,3 must lie in [1, 4], found 4.5",
    ),
    "draft vocabulary too large": (
        {"draft_vocab_size": 513},
        "draft_vocab_size=513 is above the vocabulary of 512 tokens",
    ),
    "draft vocabulary without a ranking": (
        {"draft_vocab_size": 100},
        "{draft}/vocabulary.json: missing; without it a draft drafts from the whole vocabulary "
        "only, so leave draft_vocab_size out",
    ),
    "no draft": (
        {"model": None},
        "speculative_config needs 'model' for method 'griffin': the draft's folder or hub id",
    ),
    "draft a number": ({"model": 5}, f"{FIELD}['model']=5: it must be a valid string"),
    "draft not there": ({"model": "/nowhere/draft"}, "/nowhere/draft: no such folder"),
    "draft a file": (
        {"model": "{draft}/config.json"},
        "{draft}/config.json: a model is a folder (or a hub id), this is a file",
    ),
    "draft not on the hub": (
        {"model": "nobody/nothing"},
        "nobody/nothing: no such folder, and it could not be downloaded from the Hugging Face hub "
        "(...)",
    ),
    "revision of a folder": (
        {"revision": "main"},
        f"{FIELD}['revision']='main' is of a hub id, and 'model' is a folder: leave it out",
    ),
    "revision a number": ({"revision": 3}, f"{FIELD}['revision']=3: it must be a valid string"),
    "draft on other ranks": (
        {"draft_tensor_parallel_size": 3},
        f"{FIELD}['draft_tensor_parallel_size']=3 is not supported with method 'griffin': leave it "
        "out or set it to the target's tensor_parallel_size=1",
    ),
    "ranks a word": (
        {"draft_tensor_parallel_size": "x"},
        f"{FIELD}['draft_tensor_parallel_size']='x': {NO_INTEGER}",
    ),
    "switch a word": (
        {"disable_eagle_block_drop": "x"},
        f"{FIELD}['disable_eagle_block_drop']='x': it must be a valid boolean, ...",
    ),
    "method in capitals": (
        {"method": "GRIFFIN"},
        "speculative method 'GRIFFIN' is not known: did you mean 'griffin'?",
    ),
    "method misspelt": (
        {"method": "grifin"},
        "speculative method 'grifin' is not known: did you mean 'griffin'?",
    ),
    "a tree for another method": (
        {"method": "eagle", "tree_depth": 3},
        f"{FIELD}['tree_depth'] is a field of method 'griffin': name that method, or leave the "
        "field out",
    ),
    "sizes a word": (
        {"num_speculative_tokens_per_batch_size": "x"},
        f"{SIZES}='x': {SIZES_FORM}",
    ),
    "sizes by name": (
        {"num_speculative_tokens_per_batch_size": {"1": 4}},
        f"{SIZES}={{'1': 4}}: {SIZES_FORM}",
    ),
    "size missing": (sizes([1, 4]), f"{SIZES}[0][2]=[1, 4]: {SIZES_FORM}"),
    "size too many": (sizes([1, 4, 2, 3]), f"{SIZES}[0]=[1, 4, 2, 3]: {SIZES_FORM}"),
    "size a fraction": (sizes([1, 4, 2.5]), f"{SIZES}[0][2]=2.5: {SIZES_FORM}"),
    "size true": (sizes([1, 4, 2], [True, 4, 2]), f"{SIZES}[1][0]=True: {SIZES_FORM}"),
    "size above the largest": (
        sizes([1, 4, 60]),
        "num_speculative_tokens_per_batch_size asks for 60 nodes, num_speculative_tokens=59 is the "
        "most: raise that, or ask for fewer",
    ),
    "sizes from 2": (sizes([2, 4, 6]), f"{SIZES}: The first batch-size range must start at 1 ..."),
    "sizes overlap": (
        sizes([1, 4, 6], [3, 8, 2]),
        f"{SIZES}: Batch-size ranges must be non-overlapping and sorted.",
    ),
    "sizes backwards": (
        sizes([4, 1, 2]),
        f"{SIZES}: Batch-size range start must be <= end for ...",
    ),
    "size below 0": (sizes([1, 4, -1]), f"{SIZES}: ... values must be >= 0."),
    "no sizes": (sizes(), f"{SIZES}: ... must not be empty."),
}


def refused(spec: dict[str, Any] | None = None, **engine: Any) -> BaseException:
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        make(spec, **engine)
    return caught.value


@pytest.mark.parametrize("name", SPECS)
def test_config_is_refused_in_one_sentence(name: str) -> None:
    spec, expected = SPECS[name]
    if isinstance(spec.get("model"), str):
        spec = spec | {"model": spec["model"].replace("{draft}", str(DRAFT))}
    assert_sentence(refused(spec), expected, draft=DRAFT)


# One value of each refused field that is not its default; `True` where not named here.
OTHER_VALUES: dict[str, Any] = {
    "tensor_parallel_size": 1,
    "quantization": "fp8",
    "moe_backend": "no such backend",
    "attention_backend": "no such backend",
    "kv_cache_dtype": "fp8",
    "max_model_len": 64,
    "code_revision": "main",
    "prompt_lookup_max": -3,
    "prompt_lookup_min": 3,
    "suffix_decoding_max_tree_depth": 3,
    "suffix_decoding_max_cached_requests": 3,
    "suffix_decoding_max_spec_factor": 3.0,
    "suffix_decoding_min_token_prob": 0.5,
    "draft_sample_method": "probabilistic",
    "dspark_draft_topk": 3,
}


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_field_of_another_method_is_refused_in_one_sentence(name: str) -> None:
    value = OTHER_VALUES.get(name, True)
    expected = f"{FIELD}['{name}']={value!r} is not supported with method 'griffin': "
    assert_sentence(refused({name: value}), expected + REFUSED_FIELDS[name])


def test_no_method_of_vllm_is_taken_for_griffin_misspelt() -> None:
    from vllm_griffin.compat.patches import _wants_griffin

    class Arguments:
        spec_method = None

    for method in get_args(SpeculativeMethod):
        Arguments.speculative_config = {"method": method}
        assert not _wants_griffin(Arguments)


EXCLUSIVE = "{} and --speculative-config['{}'] are mutually exclusive"
FLAGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "method twice": (
        {},
        {"spec_method": "griffin"},
        EXCLUSIVE.format("--spec-method", "method"),
    ),
    "draft twice": ({}, {"spec_model": "x"}, EXCLUSIVE.format("--spec-model", "model")),
    "nodes twice": (
        {"num-speculative-tokens": 3},
        {"spec_tokens": 7},
        EXCLUSIVE.format("--spec-tokens", "num_speculative_tokens"),
    ),
    "method misspelt": (
        {},
        {"spec_method": "griffn", "speculative_config": None},
        "speculative method 'griffn' is not known: did you mean 'griffin'?",
    ),
    "flags without a draft": (
        {},
        {"spec_method": "griffin", "speculative_config": None},
        "speculative_config needs 'model' for method 'griffin': the draft's folder or hub id",
    ),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_refused_in_one_sentence(name: str) -> None:
    spec, flags, expected = FLAGS[name]
    assert_sentence(refused(spec, **flags), expected)


NOT_SUPPORTED = "method 'griffin' does not support"
ENGINES: dict[str, tuple[dict[str, Any], str]] = {
    "pipeline parallel": (
        {"pipeline_parallel_size": 2},
        f"{NOT_SUPPORTED} pipeline parallelism: use tensor parallelism",
    ),
    "data parallel": (
        {"data_parallel_size": 2},
        f"{NOT_SUPPORTED} data parallelism: start one engine per replica",
    ),
    "LoRA": (
        {"enable_lora": True, "max_num_batched_tokens": 65536},
        f"{NOT_SUPPORTED} LoRA: merge the adapter into the target",
    ),
    "FP8 cache of another format": (
        {"kv_cache_dtype": "fp8_e5m2"},
        f"{NOT_SUPPORTED} kv_cache_dtype='fp8_e5m2': set kv_cache_dtype='float32' or 'fp8'",
    ),
    "layers without the FP8 cache": (
        {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
        f"{NOT_SUPPORTED} layers whose KV cache has another dtype: leave "
        "kv_cache_dtype_skip_layers empty",
    ),
    "prompt embeddings": (
        {"enable_prompt_embeds": True},
        f"{NOT_SUPPORTED} prompt embeddings: leave enable_prompt_embeds off",
    ),
    "small steps": (
        {"max_num_batched_tokens": 40},
        f"{NOT_SUPPORTED} max_num_batched_tokens below 1 + num_speculative_tokens: raise "
        "max_num_batched_tokens or draft a smaller tree",
    ),
    "no room to time steps": (
        {"max_model_len": 50, "spec": AUTO | {"tree_acceptance": {"9,3,3": 2.0}}},
        "num_speculative_tokens_per_batch_size='auto', which a draft with tree_acceptance turns on, "
        "times steps of up to 61 tokens, and "
        "max_model_len is 50: name num_speculative_tokens instead",
    ),
    "sliding window": (
        {"hf_overrides": {"sliding_window": 64, "use_sliding_window": True}},
        f"{NOT_SUPPORTED} sliding-window attention: use a full-attention target",
    ),
    "Runner V1": (
        {"environment": {"VLLM_USE_V2_MODEL_RUNNER": "0"}},
        f"{NOT_SUPPORTED} Model Runner V1: it needs Model Runner V2; on a CPU set "
        "VLLM_GRIFFIN_CPU=1, elsewhere unset VLLM_USE_V2_MODEL_RUNNER",
    ),
    "unknown kernels": (
        {"environment": {"VLLM_GRIFFIN_KERNELS": "cuda"}},
        "VLLM_GRIFFIN_KERNELS='cuda' is not one of auto, torch, triton",
    ),
    "trace in no folder": (
        {"environment": {"VLLM_GRIFFIN_TRACE": "/nowhere/trace.jsonl"}},
        "VLLM_GRIFFIN_TRACE=/nowhere/trace.jsonl cannot be written: ...",
    ),
    "trace a folder": (
        {"environment": {"VLLM_GRIFFIN_TRACE": "/"}},
        "VLLM_GRIFFIN_TRACE=/ cannot be written: ...",
    ),
    "tree attention's form": (
        {"environment": {"VLLM_GRIFFIN_TREE_ATTENTION": "flash"}},
        "VLLM_GRIFFIN_TREE_ATTENTION='flash' is not one of auto, split, prefix",
    ),
    "misspelt variable": (
        {"environment": {"VLLM_GRIFFIN_KERNEL": "torch"}},
        "the variable VLLM_GRIFFIN_KERNEL is not known: did you mean 'VLLM_GRIFFIN_KERNELS'?",
    ),
    "unknown variable": (
        {"environment": {"VLLM_GRIFFIN_SPEED_OF_LIGHT": "1"}},
        "the variable VLLM_GRIFFIN_SPEED_OF_LIGHT is not known: leave it out (known: ...)",
    ),
}


@pytest.mark.parametrize("name", ENGINES)
def test_engine_is_refused_in_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, expected = ENGINES[name]
    for variable, value in engine.get("environment", {}).items():
        monkeypatch.setenv(variable, value)
    arguments = {key: value for key, value in engine.items() if key != "environment"}
    assert_sentence(refused(**arguments), expected)


# What vLLM says of a target or of the rest of its config; to make such targets takes minutes.
TRAITS: dict[str, tuple[str, Any, str]] = {
    "MLA": (
        "model_config.use_mla",
        True,
        "multi-head latent attention: use a target with MHA or GQA",
    ),
    "images": (
        "model_config.supports_multimodal_inputs",
        True,
        "multimodal targets: use a text-only target",
    ),
    "Mamba": (
        "model_config.is_attention_free",
        True,
        "hybrid or attention-free targets: use a full-attention target",
    ),
    "hybrid": (
        "model_config.is_hybrid",
        True,
        "hybrid or attention-free targets: use a full-attention target",
    ),
    "M-RoPE": ("model_config.uses_mrope", True, "M-RoPE: use a target with 1-D positions"),
    "encoder": (
        "model_config.is_encoder_decoder",
        True,
        "encoder-decoder targets: use a decoder-only target",
    ),
    "pooling": ("model_config.runner_type", "pooling", "pooling: use runner='generate'"),
    "chunked attention": (
        "model_config.hf_text_config.attention_chunk_size",
        8192,
        "chunked local attention: use a full-attention target",
    ),
    "soft-capping": (
        "model_config.hf_text_config.attn_logit_softcapping",
        50.0,
        "ALiBi or logit soft-capping: use a target without them",
    ),
    "ALiBi": (
        "model_config.hf_text_config.alibi",
        True,
        "ALiBi or logit soft-capping: use a target without them",
    ),
    "replay": (
        "model_config.enable_trace_replay",
        True,
        "trace replay: leave enable_trace_replay off",
    ),
    "sampling masks": (
        "model_config.return_sampling_mask",
        True,
        "sampling masks: leave return_sampling_mask off",
    ),
    "decode contexts": (
        "parallel_config.decode_context_parallel_size",
        2,
        "decode context parallelism: set decode_context_parallel_size=1",
    ),
    "prefill contexts": (
        "parallel_config.prefill_context_parallel_size",
        2,
        "prefill context parallelism: set prefill_context_parallel_size=1",
    ),
    "two batches": (
        "parallel_config.enable_dbo",
        True,
        "dual batch overlap: leave enable_dbo and ubatch_size off",
    ),
    "offloading": (
        "kv_transfer_config",
        "some connector",
        "KV connectors and offloading: leave kv_transfer_config and KV offloading out",
    ),
    "shared keys": (
        "cache_config.kv_sharing_fast_prefill",
        True,
        "KV-sharing fast prefill: leave kv_sharing_fast_prefill off",
    ),
    "watermark": ("watermark_config", "some key", "watermarking: leave watermark_config out"),
}


@pytest.mark.parametrize("name", TRAITS)
def test_trait_is_refused_in_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, value, expected = TRAITS[name]
    whole = make()
    *parts, attribute = path.split(".")
    part = functools.reduce(getattr, parts, whole)
    computed = isinstance(getattr(type(part), attribute, None), property)
    monkeypatch.setattr(type(part) if computed else part, attribute, value, raising=False)
    with pytest.raises(ValueError) as caught:
        check_engine(whole)
    assert_sentence(caught.value, f"{NOT_SUPPORTED} {expected}")
