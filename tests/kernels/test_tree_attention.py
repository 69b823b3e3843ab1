"""Tree attention: an obvious loop, the torch reference and the Triton kernel agree."""

import dataclasses
import functools
import itertools

import pytest
import torch

from tests.kernels.attention_cases import (
    CASES,
    CONTEXT,
    DEVICE,
    FACTORS,
    FP8,
    TOLERANCE,
    TOLERANCES,
    UNTOUCHED,
    Case,
    build,
    context_of,
    obvious_loop,
    of_setting,
    quick,
    rows_of_trees,
    run,
)
from tests.kernels.pairwise import pairs, pairwise
from vllm_griffin.kernels.tree_attention import (
    num_splits,
    tree_attention_reference,
    tree_attention_triton,
)
from vllm_griffin.kernels.tree_attention_cpu import tree_attention_cpu

GRID = pairwise(FACTORS, quick)


@pytest.mark.parametrize("name", ["prefix_0_1_edge_long_and_skipped", "draft_level", "one_kv_head"])
@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
def test_reference_is_the_obvious_loop(name, dtype, atol, rtol):
    x = build(CASES[name], dtype)
    expected = obvious_loop(x)
    run(tree_attention_reference, x)
    torch.testing.assert_close(x["out"].double(), expected, atol=atol, rtol=rtol)


QUANTISED = {
    "tail_in_scratch": Case(prefix=[13, 20, 0], rows=[7, 5, 3], cache_dtype=FP8),
    "tail_in_cache": Case(prefix=[13, 20, 0], rows=[7, 5, 3], cache_dtype=FP8, tail_cached=True),
    "queries_too": Case(
        (6, 3), prefix=[40, 20], cache_dtype=FP8, tail_cached=True, quantised_queries=True
    ),
    "queries_too_tail_in_scratch": Case(cache_dtype=FP8, quantised_queries=True),
    "e5m2": Case(prefix=[13, 40], cache_dtype=torch.float8_e5m2, transposed_keys=True),
}


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
def test_a_quantised_cache_is_scaled(name, dtype, atol, rtol):
    x = build(QUANTISED[name], dtype)
    expected = obvious_loop(x)
    check_twins(x, atol, rtol, splits=2)
    torch.testing.assert_close(x["out"].double(), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("op", [tree_attention_reference, tree_attention_triton])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_cached_tail_is_read_from_the_cache(op, transposed):
    """Across a block's edge, within one block, and where the prefix ends with a block or is empty."""
    case = Case(prefix=[13, 20, 16, 0], rows=[7, 5, 4, 3], transposed_keys=transposed)
    scratch = build(case, torch.float32)
    cached = build(dataclasses.replace(case, tail_cached=True), torch.float32)
    assert cached["k_tail"].isnan().all()
    run(op, scratch)
    run(op, cached)
    torch.testing.assert_close(cached["out"], scratch["out"])


@pytest.mark.parametrize("name", CASES)
def test_triton_is_the_reference(name):
    check_twins(build(CASES[name], torch.float32), *TOLERANCES[0][1:])


@pytest.mark.parametrize("name", ["transposed_keys_head_80", "draft_level"])
@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES[1:])
def test_triton_is_the_reference_in_half_precision(name, dtype, atol, rtol):
    check_twins(build(CASES[name], dtype), atol, rtol)


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("name", CASES)
def test_a_split_prefix_is_the_reference(name, splits):
    """Also where splits have no key, or no request has as many blocks as there are splits."""
    check_twins(build(CASES[name], torch.float32), *TOLERANCES[0][1:], splits)


@pytest.mark.parametrize("setting", GRID, ids=[" ".join(map(str, s.values())) for s in GRID])
def test_triton_is_the_reference_over_the_grid(setting):
    dtype = setting["dtype"]
    check_twins(build(of_setting(setting), dtype), *TOLERANCE[dtype], setting["splits"])


on_a_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="a form for CPUs")


@on_a_cpu
@pytest.mark.parametrize("name", CASES)
def test_the_form_for_a_cpu_is_the_reference(name):
    check_cpu_form(CASES[name], torch.float32)


@on_a_cpu
@pytest.mark.parametrize("setting", GRID, ids=[" ".join(map(str, s.values())) for s in GRID])
def test_the_form_for_a_cpu_is_the_reference_over_the_grid(setting):
    check_cpu_form(of_setting(setting), setting["dtype"])


@on_a_cpu
@pytest.mark.parametrize("name", QUANTISED)
def test_the_form_for_a_cpu_scales_a_quantised_cache(name):
    check_cpu_form(QUANTISED[name], torch.bfloat16)


@on_a_cpu
def test_layers_of_a_step_share_buffers_but_no_numbers():
    """A second layer with other keys, values and queries; and one with other heads."""
    x = build(Case(prefix=[40, 3], rows=[4, 6], tail_cached=True), torch.float32)
    context = context_of(x)
    other = build(Case(prefix=[40, 3], rows=[4, 6], tail_cached=True), torch.float32, seed=1)
    heads = build(Case((6, 2), prefix=[40, 3], rows=[4, 6], tail_cached=True), torch.float32)
    # In the same blocks.
    other |= {"k_cache": x["k_cache"] * 2, "v_cache": x["v_cache"] - 1}
    heads |= {"k_cache": x["k_cache"] + 1, "v_cache": x["v_cache"] * 3}
    for layer in (x, other, heads, x):
        expected = layer | {"out": layer["out"].clone()}
        for name in CONTEXT:
            expected[name] = x[name]
        run(tree_attention_reference, expected)
        tree_attention_cpu(*(layer[n] for n in OPERANDS), context, layer["scale"], layer["out"])
        torch.testing.assert_close(layer["out"], expected["out"])


def test_the_form_for_a_cpu_refuses_a_tail_that_is_not_cached():
    with pytest.raises(AssertionError, match="reference"):
        run_cpu_form(build(Case(), torch.float32))


def check_cpu_form(case: Case, dtype: torch.dtype) -> None:
    x = build(dataclasses.replace(case, tail=None, tail_cached=True), dtype)
    twin = x | {"out": x["out"].clone()}
    run(tree_attention_reference, x)
    run_cpu_form(twin)
    atol, rtol = TOLERANCE[dtype]
    assert torch.isfinite(x["out"]).all()
    torch.testing.assert_close(twin["out"], x["out"], atol=atol, rtol=rtol)


OPERANDS = ("q", "k_cache", "v_cache")


def run_cpu_form(x: dict) -> None:
    operands = (x[name] for name in OPERANDS)
    tree_attention_cpu(*operands, context_of(x), x["scale"], x["out"], x["scales"])


def test_the_grid_holds_every_pair_of_values():
    assert len(set().union(*map(pairs, GRID))) == sum(
        len(a) * len(b) for a, b in itertools.combinations(FACTORS.values(), 2)
    )


def check_twins(x: dict, atol: float, rtol: float, splits: int = 1) -> None:
    twin = x | {"out": x["out"].clone()}
    run(tree_attention_reference, x)
    run(functools.partial(tree_attention_triton, splits=splits), twin)
    assert torch.isfinite(x["out"]).all()
    torch.testing.assert_close(twin["out"], x["out"], atol=atol, rtol=rtol)
    of_trees = rows_of_trees(x)
    assert (twin["out"][~of_trees] == UNTOUCHED).all()
    assert not (twin["out"][of_trees] == UNTOUCHED).any()


@pytest.mark.parametrize(
    ("programs", "max_keys", "splits"),
    [(8, 32768, 16), (32, 32768, 4), (200, 32768, 1), (8, 1024, 4), (8, 64, 1), (1, 1 << 20, 32)],
)
def test_a_prefix_is_split_while_multiprocessors_idle(programs, max_keys, splits):
    assert num_splits(programs, max_keys, multiprocessors=132) == splits


@pytest.mark.parametrize("op", [tree_attention_reference, tree_attention_triton])
def test_a_row_that_sees_nothing_is_zero(op):
    x = build(Case(prefix=[0, 4], rows=[3, 2]), torch.float32)
    x["tail_bits"][:, 1] = 0
    run(op, x)
    assert torch.isfinite(x["out"]).all()
    first, second = x["q_start"].tolist()
    assert (x["out"][first + 1] == 0).all()
    assert (x["out"][first] != 0).any()
    assert (x["out"][second + 1] != 0).any()


@pytest.mark.parametrize("op", [tree_attention_reference, tree_attention_triton])
def test_skipped_requests_stay_untouched(op):
    x = build(Case(prefix=[3, 40], rows=[4, 4]), torch.float32)
    x["num_rows"][1] = 0
    run(op, x)
    second = int(x["q_start"][1])
    assert (x["out"][second:] == UNTOUCHED).all()
    assert (x["out"][1:second] != UNTOUCHED).any()
