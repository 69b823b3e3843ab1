"""Tree attention: an obvious loop, the torch reference and the Triton kernel agree."""

import functools
import itertools
from dataclasses import dataclass, field, fields

import pytest
import torch

from tests.kernels.pairwise import pairs, pairwise
from vllm_griffin.kernels.packed_bits import num_words
from vllm_griffin.kernels.tree_attention import (
    TreeContext,
    num_splits,
    tree_attention_reference,
    tree_attention_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNTOUCHED = 7.0


@dataclass
class Case:
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 32
    block_size: int = 16
    prefix: list[int] = field(default_factory=lambda: [20, 0])
    # Query rows, tail keys of each request.
    rows: list[int] = field(default_factory=lambda: [3, 5])
    tail: list[int] | None = None
    max_rows: int | None = None
    transposed_keys: bool = False
    # Query rows before those of each request: of a prefill, or of nobody.
    other_rows: list[int] | None = None


CASES = {
    "prefix_0_1_edge_long_and_skipped": Case((4, 4), prefix=[0, 1, 16, 300], rows=[2, 1, 0, 5]),
    "one_kv_head": Case((8, 1), 64, 32, [31, 32, 33], [7, 0, 3]),
    "transposed_keys_head_80": Case((6, 2), 80, 128, [128, 0], [13, 61], transposed_keys=True),
    "two_words_head_96": Case((3, 3), 96, 16, [200, 5], [65, 64]),
    "three_words_head_128": Case((4, 2), 128, 32, [17, 40], [130, 2], transposed_keys=True),
    "draft_level": Case((9, 3), 64, 16, [33, 7, 90], [10, 10, 10], tail=[20, 50, 30]),
    "draft_level_two_words": Case((2, 1), 32, 16, [9, 70], [10, 10], tail=[90, 110]),
    "chain_of_one": Case((2, 2), prefix=[5, 0, 64], rows=[1, 1, 1]),
    "rows_below_max": Case((4, 2), prefix=[5, 40], rows=[2, 3], max_rows=61),
}
TOLERANCES = [
    (torch.float32, 2e-5, 2e-5),
    (torch.bfloat16, 1e-2, 1.6e-2),
    (torch.float16, 2e-3, 2e-3),
]
TOLERANCE = {dtype: rest for dtype, *rest in TOLERANCES}
# What a target and a batch can be; every pair of values is tested.
FACTORS = {
    "group": (1, 2, 4, 8),
    "head_dim": (64, 80, 96, 128, 256),
    "block_size": (16, 32, 64, 128),
    "context": (0, 1, 300, 2048, 32768),
    "rows": (2, 8, 31, 60, 65),
    "splits": (1, 4),
    "prefill": (False, True),
    "dtype": (torch.float16, torch.bfloat16),
}


def quick(setting: dict) -> bool:
    """Whether the interpreter is done in a few seconds: long contexts with few rows of a key head."""
    long = setting.get("context", 0) == 32768
    return not long or setting.get("group", 1) * setting.get("rows", 2) <= 70


GRID = pairwise(FACTORS, quick)


def random_bits(num_rows: int, num_tail: int, words: int) -> torch.Tensor:
    """Each row sees itself (one of the last tail keys) and a random half of those before.

    Keys that belong to no row are left unseen now and then, as in a scratch buffer.
    """
    bits = torch.zeros(num_rows, words, dtype=torch.int64)
    first_own = num_tail - num_rows
    for i in range(num_rows):
        earlier = [j for j in range(first_own + i) if j >= first_own or j % 5 != 2]
        half = torch.randperm(len(earlier))[: len(earlier) // 2].tolist()
        for j in [*(earlier[x] for x in half), first_own + i]:
            word = int(bits[i, j // 64]) | (1 << (j % 64))
            bits[i, j // 64] = word - (1 << 64) if word >= 1 << 63 else word
    return bits


def build(case: Case, dtype: torch.dtype, seed: int = 0) -> dict:
    """Inputs of the op; what must not be read is NaN, what must not be written is UNTOUCHED."""
    torch.manual_seed(seed)
    (heads, kv_heads), dim, size = case.heads, case.head_dim, case.block_size
    tail = case.tail or case.rows
    batch, max_rows = len(case.rows), case.max_rows or max(case.rows)
    words = num_words(max(tail))
    blocks = [-(-p // size) for p in case.prefix]
    order = torch.randperm(sum(blocks) + 3)
    table = torch.full((batch, max(blocks) + 1), 10**6, dtype=torch.int32)
    shape = (len(order), kv_heads, size, dim)
    k_cache, v_cache = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
    for b, prefix in enumerate(case.prefix):
        mine = order[sum(blocks[:b]) :][: blocks[b]]
        table[b, : blocks[b]] = mine
        for j in range(prefix):
            k_cache[mine[j // size], :, j % size] = torch.randn(kv_heads, dim)
            v_cache[mine[j // size], :, j % size] = torch.randn(kv_heads, dim)
    if case.transposed_keys:
        k_cache = k_cache.mT.contiguous().mT
    bits = torch.zeros(batch, max_rows, words, dtype=torch.int64)
    # Rows past a request's own must be ignored whatever their bits.
    bits[:] = -1
    for b, (n, t) in enumerate(zip(case.rows, tail, strict=True)):
        bits[b, :n] = random_bits(n, t, words)
    seen_by_any = torch.ones(sum(tail), dtype=torch.bool)
    k_tail, v_tail = torch.randn(2, sum(tail), kv_heads + 1, dim).unbind(0)
    starts = torch.tensor([0, *tail]).cumsum(0)
    for b, (n, t) in enumerate(zip(case.rows, tail, strict=True)):
        for j in range(t):
            seen_by_any[starts[b] + j] = any((int(w[j // 64]) >> (j % 64)) & 1 for w in bits[b, :n])
    k_tail[~seen_by_any], v_tail[~seen_by_any] = float("nan"), float("nan")
    others = case.other_rows or [1] + [0] * (batch - 1)
    q = torch.randn(sum(case.rows) + sum(others) + 1, heads, dim)
    spans = torch.tensor([x for pair in zip(others, case.rows, strict=True) for x in pair])
    tensors = {
        "q": q.to(dtype),
        "k_cache": k_cache.to(dtype),
        "v_cache": v_cache.to(dtype),
        "k_tail": k_tail.to(dtype)[:, 1:],
        "v_tail": v_tail.to(dtype)[:, :-1],
        "block_table": table,
        "prefix_lens": torch.tensor(case.prefix, dtype=torch.int32),
        "q_start": spans.cumsum(0)[::2].int(),
        "num_rows": torch.tensor(case.rows, dtype=torch.int32),
        "tail_start": starts[:-1],
        "tail_bits": bits,
        "out": torch.full_like(q, UNTOUCHED).to(dtype),
    }
    return {n: t.to(DEVICE) for n, t in tensors.items()} | {"scale": dim**-0.5}


CONTEXT = [f.name for f in fields(TreeContext) if f.name != "tail_cached"]


def run(op, x: dict) -> None:
    """`op` on the inputs of `build`."""
    tail_cached = x.get("tail_cached", False)
    context = TreeContext(**{name: x[name] for name in CONTEXT}, tail_cached=tail_cached)
    rest = x.keys() - {*CONTEXT, "tail_cached"}
    op(**{name: x[name] for name in rest}, context=context)


def obvious_loop(x: dict) -> torch.Tensor:
    """One softmax per row and head, in float64."""
    out = x["out"].double().clone()
    size, group = x["k_cache"].shape[2], x["q"].shape[1] // x["k_cache"].shape[1]
    for b in range(len(x["num_rows"])):
        for i in range(int(x["num_rows"][b])):
            places = range(int(x["prefix_lens"][b]))
            cached = [(int(x["block_table"][b, j // size]), j % size) for j in places]
            words = x["tail_bits"][b, i].tolist()
            seen = [j for j in range(64 * len(words)) if words[j // 64] >> (j % 64) & 1]
            row, start = int(x["q_start"][b]) + i, int(x["tail_start"][b])
            for h in range(x["q"].shape[1]):
                kv = h // group
                keys = [x["k_cache"][c, kv, o] for c, o in cached]
                keys += [x["k_tail"][start + j, kv] for j in seen]
                values = [x["v_cache"][c, kv, o] for c, o in cached]
                values += [x["v_tail"][start + j, kv] for j in seen]
                scores = torch.stack(keys).double() @ x["q"][row, h].double() * x["scale"]
                out[row, h] = scores.softmax(0) @ torch.stack(values).double()
    return out


@pytest.mark.parametrize("name", ["prefix_0_1_edge_long_and_skipped", "draft_level", "one_kv_head"])
@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
def test_reference_is_the_obvious_loop(name, dtype, atol, rtol):
    x = build(CASES[name], dtype)
    expected = obvious_loop(x)
    run(tree_attention_reference, x)
    torch.testing.assert_close(x["out"].double(), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_cached_tail_is_read_from_the_cache(transposed):
    """Across a block's edge, within one block, and where the prefix ends with a block or is empty."""
    case = Case(prefix=[13, 20, 16, 0], rows=[7, 5, 4, 3], transposed_keys=transposed)
    x = build(case, torch.float32)
    expected = x | {"out": x["out"].clone()}
    run(tree_attention_reference, expected)
    table = torch.arange(12, dtype=torch.int32).view(4, 3).to(DEVICE)
    for side in ("k", "v"):
        cache, tail = x[f"{side}_cache"], x[f"{side}_tail"]
        moved = torch.full((12, *cache.shape[1:]), float("nan"), device=DEVICE)
        moved = moved.mT.contiguous().mT if transposed else moved
        for b, (prefix, rows) in enumerate(zip(case.prefix, case.rows, strict=True)):
            start = int(x["tail_start"][b])
            for j in range(prefix + rows):
                old = cache[x["block_table"][b, j // 16], :, j % 16] if j < prefix else None
                new = tail[start + j - prefix] if old is None else old
                moved[table[b, j // 16], :, j % 16] = new
        x[f"{side}_cache"], x[f"{side}_tail"] = moved, torch.full_like(tail, float("nan"))
    run(tree_attention_reference, x | {"block_table": table, "tail_cached": True})
    torch.testing.assert_close(x["out"], expected["out"])


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
    dtype, group = setting["dtype"], setting["group"]
    rows, context = setting["rows"], setting["context"]
    case = Case(
        (2 * group, 2) if context < 32768 else (group, 1),
        setting["head_dim"],
        setting["block_size"],
        [context, min(context, 33)],
        [rows, 2],
        other_rows=[40, 7] if setting["prefill"] else None,
    )
    check_twins(build(case, dtype), *TOLERANCE[dtype], setting["splits"])


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
    of_trees = torch.zeros(len(x["out"]), dtype=torch.bool, device=DEVICE)
    for start, n in zip(x["q_start"].tolist(), x["num_rows"].tolist(), strict=True):
        of_trees[start : start + n] = True
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
