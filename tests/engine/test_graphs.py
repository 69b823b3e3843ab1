"""Full graphs: what a replay reads are the tensors that the capture saw.

A CPU has no CUDA graphs. Here a graph keeps what was captured as it was captured (metadata, slices of
buffers, plans), and a replay runs just that again, so whatever a step hands over by another tensor
than the captured one is missed, as it would be on a GPU. Launches, memory of a graph's own and what
CUDA cannot capture are not tested by this.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.config.compilation import CompilationConfig, CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from tests.engine.harness import Request, engine, random_prompt, run
from vllm_griffin.cost import StepTimer
from vllm_griffin.kernels.tree_attention import TreeContext
from vllm_griffin.runner.extend import decode_rows
from vllm_griffin.runner.model_state import GriffinModelState

# Trees by batch size, and the token counts that are captured. With one size of tree a batch of two
# requests is padded to three.
CASES = {
    "one size": ([[1, 64, 5]], [1, 3, 18]),
    # A plain decode is vLLM's own graph, whose attention plan a CPU makes on the host: none here.
    "sizes by batch": ([[1, 1, 5], [2, 64, 2]], [1, 3, 6, 9]),
}


class Replay:
    """Stands for a `torch.cuda.CUDAGraph`."""

    def __init__(self, forward: Callable[[CUDAGraphMode], None], name: str, log: list[str]) -> None:
        self.forward, self.name, self.log = forward, name, log

    def replay(self) -> None:
        self.log.append(self.name)
        self.forward(CUDAGraphMode.NONE)


@contextlib.contextmanager
def replaying(sizes: list[int], log: list[str]) -> Iterator[None]:
    """Engines made inside have full graphs of these sizes; each replay is written to `log`."""

    def resolve(self: CompilationConfig, *args: Any, **kwargs: Any) -> CUDAGraphMode:
        self.cudagraph_capture_sizes = sizes
        self.max_cudagraph_capture_size = sizes[-1]
        self.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        return self.cudagraph_mode

    def capture(self: CudaGraphManager, create: Callable, _description: str = "") -> None:
        for desc in self._capture_descs[CUDAGraphMode.FULL]:
            create(desc, warmup=True)(CUDAGraphMode.NONE)
            forward = create(desc, warmup=False)
            forward(CUDAGraphMode.NONE)
            self.graphs[desc] = Replay(forward, f"{type(self).__name__} {desc.num_reqs}", log)
        self._graphs_captured = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompilationConfig, "resolve_cudagraph_mode_and_sizes", resolve)
        patch.setattr(CudaGraphManager, "capture", capture)
        # What a CPU runs reads a tree's shape on the host; not once for all replays, then.
        for name in ("spans", "workspaces"):
            patch.setattr(TreeContext, name, property(TreeContext.__dict__[name].func))
        patch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
        yield


def runner_of(llm: LLM) -> Any:
    """The model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def capture(llm: LLM) -> None:
    """What `capture_model` of vLLM's runner does, without what needs a GPU."""
    runner = runner_of(llm)
    with torch.inference_mode():
        runner.cudagraph_manager.capture(
            runner.model,
            runner.model_state,
            runner.input_buffers,
            None,
            runner.block_tables,
            runner.attn_groups,
            runner.kv_cache_config,
        )
        runner.speculator.capture()


def requests() -> list[Request]:
    """One at once and two later, so that batches grow and shrink; greedy and seeded."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for i in range(3):
        params = SamplingParams(
            temperature=0.8 * (i % 2), seed=i, max_tokens=14, ignore_eos=True, detokenize=False
        )
        found.append(Request(f"r{i}", random_prompt(generator, 4 + 9 * i, 2048), params, 2 * i))
    return found


@pytest.mark.parametrize("case", CASES)
def test_replays_give_what_eager_steps_give(case: str) -> None:
    by_batch, sizes = CASES[case]
    log: list[str] = []
    spec = {"num_speculative_tokens": 5, "tree_depth": 3, "tree_top_k": 2}
    spec["num_speculative_tokens_per_batch_size"] = by_batch
    with (
        replaying(sizes, log),
        engine("tiny", spec, max_num_seqs=3, enable_prefix_caching=False) as llm,
    ):
        eager = run(llm, requests())
        assert log == []
        capture(llm)
        replayed = run(llm, requests())
    assert replayed.tokens == eager.tokens
    assert replayed.steps == eager.steps
    accepted = "vllm:spec_decode_num_accepted_tokens"
    assert replayed.metrics[accepted] == 2 * eager.metrics[accepted] > 0
    targets = {name for name in log if name.startswith("ModelCudaGraphManager")}
    assert len(targets) >= 2
    assert len({name for name in log if name.startswith("TreeGraphs")}) >= 2
    assert "ExtendGraphs 1" in log
    # Larger batches have more rows than are captured with trees by batch size.
    assert ("ExtendGraphs 3" in log) == (case == "one size")


def test_a_shared_budget_replays_the_draft() -> None:
    """Which rows a request had in such a step is known on the device only.

    The captured sizes are multiples of a tree's rows, as a user may give them.
    """
    log: list[str] = []
    spec = {"num_speculative_tokens": 5, "tree_depth": 3, "tree_top_k": 2, "tree_budget": 3}
    with (
        replaying([6, 12, 18], log),
        engine("tiny", spec, max_num_seqs=3, enable_prefix_caching=False) as llm,
    ):
        eager = run(llm, requests())
        capture(llm)
        replayed = run(llm, requests())
    assert replayed.tokens == eager.tokens
    assert replayed.steps == eager.steps
    assert {"ExtendGraphs 1", "ExtendGraphs 3", "TreeGraphs 1", "TreeGraphs 3"} <= set(log)


def test_the_captured_first_pass_is_the_eager_one() -> None:
    """Outputs and cache, in every step of decodes; a batch with a prompt has no such rows."""
    spec = {"num_speculative_tokens": 5, "tree_depth": 3, "tree_top_k": 2}
    # With two nodes there are fewer rows than a path may have.
    spec["num_speculative_tokens_per_batch_size"] = [[1, 1, 5], [2, 64, 2]]
    accepted, prompts = [], []
    with (
        replaying([1, 4, 24], []),
        engine("tiny", spec, max_num_seqs=4, enable_prefix_caching=False) as llm,
        torch.inference_mode(),
    ):
        capture(llm)
        speculator = runner_of(llm).speculator
        graphs, speculator.extend_graphs = speculator.extend_graphs, None
        first_pass, (name,) = speculator._first_pass, speculator.draft_attn_layer_names
        layer = speculator.vllm_config.compilation_config.static_forward_context[name]

        def both(batch, walk, num_sampled, slot_mappings, hidden_states):
            start = first_pass(batch, walk, num_sampled, slot_mappings, hidden_states)
            rows = decode_rows(batch, walk, num_sampled, slot_mappings[name], hidden_states)
            if rows is None:
                prompts.append(batch.num_reqs)
                return start
            cache = layer.kv_cache.clone()
            found = replace(start, predict=start.predict * 0, regress=start.regress * 0)
            found = replace(found, prefix_lens=start.prefix_lens * 0)
            speculator._extend_decodes(rows, found)
            for field in ("predict", "regress", "prefix_lens"):
                torch.testing.assert_close(getattr(found, field), getattr(start, field))
            torch.testing.assert_close(layer.kv_cache, cache)
            accepted.extend(rows.accepted.tolist())
            return start

        speculator._first_pass = both
        run(llm, requests())
        assert len(prompts) == 3 and {1, 2, 3} <= set(accepted)
        # Requests that fill up a graph write nothing, whoever was there before.
        rows = graphs._rows.of(4)
        rows = replace(rows, slots=torch.zeros_like(rows.slots), positions=rows.positions + 7)
        graphs.replay(rows)
        graphs.replay(rows.of(3))
        assert (graphs._rows.slots[3] == PAD_SLOT_ID).all() and graphs._rows.positions[3] == 0


def test_every_tree_that_may_be_chosen_has_a_graph() -> None:
    """Also where the engine serves fewer requests at once than there are trees."""
    spec = {
        "num_speculative_tokens_per_batch_size": "auto",
        "tree_acceptance": {"3,1,3": 2.0, "7,3,3": 2.2, "30,6,5": 2.5},
    }
    times = mock.patch.object(StepTimer, "seconds", lambda self, batch, nodes: 1.0 + nodes)
    with replaying([1, 31], []), times, engine("golden-a", spec, max_num_seqs=1) as llm:
        manager = runner_of(llm).cudagraph_manager
        descs = manager._capture_descs[CUDAGraphMode.FULL]
        trees = runner_of(llm).speculator.graphs._capture_descs[CUDAGraphMode.FULL]
    assert {d.uniform_token_count for d in descs} == {1, 4, 8, 31}
    assert {d.num_nodes for d in trees} == {3, 7, 30}


def test_trimmed_trees_have_the_rows_of_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the context's end the scheduler trims; for any other number of rows a GPU would compile kernels."""
    attended: set[int] = set()
    drafted: set[int] = set()
    rows_of = GriffinModelState._tree_rows

    def watched(self: GriffinModelState, batch: Any, full_graph: bool) -> Any:
        rows, alone = rows_of(self, batch, full_graph)
        if rows is not None:
            attended.add(rows.bits.shape[1])
            drafted.add(int(batch.num_draft_tokens_per_req.max()))
        return rows, alone

    monkeypatch.setattr(GriffinModelState, "_tree_rows", watched)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    with engine("tiny", {"num_speculative_tokens": 12}, max_model_len=48) as llm:
        run(llm, [Request("r", list(range(5, 25)), params)])
    assert attended == {13}
    assert min(drafted) < 12 == max(drafted)
