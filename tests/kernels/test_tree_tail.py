"""Attention that goes on from a prefix that another kernel attended: as tree attention of both."""

import pytest
import torch

from tests.kernels.attention_cases import (
    CASES,
    FACTORS,
    FP8,
    TOLERANCE,
    TOLERANCES,
    UNTOUCHED,
    Case,
    build,
    flash_attention,
    of_setting,
    quick,
    rows_of_trees,
    run,
)
from tests.kernels.pairwise import pairwise
from vllm_griffin.kernels.tree_attention import tree_attention_reference
from vllm_griffin.kernels.tree_tail import tree_tail_reference, tree_tail_triton

OPS = [tree_tail_reference, tree_tail_triton]
# Of the grid of tree attention what a tail has; long prefixes are the other kernel's.
GRID = pairwise(
    {
        **{n: v for n, v in FACTORS.items() if n not in ("splits", "tail_cached", "context")},
        "context": (0, 1, 300, 2048),
    },
    quick,
)


def prefix_attention(x: dict, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention of the inputs, [T, H, D] and [H, T]; the queries before a tree take part."""
    ends = x["q_start"] + x["num_rows"]
    q, k, v = x["q"].float(), x["k_cache"].float(), x["v_cache"].float()
    if x["scales"] is not None:
        k = k * x["scales"].k.view(-1, 1, 1)
        v = v * x["scales"].v.view(-1, 1, 1)
        if x["scales"].q is not None:
            q = q * x["scales"].q.repeat_interleave(q.shape[1] // k.shape[1])[:, None]
    out, lse = flash_attention(
        q=q,
        k=k.transpose(1, 2),
        v=v.transpose(1, 2),
        cu_seqlens_q=torch.cat([ends.new_zeros(1), ends]),
        max_seqlen_q=len(q),
        seqused_k=x["prefix_lens"],
        max_seqlen_k=int(x["prefix_lens"].max()),
        softmax_scale=x["scale"],
        causal=False,
        block_table=x["block_table"],
        return_softmax_lse=True,
    )
    return out.to(dtype), lse


def check(op, case: Case, dtype: torch.dtype) -> None:
    case.tail_cached = True
    x = build(case, dtype)
    expected = x | {"out": x["out"].clone()}
    run(tree_attention_reference, expected)
    prefix_out, prefix_lse = prefix_attention(x, dtype)
    given = {n: t for n, t in x.items() if n not in ("k_tail", "v_tail")}
    run(op, given | {"prefix_out": prefix_out, "prefix_lse": prefix_lse})
    atol, rtol = TOLERANCE[dtype]
    torch.testing.assert_close(x["out"], expected["out"], atol=atol, rtol=rtol)
    of_trees = rows_of_trees(x)
    assert (x["out"][~of_trees] == UNTOUCHED).all()
    assert not (x["out"][of_trees] == UNTOUCHED).any()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.tail is None])
def test_goes_on_from_the_prefix(op, name):
    case = CASES[name]
    check(op, Case(**vars(case)), torch.float32)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("quantised_queries", [False, True])
@pytest.mark.parametrize("dtype", [dtype for dtype, *_ in TOLERANCES])
def test_goes_on_in_a_quantised_cache(op, dtype, quantised_queries):
    prefix, rows = [13, 20, 0], [7, 5, 3]
    quantised = {"cache_dtype": FP8, "quantised_queries": quantised_queries}
    check(op, Case((6, 2), prefix=prefix, rows=rows, **quantised), dtype)


@pytest.mark.parametrize("setting", GRID, ids=[" ".join(map(str, s.values())) for s in GRID])
def test_triton_goes_on_over_the_grid(setting):
    check(tree_tail_triton, of_setting(setting | {"tail_cached": True}), setting["dtype"])


@pytest.mark.parametrize("op", OPS)
def test_result_may_lie_where_the_prefix_does(op):
    """Each row is read before it is written."""
    x = build(Case(tail_cached=True, prefix=[20, 37]), torch.float32)
    expected = x | {"out": x["out"].clone()}
    run(tree_attention_reference, expected)
    prefix_out, prefix_lse = prefix_attention(x, torch.float32)
    of_trees = rows_of_trees(x)
    given = {n: t for n, t in x.items() if n not in ("k_tail", "v_tail")}
    run(op, given | {"prefix_out": prefix_out, "prefix_lse": prefix_lse, "out": prefix_out})
    torch.testing.assert_close(prefix_out[of_trees], expected["out"][of_trees])


@pytest.mark.parametrize("op", OPS)
def test_a_row_that_sees_nothing_is_zero(op):
    x = build(Case(prefix=[0, 4], rows=[3, 2], tail_cached=True), torch.float32)
    x["tail_bits"][:, 1] = 0
    prefix_out, prefix_lse = prefix_attention(x, torch.float32)
    given = {n: t for n, t in x.items() if n not in ("k_tail", "v_tail")}
    run(op, given | {"prefix_out": prefix_out, "prefix_lse": prefix_lse})
    first, second = x["q_start"].tolist()
    assert (x["out"][first + 1] == 0).all()
    torch.testing.assert_close(x["out"][second + 1], prefix_out[second + 1])
