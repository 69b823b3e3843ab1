"""Acceptance length of a draft: its tree against its own chain, on one engine.

    python benchmarks/acceptance.py --draft examples/models/smollm2-griffin \\
        --prompts examples/prompts/mt_bench.jsonl --output docs/results/acceptance.json

The target defaults to SmolLM2-135M-Instruct. Acceptance length is 1 + accepted / drafts from vLLM's
own counters, pooled over the prompts' first turns. Prints a table and writes JSON with the command,
the versions and the hardware. It measures tokens, not time.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

TREE = {"num_speculative_tokens": 59, "tree_depth": 6, "tree_top_k": 10}
CHAIN = {"num_speculative_tokens": 6, "tree_depth": 6, "tree_top_k": 1}


def measure(
    target: str,
    draft: str,
    prompts: list[str],
    spec: dict[str, int],
    *,
    max_tokens: int,
    temperature: float,
    batch: int,
    dtype: str,
) -> dict[str, Any]:
    """Runs the prompts through one engine; returns counters, lengths per prompt set, seconds."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        target,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=batch,
        max_num_batched_tokens=max(2048, batch * 64),
        disable_log_stats=False,
        speculative_config={"method": "griffin", "model": draft} | spec,
    )
    params = [
        SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=i)
        for i in range(len(prompts))
    ]
    start = time.perf_counter()
    outputs = llm.chat([[{"role": "user", "content": p}] for p in prompts], params)
    seconds = time.perf_counter() - start
    metrics = {m.name: getattr(m, "value", getattr(m, "values", None)) for m in llm.get_metrics()}
    drafts = metrics["vllm:spec_decode_num_drafts"]
    accepted = metrics["vllm:spec_decode_num_accepted_tokens"]
    per_depth = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"][: spec["tree_depth"]]
    result = {
        "tree": spec,
        "prompts": len(prompts),
        "tokens": sum(len(o.outputs[0].token_ids) for o in outputs),
        "drafts": drafts,
        "accepted": accepted,
        "acceptance_length": round(1 + accepted / drafts, 4),
        "accepted_per_depth": [round(count / drafts, 4) for count in per_depth],
        "seconds": round(seconds, 1),
    }
    llm.llm_engine.engine_core.shutdown()
    return result


def environment() -> dict[str, Any]:
    """What a reader needs to judge or repeat a run."""
    import torch
    import vllm

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    cpu = platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu,
        "gpu": gpu,
    }


def first_turns(path: Path, limit: int | None) -> list[str]:
    """The first turn of each prompt of a JSONL file."""
    lines = path.read_text().splitlines()[:limit]
    return [json.loads(line)["turns"][0] for line in lines]


@click.command()
@click.option("--target", help="Folder or hub id; default: SmolLM2-135M-Instruct.")
@click.option("--draft", required=True, help="Folder or hub id of the draft.")
@click.option("--prompts", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--limit", type=int, help="Only the first so many prompts.")
@click.option("--max-tokens", default=128, show_default=True)
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--batch", default=8, show_default=True, help="Requests at a time.")
@click.option("--dtype", default="float32", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    target: str | None,
    draft: str,
    prompts: Path,
    limit: int | None,
    max_tokens: int,
    temperature: float,
    batch: int,
    dtype: str,
    output: Path | None,
) -> None:
    """Measures acceptance length of DRAFT as tree (59, 6, 10) and as chain of 6."""
    from rich.console import Console
    from rich.table import Table

    if target is None:
        from vllm_griffin.pretrained import smollm2_instruct

        target = str(smollm2_instruct())
    texts = first_turns(prompts, limit)
    options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "batch": batch,
        "dtype": dtype,
    }
    rows = {
        name: measure(target, draft, texts, spec, **options)
        for name, spec in (("tree", TREE), ("chain", CHAIN))
    }
    table = Table("", "acceptance length", "accepted per depth", "drafts", "tokens")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['acceptance_length']:.2f}",
            " ".join(f"{x:.2f}" for x in row["accepted_per_depth"]),
            str(row["drafts"]),
            str(row["tokens"]),
        )
    Console().print(table)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        report = {"environment": environment(), "prompts": str(prompts)} | options | rows
        output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
