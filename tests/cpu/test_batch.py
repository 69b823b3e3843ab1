"""Twins of the batch's bookkeeping against vLLM's kernels in the interpreter."""

import pytest
import torch
from vllm.v1.worker.cpu.buffer_utils import UvaBuffer
from vllm.v1.worker.gpu import buffer_utils, input_batch
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import FusedStagedWriter, StagedWriteTensor

from vllm_griffin.cpu.patches import original
from vllm_griffin.cpu.twins import batch as twins

# A chunk of a prompt, a prompt's end, a decode, three drafts, and a prompt that spans a thousand.
SLOTS = torch.tensor([4, 0, 2, 5, 1]).int()
QUERIES = torch.tensor([7, 3, 1, 4, 1100])
LOGITS = torch.tensor([1, 1, 1, 4, 1])
COMPUTED = torch.tensor([0, 33, 8, 0, 3, 60]).int()
PREFILL = torch.tensor([3, 1200, 30, 1, 40, 50]).int()


@pytest.fixture(autouse=True)
def host_buffers(monkeypatch):
    """As vLLM's CPU worker has them: there is no pinned memory without a GPU."""
    monkeypatch.setattr(buffer_utils, "UvaBuffer", UvaBuffer)


def cumulative(lengths):
    return torch.cat((torch.zeros(1), lengths.cumsum(0))).int()


def both(name, make, run):
    """What a twin and its original leave of the same state."""
    twin = getattr(twins, name)
    results = []
    for function in (original(twin), twin):
        state = make()
        results.append((run(function, state), state))
    return results


def assert_same(results):
    (expected, expected_state), (found, found_state) = results
    for wanted, got in ((expected, found), (expected_state, found_state)):
        if isinstance(wanted, torch.Tensor):
            wanted, got = [wanted], [got]
        elif isinstance(wanted, dict):
            wanted, got = list(wanted.values()), list(got.values())
        for left, right in zip(wanted or [], got or [], strict=True):
            if isinstance(left, torch.Tensor):
                assert left.dtype == right.dtype
                assert torch.equal(left, right)


def test_the_engine_runs_the_twins():
    assert input_batch.post_update is twins.post_update
    assert BlockTables.compute_slot_mappings is twins.compute_slot_mappings
    assert StagedWriteTensor.apply_write is twins.apply_write


@pytest.mark.parametrize("lookahead", [1, 3])
def test_prepare_prefill_inputs(lookahead):
    def make():
        return {
            "input_ids": torch.full((1200,), -5).int(),
            "next_prefill_tokens": torch.full((lookahead, 6), -5).int(),
            "all_token_ids": torch.arange(6 * 1300).view(6, 1300).int(),
        }

    def run(function, state):
        function(
            state["input_ids"],
            state["next_prefill_tokens"],
            SLOTS,
            cumulative(QUERIES),
            state["all_token_ids"],
            PREFILL,
            COMPUTED,
        )

    assert_same(both("prepare_prefill_inputs", make, run))


def test_prepare_pos_seq_lens():
    def make():
        return {"pos": torch.full((1200,), -5), "seq_lens": torch.full((6,), -5).int()}

    def run(function, state):
        function(SLOTS, cumulative(QUERIES), COMPUTED, state["pos"], state["seq_lens"])

    assert_same(both("prepare_pos_seq_lens", make, run))


@pytest.mark.parametrize("new_tokens", [0, 1])
def test_combine_sampled_and_draft_tokens(new_tokens):
    seq_lens = COMPUTED[SLOTS.long()] + QUERIES.int()

    def make():
        return {"input_ids": torch.full((1200,), -5).int()}

    def run(function, state):
        return function(
            state["input_ids"],
            SLOTS,
            torch.arange(100, 106).view(6, 1),
            cumulative(QUERIES),
            seq_lens,
            PREFILL,
            torch.arange(200, 200 + 6 * 4).view(6, 4),
            cumulative(LOGITS),
            int(LOGITS.sum()),
            new_tokens,
        )

    assert_same(both("combine_sampled_and_draft_tokens", make, run))


def test_get_num_sampled_and_rejected():
    seq_lens = COMPUTED[SLOTS.long()] + QUERIES.int()

    def make():
        return torch.tensor([1, 1, 1, 2, 1]).int()

    def run(function, state):
        return function(state, seq_lens, cumulative(LOGITS), SLOTS, PREFILL)

    assert_same(both("get_num_sampled_and_rejected", make, run))


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("located", [False, True])
def test_post_update(counted, located):
    slots = torch.tensor([4, -1, 2, 5, 1]).int()

    def make():
        return {
            "computed": COMPUTED.clone(),
            "last": torch.full((6, 1), -5),
            "counts": torch.ones(6, 50).int(),
            "tokens": torch.full((6, 1300), -5).int(),
            "total": torch.tensor([9, 30, 8, 7, 40, 61]).int(),
        }

    def run(function, state):
        function(
            slots,
            state["computed"],
            state["last"],
            state["counts"] if counted else None,
            # The same token twice, and rows that do not count.
            torch.tensor([[0] * 4, [9] * 4, [3] * 4, [7, 8, 7, 9], [6] * 4]),
            torch.tensor([0, 1, 1, 3, 1]).int(),
            torch.tensor([0, 0, 0, 1, 0]).int(),
            cumulative(QUERIES) if located else None,
            state["tokens"],
            state["total"],
        )

    assert_same(both("post_update", make, run))


def test_expand_idx_mapping():
    def run(function, _):
        return function(SLOTS, int(LOGITS.sum()), cumulative(LOGITS), 4)

    assert_same(both("expand_idx_mapping", dict, run))


def block_tables():
    tables = BlockTables(
        block_sizes=[16, 8],
        max_num_reqs=6,
        max_num_batched_tokens=1300,
        max_num_blocks_per_group=[90, 180],
        device=torch.device("cpu"),
        slot_mapping_enabled=[True, False],
    )
    for slot in range(6):
        ids = ([slot * 100 + i for i in range(80)], [slot * 200 + i for i in range(170)])
        tables.append_block_ids(slot, ids, overwrite=True)
    tables.apply_staged_writes()
    return tables


def test_gather_block_tables():
    def run(function, tables):
        for table in tables.input_block_tables:
            table.fill_(-5)
        return function(tables, SLOTS, 6)

    (expected, _), (found, _) = both("gather_block_tables", block_tables, run)
    assert_same([(expected, None), (found, None)])


def test_compute_slot_mappings():
    slots = torch.tensor([4, 0, -1, 5, 1]).int()
    positions = torch.cat([torch.arange(n) for n in QUERIES])

    def run(function, tables):
        return function(tables, slots, cumulative(QUERIES), positions, 1200)

    (expected, _), (found, _) = both("compute_slot_mappings", block_tables, run)
    assert_same([(expected, None), (found, None)])


@pytest.mark.parametrize("size", [(4, 1500), 4])
def test_apply_write(size):
    def make():
        return StagedWriteTensor(size, torch.int32, torch.device("cpu"))

    def run(function, tensor):
        if size == 4:
            tensor.stage_write_elem(2, 9)
            tensor.stage_write_elem(0, 4)
        else:
            tensor.stage_write(2, 3, [5, 6, 7])
            tensor.stage_write(0, 0, list(range(1300)))
            tensor.stage_write(2, 4, [8])
        function(tensor)
        assert not tensor._staged_write_indices
        return tensor.gpu

    (expected, _), (found, _) = both("apply_write", make, run)
    assert_same([(expected, None), (found, None)])


def test_write_of_several_groups():
    def make():
        return [StagedWriteTensor((3, 8), torch.int32, torch.device("cpu")) for _ in range(2)]

    def run(function, tensors):
        tensors[0].stage_write(1, 2, [3, 4])
        tensors[1].stage_write(0, 0, [5])
        tensors[1].stage_write(2, 7, [6])
        pointers = torch.tensor([t.gpu.data_ptr() for t in tensors], dtype=torch.uint64)
        strides = torch.tensor([8, 8])
        function(FusedStagedWriter(torch.device("cpu"), 6), tensors, pointers, strides)
        return [tensor.gpu for tensor in tensors]

    (expected, _), (found, _) = both("apply", make, run)
    assert_same([(expected, None), (found, None)])
