"""``make demo``: a chat model answers without and with griffin, on whatever hardware there is.

SmolLM2-135M-Instruct and the draft that this repository trained for it answer a few prompts of
MT-bench, HumanEval and GSM8K, greedily, one request at a time, on one engine after the other.
"""

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

HERE = Path(__file__).parent
SETS = {"MT-bench": "mt_bench", "HumanEval": "humaneval", "GSM8K": "gsm8k"}
TRACED_TOKENS = 24
# On a CPU each row costs time, so the tree is small; on a GPU the engine chooses one.
CPU_TREE = {"num_speculative_tokens": 5, "tree_depth": 2, "tree_top_k": 3}


@dataclass
class Answers:
    """What one engine gave for all prompts."""

    texts: list[str]
    tokens: list[list[int]]
    seconds: float
    metrics: dict[str, Any]

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all answers over the time that generation took."""
        return sum(map(len, self.tokens)) / self.seconds


def prepare_environment(on_gpu: bool) -> None:
    """Settings that vLLM reads from the environment, unless the user has made them."""
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if not on_gpu:
        defaults |= {"VLLM_GRIFFIN_CPU": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    # One process, so that nothing is measured but the engine.
    defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def answer(
    target: str, prompts: list[str], max_tokens: int, on_gpu: bool, spec: dict[str, Any] | None
) -> Answers:
    """Runs the prompts one by one through a fresh engine."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        target,
        dtype="auto" if on_gpu else "float32",
        enforce_eager=not on_gpu,
        max_model_len=2048,
        max_num_seqs=1,
        disable_log_stats=False,
        speculative_config=spec,
    )
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    llm.chat(chats[0], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)  # warm-up
    before = _counters(llm)
    start = time.perf_counter()
    outputs = [llm.chat(chat, params, use_tqdm=False)[0].outputs[0] for chat in chats]
    seconds = time.perf_counter() - start
    metrics = {name: value - before[name] for name, value in _counters(llm).items()}
    llm.llm_engine.engine_core.shutdown()
    return Answers(
        [o.text for o in outputs], [list(o.token_ids) for o in outputs], seconds, metrics
    )


def _counters(llm: Any) -> dict[str, int]:
    names = ("vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens")
    found = {m.name: m.value for m in llm.get_metrics() if m.name in names}
    return {name: found.get(name, 0) for name in names}


def load_prompts(each: int) -> list[tuple[str, str]]:
    """(name of the set, prompt) for the first prompts of each set."""
    prompts = []
    for name, stem in SETS.items():
        lines = (HERE / "prompts" / f"{stem}.jsonl").read_text().splitlines()
        prompts += [(name, json.loads(line)["turns"][0]) for line in lines[:each]]
    return prompts


def show_answers(
    console: Console, prompts: list[tuple[str, str]], plain: Answers, griffin: Answers
) -> None:
    """Each prompt, its answer, and whether both engines gave the same tokens."""
    for i, (name, prompt) in enumerate(prompts):
        same = plain.tokens[i] == griffin.tokens[i]
        verdict = Text("same tokens", "green") if same else Text("tokens differ", "bold red")
        body = Text(f"{prompt.strip()[:300]}\n\n", "dim") + Text(griffin.texts[i].strip())
        console.print(Panel(body, title=name, subtitle=verdict))


def show_figures(console: Console, plain: Answers, griffin: Answers, spec: dict[str, Any]) -> None:
    """Acceptance length, target passes and tokens per second of both."""
    total = sum(map(len, griffin.tokens))
    drafts = griffin.metrics["vllm:spec_decode_num_drafts"]
    accepted = griffin.metrics["vllm:spec_decode_num_accepted_tokens"]
    passes = total - accepted
    table = Table("", "without griffin", "with griffin")
    table.add_row("new tokens", str(sum(map(len, plain.tokens))), str(total))
    table.add_row("target passes", str(sum(map(len, plain.tokens))), str(passes))
    table.add_row("acceptance length", "1.00", f"{1 + accepted / max(drafts, 1):.2f}")
    table.add_row(
        "tokens per second", f"{plain.tokens_per_second:.1f}", f"{griffin.tokens_per_second:.1f}"
    )
    equal = sum(a == b for a, b in zip(plain.tokens, griffin.tokens, strict=True))
    console.print(table)
    shape = ", ".join(
        f"{key}={value}" for key, value in spec.items() if key not in ("method", "model")
    )
    console.print(
        f"{equal} of {len(plain.tokens)} answers have the same tokens; "
        f"{1 - passes / total:.0%} of the target's passes saved; tree: {shape or 'chosen by the engine'}"
    )


def trace_trees(trace: Path, target: str, prompt: str, on_gpu: bool, spec: dict[str, Any]) -> None:
    """Writes the trees of one short answer, in an engine of its own: a trace takes time."""
    os.environ["VLLM_GRIFFIN_TRACE"] = str(trace)
    answer(target, [prompt], TRACED_TOKENS, on_gpu, spec)


def show_tree(console: Console, trace: Path, target: str) -> None:
    """The verified tree of which most was accepted."""
    from transformers import AutoTokenizer

    from vllm_griffin.trace import draw_tree, read_trace

    tokenizer = AutoTokenizer.from_pretrained(target)
    best = max(read_trace(trace), key=lambda record: len(record.accepted))
    drawing = draw_tree(best, lambda token: tokenizer.decode([token]))
    console.print(Panel(Text(drawing), title="one verified tree (* = accepted)"))


def explain_hardware(console: Console, on_gpu: bool) -> None:
    """Which parts are not what a GPU would run, so that no time is taken for another's."""
    from vllm_griffin.kernels.backend import describe

    if on_gpu:
        console.print(f"GPU: {torch.cuda.get_device_name()}; {describe(torch.device('cuda'))}")
        return
    console.print(
        "[yellow]No GPU: this runs on the CPU.[/] vLLM's Triton kernels run in Triton's interpreter or "
        "as torch twins (vllm_griffin/cpu), griffin's own ops as "
        f"{describe(torch.device('cpu'))}. Tokens and acceptance are the same as on a GPU; "
        "[yellow]times are this CPU's and say nothing of a GPU's.[/] Both engines run eagerly: "
        "vLLM's compiler takes minutes on a CPU and helps the plain engine more."
    )


@click.command()
@click.option("--each", default=2, show_default=True, help="Prompts of each set.")
@click.option("--max-tokens", default=80, show_default=True)
@click.option("--draft", default=str(HERE / "models" / "smollm2-griffin"), show_default=True)
@click.option("--target", help="Default: SmolLM2-135M-Instruct.")
def main(each: int, max_tokens: int, draft: str, target: str | None) -> None:
    """Answers prompts without and with griffin and compares."""
    console = Console()
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        prepare_environment(on_gpu)
        explain_hardware(console, on_gpu)
        if target is None:
            from vllm_griffin.pretrained import smollm2_instruct

            with console.status("fetching SmolLM2-135M-Instruct (93 MB, once)"):
                target = str(smollm2_instruct())
        prompts = load_prompts(each)
        spec: dict[str, Any] = {"method": "griffin", "model": draft}
        spec |= {} if on_gpu else CPU_TREE
        texts = [prompt for _, prompt in prompts]
        with console.status("answering without griffin"):
            plain = answer(target, texts, max_tokens, on_gpu, None)
        with console.status("answering with griffin"):
            griffin = answer(target, texts, max_tokens, on_gpu, spec)
            trace_trees(trace, target, texts[-1], on_gpu, spec)
        show_answers(console, prompts, plain, griffin)
        show_tree(console, trace, target)
        show_figures(console, plain, griffin, spec)


if __name__ == "__main__":
    main()
