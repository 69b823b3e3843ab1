"""What a decode step does, by part: kernels launched, bytes they touch, times the host waits for a device.

    python benchmarks/counts.py --output docs/results/counts.json

With Triton kernels, on the code that a GPU runs, and beside it with their references in torch, which is what
a GPU would run without kernels, and a CPU but for the forms of its own; and a step of vLLM without
speculation. All on a CPU with Triton's interpreter (VLLM_GRIFFIN_CPU=1 and VLLM_GRIFFIN_KERNELS are set
here): a torch op that computes or copies is one launch, a Triton kernel is one. Bytes are those of the
tensors that go in and come out, the KV cache apart. Waits are those that this package's own code asks for,
not vLLM's, nor those of the stand-ins for its kernels on a CPU. Counts, not times, and without CUDA graphs,
which make one launch of those they hold.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
from common import write_table

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "examples" / "models"


# A table's columns, each for references and kernels: what is counted, its unit and decimals
COLUMNS = {"launches": ("launches", 1, 1), "MB": ("bytes", 1e6, 2), "waits": ("waits", 1, 1)}


@dataclass
class Counts:
    """Of one part, over all steps that were counted."""

    launches: int = 0
    bytes: int = 0
    waits: int = 0


def parts() -> list[tuple[Any, str, str]]:
    """(owner, method, part): what runs below a method counts for its part, but for parts within it."""
    from vllm.model_executor.models.llama import LlamaForCausalLM
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vllm_griffin.runner.model_state import GriffinModelState
    from vllm_griffin.runner.sampler import TreeVerifier
    from vllm_griffin.runner.speculator import TreeSpeculator

    return [
        (GPUModelRunner, "execute_model", "vLLM, around the model"),
        (GPUModelRunner, "sample_tokens", "vLLM, around the sampler"),
        (LlamaForCausalLM, "forward", "target"),
        (LlamaForCausalLM, "compute_logits", "target's LM head"),
        (GriffinModelState, "prepare_attn", "tree rows: masks"),
        (GriffinModelState, "prepare_inputs", "tree rows: positions"),
        (TreeVerifier, "__call__", "draws and walk"),
        (TreeSpeculator, "propose", "draft: around"),
        (TreeSpeculator, "_compact_target_cache", "KV compaction"),
        (TreeSpeculator, "_extend", "draft: extend pass"),
        (TreeSpeculator, "_grow", "draft: tree levels"),
    ]


class Counter:
    """Counts between `start` and `stop`."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, Counts] = defaultdict(Counts)
        self.stack: list[str] = []
        self.in_kernel = False
        self.steps = 0
        # Addresses of the KV caches' memory
        self.caches: set[int] = set()
        # file:line -> how often our code waited there
        self.places: defaultdict[str, int] = defaultdict(int)

    @property
    def here(self) -> Counts | None:
        """Counts of the part that runs, None outside of all parts and inside a Triton kernel."""
        return self.counts[self.stack[-1]] if self.stack and not self.in_kernel else None

    def num_bytes(self, tree: Any) -> int:
        """Of all tensors in nested arguments, KV caches apart."""
        import torch
        from torch.utils._pytree import tree_leaves

        tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
        return sum(
            t.numel() * t.element_size()
            for t in tensors
            if t.untyped_storage().data_ptr() not in self.caches
        )

    def wait(self) -> None:
        """Count a wait if it is our code that asks for it."""
        place = asking_code()
        if self.here is not None and place is not None:
            self.here.waits += 1
            self.places[place] += 1

    def part(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        """`method`, with what it does counted for `name`."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.stack.append(name)
            try:
                return method(*args, **kwargs)
            finally:
                self.stack.pop()

        return counted

    def kernel(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        """Triton's launch in the interpreter, as one launch."""

        def counted(grid: Any, *args: Any, **kwargs: Any) -> Any:
            if self.here is not None:
                self.here.launches += 1
                self.here.bytes += self.num_bytes([args, kwargs])
            outer, self.in_kernel = self.in_kernel, True
            try:
                return launch(grid, *args, **kwargs)
            finally:
                self.in_kernel = outer

        return counted


def asking_code() -> str | None:
    """file:line of the innermost caller in this package or in vLLM, if it is ours."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/vllm/" in file or "/vllm_griffin/cpu/" in file:
            return None
        if "/vllm_griffin/" in file or file.startswith(f"{ROOT}/kernels/"):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return None


@contextmanager
def counting(counter: Counter) -> Iterator[None]:
    """Count torch ops, Triton launches and waits of this process."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.runtime.interpreter import GridExecutor
    from waits import is_wait

    class Launches(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            here = counter.here
            view = func.is_view or func.__name__.startswith(("empty", "new_empty", "detach"))
            if here is not None and not view:
                here.launches += 1
                here.bytes += counter.num_bytes([args, kwargs, out])
            return out

    class Waits(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if is_wait(func, args, kwargs or {}):
                counter.wait()
            return func(*args, **(kwargs or {}))

    patches = [
        mock.patch.object(owner, method, counter.part(getattr(owner, method), name))
        for owner, method, name in parts()
    ]
    patches.append(
        mock.patch.object(GridExecutor, "__call__", counter.kernel(GridExecutor.__call__))
    )
    for patch in patches:
        patch.start()
    try:
        with Waits(), Launches():
            yield
    finally:
        for patch in patches:
            patch.stop()


def table(counter: Counter) -> list[dict[str, Any]]:
    """A row for each part and one for the sum, per step."""
    rows = [
        {"part": name} | {k: v / counter.steps for k, v in asdict(counts).items()}
        for _, _, name in parts()
        if (counts := counter.counts.get(name)) is not None
    ]
    ours = [row for row in rows if not row["part"].startswith(("target", "vLLM"))]
    for name, chosen in (("ours", ours), ("all", list(rows))):
        sums = {k: sum(row[k] for row in chosen) for k in ("launches", "bytes", "waits")}
        rows.append({"part": name} | sums)
    return rows


def cells(references: dict[str, Any] | None, kernels: dict[str, Any]) -> list[str]:
    """Each count of two rows, in a table's columns."""
    return [
        f"{row[key] / unit:.{decimals}f}" if row else "-"
        for key, unit, decimals in COLUMNS.values()
        for row in (references, kernels)
    ]


def count(kernels: str, target: Path, requests: int, steps: int, **options: Any) -> Counter:
    """Of `steps` decode steps of an engine of its own, in this process.

    Args:
        kernels: Value of VLLM_GRIFFIN_KERNELS.
        options: Further arguments of the engine.
    """
    os.environ["VLLM_GRIFFIN_KERNELS"] = kernels
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(target),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=requests,
        **options,
    )
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True, detokenize=False)
    engine = llm.llm_engine
    for i in range(requests):
        engine.add_request(str(i), {"prompt_token_ids": list(range(40 + i, 60 + i))}, params)
    counter = Counter()
    core: Any = engine.engine_core
    context = core.engine_core.vllm_config.compilation_config.static_forward_context
    counter.caches = {x.kv_cache.untyped_storage().data_ptr() for x in context.values()}
    for _ in range(3):
        engine.step()
    with counting(counter):
        for _ in range(steps):
            engine.step()
    counter.steps = steps
    core.shutdown()
    return counter


@click.command()
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--target", default=MODELS / "target", type=click.Path(exists=True, path_type=Path))
@click.option("--draft", default=MODELS / "griffin", type=click.Path(exists=True, path_type=Path))
@click.option("--tree", default="59,6,10", show_default=True, help="nodes,depth,top_k")
@click.option("--requests", default=2, show_default=True)
@click.option("--steps", default=6, show_default=True)
def main(output: Path, target: Path, draft: Path, tree: str, requests: int, steps: int) -> None:
    """Count a decode step's launches, bytes and waits, by part."""
    os.environ |= {"VLLM_GRIFFIN_CPU": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm_griffin import provenance
    from vllm_griffin.tree_shape import TreeShape
    from vllm_griffin.whole_file import write_json

    made = provenance.describe()
    config = TreeShape.parse(tree).speculative_config(str(draft))
    counters = [
        count(kernels, target, requests, steps, speculative_config=config)
        for kernels in ("torch", "triton")
    ]
    references, rows = map(table, counters)
    plain = table(count("triton", target, requests, steps))[-1]
    setting = {"tree": tree, "requests": requests, "steps": steps, "target": target.name}
    record = {"provenance": made, "setting": setting, "rows": rows, "references": references}
    write_json(output, record | {"plain": plain, "waits": dict(counters[1].places)})
    by_part = {row["part"]: row for row in references}
    lines = [[row["part"], *cells(by_part[row["part"]], row)] for row in rows]
    lines.append(["vLLM without speculation, all", *cells(None, plain)])
    head = ("part, per step", *(f"{x}{y}" for x in COLUMNS for y in (", references", "")))
    write_table(output, made, head, lines, [json.dumps(setting)], times=False)


if __name__ == "__main__":
    main()
