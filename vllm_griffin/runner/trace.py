"""Writes each verified tree to the file that ``VLLM_GRIFFIN_TRACE`` names.

Without that variable no object of this class exists, so a step pays nothing for it. With it, a step
copies its trees to the host.
"""

from collections import OrderedDict

from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_griffin.kernels.verify import Walk
from vllm_griffin.trace import START_UP, TraceRecord, open_trace
from vllm_griffin.tree import DraftTrees

# Nobody sent them: the measurement's (`vllm_griffin.cost`), and those of vLLM's warm-up.
NOBODYS = (START_UP, "_warmup_")
# Of so many requests that left last, the number of steps is kept.
LEFT = 1024


class StepTrace:
    """Collects one record per request and verify step."""

    def __init__(self, path: str) -> None:
        self.writer = open_trace(path)
        self.steps: dict[str, int] = {}
        self.left: OrderedDict[str, int] = OrderedDict()

    def forget(self, request_id: str) -> None:
        """A request has ended, or was preempted and will count on; here both look alike."""
        if request_id in self.steps:
            self.left[request_id] = self.steps.pop(request_id)
        if len(self.left) > LEFT:
            self.left.popitem(last=False)

    def record(self, batch: InputBatch, trees: DraftTrees, walk: Walk) -> None:
        """One line for each request of the batch that had a tree."""
        logit_rows = batch.logits_indices.tolist()
        first_rows = batch.cu_num_logits.tolist()
        records = []
        for b, request_id in enumerate(batch.req_ids):
            slot = int(batch.idx_mapping_np[b])
            first, last = first_rows[b : b + 2]
            rows = last - first
            if rows == 1 or int(trees.num_nodes[slot]) == 0 or request_id.startswith(NOBODYS):
                continue
            step = self.steps.get(request_id, self.left.pop(request_id, 0))
            self.steps[request_id] = step + 1
            accepted = int(walk.num_accepted[b])
            root_row = logit_rows[first]
            records.append(
                TraceRecord(
                    request_id=client_request_id(request_id),
                    step=step,
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
        self.writer.write(records)


def client_request_id(request_id: str) -> str:
    """The id that the client knows: vLLM appends ``-`` and eight hexadecimal digits to it."""
    head, dash, tail = request_id.rpartition("-")
    is_suffix = len(tail) == 8 and all(c in "0123456789abcdef" for c in tail)
    return head if dash and is_suffix else request_id
