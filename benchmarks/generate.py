"""Tokens per second of decoding: vLLM without speculation and trees, in turn on one machine.

    python benchmarks/generate.py chat --output chat.json
    python benchmarks/generate.py shape --acceptance 3.5 --output shape.json

`chat`: a real pair on MT-bench prompts. `shape`: weights of random numbers in a Llama's shape, acceptance
forced to a given length (vLLM's `rejection_sample_method="synthetic"`). All engines live at the same time
and take turns, so that a noisy machine is noisy for all of them. On a CPU set `VLLM_GRIFFIN_CPU=1`. Prints
a table; writes JSON, Markdown and a picture.
"""

import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from common import (
    CPU,
    RUNNERS,
    baseline_option,
    draw_engines,
    forced,
    numbers,
    write_table,
)
from engine_process import Decoding, Engine
from shapes import LlamaShape, write_pair

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "examples" / "models" / "smollm2-griffin"
PLAIN = {runner: f"no speculation, runner {runner}" for runner in RUNNERS}
# A draft vocabulary as `train` writes it, for drafts without weights.
DRAFT_VOCABULARY = 8192
HEAD = ("engine", "batch", "tokens/s (lowest - highest)", "of the best without speculation",
        "the same, round by round", "tokens a step", "ms a step")  # fmt: skip


@contextmanager
def engines(
    target: str,
    baselines: Sequence[str],
    specs: dict[str, dict[str, Any]],
    options: dict[str, Any],
    logs: Path,
) -> Iterator[dict[str, Engine]]:
    """Engines by name: those without speculation, and one for each spec."""
    plain = [(PLAIN[r], RUNNERS[r]) for r in baselines]
    with ExitStack() as stack:
        made = {}
        for name, environment in [*plain, *((name, RUNNERS["V2"]) for name in specs)]:
            arguments = {"model": target} | options
            if name in specs:
                arguments["speculative_config"] = specs[name]
            click.echo(f"starting: {name}", err=True)
            made[name] = Engine(arguments, environment, logs / f"{len(made)}.log")
            stack.callback(made[name].close)
        yield made


# By batch size and engine: the runs, each over all batches of that size
Runs = dict[tuple[int, str], list[list[Decoding]]]


def measure(
    made: dict[str, Engine],
    batches: dict[int, list[list[list[int]]]],
    max_tokens: int,
    rounds: int,
    temperature: float,
) -> Runs:
    """`rounds` runs of each engine over all batches of each size, in turn."""
    runs: Runs = {(size, name): [] for size in batches for name in made}
    for size, prompts in batches.items():
        for number in range(1 + rounds):
            # Each takes every place in turn: what ran before, and a machine that drifts, favour none.
            first = number % len(made)
            for name in [*made][first:] + [*made][:first]:
                done = [
                    made[name].decode(batch, max_tokens, temperature=temperature, seed=0)
                    for batch in prompts
                ]
                # The first round warms caches up.
                if number:
                    runs[size, name].append(done)
    return runs


def summary(runs: Runs) -> list[dict[str, Any]]:
    """A row for each engine and batch size."""
    rows = []
    for (size, name), kept in runs.items():
        rates = [sum(d.tokens for d in one) / sum(d.seconds for d in one) for one in kept]
        everything = [d for one in kept for d in one]
        steps = sum(d.steps for d in everything)
        rows.append(
            {
                "engine": name,
                "batch": size,
                "tokens_per_second": statistics.median(rates),
                "rates": rates,
                "lowest": min(rates),
                "highest": max(rates),
                "tokens_per_step": sum(d.tokens for d in everything) / steps / size,
                "step_ms": statistics.median(d.step_ms for d in everything),
                "runs": [[asdict(d) for d in one] for one in kept],
            }
        )
    plain = sorted(filter(is_plain, rows), key=lambda row: row["tokens_per_second"])
    # Of each batch size the last, and so the best
    best = {row["batch"]: row for row in plain}
    return [row | _against(row, best[row["batch"]]) for row in rows]


def _against(row: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """Over a baseline: the ratio of the medians, and the median of a round's ratios, where drift cancels."""
    pairs = zip(row["rates"], base["rates"], strict=True)
    return {
        "speedup": row["tokens_per_second"] / base["tokens_per_second"],
        "paired_speedup": statistics.median(mine / theirs for mine, theirs in pairs),
    }


def is_plain(row: dict[str, Any]) -> bool:
    """Whether a row is a baseline without speculation; the better one counts as 1."""
    return row["engine"] in PLAIN.values()


def report(
    rows: list[dict[str, Any]], made: dict[str, Any], setting: dict[str, Any], output: Path
) -> None:
    """JSON, a table and a picture, with where they come from."""
    from vllm_griffin.whole_file import write_json

    write_json(output, {"provenance": made, "setting": setting, "rows": rows})
    lines = []
    for row in rows:
        spread = f"({row['lowest']:.1f} - {row['highest']:.1f})"
        cells = [row["engine"], str(row["batch"]), f"{row['tokens_per_second']:.1f} {spread}"]
        cells += [f"{row['speedup']:.2f}", f"{row['paired_speedup']:.2f}"]
        cells += [f"{row['tokens_per_step']:.2f}", f"{row['step_ms']:.1f}"]
        lines.append(cells)
    write_table(output, made, HEAD, lines)
    draw_engines(
        rows,
        ("batch", "requests in a batch"),
        ("speedup", "tokens/s over the best without speculation"),
        output.with_suffix(".png"),
        level=1.0,
    )


def griffin(draft: Path, tree: str, **fields: Any) -> dict[str, Any]:
    """A speculative config; tree is `auto` or as `TreeShape` reads it; ` int8` behind it: draft in 8 bits."""
    from vllm_griffin.tree_shape import TreeShape

    if tree.endswith(" int8"):
        tree = tree.removesuffix(" int8")
        fields["draft_quantization"] = "int8"
    if tree != "auto":
        return TreeShape.parse(tree).speculative_config(str(draft)) | fields
    sizes = {"num_speculative_tokens_per_batch_size": "auto"}
    return {"method": "griffin", "model": str(draft)} | sizes | fields


def common(command: Any) -> Any:
    """Options of both commands."""
    for option in (
        baseline_option,
        click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path)),
        click.option("--batches", default="1,2,4", callback=numbers, show_default=True),
        click.option(
            "--tree",
            "trees",
            multiple=True,
            help="nodes,depth,top_k or auto, ' int8' behind it for a draft in 8 bits; repeatable.",
        ),
        click.option(
            "--starts",
            default=1,
            show_default=True,
            help="Of all engines: the memory that a process gets can make it some percent slower for good.",
        ),
        click.option(
            "--rounds", default=5, show_default=True, help="Runs that count, in turn, of a start."
        ),
        click.option("--max-tokens", default=64, show_default=True),
        click.option("--temperature", default=0.0, show_default=True, help="Seeded above 0."),
        click.option("--dtype", default="auto", show_default=True),
        click.option(
            "--eager", is_flag=True, help="Without torch.compile and CUDA graphs, for all."
        ),
        click.option(
            "--logs",
            default=Path(tempfile.gettempdir()) / "generate",
            type=click.Path(path_type=Path),
        ),
    ):
        command = option(command)
    return command


@click.group()
def main() -> None:
    """Decode rates in one run."""


@main.command()
@common
@click.option("--target", help="Default: SmolLM2-135M-Instruct.")
@click.option("--draft", default=SHIPPED, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--prompts",
    default=8,
    show_default=True,
    type=click.IntRange(1, 80),
    help="MT-bench first turns, spread over its categories.",
)
def chat(
    target: str | None, draft: Path, prompts: int, trees: Sequence[str], **settings: Any
) -> None:
    """A real pair on chat prompts, greedy."""
    from transformers import AutoTokenizer

    from vllm_griffin.evaluate.prompts import encode, read_first_turns
    from vllm_griffin.pretrained import smollm2_instruct

    target = target or str(smollm2_instruct())
    tokenizer = AutoTokenizer.from_pretrained(target)
    turns = read_first_turns(ROOT / "examples/prompts/mt_bench.jsonl")
    # The file is sorted by category.
    ids = [encode(turns[i * len(turns) // prompts][1], tokenizer) for i in range(prompts)]
    specs = {f"tree {tree}": griffin(draft, tree) for tree in trees or ("auto",)}
    batches = {
        size: [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        for size in settings["batches"]
    }
    facts = {"target": Path(target).name, "draft": draft.name, "prompts": prompts}
    _run(target, specs, batches, settings, {"skip_tokenizer_init": False}, facts)


@main.command()
@common
@click.option("--hidden", default=2048, show_default=True)
@click.option("--intermediate", default=8192, show_default=True)
@click.option("--layers", default=16, show_default=True)
@click.option("--heads", default=(32, 8), show_default=True, type=(int, int), help="Queries, keys.")
@click.option("--vocab", default=128256, show_default=True)
@click.option("--context", default=128, show_default=True, help="Tokens of a prompt.")
@click.option("--acceptance", default=3.5, show_default=True, help="Forced acceptance length.")
def shape(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: tuple[int, int],
    vocab: int,
    context: int,
    acceptance: float,
    trees: Sequence[str],
    **settings: Any,
) -> None:
    """Weights of random numbers in a Llama's shape (default: Llama-3.2-1B), forced acceptance."""
    config = LlamaShape(hidden, intermediate, layers, *heads, vocab).config(settings["dtype"])
    with tempfile.TemporaryDirectory() as folder:
        target, draft = write_pair(Path(folder), config, DRAFT_VOCABULARY)
        specs = {
            f"tree {tree}": griffin(draft, tree, **forced(acceptance))
            for tree in trees or ("15,4,4", "7,4,3")
        }
        prompt = [7 + i % 1000 for i in range(context)]
        batches = {size: [[[i, *prompt[1:]] for i in range(size)]] for size in settings["batches"]}
        options = {"load_format": "dummy", "skip_tokenizer_init": True}
        facts = {"shape": config, "acceptance": acceptance, "context": context}
        _run(str(target), specs, batches, settings, options, facts)


def _run(
    target: str,
    specs: dict[str, dict[str, Any]],
    batches: dict[int, list[list[list[int]]]],
    settings: dict[str, Any],
    options: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    from vllm_griffin import provenance

    made_by = provenance.describe()
    longest = max(len(prompt) for groups in batches.values() for g in groups for prompt in g)
    arguments = {
        "dtype": settings["dtype"],
        "enforce_eager": settings["eager"],
        "max_model_len": longest + settings["max_tokens"] + 64,
        "max_num_seqs": max(batches),
        "enable_prefix_caching": False,
    }
    if CPU not in os.environ:
        # All engines share the device.
        arguments["gpu_memory_utilization"] = 0.9 / (len(settings["baselines"]) + len(specs))
    runs: Runs = defaultdict(list)
    how = [settings[name] for name in ("max_tokens", "rounds", "temperature")]
    for start in range(settings["starts"]):
        logs = settings["logs"] / str(start)
        with engines(target, settings["baselines"], specs, arguments | options, logs) as made:
            for key, more in measure(made, batches, *how).items():
                runs[key] += more
    rows = summary(runs)
    kept = {k: v for k, v in settings.items() if k not in ("output", "logs")}
    report(rows, made_by, kept | facts | {"engines": list(specs)}, settings["output"])


if __name__ == "__main__":
    main()
