"""Time of each op beside its torch reference and beside the floor that memory sets.

    python benchmarks/kernels.py --output docs/results/kernels.json

On a GPU the Triton kernels are timed, on a CPU what runs there: the torch references, or a form of its
own. The floor is the bytes of an op's arguments and results (of tree attention: the context and what the
tree adds) over the bandwidth of a large copy on the same machine. Tree attention also stands beside the
engine's own attention of a chain of as many rows (FlashAttention on a GPU, vLLM's CPU kernel on a CPU), and
beside its other form, the prefix by FlashAttention (a stand-in on a CPU, which is no result). Default shape:
Llama-3-8B with its draft. Prints a table; writes JSON, Markdown and a picture.
"""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from common import numbers, write_table

from vllm_griffin.attention.prefix import attend_from_prefix, flash_attention
from vllm_griffin.kernels import (
    backend,
    kv_compaction,
    path_ranks,
    token_fusion,
    top_tokens,
    tree_growth,
    tree_order,
    verify,
)
from vllm_griffin.kernels import tree_attention as attention
from vllm_griffin.kernels.packed_bits import num_words
from vllm_griffin.kernels.token_fusion_cpu import fusion_norms_cpu
from vllm_griffin.kernels.tree_attention_cpu import tree_attention_cpu
from vllm_griffin.tree import TreeGrower

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEAD = ("op", "batch", "context", "ms", "of the floor", "of the reference",
        "of the engine's chain", "of the prefix form")  # fmt: skip
COPY_BYTES = 1 << 30 if DEVICE.type == "cuda" else 1 << 28


@dataclass(frozen=True)
class Shape:
    """A target, its tree, and a step of it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    block_size: int
    nodes: int
    depth: int
    top_k: int
    dtype: torch.dtype
    batch: int
    context: int

    @property
    def rows(self) -> int:
        """Rows of a request: the root and the nodes."""
        return 1 + self.nodes


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        run: What runs on this machine; `reference` is None where that is the reference itself.
        bytes: What the floor is made of.
        chain: The engine's own op for a chain of as many rows.
        prefix: Tree attention in its other form, the prefix by FlashAttention.
    """

    op: str
    run: Callable[[], object]
    reference: Callable[[], object] | None
    bytes: int
    chain: Callable[[], object] | None = None
    prefix: Callable[[], object] | None = None


def case(
    op: str,
    module: Any,
    name: str,
    arguments: tuple[Any, ...],
    moved: int | None = None,
    chain: Callable[[], object] | None = None,
) -> Case:
    """An op of a module of `kernels`; `moved` defaults to the bytes of arguments and results."""
    reference, triton = (getattr(module, f"{name}_{kind}") for kind in ("reference", "triton"))
    here = triton if backend.use_triton(DEVICE) else reference
    if moved is None:
        found = reference(*arguments)
        results = [found] if isinstance(found, torch.Tensor) else found
        moved = size(*(a for a in arguments if isinstance(a, torch.Tensor)), *results)
    return Case(
        op,
        lambda: here(*arguments),
        None if here is reference else lambda: reference(*arguments),
        moved,
        chain,
    )


def size(*tensors: torch.Tensor) -> int:
    """Bytes of all elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


def trees(shape: Shape) -> tree_order.OrderedTree:
    """Trees of random scores, grown as the speculator grows them."""
    grower, k = TreeGrower(shape.depth, shape.top_k, DEVICE), shape.top_k
    frontier = grower.begin(*children(shape.batch, k))
    for _ in range(shape.depth - 1):
        logprobs, tokens = children(shape.batch * k, k)
        frontier = grower.advance(frontier, logprobs.view(-1, k, k), tokens.view(-1, k, k))
    return grower.finish(shape.nodes)


def children(rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random log-probabilities and distinct tokens."""
    logprobs = torch.randn(rows, 4 * k, device=DEVICE).log_softmax(1).topk(k).values
    return logprobs, torch.arange(k, device=DEVICE).expand(rows, -1).contiguous()


def cases_of_any_context(shape: Shape) -> Iterator[Case]:
    """The ops of a step that do not see the context."""
    yield from tree_cases(shape, trees(shape))
    yield compaction_case(shape)
    rows = shape.batch * shape.top_k
    wide = torch.randn(3, rows, shape.hidden, device=DEVICE).to(shape.dtype)
    weights = torch.ones(2, shape.hidden, device=DEVICE).to(shape.dtype)
    arguments = (*wide, *weights, 1e-5)
    norms = case("fusion norms", token_fusion, "fusion_norms", arguments)
    if backend.runs_own_form(DEVICE):
        own = functools.partial(fusion_norms_cpu, *arguments)
        norms = dataclasses.replace(norms, run=own, reference=norms.run)
    yield norms
    logits = torch.randn(rows, shape.vocabulary, device=DEVICE).to(shape.dtype)
    yield case("top tokens", top_tokens, "top_tokens", (logits, shape.top_k))


def attention_case(shape: Shape) -> Case:
    """Verification of trees of 1 + N rows behind a paged context."""
    tree = trees(shape)
    total = shape.batch * shape.rows
    per_request = -(-(shape.context + shape.rows) // shape.block_size)
    blocks = shape.batch * per_request
    cache = torch.randn(
        blocks, shape.kv_heads, shape.block_size, 2 * shape.head_dim, device=DEVICE
    ).to(shape.dtype)
    table = torch.randperm(blocks, device=DEVICE).int().view(shape.batch, per_request)
    starts = torch.arange(shape.batch, dtype=torch.int32, device=DEVICE) * shape.rows
    prefix = torch.full_like(starts, shape.context)
    rows = torch.full_like(starts, shape.rows)
    context = attention.TreeContext(
        table, prefix, starts, rows, starts, tree.bits, tail_cached=True
    )
    q = torch.randn(total, shape.heads, shape.head_dim, device=DEVICE).to(shape.dtype)
    tail = torch.randn(2, total, shape.kv_heads, shape.head_dim, device=DEVICE).to(shape.dtype)
    out, scale = torch.empty_like(q), shape.head_dim**-0.5
    arguments = (q, *views(cache, shape), *tail, context, scale, out)
    read = 2 * shape.batch * shape.context * shape.kv_heads * shape.head_dim * q.itemsize
    found = case(
        "tree attention",
        attention,
        "tree_attention",
        arguments,
        read + size(q, tail, out, tree.bits),
        chain_attention(shape, q, cache, table, starts, prefix, out),
    )
    query_start = torch.cat([starts, starts[-1:] + shape.rows])
    from_prefix = functools.partial(
        attend_from_prefix,
        *(flash(), q, *views(cache, shape), context, query_start, shape.rows, shape.context),
        *(scale, out),
    )
    if backend.runs_own_form(DEVICE):
        on_cpu = functools.partial(tree_attention_cpu, q, *views(cache, shape), context, scale, out)
        found = dataclasses.replace(found, run=on_cpu, reference=found.run)
    return dataclasses.replace(found, prefix=from_prefix)


def flash() -> Callable[..., Any]:
    """vLLM's FlashAttention; on a CPU, where there is none, the tests' stand-in, whose time says nothing."""
    if DEVICE.type == "cuda":
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        version = get_flash_attn_version()
        assert version is not None, "FlashAttention runs on this GPU"
        return flash_attention(version)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.kernels.attention_cases import flash_attention as stand_in

    return stand_in


def views(cache: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer's cache as vLLM keeps them on this machine."""
    if DEVICE.type == "cuda":
        return cache.split(shape.head_dim, dim=-1)  # type: ignore[return-value]
    from vllm_griffin.attention.cpu import TreeCPUAttentionImpl

    reader = TreeCPUAttentionImpl.__new__(TreeCPUAttentionImpl)
    reader.head_size = shape.head_dim
    return reader.split_cache(cache)


def chain_attention(
    shape: Shape,
    q: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    prefix: torch.Tensor,
    out: torch.Tensor,
) -> Callable[[], object]:
    """The engine's own causal attention of as many rows behind the same context."""
    query_start = torch.cat([starts, starts[-1:] + shape.rows])
    lengths = prefix + shape.rows
    longest, scale = shape.context + shape.rows, shape.head_dim**-0.5
    if DEVICE.type == "cuda":
        from vllm.v1.attention.backends.fa_utils import (
            flash_attn_varlen_func,
            get_flash_attn_version,
        )

        k, v = cache.transpose(1, 2).split(shape.head_dim, dim=-1)
        return lambda: flash_attn_varlen_func(
            q=q, k=k, v=v, out=out, cu_seqlens_q=query_start, max_seqlen_q=shape.rows,
            seqused_k=lengths, max_seqlen_k=longest, softmax_scale=scale, causal=True,
            block_table=table, fa_version=get_flash_attn_version(),
        )  # fmt: skip
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(shape.dtype, shape.block_size, shape.head_dim)
    plan = ops.cpu_attn_get_scheduler_metadata(
        shape.batch, shape.heads, shape.kv_heads, shape.head_dim, lengths, shape.dtype,
        query_start, True, -1, isa, True,
    )  # fmt: skip
    halves = cache.view(*cache.shape[:2], 2 * shape.block_size, shape.head_dim).chunk(2, dim=2)
    return lambda: ops.cpu_attention_with_kv_cache(
        q, *halves, out, query_start, lengths, scale, True, None, -1, table, 0.0, plan, None
    )


def tree_cases(shape: Shape, tree: tree_order.OrderedTree) -> Iterator[Case]:
    """One level of growing, ordering, the walk and the ranks."""
    batch, k = shape.batch, shape.top_k
    words = num_words(max(shape.depth - 1, 1) * k)
    logprobs, tokens = (x.view(batch, k, k) for x in children(batch * k, k))
    scores = torch.zeros(batch, k, device=DEVICE)
    bits = torch.zeros(batch, k, words, dtype=torch.int64, device=DEVICE)
    grow = (logprobs, tokens, scores, bits, 0, k)
    yield case("advance frontier", tree_growth, "advance_frontier", grow)

    # As grown: each level's nodes are children of the K best of the level before, by score.
    pool = k + (shape.depth - 1) * k * k
    index = torch.arange(pool, device=DEVICE)
    levels = torch.where(index < k, 0, (index - k) // (k * k) + 1)
    first = torch.where(levels > 1, k + (levels - 2) * k * k, 0)
    above = torch.where(levels > 0, first + (index - k) % (k * k) // k, -1)
    parents = above.int().expand(batch, -1).contiguous()
    pool_scores = torch.rand(batch, pool, device=DEVICE) - 1 - levels
    pool_tokens = index.expand(batch, -1).contiguous()
    ordered = (
        *(pool_tokens, pool_scores, parents, (levels + 1).int()),
        *(shape.nodes, shape.depth),
    )
    yield case("order tree", tree_order, "order_tree", ordered)

    cu = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * shape.rows
    slots = torch.arange(batch, device=DEVICE)
    nodes = torch.full((batch,), shape.nodes, dtype=torch.int32, device=DEVICE)
    # Each draw is the best node's token, so that paths are as long as they can be.
    sampled = torch.zeros(batch * shape.rows, dtype=torch.int64, device=DEVICE)
    free = torch.zeros(batch, dtype=torch.bool, device=DEVICE)
    path = 1 + shape.depth
    walk = (sampled, cu, slots, tree.tokens, tree.parents, nodes, tree.spine_len, free, None, path)
    yield case("walk", verify, "walk_tree", walk)
    accepted = verify.walk_tree(*walk).path
    ranks = (accepted, cu, slots, tree.parents, tree.depths, nodes)
    yield case("path ranks", path_ranks, "path_ranks", ranks)


def compaction_case(shape: Shape) -> Case:
    """A path of `depth` nodes in all layers."""
    blocks = shape.batch * -(-shape.rows // shape.block_size)
    layout = (blocks, shape.kv_heads, shape.block_size, 2 * shape.head_dim)
    layers = [torch.zeros(layout, dtype=shape.dtype, device=DEVICE) for _ in range(shape.layers)]
    keys, values = zip(*(layer.split(shape.head_dim, dim=-1) for layer in layers), strict=True)
    caches = kv_compaction.PagedCaches(list(keys), list(values))
    slots = torch.arange(shape.batch * shape.rows, device=DEVICE)
    starts = torch.arange(shape.batch, dtype=torch.int32, device=DEVICE) * shape.rows
    path = torch.linspace(0, shape.nodes, 1 + shape.depth, device=DEVICE).int()
    arguments = (
        *(caches, slots, starts, path.expand(shape.batch, -1).contiguous()),
        torch.full_like(starts, 1 + shape.depth),
    )
    row = 2 * shape.kv_heads * shape.head_dim * layers[0].itemsize
    moved = 2 * shape.batch * shape.depth * shape.layers * row
    return case("KV compaction", kv_compaction, "compact_kv", arguments, moved)


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of a call; on a GPU by events, with its cache flushed before each."""
    if DEVICE.type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, return_mode="median")
    run()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return 1e3 * statistics.median(found)


def bandwidth(repeats: int) -> float:
    """Bytes per second of a large copy, reads and writes counted."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (1e-3 * milliseconds(lambda: target.copy_(source), repeats))


@click.command()
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--hidden", default=4096, show_default=True)
@click.option("--layers", default=32, show_default=True)
@click.option("--heads", default=(32, 8), show_default=True, type=(int, int), help="Queries, keys.")
@click.option("--head-dim", default=128, show_default=True)
@click.option("--vocabulary", default=128256, show_default=True, help="That is drafted from.")
@click.option("--block-size", default=16, show_default=True)
@click.option("--tree", default="59,6,10", callback=numbers, show_default=True)
@click.option("--batches", default="1,8,32", callback=numbers, show_default=True)
@click.option("--contexts", default="1024,8192,32768", callback=numbers, show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
)
@click.option("--repeats", default=20, show_default=True, help="On a CPU.")
def main(
    output: Path,
    hidden: int,
    layers: int,
    heads: tuple[int, int],
    head_dim: int,
    vocabulary: int,
    block_size: int,
    tree: list[int],
    batches: list[int],
    contexts: list[int],
    dtype: str,
    repeats: int,
) -> None:
    """All ops by batch size, attention by context too."""
    from vllm_griffin import provenance

    made = provenance.describe()
    speed = bandwidth(repeats)
    rows = []
    for batch in batches:
        shape = Shape(
            *(hidden, layers, *heads, head_dim, vocabulary, block_size, *tree),
            *(getattr(torch, dtype), batch, contexts[0]),
        )
        for context in contexts:
            longer = dataclasses.replace(shape, context=context)
            rows.append(measured(attention_case(longer), longer, speed, repeats))
        for found in cases_of_any_context(shape):
            rows.append(measured(found, shape, speed, repeats))
    report(rows, speed, made, output)


def measured(found: Case, shape: Shape, speed: float, repeats: int) -> dict[str, Any]:
    """A row of the table."""
    return {
        "op": found.op,
        "batch": shape.batch,
        "context": shape.context if found.chain else None,
        "ms": milliseconds(found.run, repeats),
        "reference_ms": found.reference and milliseconds(found.reference, repeats),
        "floor_ms": 1e3 * found.bytes / speed,
        "chain_ms": found.chain and milliseconds(found.chain, repeats),
        "prefix_ms": found.prefix and milliseconds(found.prefix, repeats),
        "bytes": found.bytes,
    }


def report(rows: list[dict[str, Any]], speed: float, made: dict[str, Any], output: Path) -> None:
    """JSON, a table and a picture."""
    from vllm_griffin.whole_file import write_json

    runs = backend.describe(DEVICE)
    record = {"provenance": made, "runs": runs, "bytes_per_second": speed, "rows": rows}
    write_json(output, record)
    lines = []
    for row in rows:
        found = [
            row["ms"] / row["floor_ms"],
            row["reference_ms"] and row["ms"] / row["reference_ms"],
            row["chain_ms"] and over_chain(row),
            row["prefix_ms"] and row["ms"] / row["prefix_ms"],
        ]
        ratios = [f"{ratio:.2f}" if ratio else "-" for ratio in found]
        context = str(row["context"] or "-")
        lines.append([row["op"], str(row["batch"]), context, f"{row['ms']:.3f}", *ratios])
    notes = [f"{runs}; a copy moves {speed / 1e9:.1f} GB/s."]
    if DEVICE.type != "cuda":
        notes += [
            "The prefix form runs with torch in FlashAttention's place: its times say nothing."
        ]
    write_table(output, made, HEAD, lines, notes)
    draw([row for row in rows if row["chain_ms"]], output.with_suffix(".png"))


def over_chain(row: dict[str, Any]) -> float:
    """Time of tree attention, in the form that an engine takes here, over that of the engine's chain."""
    # FlashAttention is on GPUs only, and an engine there takes the faster form.
    forms = ("ms", "prefix_ms") if DEVICE.type == "cuda" else ("ms",)
    return min(row[form] for form in forms) / row["chain_ms"]


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Tree attention over the engine's attention of a chain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for batch in dict.fromkeys(row["batch"] for row in rows):
        own = [row for row in rows if row["batch"] == batch]
        axes.plot(
            [r["context"] for r in own],
            [over_chain(r) for r in own],
            marker="o",
            label=f"batch {batch}",
        )
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("tree attention over a chain's")
    axes.legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
