"""The reduced vocabulary that a draft may draft from: the first of a ranking that lies beside its weights.

The LM head over the whole vocabulary is most of a draft's cost, and few tokens make most of a text. The
target still verifies over its whole vocabulary, so what the draft leaves out changes no output, only what
can be accepted. `vocabulary.json` lists token ids, the most frequent of the training data first; the optional
`draft_vocab_size` of `config.json` says how many of them to draft from.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_griffin.model.config import CheckpointError, Fields, load_json

VOCABULARY_FILE = "vocabulary.json"
SIZE_FIELD = "draft_vocab_size"


def default_size(raw_config: Mapping[str, Any], source: str) -> int | None:
    """What a draft's `config.json` recommends; None: the whole vocabulary.

    Raises:
        CheckpointError: Not a positive integer.
    """
    if raw_config.get(SIZE_FIELD) is None:
        return None
    return Fields(raw_config, source).positive(SIZE_FIELD)


def read_ranking(folder: Path, vocab_size: int) -> list[int]:
    """Token ids of `vocabulary.json`, the most frequent first.

    Raises:
        CheckpointError: Missing, unreadable, or not a list of different ids of a vocabulary of `vocab_size`.
    """
    file = folder / VOCABULARY_FILE
    if not os.path.isfile(file):
        raise CheckpointError(
            f"{file}: missing; without it a draft drafts from the whole vocabulary only, so leave "
            f"{SIZE_FIELD} out"
        )
    ranking = load_json(file)
    whole = isinstance(ranking, list) and all(type(token) is int for token in ranking)
    if not whole or not all(0 <= token < vocab_size for token in ranking):
        raise CheckpointError(f"{file}: expected a list of token ids below {vocab_size}")
    if len(set(ranking)) < len(ranking):
        raise CheckpointError(f"{file}: names a token twice")
    return ranking


def most_frequent(folder: Path, vocab_size: int, size: int) -> list[int] | None:
    """Ids of the `size` tokens to draft from, ascending; None where that is the whole vocabulary.

    Raises:
        CheckpointError: See `read_ranking`; or it ranks fewer tokens.
    """
    if size == vocab_size:
        return None
    if size > vocab_size:
        raise CheckpointError(f"{SIZE_FIELD}={size} is above the vocabulary of {vocab_size} tokens")
    ranking = read_ranking(folder, vocab_size)
    if size > len(ranking):
        raise CheckpointError(
            f"{folder / VOCABULARY_FILE}: ranks {len(ranking)} tokens, {SIZE_FIELD}={size} needs more"
        )
    return sorted(ranking[:size])
