"""What the draft network needs of a checkpoint's `config.json`, checked once, here."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_griffin.tree_shape import TreeShape

# Rope types that vLLM's `get_rope` computes as Hugging Face does, with the fields each one needs.
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
TREE_FIELDS = ("num_speculative_tokens", "tree_depth", "tree_top_k")
# A rope table of more rows is a mistake in a config: it would fill the memory.
MAX_ROPE_ROWS = 1 << 24
# The tree of the paper (App. C.2): 60 rows with the root, six levels, ten branches.
PAPER_TREE = {"num_speculative_tokens": 59, "tree_depth": 6, "tree_top_k": 10}


class CheckpointError(ValueError):
    """A draft checkpoint cannot be used; the message names the file and the key, if any."""


@dataclass(frozen=True)
class DraftConfig:
    """Shape of a draft network. `source` is the file it came from, for error messages."""

    source: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    architectures: tuple[str, ...]
    qkv_bias: bool

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> "DraftConfig":
        """Read a `config.json`, with old or new rope fields; defaults are those of Llama.

        Raises:
            CheckpointError: A field is missing, is wrong, or asks for what is not supported.
        """
        field = Fields(raw, source)
        heads = field.positive("num_attention_heads")
        kv_heads = field.positive("num_key_value_heads", heads)
        hidden = field.positive("hidden_size")
        field.require(heads % kv_heads == 0, "num_key_value_heads", f"a divisor of {heads}")
        head_dim = field.positive("head_dim", hidden // heads or None)
        if raw.get("head_dim") is None:
            field.require(hidden % heads == 0, "hidden_size", f"a multiple of {heads} heads")
        field.require(head_dim % 2 == 0, "head_dim", "an even number (rotary embedding)")
        layers = field.positive("num_hidden_layers")
        field.require(layers == 1, "num_hidden_layers", "1 (a draft has one decoder layer)")
        field.require(raw.get("hidden_act", "silu") == "silu", "hidden_act", "'silu'")
        window = raw.get("sliding_window") and raw.get("use_sliding_window", True)
        field.require(not window, "sliding_window", "none (drafts attend to their whole context)")
        for name in ("quantization_config", "compression_config"):
            whole = raw.get(name) is None
            field.require(whole, name, "left out, with unquantised weights")
        qkv_bias = raw.get("qkv_bias", False)
        field.require(isinstance(qkv_bias, bool), "qkv_bias", "true or false")
        return cls(
            source=source,
            vocab_size=field.positive("vocab_size"),
            hidden_size=hidden,
            intermediate_size=field.positive("intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=field.epsilon("rms_norm_eps", 1e-6),
            max_position_embeddings=field.positive("max_position_embeddings", 2048),
            rope_parameters=_rope_parameters(raw, field),
            architectures=_architectures(raw, field),
            qkv_bias=qkv_bias,
        )

    def check_target(self, hidden_size: int, vocab_size: int) -> None:
        """Refuse a draft that was made for a target of another width or vocabulary.

        Raises:
            CheckpointError: Names the config file and both values.
        """
        for name, target in (("hidden_size", hidden_size), ("vocab_size", vocab_size)):
            own = getattr(self, name)
            if own != target:
                raise CheckpointError(
                    f"{self.source}: `{name}` is {own}, but the target model's is {target}: "
                    "this draft was made for another target"
                )

    def check_context(self, max_model_len: int) -> None:
        """Refuse a rope that ends before the engine's context, or whose table is absurdly long.

        Raises:
            CheckpointError: Names the config file and both lengths.
        """
        rope, rows = self.rope_parameters, float(max_model_len)
        kind = rope["rope_type"]
        if kind == "linear":
            rows *= rope["factor"]
        if kind == "yarn":
            rows = rope["factor"] * rope["original_max_position_embeddings"]
        if rows < max_model_len:
            raise CheckpointError(
                f"{self.source}: its rope ({kind}) covers {rows:.0f} positions, the engine's "
                f"max_model_len is {max_model_len}: lower that to {rows:.0f}"
            )
        if rows > MAX_ROPE_ROWS:
            raise CheckpointError(
                f"{self.source}: its rope ({kind}) asks for {rows:.3g} positions, at most "
                f"{MAX_ROPE_ROWS} are supported: correct its `factor`"
            )

    def check_ranks(self, ranks: int) -> None:
        """Refuse a draft that cannot be split over so many tensor-parallel ranks.

        Raises:
            CheckpointError: Names the config file and what does not divide.
        """
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
            what = f"{heads} attention heads and {kv_heads} key/value heads"
        elif self.intermediate_size % ranks:
            what = f"intermediate_size {self.intermediate_size}"
        else:
            return
        raise CheckpointError(
            f"{self.source}: {what} cannot be split over tensor_parallel_size {ranks}: "
            "take one that divides them"
        )


def load_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: Missing, or unreadable.
    """
    # A folder, a pipe or a link that leads nowhere is no file either.
    if not os.path.isfile(file):
        raise CheckpointError(f"{file}: missing")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    # RecursionError: brackets nested thousands deep.
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: Missing, unreadable, or not an object.
    """
    value = load_json(file)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found a {type(value).__name__}")
    return value


def read_sizes(folder: Path, *names: str) -> list[int]:
    """Whole numbers of a target's `config.json`.

    Raises:
        CheckpointError: It lacks one; the first is named.
    """
    config = read_json(folder / "config.json")
    for name in names:
        if not isinstance(config.get(name), int):
            raise CheckpointError(
                f"{folder / 'config.json'}: the target has no `{name}`, found {config.get(name)!r}"
            )
    return [config[name] for name in names]


def tree_defaults(config: Mapping[str, Any], source: str = "config.json") -> dict[str, int]:
    """Tree settings a draft recommends in the optional `"tree"` entry of its `config.json`.

    Returns:
        Some of `num_speculative_tokens`, `tree_depth`, `tree_top_k`; empty without the entry.

    Raises:
        CheckpointError: Not an object, an unknown setting, or not a positive integer.
    """
    tree = config.get("tree")
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{source}: `tree` must be an object, found {tree!r}")
    for name in tree:
        if name not in TREE_FIELDS:
            known = ", ".join(TREE_FIELDS)
            raise CheckpointError(f"{source}: `tree.{name}` is not known (known: {known})")
    return {name: Fields(tree, source, "tree.").positive(name) for name in tree}


def tree_acceptance(
    config: Mapping[str, Any], source: str = "config.json"
) -> dict[str, float] | None:
    """Acceptance length by tree, in the optional `"tree_acceptance"` entry of a draft's `config.json`.

    Returns:
        `nodes,depth,top_k` -> length; None without the entry.

    Raises:
        CheckpointError: Not an object, not a tree, or a length that such a tree cannot have.
    """
    lengths = config.get("tree_acceptance")
    if lengths is None:
        return None
    if not isinstance(lengths, Mapping) or not lengths:
        raise CheckpointError(f"{source}: `tree_acceptance` must be an object with trees in it")
    for tree, length in lengths.items():
        try:
            shape = TreeShape.parse(tree)
        except ValueError as error:
            raise CheckpointError(f"{source}: `tree_acceptance`: {error}") from error
        number = isinstance(length, (int, float)) and not isinstance(length, bool)
        if not number or not 1 <= length <= 1 + shape.levels:
            raise CheckpointError(
                f"{source}: `tree_acceptance` of {tree} must lie in [1, {1 + shape.levels}], "
                f"found {length!r}"
            )
    return dict(lengths)


@dataclass(frozen=True)
class Fields:
    """Typed access to one mapping; every complaint names the file and the field."""

    raw: Mapping[str, Any]
    source: str
    prefix: str = ""

    def require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            found = f"found {self.raw[name]!r}" if name in self.raw else "it is missing"
            raise CheckpointError(
                f"{self.source}: `{self.prefix}{name}` must be {expected}, {found}"
            )

    def positive(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        value = default if value is None else value
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        self.require(whole, name, "a positive integer")
        assert isinstance(value, int)
        return value

    def epsilon(self, name: str, default: float) -> float:
        value = self.raw.get(name, default)
        small = isinstance(value, float | int) and not isinstance(value, bool) and 0 < value < 1
        self.require(small, name, "a number between 0 and 1")
        return float(value)


def _rope_parameters(raw: Mapping[str, Any], field: Fields) -> dict[str, Any]:
    """The dict for `get_rope`: `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
    name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    given = raw.get(name) or {}
    field.require(isinstance(given, Mapping), name, "an object")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise CheckpointError(
            f"{field.source}: `{name}` of type {kind!r} is not supported for a draft "
            f"(supported: {', '.join(ROPE_FIELDS)})"
        )
    theta = given.get("rope_theta", raw.get("rope_theta"))
    rope = {**given, "rope_type": kind, "rope_theta": 10000.0 if theta is None else theta}
    rope.pop("type", None)
    for needed in ("rope_theta", *ROPE_FIELDS[kind]):
        value: Any = rope.get(needed)
        least = 1 if needed == "factor" else 0
        if not _is_number(value) or value < least or value == 0:
            above = "of at least 1" if least else "above 0"
            raise CheckpointError(
                f"{field.source}: rope type {kind!r} needs a `{needed}` {above}, found {value!r}"
            )
    for key in sorted(rope.keys() - {"rope_type"}):
        if not isinstance(rope[key], bool | None) and not _is_number(rope[key]):
            raise CheckpointError(
                f"{field.source}: `{name}.{key}` must be a number, found {rope[key]!r}"
            )
    partial = rope.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise CheckpointError(
            f"{field.source}: `partial_rotary_factor` {partial} is not supported for a draft"
        )
    return rope


def _is_number(value: Any) -> bool:
    """Whether a float can hold it: no boolean, NaN, infinity or integer of hundreds of digits."""
    number = isinstance(value, float | int) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _architectures(raw: Mapping[str, Any], field: Fields) -> tuple[str, ...]:
    names = raw.get("architectures") or []
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    field.require(listed, "architectures", "a list of names")
    return tuple(names)
