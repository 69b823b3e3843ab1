"""Writes each verified tree to the file that ``VLLM_GRIFFIN_TRACE`` names.

Without that variable no object of this class exists, so a step pays nothing for it. With it, a step
copies its trees to the host.
"""

from collections import defaultdict

from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_griffin.kernels.verify import Walk
from vllm_griffin.trace import TraceRecord, open_trace
from vllm_griffin.tree import DraftTrees

# Requests of the measurement at start-up (`vllm_griffin.cost`) are nobody's.
START_UP = "griffin-start-up-"


class StepTrace:
    """Collects one record per request and verify step."""

    def __init__(self, path: str) -> None:
        self.writer = open_trace(path)
        self.steps: defaultdict[str, int] = defaultdict(int)

    def forget(self, request_id: str) -> None:
        """A finished request counts no further steps."""
        self.steps.pop(request_id, None)

    def record(self, batch: InputBatch, trees: DraftTrees, walk: Walk) -> None:
        """One line for each request of the batch that had a tree."""
        logit_rows = batch.logits_indices.tolist()
        records = []
        for b, request_id in enumerate(batch.req_ids):
            slot = int(batch.idx_mapping_np[b])
            first, last = (int(i) for i in batch.cu_num_logits_np[b : b + 2])
            rows = last - first
            if rows == 1 or int(trees.num_nodes[slot]) == 0 or request_id.startswith(START_UP):
                continue
            accepted = int(walk.num_accepted[b])
            root_row = logit_rows[first]
            records.append(
                TraceRecord(
                    request_id=client_request_id(request_id),
                    step=self.steps[request_id],
                    position=int(batch.positions[root_row]),
                    tokens=[
                        int(batch.input_ids[root_row]),
                        *trees.tokens[slot, : rows - 1].tolist(),
                    ],
                    parents=trees.parents[slot, :rows].tolist(),
                    depths=trees.depths[slot, :rows].tolist(),
                    scores=trees.scores[slot, :rows].tolist(),
                    accepted=walk.path[b, :accepted].tolist(),
                    bonus=int(walk.tokens[b, accepted - 1]),
                )
            )
            self.steps[request_id] += 1
        self.writer.write(records)


def client_request_id(request_id: str) -> str:
    """The id that the client knows: vLLM appends ``-`` and eight hexadecimal digits to it."""
    head, dash, tail = request_id.rpartition("-")
    is_suffix = len(tail) == 8 and all(c in "0123456789abcdef" for c in tail)
    return head if dash and is_suffix else request_id
