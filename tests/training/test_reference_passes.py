"""Several passes against decoding one slot at a time, and against the published attention, dense."""

import itertools

import pytest
import torch

from tests.training import references as slow
from vllm_griffin.train.network import Draft
from vllm_griffin.train.passes import multi_pass

LENGTHS = [2, 3, 5, 17, 1, 4]
PASSES = 4
VARIANTS = [
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "qkv_bias": True},
    {"fusion": False},
    {"two_heads": False},
    {"fusion": False, "two_heads": False},
]
Outputs = list[tuple[torch.Tensor, torch.Tensor]]


def packed(lengths: list[int], seed: int = 0) -> dict:
    """Random packed documents with these numbers of slots, as arguments of `multi_pass`."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return {
        "features": torch.randn(total, 16, generator=generator),
        "tokens": torch.randint(30, (total,), generator=generator),
        "positions": torch.cat([torch.arange(n) for n in lengths]),
        "starts": [0, *itertools.accumulate(lengths)],
    }


def one_document(data: dict, a: int, b: int) -> dict:
    """The arguments for one document of `packed` alone."""
    part = {k: data[k][a:b] for k in ("features", "tokens", "positions")}
    return part | {"starts": [0, b - a]}


def _reference(draft: Draft, data: dict, passes: int, attention: str) -> Outputs:
    form = slow.proper_passes if attention == "proper" else slow.published_passes
    documents = [
        list(form(draft, data["features"][a:b], data["tokens"][a:b], passes))
        for a, b in itertools.pairwise(data["starts"])
    ]
    return [
        (torch.cat([d[n][0] for d in documents]), torch.cat([d[n][1] for d in documents]))
        for n in range(passes)
    ]


def _compare(got: Outputs, expected: Outputs) -> None:
    assert len(got) == len(expected)
    for n, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for name, x, y in zip(("predict", "regress"), ours, theirs, strict=True):
            torch.testing.assert_close(
                x, y, atol=1e-4, rtol=1e-4, msg=lambda m, n=n, name=name: f"pass {n} {name}: {m}"
            )


@pytest.mark.parametrize("attention", ["proper", "published"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@torch.no_grad()
def test_every_pass_is_what_a_loop_over_slots_computes(changes: dict, attention: str) -> None:
    draft, data = slow.small_draft(1, **changes), packed(LENGTHS)
    got = list(multi_pass(draft, **data, passes=PASSES, attention=attention))
    _compare(got, _reference(draft, data, PASSES, attention))
    # The passes differ from each other, and the two attentions do: else this says little.
    other = "published" if attention == "proper" else "proper"
    far = list(multi_pass(draft, **data, passes=PASSES, attention=other))
    assert all((got[n][0] - far[n][0]).abs().max() > 0.05 for n in range(PASSES))
    assert all((got[n][0] - got[n - 1][0]).abs().max() > 0.05 for n in range(1, PASSES))


@pytest.mark.parametrize("attention", ["proper", "published"])
@pytest.mark.parametrize("length", [1, 2, 7])
@torch.no_grad()
def test_one_pass_is_the_plain_network(length: int, attention: str) -> None:
    draft, data = slow.small_draft(2), packed([length, 3])
    got = list(multi_pass(draft, **data, passes=1, attention=attention))
    _compare(got, _reference(draft, data, 1, "proper"))
    _compare(got, [draft(**data)])


@torch.no_grad()
def test_attention_is_proper_unless_told_otherwise() -> None:
    draft, data = slow.small_draft(3), packed([6, 4])
    got = list(multi_pass(draft, **data, passes=3))
    for ours, theirs in zip(
        got, multi_pass(draft, **data, passes=3, attention="proper"), strict=True
    ):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("attention", ["proper", "published"])
@torch.no_grad()
def test_packing_changes_nothing(attention: str) -> None:
    draft, data = slow.small_draft(4), packed(LENGTHS, seed=3)
    together = list(multi_pass(draft, **data, passes=PASSES, attention=attention))
    for a, b in itertools.pairwise(data["starts"]):
        part = one_document(data, a, b)
        alone = list(multi_pass(draft, **part, passes=PASSES, attention=attention))
        _compare([(p[a:b], r[a:b]) for p, r in together], alone)


@pytest.mark.parametrize("attention", ["proper", "published"])
@torch.no_grad()
def test_a_pass_knows_no_feature_that_decoding_does_not(attention: str) -> None:
    """Pass n at slot t is the same whatever the target's features after t - n are."""
    draft, data = slow.small_draft(5), packed([9])
    before = list(multi_pass(draft, **data, passes=PASSES, attention=attention))
    changed = data | {"features": data["features"].clone()}
    changed["features"][4:] += 1.0
    after = list(multi_pass(draft, **changed, passes=PASSES, attention=attention))
    for n, (x, y) in enumerate(zip(before, after, strict=True)):
        differs = (x[0] - y[0]).abs().amax(-1) > 1e-4
        assert differs.tolist() == [t >= 4 + n for t in range(9)], n


@torch.no_grad()
def test_a_tokens_influence_begins_at_its_own_slot() -> None:
    draft, data = slow.small_draft(6), packed([8])
    before = list(multi_pass(draft, **data, passes=3))
    changed = data | {"tokens": data["tokens"].clone()}
    changed["tokens"][5] = (changed["tokens"][5] + 1) % 30
    for x, y in zip(before, multi_pass(draft, **changed, passes=3), strict=True):
        assert ((x[0] - y[0]).abs().amax(-1) > 1e-4).tolist() == [t >= 5 for t in range(8)]
