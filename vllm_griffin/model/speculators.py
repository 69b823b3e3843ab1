"""The speculators layout of a draft's `config.json`, which names the target that the draft is for.

vLLM starts the target with its draft when it is given such a folder as the model. The weights are laid
out as ever; only the config differs:

    speculators_model_type, speculators_version, architectures
    transformer_layer_config   the plain layout's fields
    speculators_config         proposal_methods[0]: the tree; verifier: the target
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_griffin.model.config import PAPER_TREE, CheckpointError, Fields

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
METHOD = "griffin"
PROPOSAL = "tree"
# The release of the speculators library whose layout this is.
VERSION = "0.6.0"
# Tree fields of the plain layout -> of a proposal method. The first name is vLLM's.
TREE_KEYS = {
    "num_speculative_tokens": "speculative_tokens",
    "tree_depth": "tree_depth",
    "tree_top_k": "tree_top_k",
}
# Fields of the plain layout that stand beside the network's in the speculators layout.
OWN_FIELDS = ("architectures", "draft_vocab_size", "tree_acceptance")


def is_speculators(raw: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is in the speculators layout."""
    return "speculators_config" in raw or "speculators_model_type" in raw


def flatten(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """The plain form of a `config.json`: what a draft of this project's layout has there.

    Args:
        raw: A `config.json` of either layout; the plain one is returned as it is.
        source: The file, for error messages.

    Raises:
        CheckpointError: Another method's speculator, or a key of the layout is missing, odd or wrong.
    """
    if not is_speculators(raw):
        return raw
    _expect(raw, source, "", "speculators_model_type", METHOD)
    layer = _object(raw, source, "", "transformer_layer_config")
    config = _object(raw, source, "", "speculators_config")
    flat = dict(layer) | {"tree": _tree(config, source)}
    return flat | {name: raw[name] for name in OWN_FIELDS if name in raw}


def wrap(
    config: Mapping[str, Any], verifier: str, verifier_architectures: Sequence[str]
) -> dict[str, Any]:
    """The speculators layout of a plain `config.json`; `flatten` undoes it.

    Args:
        config: With `architectures` and `tree`.
        verifier: The target: an absolute path or a hub id.
        verifier_architectures: From the target's `config.json`.
    """
    tree = PAPER_TREE | config["tree"]
    method = {"proposal_type": PROPOSAL} | {
        theirs: tree[ours] for ours, theirs in TREE_KEYS.items()
    }
    # Without a `model_type` of its own: by that vLLM tells the layout.
    return {
        **{name: config[name] for name in OWN_FIELDS if name in config},
        "speculators_model_type": METHOD,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": METHOD,
            "proposal_methods": [method],
            "default_proposal_method": PROPOSAL,
            "verifier": {
                "name_or_path": verifier,
                "architectures": list(verifier_architectures),
            },
        },
        "transformer_layer_config": {
            key: value for key, value in config.items() if key not in (*OWN_FIELDS, "tree")
        },
    }


def verifier_name(target: str | Path) -> str:
    """How a config names the target: a folder by its absolute path, since a server may be started anywhere.

    Raises:
        CheckpointError: Neither a folder that is there nor a hub id.
    """
    folder = Path(target).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if isinstance(target, Path) or folder.is_absolute() or not HUB_ID.fullmatch(target):
        raise CheckpointError(
            f"{target}: the target's name must be a folder that exists or a hub id"
        )
    return target


def verifier_of(raw: Mapping[str, Any], source: str) -> str | None:
    """The target that a speculators `config.json` names; None for the plain layout.

    Raises:
        CheckpointError: The entry is missing or not a name.
    """
    if not is_speculators(raw):
        return None
    config = _object(raw, source, "", "speculators_config")
    verifier = _object(config, source, "speculators_config.", "verifier")
    name = verifier.get("name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{source}: `speculators_config.verifier.name_or_path` must name the target, found {name!r}"
        )
    return name


def _tree(config: Mapping[str, Any], source: str) -> dict[str, int]:
    """Tree of the first proposal method, the one that vLLM serves."""
    prefix = "speculators_config."
    methods = config.get("proposal_methods")
    if not isinstance(methods, list) or not methods or not isinstance(methods[0], Mapping):
        raise CheckpointError(
            f"{source}: `{prefix}proposal_methods` must be a list of objects, found {methods!r}"
        )
    method = methods[0]
    where = f"{prefix}proposal_methods[0]."
    _expect(method, source, where, "proposal_type", PROPOSAL)
    _expect(config, source, prefix, "default_proposal_method", PROPOSAL)
    known = ("proposal_type", *TREE_KEYS.values())
    for name in method:
        if name not in known:
            raise CheckpointError(
                f"{source}: `{where}{name}` is not known (known: {', '.join(known)})"
            )
    fields = Fields(method, source, where)
    tree = {"num_speculative_tokens": fields.positive("speculative_tokens")}
    return tree | {name: fields.positive(name) for name in ("tree_depth", "tree_top_k")}


def _object(raw: Mapping[str, Any], source: str, prefix: str, name: str) -> Mapping[str, Any]:
    value = raw.get(name)
    Fields(raw, source, prefix).require(isinstance(value, Mapping), name, "an object")
    assert isinstance(value, Mapping)
    return value


def _expect(raw: Mapping[str, Any], source: str, prefix: str, name: str, value: str) -> None:
    Fields(raw, source, prefix).require(raw.get(name) == value, name, repr(value))
