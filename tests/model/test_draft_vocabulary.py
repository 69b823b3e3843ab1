"""The reduced vocabulary: which tokens, and which rows of the head."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.model.conftest import GOLDEN, engine_config
from tests.model.draft_files import CONFIG, random_weights, write_draft
from vllm_griffin.model.checkpoint import DraftCheckpoint
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
