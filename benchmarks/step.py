"""Time of a decode step by batch size and context: plain, vLLM's EAGLE chain, and trees.

    python benchmarks/step.py --shape llama-3-8b --output docs/results/step_8b.json

Weights are random numbers in a model's shape, acceptance is forced (vLLM's
`rejection_sample_method="synthetic"`), so a row says what a draft of that acceptance length would bring:
acceptance length x plain step / step. Trees draft with GRIFFIN's network, vLLM's chain with EAGLE's. Engines
run one after the other, each with the whole device and, on a GPU, with CUDA graphs. On a CPU set
`VLLM_GRIFFIN_CPU=1`; vLLM's other runner is a baseline, too, then, and `generate.py` compares better, since
its engines take turns. Prints a table; writes JSON, Markdown and a picture.
"""

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import torch
from common import (
    RUNNERS,
    baseline_option,
    draw_engines,
    forced,
    numbers,
    write_table,
)
from engine_process import Decoding, Engine
from shapes import NAMED, write_pair

PREFILL_TOKENS = 8192  # of a step
TOKENS_PER_STEP = 8  # of a request, at most, on average
HEAD = ("engine", "context", "batch", "ms a step (lowest - highest)", "of which drafting",
        "the rest, over plain", "drafting, over plain", "acceptance, forced", "speed-up")  # fmt: skip


def specs(
    draft: Path, chain: int, chain_acceptance: float, trees: Sequence[str], acceptance: float
) -> dict[str, dict[str, Any]]:
    """Speculative configs by name."""
    from vllm_griffin.tree_shape import TreeShape

    found: dict[str, dict[str, Any]] = {}
    if chain:
        fields = {"num_speculative_tokens": chain} | forced(chain_acceptance)
        found[f"vLLM's EAGLE, chain of {chain}"] = {"method": "eagle", "model": str(draft)} | fields
    for tree in trees:
        shape, _, own = tree.partition("=")
        if f"tree {shape}" in found:
            raise click.BadParameter(f"tree {shape} is given twice")
        spec = TreeShape.parse(shape).speculative_config(str(draft))
        found[f"tree {shape}"] = spec | forced(float(own) if own else acceptance)
    return found


def capture_sizes(batches: Sequence[int], rows: int) -> list[int]:
    """Rows of the steps to be captured: of each batch, plain and with so many rows a request.

    vLLM of its own accord stops at 512 rows, which are 8 trees of 59 nodes, while plain steps of all these
    batches have graphs.
    """
    return sorted({*batches, *(batch * rows for batch in batches)})


def grown(batch: int, context: int, steps: int) -> int:
    """Tokens of a request at the end: the first ones decode while others' prompts are still read."""
    prefill = -(-batch * context // PREFILL_TOKENS)
    return context + TOKENS_PER_STEP * (prefill + steps + 4)


def measure(
    engine: Engine, batch: int, context: int, steps: int, rounds: int, vocab: int
) -> list[Decoding]:
    """Runs of one setting; a first one that warms up is left out."""
    prompts = [[(7 * i + j) % vocab for j in range(context)] for i in range(batch)]
    most = grown(batch, context, steps) - context
    return [engine.decode(prompts, most, steps, temperature=0.0) for _ in range(1 + rounds)][1:]


def summary(runs: Sequence[Decoding], acceptance: float) -> dict[str, Any]:
    """Of runs of one setting: medians, in milliseconds of a step."""
    times = [run.step_ms for run in runs]
    drafts = [run.draft_ms for run in runs if run.draft_ms is not None]
    return {
        "acceptance": acceptance,
        "step_ms": statistics.median(times),
        "lowest": min(times),
        "highest": max(times),
        "draft_ms": statistics.median(drafts) if drafts else None,
    }


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their times over the better plain engine's at the same batch size and context."""
    plain: dict[tuple[int, int], float] = {}
    for row in rows:
        if row["plain"]:
            key = row["batch"], row["context"]
            plain[key] = min(plain.get(key, row["step_ms"]), row["step_ms"])
    found = []
    for row in rows:
        base = plain.get((row["batch"], row["context"]))
        ratios: dict[str, float | None] = {"verify": None, "draft": None, "speedup": None}
        if base is not None:
            drafting = row["draft_ms"] or 0.0
            ratios["verify"] = (row["step_ms"] - drafting) / base
            ratios["draft"] = drafting / base
            ratios["speedup"] = row["acceptance"] * base / row["step_ms"]
        found.append(row | ratios)
    return found


def report(
    rows: list[dict[str, Any]], made: dict[str, Any], setting: dict[str, Any], output: Path
) -> None:
    """JSON, a table and a picture, with where they come from."""
    from vllm_griffin.whole_file import write_json

    write_json(output, {"provenance": made, "setting": setting, "rows": rows})
    lines = []
    for row in rows:
        ratios = [row["verify"], row["draft"], row["acceptance"], row["speedup"]]
        spread = f"({row['lowest']:.2f} - {row['highest']:.2f})"
        cells = [row["engine"], str(row["context"]), str(row["batch"])]
        cells.append(f"{row['step_ms']:.2f} {spread}")
        cells += ["-" if x is None else f"{x:.2f}" for x in (row["draft_ms"], *ratios)]
        lines.append(cells)
    write_table(output, made, HEAD, lines)
    drawn = [
        row | {"engine": f"{row['engine']}, context {row['context']}"}
        for row in rows
        if row["speedup"] is not None and not row["plain"]
    ]
    draw_engines(
        drawn,
        ("batch", "requests in a batch"),
        ("speedup", "speed-up over plain, acceptance forced"),
        output.with_suffix(".png"),
        level=1.0,
    )


@click.command()
@click.option("--shape", default="llama-3-8b", type=click.Choice(list(NAMED)), show_default=True)
@click.option(
    "--tree",
    "trees",
    multiple=True,
    # What smaller trees accept where 59 nodes accept 5.38 is assumed: `eval` measures it for a draft.
    default=("59,6,10", "24,5,6=4.8", "6,6,1=3.5"),
    show_default=True,
    help="nodes,depth,top_k[=acceptance]; repeatable. One of top_k 1 is a chain.",
)
@click.option(
    "--acceptance", default=5.38, show_default=True, help="Of trees that name none; forced."
)
@baseline_option
@click.option(
    "--chain", default=5, show_default=True, help="Drafts of vLLM's EAGLE; 0: without it."
)
@click.option("--chain-acceptance", default=3.5, show_default=True, help="Of that chain; forced.")
@click.option("--batches", default="1,2,4,8,16,32,64", callback=numbers, show_default=True)
@click.option("--contexts", default="1024,8192,32768", callback=numbers, show_default=True)
@click.option("--steps", default=32, show_default=True, help="Timed steps of a run.")
@click.option("--rounds", default=3, show_default=True, help="Runs that count.")
@click.option(
    "--draft-vocabulary",
    default=0,
    show_default=True,
    help="Tokens that trees choose from; 0: all, as vLLM's EAGLE does.",
)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--eager", is_flag=True, help="Without torch.compile and CUDA graphs, for all.")
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--logs", default=Path(tempfile.gettempdir()) / "step", type=click.Path(path_type=Path)
)
def main(
    shape: str,
    trees: tuple[str, ...],
    baselines: tuple[str, ...],
    acceptance: float,
    chain: int,
    chain_acceptance: float,
    batches: list[int],
    contexts: list[int],
    steps: int,
    rounds: int,
    draft_vocabulary: int,
    dtype: str,
    eager: bool,
    output: Path,
    logs: Path,
) -> None:
    """Decode steps of engines in a model's shape."""
    from vllm_griffin import provenance

    made = provenance.describe()
    rows: list[dict[str, Any]] = []
    settings = [(batch, context) for context in contexts for batch in batches]
    with tempfile.TemporaryDirectory() as folder:
        target, draft = write_pair(Path(folder), NAMED[shape].config(dtype), draft_vocabulary)
        options = {
            "model": str(target),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": dtype,
            "enforce_eager": eager,
            "max_model_len": max(grown(b, c, steps) for b, c in settings) + 128,
            "max_num_seqs": max(batches),
            "max_num_batched_tokens": PREFILL_TOKENS,
            "enable_prefix_caching": False,
        }
        plain = {f"plain, runner {r}": r for r in baselines}
        speculative = specs(draft, chain, chain_acceptance, trees, acceptance)
        for number, name in enumerate([*plain, *speculative]):
            click.echo(f"starting: {name}", err=True)
            spec: dict[str, Any] = {}
            environment = RUNNERS[plain.get(name, "V2")]
            length = 1.0
            if name in speculative:
                spec["speculative_config"] = speculative[name]
                length = speculative[name]["synthetic_acceptance_length"]
                if torch.cuda.is_available() and not eager:
                    rows_of_a_request = 1 + speculative[name]["num_speculative_tokens"]
                    sizes = capture_sizes(batches, rows_of_a_request)
                    spec["compilation_config"] = {"cudagraph_capture_sizes": sizes}
            with closing(Engine(options | spec, environment, logs / f"{number}.log")) as engine:
                for batch, context in settings:
                    if batch * grown(batch, context, steps) > engine.cache_tokens:
                        click.echo(f"{name}: no room for {batch} x {context} tokens", err=True)
                        continue
                    runs = measure(engine, batch, context, steps, rounds, NAMED[shape].vocab)
                    key = {"engine": name, "plain": name in plain}
                    key |= {"batch": batch, "context": context}
                    rows.append(key | summary(runs, length))
    kept = {"shape": shape, "steps": steps, "rounds": rounds, "dtype": dtype, "eager": eager}
    kept["draft_vocabulary"] = draft_vocabulary
    report(compared(rows), made, kept, output)


if __name__ == "__main__":
    main()
