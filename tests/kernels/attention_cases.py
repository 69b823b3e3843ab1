"""Inputs of attention kernels: batches of trees, in every form that a cache and a tail can have."""

from dataclasses import dataclass, field, fields

import torch

from vllm_griffin.kernels.packed_bits import num_words
from vllm_griffin.kernels.tree_attention import QuantScales, TreeContext

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNTOUCHED = 7.0
FP8 = torch.float8_e4m3fn


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
    # The tail's keys and values are in the cache, behind the prefix.
    tail_cached: bool = False
    # None: the activations' dtype.
    cache_dtype: torch.dtype | None = None
    quantised_queries: bool = False


CASES = {
    "prefix_0_1_edge_long_and_skipped": Case((4, 4), prefix=[0, 1, 16, 300], rows=[2, 1, 0, 5]),
    "one_kv_head": Case((8, 1), 64, 32, [31, 32, 33], [7, 0, 3]),
    "transposed_keys_head_80": Case((6, 2), 80, 128, [128, 0], [13, 61], transposed_keys=True),
    "two_words_head_96": Case((3, 3), 96, 16, [200, 5], [65, 64]),
    "three_words_head_128": Case((4, 2), 128, 32, [17, 40], [130, 2], transposed_keys=True),
    "draft_level": Case((9, 3), 64, 16, [33, 7, 90], [10, 10, 10], tail=[20, 50, 30]),
    "draft_level_two_words": Case((2, 1), 32, 16, [9, 70], [10, 10], tail=[90, 110]),
    "chain_of_one": Case((2, 2), prefix=[5, 0, 64], rows=[1, 1, 1]),
    "one_row_of_one_head": Case((1, 1), prefix=[40, 3], rows=[1, 1]),
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
    "cache": (None, FP8),
    "tail_cached": (False, True),
}


def quick(setting: dict) -> bool:
    """Whether the interpreter is done in a few seconds: long contexts with few numbers a key head."""
    numbers = setting.get("group", 1) * setting.get("rows", 2) * setting.get("head_dim", 64)
    eight_bits = setting.get("cache") is not None
    return setting.get("context", 0) < 32768 or numbers * (1 + eight_bits) <= 65 * 80


def of_setting(setting: dict) -> Case:
    """A large and a small tree of one combination of `FACTORS`."""
    group, rows, context = setting["group"], setting["rows"], setting["context"]
    return Case(
        (2 * group, 2) if context < 32768 else (group, 1),
        setting["head_dim"],
        setting["block_size"],
        [context, min(context, 33)],
        [rows, 2],
        other_rows=[40, 7] if setting["prefill"] else None,
        tail_cached=setting["tail_cached"],
        cache_dtype=setting["cache"],
    )


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
    (heads, kv_heads), dim = case.heads, case.head_dim
    tail = case.tail or case.rows
    batch, max_rows = len(case.rows), case.max_rows or max(case.rows)
    words = num_words(max(tail))
    bits = torch.zeros(batch, max_rows, words, dtype=torch.int64)
    # Rows past a request's own must be ignored whatever their bits.
    bits[:] = -1
    for b, (n, t) in enumerate(zip(case.rows, tail, strict=True)):
        bits[b, :n] = random_bits(n, t, words)
    # Keys, then values, of each request's prefix and tail; tail keys that no row sees are NaN.
    texts = [torch.randn(2, p + t, kv_heads, dim) for p, t in zip(case.prefix, tail, strict=True)]
    for b, (p, n, t) in enumerate(zip(case.prefix, case.rows, tail, strict=True)):
        for j in range(t):
            if not any((int(w[j // 64]) >> (j % 64)) & 1 for w in bits[b, :n]):
                texts[b][:, p + j] = float("nan")
    others = case.other_rows or [1] + [0] * (batch - 1)
    q = torch.randn(sum(case.rows) + sum(others) + 1, heads, dim)
    spans = torch.tensor([x for pair in zip(others, case.rows, strict=True) for x in pair])
    starts = torch.tensor([0, *tail]).cumsum(0)
    caches, table = _paged(case, texts, dtype)
    tails = torch.full((2, sum(tail), kv_heads + 1, dim), float("nan"))
    if not case.tail_cached:
        tails[:, :, 1:] = torch.cat([x[:, p:] for x, p in zip(texts, case.prefix, strict=True)], 1)
    tensors = {
        "q": q.to(dtype),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "k_tail": tails[0].to(dtype)[:, 1:],
        "v_tail": tails[1].to(dtype)[:, 1:],
        "block_table": table,
        "prefix_lens": torch.tensor(case.prefix, dtype=torch.int32),
        "q_start": spans.cumsum(0)[::2].int(),
        "num_rows": torch.tensor(case.rows, dtype=torch.int32),
        "tail_start": starts[:-1],
        "tail_bits": bits,
        "out": torch.full_like(q, UNTOUCHED).to(dtype),
    }
    scales = None
    if case.cache_dtype is not None:
        k, v, q_scale = _scales(kv_heads)
        if case.quantised_queries:
            per_head = q_scale.repeat_interleave(heads // kv_heads)
            tensors["q"] = (q / per_head[:, None]).to(FP8)
        # As vLLM's per-tensor scales: one number for all heads.
        v = v[:1].expand(kv_heads)
        scales = QuantScales(k.to(DEVICE), v.to(DEVICE), q_scale.to(DEVICE))
        scales = scales if case.quantised_queries else QuantScales(scales.k, scales.v)
    return {n: t.to(DEVICE) for n, t in tensors.items()} | {
        "scale": dim**-0.5,
        "tail_cached": case.tail_cached,
        "scales": scales,
    }


def _scales(kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of keys, values and queries; randn fills the range of an 8-bit float with them."""
    head = torch.arange(kv_heads)
    return 0.02 + 0.003 * head, torch.full((kv_heads,), 0.017), 0.05 + 0.01 * head


def _paged(
    case: Case, texts: list[torch.Tensor], dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Cached keys and values in blocks of any order, and the block table."""
    (_, kv_heads), size = case.heads, case.block_size
    lengths = [
        x.shape[1] if case.tail_cached else p for x, p in zip(texts, case.prefix, strict=True)
    ]
    blocks = [-(-n // size) for n in lengths]
    order = torch.randperm(sum(blocks) + 3)
    table = torch.full((len(texts), max(blocks) + 1), 10**6, dtype=torch.int32)
    caches = torch.full((2, len(order), kv_heads, size, case.head_dim), float("nan"))
    for b, (text, n) in enumerate(zip(texts, lengths, strict=True)):
        table[b, : blocks[b]] = order[sum(blocks[:b]) :][: blocks[b]]
        place = torch.arange(n)
        block, offset = table[b, place // size].long(), place % size
        caches[:, block, :, offset] = text[:, :n].transpose(0, 1)
    kept = dtype if case.cache_dtype is None else case.cache_dtype
    if case.cache_dtype is not None:
        k, v, _ = _scales(kv_heads)
        caches /= torch.stack([k, v[:1].expand(kv_heads)]).view(2, 1, kv_heads, 1, 1)
    keys, values = caches.unbind(0)
    keys = keys.mT.contiguous().to(kept).mT if case.transposed_keys else keys.to(kept)
    return [keys, values.to(kept)], table


CONTEXT = [f.name for f in fields(TreeContext)]


def context_of(x: dict) -> TreeContext:
    """The context among the inputs of `build`."""
    return TreeContext(**{name: x[name] for name in CONTEXT})


def run(op, x: dict) -> None:
    """`op` on the inputs of `build`."""
    op(**{name: x[name] for name in x.keys() - {*CONTEXT}}, context=context_of(x))


def obvious_loop(x: dict) -> torch.Tensor:
    """One softmax per row and head, in float64."""
    out = x["out"].double().clone()
    size, kv_heads = x["k_cache"].shape[2], x["k_cache"].shape[1]
    group, scales = x["q"].shape[1] // kv_heads, x["scales"]
    ones = torch.ones(kv_heads)
    k_scale, v_scale = (scales.k, scales.v) if scales else (ones, ones)
    q_scale = ones if scales is None or scales.q is None else scales.q
    for b in range(len(x["num_rows"])):
        for i in range(int(x["num_rows"][b])):
            words = x["tail_bits"][b, i].tolist()
            seen = [j for j in range(64 * len(words)) if words[j // 64] >> (j % 64) & 1]
            prefix = int(x["prefix_lens"][b])
            places = [*range(prefix), *(prefix + j for j in seen if x["tail_cached"])]
            cached = [(int(x["block_table"][b, j // size]), j % size) for j in places]
            own = [] if x["tail_cached"] else [int(x["tail_start"][b]) + j for j in seen]
            row = int(x["q_start"][b]) + i
            for h in range(x["q"].shape[1]):
                kv = h // group
                keys = [x["k_cache"][c, kv, o].double() * k_scale[kv] for c, o in cached]
                keys += [x["k_tail"][j, kv].double() for j in own]
                values = [x["v_cache"][c, kv, o].double() * v_scale[kv] for c, o in cached]
                values += [x["v_tail"][j, kv].double() for j in own]
                query = x["q"][row, h].double() * q_scale[kv]
                scores = torch.stack(keys) @ query * x["scale"]
                out[row, h] = scores.softmax(0) @ torch.stack(values)
    return out


def rows_of_trees(x: dict) -> torch.Tensor:
    """[T] bool."""
    found = torch.zeros(len(x["out"]), dtype=torch.bool, device=DEVICE)
    for start, n in zip(x["q_start"].tolist(), x["num_rows"].tolist(), strict=True):
        found[start : start + n] = True
    return found


def flash_attention(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: torch.Tensor,
    return_softmax_lse: bool,
    num_splits: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What vLLM's `flash_attn_varlen_func` gives of a paged cache [num_blocks, block_size, H_kv, D].

    Output [T, H, D] in q's dtype and the natural LSE [H, T]; NaN and +inf where it is undefined.
    """
    assert not causal and return_softmax_lse
    assert len(seqused_k) == len(block_table) == len(cu_seqlens_q) - 1
    out = torch.full(q.shape, float("nan"), device=q.device)
    lse = torch.full(q.shape[1::-1], float("inf"), device=q.device)
    size, group = k.shape[1], q.shape[1] // k.shape[2]
    for b, (first, end) in enumerate(cu_seqlens_q.unfold(0, 2, 1).tolist()):
        length = int(seqused_k[b])
        assert end - first <= max_seqlen_q and length <= max_seqlen_k
        if length == 0:
            continue
        place = torch.arange(length, device=q.device)
        block = block_table[b, place // size].long()
        keys, values = (
            x[block, place % size].float().repeat_interleave(group, 1).transpose(0, 1)
            for x in (k, v)
        )
        scores = q[first:end].float().transpose(0, 1) @ keys.mT * softmax_scale
        lse[:, first:end] = scores.logsumexp(-1)
        out[first:end] = (scores.softmax(-1) @ values).transpose(0, 1)
    return out.to(q.dtype), lse
