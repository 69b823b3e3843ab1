"""The reduced vocabulary: which tokens, which rows of the head, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.model.conftest import GOLDEN, engine_config
from tests.model.draft_files import CONFIG, random_weights, write_draft
from vllm_griffin.model.checkpoint import CheckpointError, DraftCheckpoint
from vllm_griffin.model.layout import DraftLayout

RANKING = [7, 400, 3, 511, 0, 90]


@pytest.fixture
def folder(tmp_path):
    def folder(ranking=RANKING, **config):
        made = write_draft(tmp_path, CONFIG | config, random_weights(CONFIG, DraftLayout()))
        (made / "vocabulary.json").write_text(
            ranking if isinstance(ranking, str) else json.dumps(ranking)
        )
        return made

    return folder


def test_the_most_frequent_of_the_ranking(folder):
    draft = DraftCheckpoint.open(folder(draft_vocab_size=5))
    assert draft.vocabulary() == [0, 3, 7, 400, 511]
    assert draft.vocabulary(2) == [7, 400]
    assert draft.vocabulary(512) is None
    assert DraftCheckpoint.open(folder()).vocabulary() is None


@pytest.mark.parametrize(
    ("ranking", "size", "message"),
    [
        (RANKING, 7, r"vocabulary\.json: ranks 6 tokens, draft_vocab_size=7 needs more"),
        (RANKING, 513, "draft_vocab_size=513 is above the vocabulary of 512 tokens"),
        ([1, 512], 2, r"vocabulary\.json: expected a list of token ids below 512"),
        ([1, -1], 2, "expected a list of token ids below 512"),
        ([1, True], 2, "expected a list of token ids below 512"),
        ({"1": 2}, 1, "expected a list of token ids below 512"),
        ([1, 4, 1], 2, r"vocabulary\.json: names a token twice"),
        ("[1, 2", 2, r"vocabulary\.json: not readable as JSON"),
    ],
)
def test_what_is_wrong_is_named(folder, ranking, size, message):
    with pytest.raises(CheckpointError, match=message):
        DraftCheckpoint.open(folder(ranking)).vocabulary(size)


def test_a_missing_ranking_is_named(folder):
    made = folder(draft_vocab_size=5)
    (made / "vocabulary.json").unlink()
    with pytest.raises(ValueError, match=r"vocabulary\.json: missing"):
        engine_config(GOLDEN / "a" / "target", made, {})


@pytest.mark.parametrize("value", [0, -3, 2.5, True, "5"])
def test_a_wrong_default_is_named(folder, value):
    with pytest.raises(CheckpointError, match=r"`draft_vocab_size` must be a positive integer"):
        DraftCheckpoint.open(folder(draft_vocab_size=value)).vocabulary()


def test_the_tree_must_find_its_children_there(folder):
    with pytest.raises(ValueError, match="tree_top_k=10 is above the vocabulary of 6 tokens"):
        engine_config(GOLDEN / "a" / "target", folder(draft_vocab_size=6), {})


@pytest.mark.parametrize("packed", [False, True])
def test_the_heads_rows_are_the_targets(load, folder, packed, monkeypatch):
    """Also where the target's head has a bias, a scale, and no weight to look at."""
    monkeypatch.setattr("vllm_griffin.model.draft.UNIT_ROWS", 24)
    tree = {"num_speculative_tokens": 4, "tree_depth": 2, "tree_top_k": 2}
    whole = load(folder(), tree=tree)
    draft = load(folder(draft_vocab_size=5), tree=tree)
    assert draft.draft_tokens.tolist() == [0, 3, 7, 400, 511]
    hidden = torch.randn(3, 64)
    wanted = whole.compute_logits(hidden)[:, draft.draft_tokens]
    torch.testing.assert_close(draft.compute_logits(hidden), wanted)
    rows = torch.tensor([[4, 0]])
    assert draft.target_tokens(rows).tolist() == [[511, 0]]
    assert whole.target_tokens(rows) is rows
    if not packed:
        return
    weight, bias = torch.randn(512, 64), torch.randn(512)
    head = nn.Module()
    head.bias = bias
    head.quant_method = SimpleNamespace(apply=lambda _, x: x @ weight.T)
    whole.lm_head, whole.logits_processor.scale = head, 0.5
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(engine_config(GOLDEN / "a" / "target", folder())):
        whole.draft_from([2, 300])
    wanted = (hidden @ weight.T + bias)[:, [2, 300]] * 0.5
    torch.testing.assert_close(whole.compute_logits(hidden), wanted)
