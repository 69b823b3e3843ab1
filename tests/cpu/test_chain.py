"""Twins around vLLM's chain of drafts against its kernels in the interpreter."""

import copy
from types import SimpleNamespace

import pytest
import torch

from vllm_griffin.cpu.patches import original
from vllm_griffin.cpu.twins import chain

# A chunk of a prompt, a decode without drafts, and two with three drafts.
LENGTHS = torch.tensor([1030, 1, 4, 4])
SLOTS = torch.tensor([4, 0, 2, 5]).int()
MAX_REQS = 6
MAX_LEN = 1100


def state():
    num_tokens = int(LENGTHS.sum())
    cumulative = torch.cat((torch.zeros(1), LENGTHS.cumsum(0))).int()
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randint(0, 1000, size, generator=generator)

    return SimpleNamespace(
        batch=SimpleNamespace(
            num_reqs=4,
            input_ids=draw(num_tokens + 5).int(),
            positions=draw(num_tokens + 5),
            idx_mapping=SLOTS,
            query_start_loc=cumulative,
            seq_lens=torch.tensor([1030, 50, 1099, 1100, 0]).int(),
        ),
        buffers=SimpleNamespace(
            input_ids=torch.full((1100,), -5).int(),
            positions=draw(1100),
            query_start_loc=torch.full((MAX_REQS + 1,), -5).int(),
            seq_lens=torch.tensor([1030, 50, 1099, 1100, 7, 7]).int(),
        ),
        num_sampled=torch.tensor([0, 1, 4, 2]).int(),
        num_rejected=torch.tensor([0, 0, 0, 2]).int(),
        sample_positions=draw(MAX_REQS),
        draft_tokens=draw(MAX_REQS, 3),
        step_tokens=draw(4),
        hidden=torch.randn(6, 1030, generator=generator),
        next_hidden=torch.zeros(8, 1030),
        last_indices=torch.full((MAX_REQS,), -5),
        step=torch.tensor(2).int(),
        tokens=draw(MAX_REQS, 1),
        prefill_tokens=draw(MAX_REQS).int(),
    )


def tensors(namespace):
    for value in vars(namespace).values():
        yield from tensors(value) if isinstance(value, SimpleNamespace) else (value,)


def compare(twin, run):
    start = state()
    left, right = copy.deepcopy(start), copy.deepcopy(start)
    results = run(original(twin), left), run(twin, right)
    for name, (expected, found) in enumerate(zip(tensors(left), tensors(right), strict=True)):
        if isinstance(expected, torch.Tensor):
            assert torch.equal(expected, found), name
    assert any(
        isinstance(before, torch.Tensor) and not torch.equal(before, after)
        for before, after in zip(tensors(start), tensors(right), strict=True)
    )
    return results


def test_prepare_prefill_inputs():
    def run(function, s):
        return function(
            s.last_indices,
            s.step,
            s.buffers,
            s.batch,
            s.num_sampled,
            s.num_rejected,
            s.tokens,
            s.prefill_tokens,
            MAX_REQS,
        )

    expected, found = compare(chain.prepare_prefill_inputs, run)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("advance", [True, False])
def test_prepare_decode_inputs(advance):
    def run(function, s):
        function(
            s.draft_tokens[:4, 0],
            s.batch.seq_lens,
            s.num_rejected,
            s.buffers,
            s.sample_positions,
            MAX_LEN,
            MAX_REQS,
            advance,
        )

    compare(chain.prepare_decode_inputs, run)


@pytest.mark.parametrize("advance", [True, False])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_update_draft_inputs(step, advance):
    def run(function, s):
        function(
            s.step_tokens,
            s.step.fill_(step),
            s.hidden,
            s.draft_tokens,
            s.next_hidden,
            s.buffers,
            s.sample_positions,
            4,
            MAX_LEN,
            3,
            advance,
        )

    compare(chain.update_draft_inputs, run)


def test_gather_draft_sampled():
    arguments = (
        torch.arange(100, 140).int(),
        torch.arange(40) + 7,
        torch.tensor([3, 9, 10, 11, 20, 21]),
        torch.tensor([1, 0, 0, 0, 2, 2]).int(),
        torch.tensor([0, 0, 1, 2, 0, 1]).int(),
        torch.tensor([16, 3, 40]).int(),
    )
    expected = original(chain.gather_draft_sampled)(*arguments)
    found = chain.gather_draft_sampled(*arguments)
    for left, right in zip(expected, found, strict=True):
        assert left.dtype == right.dtype
        assert left.tolist() == right.tolist()
    assert (found[0] == -1).tolist() == [False] * 5 + [True]
