"""Checkpoints that cannot be used are refused with one error that names the file and the key."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from vllm_griffin.model import checkpoint as module
from vllm_griffin.model.checkpoint import (
    CheckpointError,
    DraftCheckpoint,
    DraftLayout,
    tree_defaults,
)

from .draft_files import CONFIG, random_weights, write_draft, write_tensors

GRIFFIN = random_weights(CONFIG, DraftLayout())
EAGLE = random_weights(CONFIG, DraftLayout(fusion=False, two_heads=False, fc_bias=False))
BIASED = random_weights(CONFIG, DraftLayout(qkv_bias=True))
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
Q_PROJ = "layers.0.self_attn.q_proj.weight"
DOWN = "layers.0.mlp.down_proj.weight"


def config(**changes):
    """A draft whose config has these fields; None removes one."""
    raw = {k: v for k, v in (CONFIG | changes).items() if v is not None}
    return lambda folder: write_draft(folder, raw, GRIFFIN)


def weights(base=GRIFFIN, form="safetensors", **changes):
    """A draft with these tensors; None removes one. `__` in a name stands for a dot."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    tensors = {k: v for k, v in (base | changes).items() if v is not None}
    return lambda folder: write_draft(folder, CONFIG, tensors, form)


def file(name, content, form="safetensors"):
    """A draft one of whose files has another content; None removes it, an int cuts it there."""

    def make(folder):
        path = write_draft(folder, CONFIG, GRIFFIN, form) / name
        if content is None:
            path.unlink()
        elif isinstance(content, int):
            path.write_bytes(path.read_bytes()[:content])
        elif isinstance(content, dict):
            path.write_text(json.dumps(content))
        else:
            path.write_bytes(content)

    return make


def index(key, shard):
    """A sharded draft whose index sends a key elsewhere."""

    def make(folder):
        path = write_draft(folder, CONFIG, GRIFFIN, "sharded-safetensors") / INDEX
        read = json.loads(path.read_text())
        read["weight_map"][key] = shard
        path.write_text(json.dumps(read))

    return make


def saved(value):
    """A draft whose `pytorch_model.bin` holds any object."""

    def make(folder):
        torch.save(value, write_draft(folder, CONFIG, GRIFFIN, "bin") / "pytorch_model.bin")

    return make


class Surprise:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("never printed",))


def unlisted_tensor(folder):
    write_draft(folder, CONFIG, GRIFFIN, "sharded-safetensors")
    write_tensors(folder / SHARD, {key: GRIFFIN[key] for key in sorted(GRIFFIN)[1::3]} | EXTRA)


EXTRA = {"lm_head.weight": torch.ones(512, 64)}
ROPE = {"type": "dynamic", "factor": 2.0}
SOME_BIASES = {"layers__0__self_attn__k_proj__bias": None}
# name -> (how to make it, what the message says)
BAD = {
    "empty folder": (lambda folder: folder.mkdir(), ["config.json: missing"]),
    "no config": (file("config.json", None), ["config.json: missing"]),
    "config is not JSON": (file("config.json", b"{,}"), ["config.json", "JSON"]),
    "config is not text": (file("config.json", b"\xff\xfe\x00"), ["config.json", "JSON"]),
    "config is a list": (file("config.json", b"[]"), ["config.json", "list"]),
    "no hidden size": (config(hidden_size=None), ["config.json", "`hidden_size`", "missing"]),
    "hidden size a string": (config(hidden_size="64"), ["`hidden_size`", "integer", "'64'"]),
    "hidden size true": (config(hidden_size=True), ["`hidden_size`", "integer", "True"]),
    "no vocabulary": (config(vocab_size=None), ["config.json", "`vocab_size`", "missing"]),
    "negative width": (config(intermediate_size=-1), ["`intermediate_size`", "positive", "-1"]),
    "heads do not divide": (
        config(num_attention_heads=3, num_key_value_heads=3),
        ["multiple of 3"],
    ),
    "kv heads do not divide": (config(num_attention_heads=4, num_key_value_heads=3), ["divisor"]),
    "odd head size": (config(head_dim=5), ["`head_dim`", "even", "5"]),
    "two layers": (config(num_hidden_layers=2), ["`num_hidden_layers`", "must be 1", "found 2"]),
    "other activation": (config(hidden_act="gelu"), ["`hidden_act`", "'silu'", "'gelu'"]),
    "epsilon zero": (config(rms_norm_eps=0), ["`rms_norm_eps`", "between 0 and 1"]),
    "sliding window": (config(sliding_window=4096), ["`sliding_window`", "4096"]),
    "rope type": (config(rope_scaling=ROPE), ["`rope_scaling`", "'dynamic'", "llama3"]),
    "rope without factor": (config(rope_scaling={"type": "linear"}), ["linear", "`factor`"]),
    "rope not an object": (config(rope_scaling="linear"), ["`rope_scaling`", "an object"]),
    "partial rope": (config(partial_rotary_factor=0.5), ["`partial_rotary_factor`", "0.5"]),
    "no weights": (file("model.safetensors", None), ["no weights", "pytorch_model.bin"]),
    "missing key": (
        weights(fc__mlp__up_proj__weight=None),
        ["model.safetensors: missing key `fc.mlp.up_proj.weight`", "[96, 128]", "GRIFFIN"],
    ),
    "missing key of EAGLE": (
        weights(EAGLE, layers__0__mlp__gate_proj__weight=None),
        ["missing key `layers.0.mlp.gate_proj.weight`", "EAGLE layout"],
    ),
    "missing key in shards": (
        weights(form="sharded-bin", fc__fc__bias=None),
        ["pytorch_model.bin.index.json: missing key `fc.fc.bias`"],
    ),
    "some biases only": (
        weights(BIASED, **SOME_BIASES),
        ["missing key `layers.0.self_attn.k_proj.bias`", "[64]"],
    ),
    "not a draft": (weights(fc__fc__weight=None), ["`fc.fc.weight` (GRIFFIN) or `fc.weight`"]),
    "extra key": (
        weights(norm__weight=torch.ones(64)),
        ["model.safetensors: unexpected key `norm.weight`", "GRIFFIN"],
    ),
    "head in the draft": (weights(form="bin", **EXTRA), ["unexpected key `lm_head.weight`"]),
    "both layouts": (
        weights(fc__weight=torch.ones(64, 128)),
        ["unexpected key `fc.weight` (GRIFFIN layout)"],
    ),
    "wrong shape": (
        weights(**{Q_PROJ: torch.ones(64, 60)}),
        [f"model.safetensors: `{Q_PROJ}`", "[64, 60], expected [64, 64]"],
    ),
    "wrong dimensions": (weights(fc__fc__bias=torch.ones(1, 64)), ["[1, 64], expected [64]"]),
    "other vocabulary": (
        weights(embed_tokens__weight=torch.ones(500, 64)),
        ["`embed_tokens.weight` has shape [500, 64], expected [512, 64]"],
    ),
    "wrong output": (
        weights(form="sharded-safetensors", **{DOWN: torch.ones(100, 96)}),
        ["-of-00003.safetensors", f"`{DOWN}` has shape [100, 96], expected [128, 96]"],
    ),
    "integers": (
        weights(**{Q_PROJ: torch.ones(64, 64, dtype=torch.int8)}),
        ["model.safetensors", Q_PROJ, "int8", "bfloat16"],
    ),
    "eight-bit floats": (
        weights(form="bin", **{Q_PROJ: torch.ones(64, 64).to(torch.float8_e4m3fn)}),
        ["pytorch_model.bin", Q_PROJ, "float8_e4m3fn"],
    ),
    "safetensors cut short": (file("model.safetensors", 40000), ["model.safetensors", "cut short"]),
    "safetensors empty": (file("model.safetensors", b""), ["model.safetensors", "cut short"]),
    "safetensors is text": (file("model.safetensors", b"<html>" * 9), ["model.safetensors"]),
    "LFS pointer": (
        file("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        ["model.safetensors", "git lfs pull"],
    ),
    "bin cut short": (
        file("pytorch_model.bin", 40000, "bin"),
        ["pytorch_model.bin", "cut short"],
    ),
    "bin empty": (file("pytorch_model.bin", b"", "bin"), ["pytorch_model.bin", "cut short"]),
    "bin is text": (file("pytorch_model.bin", b"hello", "bin"), ["pytorch_model.bin"]),
    "bin runs code": (saved({"fc.fc.weight": Surprise()}), ["pytorch_model.bin", "torch.save"]),
    "bin is a list": (saved([torch.ones(1)]), ["pytorch_model.bin", "found a list"]),
    "bin holds a dict": (saved({"model": {}}), ["pytorch_model.bin", "`model` is a dict"]),
    "index is not JSON": (file(INDEX, b"?", "sharded-safetensors"), [INDEX, "JSON"]),
    "index without a map": (file(INDEX, {}, "sharded-safetensors"), [INDEX, "`weight_map`"]),
    "shard missing": (file(SHARD, None, "sharded-safetensors"), [INDEX, SHARD, "missing"]),
    "shard cut short": (file(SHARD, 500, "sharded-safetensors"), [SHARD, "cut short"]),
    "shard above": (index(Q_PROJ, "../model.safetensors"), [INDEX, Q_PROJ, "outside"]),
    "shard absolute": (index(Q_PROJ, "/etc/passwd"), [INDEX, "'/etc/passwd'", "outside"]),
    "shard not a name": (index(Q_PROJ, 7), [INDEX, Q_PROJ, "7"]),
    "shard of another kind": (index(Q_PROJ, "x.bin"), [INDEX, "x.bin", ".safetensors file"]),
    "key not in its shard": (index("norm.weight", SHARD), [INDEX, "norm.weight", SHARD]),
    "key not in the index": (unlisted_tensor, [SHARD, "unexpected key `lm_head.weight`"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoint_is_refused_by_name(tmp_path, name, capsys):
    make, parts = BAD[name]
    folder = tmp_path / "draft"
    make(folder)
    with pytest.raises(CheckpointError) as error:
        DraftCheckpoint.open(folder).validate()
    for part in [str(folder), *parts]:
        assert part in str(error.value)
    assert "never printed" not in capsys.readouterr().out


def test_many_problems_make_one_error_of_a_few_lines(tmp_path):
    write_draft(tmp_path, CONFIG, {"fc.fc.weight": torch.ones(1), "x": torch.ones(1)})
    with pytest.raises(CheckpointError) as error:
        DraftCheckpoint.open(tmp_path).validate()
    lines = str(error.value).splitlines()
    assert len(lines) == 6
    assert lines[-1] == "... and 10 more"


@pytest.mark.parametrize(
    ("hidden", "vocabulary", "parts"),
    [
        (128, 512, ["`hidden_size` is 64", "128"]),
        (32, 512, ["`hidden_size` is 64", "32"]),
        (64, 32000, ["`vocab_size` is 512", "32000"]),
        (64, 500, ["`vocab_size` is 512", "500"]),
    ],
)
def test_draft_of_another_target_is_refused(tmp_path, hidden, vocabulary, parts):
    opened = DraftCheckpoint.open(write_draft(tmp_path, CONFIG, GRIFFIN))
    opened.check_target(64, 512)
    with pytest.raises(CheckpointError) as error:
        opened.check_target(hidden, vocabulary)
    for part in [str(tmp_path / "config.json"), *parts]:
        assert part in str(error.value)


def test_safetensors_are_preferred_and_listed_without_their_data(tmp_path, monkeypatch):
    write_draft(tmp_path, CONFIG, EAGLE, "bin")
    write_draft(tmp_path, CONFIG, GRIFFIN, "safetensors")
    monkeypatch.setattr(module, "read_tensors", None)
    assert DraftCheckpoint.open(tmp_path).validate() == DraftLayout()


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded-safetensors", "sharded-bin"])
def test_weights_come_back_whole(tmp_path, form):
    found = dict(DraftCheckpoint.open(write_draft(tmp_path, CONFIG, GRIFFIN, form)).weights())
    assert found.keys() == GRIFFIN.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in GRIFFIN.items())


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("no/such/folder", ["no/such/folder: no such folder"]),
        ("./nothing", ["no such folder"]),
        ("someone/draft", ["someone/draft", "hub", "ConnectionError", "no network"]),
    ],
)
def test_what_is_not_found_is_said(monkeypatch, tmp_path, path, parts):
    def offline(*args, **kwargs):
        raise ConnectionError("no network\nand more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError) as error:
        DraftCheckpoint.open(path)
    for part in parts:
        assert part in str(error.value)


def test_a_file_is_not_a_draft(tmp_path):
    (tmp_path / "draft.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="this is a file"):
        DraftCheckpoint.open(tmp_path / "draft.bin")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_hub_download_takes_bin_only_without_safetensors(monkeypatch, tmp_path, form):
    source = write_draft(tmp_path / "hub", CONFIG, GRIFFIN, form)
    (source / "vocabulary.json").write_text("[5, 2]")
    asked = []

    def download(repo, *, revision, cache_dir, allow_patterns):
        asked.append((repo, revision, cache_dir, allow_patterns))
        target = tmp_path / "cache"
        for pattern in allow_patterns:
            for found in source.glob(pattern):
                target.mkdir(exist_ok=True)
                shutil.copy(found, target)
        return str(target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    opened = DraftCheckpoint.open("someone/draft", revision="v1", cache_dir="here")
    assert opened.validate() == DraftLayout()
    assert [ask[:3] for ask in asked] == [("someone/draft", "v1", "here")] * len(asked)
    kinds = [ask[3] for ask in asked]
    assert kinds[0] == [
        "config.json",
        "vocabulary.json",
        "*.safetensors",
        "*.safetensors.index.json",
    ]
    assert opened.vocabulary(2) == [2, 5]
    assert len(kinds) == (1 if form == "safetensors" else 2)


TREE = {"num_speculative_tokens": 12, "tree_depth": 3, "tree_top_k": 4}


@pytest.mark.parametrize("tree", [TREE, {"tree_depth": 2}, {}])
def test_tree_settings_of_a_draft(tmp_path, tree):
    assert tree_defaults({"tree": tree}) == tree
    write_draft(tmp_path, CONFIG | {"tree": tree}, GRIFFIN)
    assert DraftCheckpoint.open(tmp_path).tree_defaults() == tree


def test_no_tree_settings():
    assert tree_defaults(CONFIG) == tree_defaults({"tree": None}) == {}


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ([1], ["`tree` must be an object"]),
        ({"depth": 3}, ["`tree.depth` is not known", "tree_depth"]),
        ({"tree_depth": 0}, ["`tree.tree_depth`", "positive integer", "0"]),
        ({"tree_top_k": 2.5}, ["`tree.tree_top_k`", "positive integer", "2.5"]),
        ({"tree_top_k": None}, ["`tree.tree_top_k`", "positive integer", "None"]),
    ],
)
def test_bad_tree_settings_are_refused(tree, parts):
    with pytest.raises(CheckpointError) as error:
        tree_defaults({"tree": tree}, "folder/config.json")
    for part in ["folder/config.json", *parts]:
        assert part in str(error.value)


def test_checking_a_checkpoint_needs_no_vllm():
    code = "import sys, vllm_griffin.model.checkpoint; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
