"""CUDA graphs of the draft: its first pass is one replay, all levels of a batch's trees are another.

The target's verification is captured by vLLM; this is the like for drafting, on vLLM's own
manager of graphs (memory pool, warm-up, tensor parallel capture, memory estimate at start-up).
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_griffin.kernels.tree_order import OrderedTree
from vllm_griffin.runner.extend import DecodeRows


@dataclass(frozen=True)
class TreeBatchDescriptor(BatchExecutionDescriptor):
    """A batch of so many requests, and how many nodes each tree has."""

    num_nodes: int = 0


@dataclass(frozen=True)
class TreeStart:
    """What trees grow from.

    Shapes: B requests, h hidden size.
    """

    # [B, h]: the draft's two outputs at the last token of the text
    predict: torch.Tensor
    regress: torch.Tensor
    # [B] int32: draft keys of the text
    prefix_lens: torch.Tensor
    # [B, max_blocks] int32: where they are
    block_table: torch.Tensor
    # [B] bool: whose rows begin with the spine; None: all
    spine_first: torch.Tensor | None

    def of(self, num_reqs: int) -> "TreeStart":
        """The first requests."""
        return TreeStart(
            self.predict[:num_reqs],
            self.regress[:num_reqs],
            self.prefix_lens[:num_reqs],
            self.block_table[:num_reqs],
            None if self.spine_first is None else self.spine_first[:num_reqs],
        )


class RequestGraphs(CudaGraphManager):
    """Graphs by number of requests, of which each has rows of its own.

    There is one for each size that vLLM captures, and for each number of trees that its full graphs of
    the target hold: sizes that a user gives may be multiples of a tree's rows.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        mode = CUDAGraphMode.FULL_DECODE_ONLY
        super().__init__(vllm_config, device, mode, decode_query_len=1)

    def _init_candidates(self) -> None:
        rows = 1 + self.vllm_config.num_speculative_tokens
        sizes = self.compilation_config.cudagraph_capture_sizes or []
        # vLLM rounds each size up to whole trees.
        trees = {-(-size // rows) for size in sizes}
        self.compilation_config = copy.copy(self.compilation_config)
        self.compilation_config.cudagraph_capture_sizes = sorted({*sizes, *trees})
        super()._init_candidates()


class ExtendGraphs(RequestGraphs):
    """The draft's first pass over a batch of decodes."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        extend: Callable[[DecodeRows, TreeStart], None],
        rows: DecodeRows,
        start: TreeStart,
    ) -> None:
        """Plans the graphs.

        Args:
            extend: Captured; from rows to what trees grow from.
            rows: As many requests as the engine serves; read by the graphs at their addresses, and
                written before each replay.
            start: Written by the graphs; read by `TreeGraphs`.
        """
        super().__init__(vllm_config, device)
        self._extend = extend
        self._rows, self._start = rows, start
        most = self.compilation_config.max_cudagraph_capture_size
        per_request = rows.tokens.shape[1]
        self._capture_descs = {
            mode: [desc for desc in descs if desc.num_tokens * per_request <= most]
            for mode, descs in self._capture_descs.items()
        }

    def capture_pass(self) -> None:
        """Captures what was planned, with rows that are padding."""

        def extending(
            desc: BatchExecutionDescriptor, warmup: bool
        ) -> Callable[[CUDAGraphMode], None]:
            assert desc.num_reqs is not None
            rows, start = self._rows.of(desc.num_reqs), self._start.of(desc.num_reqs)

            def forward(_mode: CUDAGraphMode) -> None:
                self._extend(rows, start)

            return forward

        self.capture(extending, "Capturing CUDA graphs of the draft's first pass")

    def fits(self, num_reqs: int) -> bool:
        """Whether there is a graph for so many requests."""
        return self._desc(num_reqs) in self.graphs

    def _desc(self, num_reqs: int) -> BatchExecutionDescriptor:
        return self.dispatch(num_reqs, num_reqs, uniform_token_count=1, num_active_loras=0)

    def replay(self, rows: DecodeRows) -> TreeStart:
        """What trees grow from, overwritten by the next replay; for requests that fit."""
        num_reqs = len(rows.tokens)
        desc = self._desc(num_reqs)
        assert desc.num_reqs is not None
        self._rows.of(num_reqs).copy_(rows)
        # The graph's other requests write nothing and have no text.
        self._rows.slots[num_reqs : desc.num_reqs].fill_(PAD_SLOT_ID)
        self._rows.positions[num_reqs : desc.num_reqs].zero_()
        self.run_fullgraph(desc)
        return self._start.of(num_reqs)


class TreeGraphs(RequestGraphs):
    """Growth of trees, captured for each size of tree."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        level_rows: Mapping[int, int],
        grow: Callable[[TreeStart, int], OrderedTree],
        buffers: TreeStart,
    ) -> None:
        """Plans the graphs.

        Args:
            level_rows: Nodes of the trees that the engine may ask for, and a level's rows of each. Where a
                batch has more rows than vLLM captures of the target, launches are not what takes the time.
            grow: Captured; the trees of so many nodes from a start.
            buffers: As many requests as the engine serves; read by the graphs at their addresses.
                The block table is kept up by vLLM, the rest is written before each replay.
        """
        super().__init__(vllm_config, device)
        self._grow = grow
        self._buffers = buffers
        self._trees: dict[TreeBatchDescriptor, OrderedTree] = {}
        most = self.compilation_config.max_cudagraph_capture_size
        self._capture_descs = {
            mode: [
                TreeBatchDescriptor(**vars(desc), num_nodes=nodes)
                for desc in descs
                for nodes, rows in sorted(level_rows.items(), reverse=True)
                if desc.num_tokens * rows <= most
            ]
            for mode, descs in self._capture_descs.items()
        }

    def capture_growth(self) -> None:
        """Captures what was planned, with empty prefixes."""
        self._buffers.prefix_lens.zero_()

        def growing(
            desc: BatchExecutionDescriptor, warmup: bool
        ) -> Callable[[CUDAGraphMode], None]:
            assert isinstance(desc, TreeBatchDescriptor) and desc.num_reqs is not None
            start = self._buffers.of(desc.num_reqs)

            def forward(_mode: CUDAGraphMode) -> None:
                self._trees[desc] = self._grow(start, desc.num_nodes)

            return forward

        self.capture(growing, "Capturing CUDA graphs of draft trees")

    def replay(self, start: TreeStart, num_nodes: int) -> OrderedTree | None:
        """The batch's trees, overwritten by the next replay; None if no graph is as large."""
        num_reqs = len(start.prefix_lens)
        found = self.dispatch(num_reqs, num_reqs, uniform_token_count=1, num_active_loras=0)
        desc = TreeBatchDescriptor(**vars(found), num_nodes=num_nodes)
        if desc not in self.graphs:
            return None
        assert desc.num_reqs is not None
        into = self._buffers.of(num_reqs)
        # The graph of the first pass has written there itself.
        if start.predict.data_ptr() != into.predict.data_ptr():
            into.predict.copy_(start.predict)
            into.regress.copy_(start.regress)
            into.prefix_lens.copy_(start.prefix_lens)
        if into.spine_first is not None and start.spine_first is not None:
            into.spine_first.copy_(start.spine_first)
        # The graph's other requests have no text, whatever their rows of the block table hold.
        self._buffers.prefix_lens[num_reqs : desc.num_reqs].zero_()
        self.run_fullgraph(desc)
        return OrderedTree(*(x[:num_reqs] for x in self._trees[desc]))
