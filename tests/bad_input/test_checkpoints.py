"""Every wrong draft checkpoint is refused in one sentence at start-up, and nothing in it is run.

The table is name -> (how to make the folder, the sentence). The draft is for golden case a's target.
"""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bad_input.sentences import assert_sentence
from tests.model.draft_files import CONFIG, random_weights, write_draft, write_tensors
from tests.test_config import make
from vllm_griffin.model.checkpoint import CheckpointError, DraftCheckpoint
from vllm_griffin.model.layout import DraftLayout
from vllm_griffin.model.speculators import wrap

Make = Callable[[Path], object]
GRIFFIN = random_weights(CONFIG, DraftLayout())
EAGLE = random_weights(CONFIG, DraftLayout(fusion=False, two_heads=False, fc_bias=False))
BIASED = random_weights(CONFIG, DraftLayout(qkv_bias=True))
SAFETENSORS, BIN, SHARDS = "model.safetensors", "pytorch_model.bin", "sharded-safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
Q_PROJ = "layers.0.self_attn.q_proj.weight"
DOWN = "layers.0.mlp.down_proj.weight"


def config(**changes: Any) -> Make:
    """A draft whose config has these fields; `...` removes one."""
    raw = {k: v for k, v in (CONFIG | changes).items() if v is not ...}
    return lambda folder: write_draft(folder, raw, GRIFFIN)


def weights(base: dict = GRIFFIN, form: str = "safetensors", **changes: Any) -> Make:
    """A draft with these tensors; None removes one. `__` in a name stands for a dot."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    tensors = {k: v for k, v in (base | changes).items() if v is not None}
    return lambda folder: write_draft(folder, CONFIG, tensors, form)


def file(name: str, content: Any, form: str = "safetensors") -> Make:
    """A draft one of whose files has other content; None removes it, a number cuts it there."""

    def write(folder: Path) -> None:
        path = write_draft(folder, CONFIG, GRIFFIN, form) / name
        before = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        if isinstance(content, Path):
            path.symlink_to(content)
        elif isinstance(content, int):
            path.write_bytes(before[:content])
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            path.write_text(json.dumps(content))

    return write


def folder_named(name: str) -> Make:
    """A draft with a folder where a file should be."""

    def write(folder: Path) -> None:
        file(name, None)(folder)
        (folder / name).mkdir()

    return write


def index(key: str, shard: Any) -> Make:
    """A sharded draft whose index sends a key elsewhere."""

    def write(folder: Path) -> None:
        path = write_draft(folder, CONFIG, GRIFFIN, SHARDS) / INDEX
        read = json.loads(path.read_text())
        read["weight_map"][key] = shard
        path.write_text(json.dumps(read))

    return write


def linked_shard(folder: Path) -> None:
    """A shard that is a link to a file outside of the folder."""
    write_draft(folder, CONFIG, GRIFFIN, SHARDS)
    (folder / SHARD).rename(folder.parent / SHARD)
    (folder / SHARD).symlink_to(folder.parent / SHARD)


def linked_subfolder(folder: Path) -> None:
    index(Q_PROJ, "sub/x.safetensors")(folder)
    write_tensors(folder.parent / "x.safetensors", {Q_PROJ: GRIFFIN[Q_PROJ]})
    (folder / "sub").symlink_to(folder.parent)


def header(text: bytes) -> bytes:
    """A safetensors file of 16 bytes of data with this header."""
    return struct.pack("<Q", len(text)) + text + bytes(16)


def saved(value: object, **options: Any) -> Make:
    """A draft whose `pytorch_model.bin` holds any object."""

    def write(folder: Path) -> None:
        torch.save(value, write_draft(folder, CONFIG, GRIFFIN, "bin") / BIN, **options)

    return write


class Bomb:
    """Unpickled with leave to run code, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def bomb(folder: Path) -> None:
    saved(GRIFFIN | {"fc.fc.weight": Bomb(folder.parent / "mark")})(folder)


def plain_pickle(folder: Path) -> None:
    """Not even a file of torch's."""
    path = write_draft(folder, CONFIG, GRIFFIN, "bin") / BIN
    path.write_bytes(pickle.dumps(Bomb(folder.parent / "mark")))


def remote_code(folder: Path) -> None:
    """A config that asks for a class of its own, which would make a file."""
    config(model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})(folder)
    mark = str(folder.parent / "mark")
    (folder / "own.py").write_text(f"import pathlib; pathlib.Path({mark!r}).touch()\n")


def vocabulary(ranking: Any, size: Any = 6) -> Make:
    """A draft with a ranking of tokens, that drafts from `size` of them."""

    def write(folder: Path) -> None:
        write_draft(folder, CONFIG | {"draft_vocab_size": size}, GRIFFIN)
        text = ranking if isinstance(ranking, str) else json.dumps(ranking)
        (folder / "vocabulary.json").write_text(text)

    return write


def speculators(*path: str | int, value: Any = ...) -> Make:
    """A draft in the speculators layout in which one key has another value, or none."""
    tree = {"num_speculative_tokens": 20, "tree_depth": 4, "tree_top_k": 3}
    raw = wrap(CONFIG | {"tree": tree}, "some/target", ["LlamaForCausalLM"])
    place: Any = json.loads(json.dumps(raw))
    whole = place
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return lambda folder: write_draft(folder, whole, GRIFFIN)


def unlisted_tensor(folder: Path) -> None:
    write_draft(folder, CONFIG, GRIFFIN, SHARDS)
    keys = sorted(GRIFFIN)[1::3]
    write_tensors(folder / SHARD, {key: GRIFFIN[key] for key in keys} | HEAD)


HEAD = {"lm_head.weight": torch.ones(512, 64)}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
HUGE = 10**18
MODELOPT = {"quantization": {"quant_algo": "FP8"}, "producer": {"name": "modelopt"}}
METHODS = ("speculators_config", "proposal_methods")
UNREADABLE = "{folder}/config.json: vLLM cannot read it as a model's config, correct it or take a "
UNREADABLE += "draft that `vllm-griffin convert` wrote (...)"
NO_DRAFT = "missing key `fc.fc.weight` (GRIFFIN) or `fc.weight` (EAGLE): this is not a draft of "
NO_DRAFT += "either layout; and {n} more problems with its keys"
DAMAGED = "{folder}/{file}: not a readable {kind} file, damaged or cut short? (...)"


def damaged(name: str) -> str:
    kind = "safetensors" if name.endswith("safetensors") else "torch.save"
    return DAMAGED.replace("{file}", name).replace("{kind}", kind)


def of_config(text: str) -> str:
    return "{folder}/config.json: " + text


BAD: dict[str, tuple[Make, str]] = {
    # config.json
    "empty folder": (lambda folder: folder.mkdir(), of_config("missing")),
    "no config": (file("config.json", None), of_config("missing")),
    "config a folder": (folder_named("config.json"), of_config("missing")),
    "config not JSON": (file("config.json", b"{,}"), of_config("not readable as JSON (...)")),
    "config not text": (
        file("config.json", b"\xff\xfe\0"),
        of_config("not readable as JSON (...)"),
    ),
    "config too deep": (
        file("config.json", b"[" * 10**5),
        of_config("not readable as JSON (maximum recursion depth exceeded ...)"),
    ),
    "config a list": (file("config.json", []), of_config("expected a JSON object, found a list")),
    "no hidden size": (
        config(hidden_size=...),
        of_config("`hidden_size` must be a positive integer, it is missing"),
    ),
    "hidden size a string": (
        config(hidden_size="64"),
        of_config("`hidden_size` must be a positive integer, found '64'"),
    ),
    "hidden size true": (
        config(hidden_size=True),
        of_config("`hidden_size` must be a positive integer, found True"),
    ),
    "hidden size of another target": (
        config(hidden_size=128),
        of_config(
            "`hidden_size` is 128, but the target model's is 64: this draft was made for another "
            "target"
        ),
    ),
    "hidden size absurd": (
        config(hidden_size=HUGE),
        of_config(
            f"`hidden_size` is {HUGE}, but the target model's is 64: this draft was made for "
            "another target"
        ),
    ),
    "no vocabulary": (
        config(vocab_size=...),
        of_config("`vocab_size` must be a positive integer, it is missing"),
    ),
    "another tokenizer": (
        config(vocab_size=511),
        of_config(
            "`vocab_size` is 511, but the target model's is 512: this draft was made for another "
            "target"
        ),
    ),
    "negative width": (
        config(intermediate_size=-1),
        of_config("`intermediate_size` must be a positive integer, found -1"),
    ),
    "width absurd": (
        config(intermediate_size=HUGE),
        "{folder}/model.safetensors: `fc.mlp.up_proj.weight` has shape [96, 128], expected "
        f"[{HUGE}, 128] (GRIFFIN layout); and 4 more problems with its keys",
    ),
    "heads do not divide": (
        config(num_attention_heads=3, num_key_value_heads=3),
        of_config("`hidden_size` must be a multiple of 3 heads, found 64"),
    ),
    "key heads do not divide": (
        config(num_attention_heads=4, num_key_value_heads=3),
        of_config("`num_key_value_heads` must be a divisor of 4, found 3"),
    ),
    "odd head size": (
        config(head_dim=5),
        of_config("`head_dim` must be an even number (rotary embedding), found 5"),
    ),
    "two layers": (
        config(num_hidden_layers=2),
        of_config("`num_hidden_layers` must be 1 (a draft has one decoder layer), found 2"),
    ),
    "other activation": (
        config(hidden_act="gelu"),
        of_config("`hidden_act` must be 'silu', found 'gelu'"),
    ),
    "epsilon zero": (
        config(rms_norm_eps=0),
        of_config("`rms_norm_eps` must be a number between 0 and 1, found 0"),
    ),
    "epsilon NaN": (
        config(rms_norm_eps=float("nan")),
        of_config("`rms_norm_eps` must be a number between 0 and 1, found nan"),
    ),
    "sliding window": (
        config(sliding_window=4096),
        of_config(
            "`sliding_window` must be none (drafts attend to their whole context), found 4096"
        ),
    ),
    "bias a string": (
        config(qkv_bias="false"),
        of_config("`qkv_bias` must be true or false, found 'false'"),
    ),
    "context a string": (
        config(max_position_embeddings="long"),
        of_config("`max_position_embeddings` must be a positive integer, found 'long'"),
    ),
    "architectures a string": (
        config(architectures="LlamaForCausalLM"),
        of_config("`architectures` must be a list of names, found 'LlamaForCausalLM'"),
    ),
    "no model type": (config(model_type=...), UNREADABLE),
    "unknown model type": (config(model_type="nonsense"), UNREADABLE),
    "unknown dtype": (config(torch_dtype="float7"), UNREADABLE),
    "heads absurd": (
        config(num_attention_heads=10**9, num_key_value_heads=10**9, head_dim=2),
        UNREADABLE,
    ),
    "code of its own": (remote_code, UNREADABLE),
    # Rotary embedding
    "rope type": (
        config(rope_scaling={"type": "dynamic", "factor": 2.0}),
        of_config(
            "`rope_scaling` of type 'dynamic' is not supported for a draft (supported: default, "
            "linear, llama3, yarn)"
        ),
    ),
    "rope type a list": (
        config(rope_scaling={"type": ["linear"]}),
        of_config("`rope_scaling` of type ['linear'] is not supported for a draft (...)"),
    ),
    "rope without factor": (
        config(rope_scaling={"type": "linear"}),
        of_config("rope type 'linear' needs a `factor` of at least 1, found None"),
    ),
    "rope that shrinks": (
        config(rope_scaling={"type": "linear", "factor": 1e-9}),
        of_config("rope type 'linear' needs a `factor` of at least 1, found 1e-09"),
    ),
    "rope absurd": (
        config(rope_scaling={"type": "linear", "factor": 1e12}),
        of_config(
            "its rope (linear) asks for 5.12e+14 positions, at most 16777216 are supported: "
            "correct its `factor`"
        ),
    ),
    "rope ends before the context": (
        config(rope_scaling=YARN),
        of_config(
            "its rope (yarn) covers 128 positions, the engine's max_model_len is 512: lower that "
            "to 128"
        ),
    ),
    "rope entry a word": (
        config(rope_scaling=YARN | {"beta_fast": "x"}),
        of_config("`rope_scaling.beta_fast` must be a number, found 'x'"),
    ),
    "rope not an object": (
        config(rope_scaling="linear"),
        of_config("`rope_scaling` must be an object, found 'linear'"),
    ),
    "base zero": (
        config(rope_theta=0),
        of_config("rope type 'default' needs a `rope_theta` above 0, found 0"),
    ),
    "base infinite": (
        config(rope_theta=float("inf")),
        of_config("rope type 'default' needs a `rope_theta` above 0, found inf"),
    ),
    "base of 400 digits": (
        config(rope_theta=10**400),
        of_config("rope type 'default' needs a `rope_theta` above 0, found 1000..."),
    ),
    "partial rope": (
        config(partial_rotary_factor=0.5),
        of_config("`partial_rotary_factor` 0.5 is not supported for a draft"),
    ),
    # The tree that the draft recommends
    "tree a list": (config(tree=[1]), of_config("`tree` must be an object, found [1]")),
    "tree entry misnamed": (
        config(tree={"depth": 3}),
        of_config(
            "`tree.depth` is not known (known: num_speculative_tokens, tree_depth, tree_top_k)"
        ),
    ),
    "tree depth zero": (
        config(tree={"tree_depth": 0}),
        of_config("`tree.tree_depth` must be a positive integer, found 0"),
    ),
    "tree width a fraction": (
        config(tree={"tree_top_k": 2.5}),
        of_config("`tree.tree_top_k` must be a positive integer, found 2.5"),
    ),
    "tree width null": (
        config(tree={"tree_top_k": None}),
        of_config("`tree.tree_top_k` must be a positive integer, found None"),
    ),
    # Quantised drafts
    "quantised": (
        config(quantization_config={"quant_method": "gptq"}),
        of_config(
            "`quantization_config` must be left out, with unquantised weights, found "
            "{'quant_method': 'gptq'}"
        ),
    ),
    "quantised, in a file beside it": (
        file("hf_quant_config.json", MODELOPT),
        "{folder}: griffin does not support a quantised draft (quantization='modelopt'): use its "
        "unquantised weights",
    ),
    # Tensors
    "no weights": (
        file(SAFETENSORS, None),
        "{folder}: no weights, expected one of model.safetensors, pytorch_model.bin or their "
        ".index.json",
    ),
    "weights a folder": (folder_named(SAFETENSORS), "{folder}: no weights, ..."),
    "weights a link to itself": (file(SAFETENSORS, Path(SAFETENSORS)), "{folder}: no weights, ..."),
    "missing key": (
        weights(fc__mlp__up_proj__weight=None),
        "{folder}/model.safetensors: missing key `fc.mlp.up_proj.weight` of shape [96, 128] "
        "(GRIFFIN layout)",
    ),
    "missing key of EAGLE": (
        weights(EAGLE, layers__0__mlp__gate_proj__weight=None),
        "{folder}/model.safetensors: missing key `layers.0.mlp.gate_proj.weight` of shape [96, 64] "
        "(EAGLE layout)",
    ),
    "missing key in shards": (
        weights(form="sharded-bin", fc__fc__bias=None),
        "{folder}/pytorch_model.bin.index.json: missing key `fc.fc.bias` of shape [64] (GRIFFIN "
        "layout)",
    ),
    "some biases only": (
        weights(BIASED, layers__0__self_attn__k_proj__bias=None),
        "{folder}/model.safetensors: missing key `layers.0.self_attn.k_proj.bias` of shape [64] "
        "(GRIFFIN layout)",
    ),
    "misnamed key": (
        weights(fc__fc__bias=None, fc__fc__biases=GRIFFIN["fc.fc.bias"]),
        "{folder}/model.safetensors: missing key `fc.fc.bias` of shape [64] (GRIFFIN layout); and "
        "1 more problem with its keys",
    ),
    "all keys under a prefix": (
        lambda folder: write_draft(folder, CONFIG, {f"model.{k}": v for k, v in GRIFFIN.items()}),
        "{folder}/model.safetensors: " + NO_DRAFT.replace("{n}", "29"),
    ),
    "no tensors": (
        file(SAFETENSORS, struct.pack("<Q", 2) + b"{}"),
        "{folder}/model.safetensors: " + NO_DRAFT.replace("{n}", "14"),
    ),
    "extra key": (
        weights(norm__weight=torch.ones(64)),
        "{folder}/model.safetensors: unexpected key `norm.weight` (GRIFFIN layout)",
    ),
    "head in the draft": (
        weights(form="bin", **HEAD),
        "{folder}/pytorch_model.bin: unexpected key `lm_head.weight` (GRIFFIN layout)",
    ),
    "both layouts": (
        weights(fc__weight=torch.ones(64, 128)),
        "{folder}/model.safetensors: unexpected key `fc.weight` (GRIFFIN layout)",
    ),
    "wrong shape": (
        weights(**{Q_PROJ: torch.ones(64, 60)}),
        f"{{folder}}/model.safetensors: `{Q_PROJ}` has shape [64, 60], expected [64, 64] (GRIFFIN "
        "layout)",
    ),
    "wrong dimensions": (
        weights(fc__fc__bias=torch.ones(1, 64)),
        "{folder}/model.safetensors: `fc.fc.bias` has shape [1, 64], expected [64] (GRIFFIN layout)",
    ),
    "wrong output in a shard": (
        weights(form=SHARDS, **{DOWN: torch.ones(100, 96)}),
        f"{{folder}}/model-...-of-00003.safetensors: `{DOWN}` has shape [100, 96], expected "
        "[128, 96] (GRIFFIN layout)",
    ),
    "integers": (
        weights(**{Q_PROJ: torch.ones(64, 64, dtype=torch.int8)}),
        f"{{folder}}/model.safetensors: `{Q_PROJ}` is int8, expected one of float64, float32, "
        "float16, bfloat16",
    ),
    "eight-bit floats": (
        weights(form="bin", **{Q_PROJ: torch.ones(64, 64).to(torch.float8_e4m3fn)}),
        f"{{folder}}/pytorch_model.bin: `{Q_PROJ}` is float8_e4m3fn, expected one of ...",
    ),
    "sparse": (
        weights(form="bin", **{Q_PROJ: GRIFFIN[Q_PROJ].to_sparse()}),
        f"{{folder}}/pytorch_model.bin: `{Q_PROJ}` is torch.sparse_coo on cpu, expected an ordinary "
        "tensor",
    ),
    "without data": (
        weights(form="bin", **{Q_PROJ: torch.empty(64, 64, device="meta")}),
        f"{{folder}}/pytorch_model.bin: `{Q_PROJ}` is torch.strided on meta, expected an ordinary "
        "tensor",
    ),
    # Weight files
    "safetensors cut short": (file(SAFETENSORS, 40000), damaged(SAFETENSORS)),
    "safetensors empty": (file(SAFETENSORS, b""), damaged(SAFETENSORS)),
    "safetensors text": (file(SAFETENSORS, b"<html>" * 9), damaged(SAFETENSORS)),
    "safetensors of 2^60 bytes": (
        file(SAFETENSORS, struct.pack("<Q", 1 << 60) + b"{}"),
        damaged(SAFETENSORS),
    ),
    "safetensors past its end": (
        file(SAFETENSORS, header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,999]}}')),
        damaged(SAFETENSORS),
    ),
    "safetensors of negative size": (
        file(SAFETENSORS, header(b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}')),
        damaged(SAFETENSORS),
    ),
    "LFS pointer": (
        file(SAFETENSORS, b"version https://git-lfs.github.com/spec/v1\n"),
        "{folder}/model.safetensors: a Git LFS pointer, not the weights; run `git lfs pull`",
    ),
    "bin cut short": (file(BIN, 40000, "bin"), damaged(BIN)),
    "bin empty": (file(BIN, b"", "bin"), damaged(BIN)),
    "bin text": (file(BIN, b"hello", "bin"), damaged(BIN)),
    "bin of an old torch": (saved(GRIFFIN, _use_new_zipfile_serialization=False), damaged(BIN)),
    "bin that runs code": (bomb, damaged(BIN)),
    "bin a plain pickle": (plain_pickle, damaged(BIN)),
    "bin a list": (
        saved([torch.ones(1)]),
        "{folder}/pytorch_model.bin: expected a dict of tensors, found a list",
    ),
    "bin holds a dict": (
        saved({"model": {}}),
        "{folder}/pytorch_model.bin: `model` is a dict, expected a tensor",
    ),
    "bin without names": (
        saved({1: torch.ones(1)}),
        "{folder}/pytorch_model.bin: has the key 1, expected names of tensors",
    ),
    # Index of shards
    "index not JSON": (
        file(INDEX, b"?", SHARDS),
        f"{{folder}}/{INDEX}: not readable as JSON (...)",
    ),
    "index without a map": (
        file(INDEX, {}, SHARDS),
        f"{{folder}}/{INDEX}: has no `weight_map` from keys to shards",
    ),
    "shard missing": (
        file(SHARD, None, SHARDS),
        f"{{folder}}/{INDEX}: names the shard '{SHARD}', which is missing",
    ),
    "shard cut short": (file(SHARD, 500, SHARDS), damaged(SHARD)),
    "shard above": (
        index(Q_PROJ, "../../etc/passwd"),
        f"{{folder}}/{INDEX}: `{Q_PROJ}` is in '../../etc/passwd', which is outside the folder",
    ),
    "shard absolute": (
        index(Q_PROJ, "/etc/passwd"),
        f"{{folder}}/{INDEX}: `{Q_PROJ}` is in '/etc/passwd', which is outside the folder",
    ),
    "shard with backslashes": (
        index(Q_PROJ, r"..\x.safetensors"),
        f"{{folder}}/{INDEX}: `{Q_PROJ}` is in ..., which is outside the folder",
    ),
    "shard a link outside": (
        linked_shard,
        f"{{folder}}/{INDEX}: names the shard '{SHARD}', which is a link to {{parent}}/{SHARD}, "
        "outside the folder: put the file itself there",
    ),
    "shard in a link outside": (
        linked_subfolder,
        f"{{folder}}/{INDEX}: names the shard 'sub/x.safetensors', which is a link to "
        "{parent}/x.safetensors, outside the folder: put the file itself there",
    ),
    "shard a number": (
        index(Q_PROJ, 7),
        f"{{folder}}/{INDEX}: `{Q_PROJ}` is in 7, expected the name of a file",
    ),
    "shard with a NUL": (
        index(Q_PROJ, "a\0.safetensors"),
        f"{{folder}}/{INDEX}: names the shard 'a\\x00.safetensors', which is missing",
    ),
    "shard of a long name": (
        index(Q_PROJ, "a" * 5000 + ".safetensors"),
        f"{{folder}}/{INDEX}: names the shard 'aaa..., which is missing",
    ),
    "shard of another kind": (
        index(Q_PROJ, "x.bin"),
        f"{{folder}}/{INDEX}: `{Q_PROJ}` is in 'x.bin', expected a .safetensors file",
    ),
    "key not in its shard": (
        index("norm.weight", SHARD),
        f"{{folder}}/{INDEX}: says `norm.weight` is in {SHARD}, where it is not",
    ),
    "key not in the index": (
        unlisted_tensor,
        f"{{folder}}/{SHARD}: unexpected key `lm_head.weight` (GRIFFIN layout)",
    ),
    # vocabulary.json
    "no ranking": (
        config(draft_vocab_size=20),
        "{folder}/vocabulary.json: missing; without it a draft drafts from the whole vocabulary "
        "only, so leave draft_vocab_size out",
    ),
    "ranking cut short": (
        vocabulary("[1, 2"),
        "{folder}/vocabulary.json: not readable as JSON (...)",
    ),
    "ranking by name": (
        vocabulary({"1": 2}),
        "{folder}/vocabulary.json: expected a list of token ids below 512",
    ),
    "ranking out of range": (
        vocabulary([1, 512]),
        "{folder}/vocabulary.json: expected a list of token ids below 512",
    ),
    "ranking below 0": (
        vocabulary([1, -1]),
        "{folder}/vocabulary.json: expected a list of token ids below 512",
    ),
    "ranking with true": (
        vocabulary([1, True]),
        "{folder}/vocabulary.json: expected a list of token ids below 512",
    ),
    "ranking with a token twice": (
        vocabulary([1, 4, 1]),
        "{folder}/vocabulary.json: names a token twice",
    ),
    "ranking too short": (
        vocabulary([7, 400, 3]),
        "{folder}/vocabulary.json: ranks 3 tokens, draft_vocab_size=6 needs more",
    ),
    "fewer tokens than children": (
        vocabulary([7, 400, 3, 511, 0, 90]),
        "tree_top_k=10 is above the vocabulary of 6 tokens: lower it",
    ),
    "draft vocabulary above the whole": (
        vocabulary([1, 2], 513),
        "draft_vocab_size=513 is above the vocabulary of 512 tokens",
    ),
    "draft vocabulary a string": (
        vocabulary([1, 2], "2"),
        of_config("`draft_vocab_size` must be a positive integer, found '2'"),
    ),
    "draft vocabulary true": (
        vocabulary([1, 2], True),
        of_config("`draft_vocab_size` must be a positive integer, found True"),
    ),
    "draft vocabulary below 0": (
        vocabulary([1, 2], -3),
        of_config("`draft_vocab_size` must be a positive integer, found -3"),
    ),
    # Speculators layout
    "speculator without a type": (
        speculators("speculators_model_type"),
        of_config("`speculators_model_type` must be 'griffin', it is missing"),
    ),
    "speculator of another type": (
        speculators("speculators_model_type", value="eagle3"),
        of_config("`speculators_model_type` must be 'griffin', found 'eagle3'"),
    ),
    "speculator without a layer": (
        speculators("transformer_layer_config"),
        of_config("`transformer_layer_config` must be an object, it is missing"),
    ),
    "speculator without a width": (
        speculators("transformer_layer_config", "hidden_size"),
        of_config("`hidden_size` must be a positive integer, it is missing"),
    ),
    "speculator's config a list": (
        speculators("speculators_config", value=[]),
        of_config("`speculators_config` must be an object, found []"),
    ),
    "speculator without methods": (
        speculators(*METHODS, value=[]),
        of_config("`speculators_config.proposal_methods` must be a list of objects, found []"),
    ),
    "speculator without nodes": (
        speculators(*METHODS, 0, "speculative_tokens"),
        of_config(
            "`speculators_config.proposal_methods[0].speculative_tokens` must be a positive "
            "integer, it is missing"
        ),
    ),
    "speculator of depth 0": (
        speculators(*METHODS, 0, "tree_depth", value=0),
        of_config(
            "`speculators_config.proposal_methods[0].tree_depth` must be a positive integer, "
            "found 0"
        ),
    ),
    "speculator with an unknown setting": (
        speculators(*METHODS, 0, "accept_tolerance", value=0.1),
        of_config(
            "`speculators_config.proposal_methods[0].accept_tolerance` is not known (known: "
            "proposal_type, speculative_tokens, tree_depth, tree_top_k)"
        ),
    ),
    "speculator of another proposal": (
        speculators(*METHODS, 0, "proposal_type", value="greedy"),
        of_config(
            "`speculators_config.proposal_methods[0].proposal_type` must be 'tree', found 'greedy'"
        ),
    ),
    "speculator of another default": (
        speculators("speculators_config", "default_proposal_method", value="greedy"),
        of_config("`speculators_config.default_proposal_method` must be 'tree', found 'greedy'"),
    ),
}


@pytest.fixture(autouse=True)
def fast_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM reads a config that transformers refuses a second time, two seconds later."""
    monkeypatch.setattr("vllm.transformers_utils.repo_utils.time.sleep", lambda seconds: None)


@pytest.mark.parametrize("name", BAD)
def test_checkpoint_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    write, expected = BAD[name]
    folder = tmp_path / "draft"
    write(folder)
    with pytest.raises(ValueError) as caught:
        make({"model": str(folder)})
    assert_sentence(caught.value, expected, folder=folder, parent=tmp_path)
    assert not (tmp_path / "mark").exists(), "something of the checkpoint was executed"


def test_the_bombs_go_off_where_code_may_run(tmp_path: Path) -> None:
    plain_pickle(tmp_path / "draft")
    pickle.loads((tmp_path / "draft" / BIN).read_bytes())
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_that_is_no_number_is_refused_when_loaded(
    value: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Not at start-up: that would read each file twice."""
    spoilt = GRIFFIN[Q_PROJ].to(dtype)
    spoilt[7, 7] = float(value)
    weights(**{Q_PROJ: spoilt})(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        list(DraftCheckpoint.open(tmp_path).weights())
    expected = "{folder}/model.safetensors: `{key}` holds a NaN or an infinity: train or convert "
    assert_sentence(caught.value, expected + "the draft again", folder=tmp_path, key=Q_PROJ)


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    folder, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    write_draft(folder, CONFIG, GRIFFIN, SHARDS)
    blobs.mkdir()
    for n, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(n))
        path.symlink_to(Path("..", "..", "blobs", str(n)))
    assert DraftCheckpoint.open(folder).validate() == DraftLayout()
