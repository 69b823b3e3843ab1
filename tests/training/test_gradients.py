"""Where gradients go, and where they do not."""

import itertools

import pytest
import torch

from tests.training import references as slow
from tests.training.test_reference_passes import packed
from vllm_griffin.train.losses import Objective, feature_loss, head_terms
from vllm_griffin.train.network import Draft
from vllm_griffin.train.passes import multi_pass

PASSES = 3
FULL = Objective(token=0.1, top=0.5, tvd=0.3, tvd_plus=0.2)
Gradients = dict[str, torch.Tensor]


def _weighed(predict: torch.Tensor, regress: torch.Tensor) -> torch.Tensor:
    """Some number that depends on every output, differently."""
    generator = torch.Generator().manual_seed(len(predict))
    a, b = torch.randn(2, *predict.shape, generator=generator)
    return (predict * a).sum() + (regress * b).sum()


def _gradients(draft: Draft, loss: torch.Tensor) -> Gradients:
    """Gradients by parameter name; parameters without one are left out."""
    names = [name for name, p in draft.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(
        loss, [draft.get_parameter(n) for n in names], retain_graph=True, allow_unused=True
    )
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def _close(got: Gradients, expected: Gradients) -> None:
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        scale = grad.abs().max().item()
        gap = (got[name] - grad).abs().max().item()
        assert gap <= 2e-4 * scale + 1e-6, f"{name}: {gap:.2e} of {scale:.2e}"


@pytest.mark.parametrize("attention", ["proper", "published"])
@pytest.mark.parametrize("n", range(PASSES))
def test_a_passs_gradient_is_the_references(n: int, attention: str) -> None:
    """Fed features are constants; keys and values of every feature set are not."""
    draft, data = slow.small_draft(11), packed([6, 4])
    got = list(multi_pass(draft, **data, passes=PASSES, attention=attention))[n]
    form = slow.proper_passes if attention == "proper" else slow.published_passes
    parts = [
        list(form(draft, data["features"][a:b], data["tokens"][a:b], PASSES))[n]
        for a, b in itertools.pairwise(data["starts"])
    ]
    expected = [torch.cat(x) for x in zip(*parts, strict=True)]
    _close(_gradients(draft, _weighed(*got)), _gradients(draft, _weighed(*expected)))


@pytest.mark.parametrize("n", [1, 2])
def test_later_passes_teach_the_keys_and_values_of_earlier_sets(n: int) -> None:
    """With those detached, fusion, keys and values would learn something else; the rest would not."""
    draft, data = slow.small_draft(12), packed([7])
    got = _gradients(draft, _weighed(*list(multi_pass(draft, **data, passes=PASSES))[n]))
    document = data["features"], data["tokens"]
    frozen = list(slow.proper_passes(draft, *document, PASSES, frozen_context=True))[n]
    other = _gradients(draft, _weighed(*frozen))
    for name, grad in got.items():
        gap = (grad - other[name]).abs().max() / grad.abs().max()
        reached = name.startswith("fc.") or "k_proj" in name or "v_proj" in name
        assert gap > 0.05 if reached else gap < 1e-3, f"{name}: {gap:.3f}"


@pytest.mark.parametrize("attention", ["proper", "published"])
def test_no_gradient_reaches_an_earlier_passs_outputs(attention: str) -> None:
    draft, data = slow.small_draft(13), packed([6, 3])
    outputs = list(multi_pass(draft, **data, passes=PASSES, attention=attention))
    for n in range(1, PASSES):
        earlier = [x for pair in outputs[:n] for x in pair]
        found = torch.autograd.grad(
            _weighed(*outputs[n]), earlier, retain_graph=True, allow_unused=True
        )
        assert all(grad is None for grad in found), n


@pytest.mark.parametrize("attention", ["proper", "published"])
def test_a_slot_depends_on_the_features_that_decoding_has(attention: str) -> None:
    """Pass n at slot t: target features up to t - n of its own document (its first slot always)."""
    draft, data = slow.small_draft(14), packed([5, 6])
    data["features"].requires_grad_()
    outputs = list(multi_pass(draft, **data, passes=PASSES, attention=attention))
    for n, (predict, regress) in enumerate(outputs):
        for a, b in itertools.pairwise(data["starts"]):
            for t in range(a, b):
                loss = _weighed(predict[t : t + 1], regress[t : t + 1])
                (grad,) = torch.autograd.grad(loss, data["features"], retain_graph=True)
                reached = [s for s, row in enumerate(grad) if row.abs().max() > 0]
                assert reached == list(range(a, max(t - n, a) + 1)), (n, t)


def _step(draft: Draft, data: dict, head: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    labels = torch.zeros(len(data["tokens"]), dtype=torch.long)
    total = torch.zeros(())
    for predict, regress in multi_pass(draft, **data, passes=PASSES):
        terms = head_terms(predict, wanted, head, labels, FULL)
        total = total + terms.loss.mean() + feature_loss(regress, wanted).mean()
    return total


@pytest.mark.parametrize(
    "changes", [{}, {"fusion": False}, {"two_heads": False}, {"qkv_bias": True}], ids=str
)
def test_everything_is_taught_but_embedding_and_head(changes: dict) -> None:
    draft, data = slow.small_draft(15, **changes), packed([6, 4])
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(30, 16, generator=generator).requires_grad_()
    wanted = torch.randn(10, 16, generator=generator).requires_grad_()
    _step(draft, data, head, wanted.detach()).backward()
    for name, parameter in draft.named_parameters():
        if name == "embed_tokens.weight":
            assert not parameter.requires_grad and parameter.grad is None
        elif name.endswith("k_proj.bias"):
            # It adds the same to all scores of a row but for RoPE: small, not zero.
            assert parameter.grad is not None
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert head.grad is None
    # The teacher is a constant too.
    predict = torch.randn(10, 16).requires_grad_()
    labels = torch.zeros(10, dtype=torch.long)
    head_terms(predict, wanted, head, labels, FULL).loss.sum().backward()
    assert head.grad is None and wanted.grad is None


def _output_rows(draft: Draft, loss: torch.Tensor) -> torch.Tensor:
    """Largest gradient of each row of the layer's last projection, whose rows are output channels."""
    return _gradients(draft, loss)["layers.0.mlp.down_proj.weight"].abs().amax(1)


def _both_losses(draft: Draft) -> tuple[torch.Tensor, torch.Tensor]:
    data = packed([6, 4])
    generator = torch.Generator().manual_seed(4)
    head, wanted = (
        torch.randn(30, 16, generator=generator),
        torch.randn(10, 16, generator=generator),
    )
    predict, regress = list(multi_pass(draft, **data, passes=2))[1]
    labels = torch.zeros(10, dtype=torch.long)
    token = head_terms(predict, wanted, head, labels, FULL).loss.sum()
    return token, feature_loss(regress, wanted).sum()


def test_two_heads_learn_apart() -> None:
    """The token loss teaches the first half of the output, the feature loss the second."""
    draft = slow.small_draft(16)
    token, feature = _both_losses(draft)
    for loss, own in ((token, slice(0, 16)), (feature, slice(16, 32))):
        rows = _output_rows(draft, loss)
        assert (rows[own] > 0).all()
        rows[own] = 0
        assert (rows == 0).all()


def test_a_single_output_gets_both_losses() -> None:
    draft = slow.small_draft(16, two_heads=False)
    token, feature = _both_losses(draft)
    apart = [_gradients(draft, token), _gradients(draft, feature)]
    assert (_output_rows(draft, token) > 0).all() and (_output_rows(draft, feature) > 0).all()
    _close(_gradients(draft, token + feature), {n: apart[0][n] + apart[1][n] for n in apart[0]})


@pytest.mark.parametrize("attention", ["proper", "published"])
def test_checkpointing_changes_no_gradient(attention: str) -> None:
    draft, data = slow.small_draft(17), packed([6, 4])
    results = []
    for checkpointing in (False, True):
        outputs = multi_pass(
            draft, **data, passes=PASSES, attention=attention, checkpointing=checkpointing
        )
        results.append(_gradients(draft, sum(_weighed(*pair) for pair in outputs)))
    _close(results[1], results[0])
