"""Checkpoints on disk and on the hub: what is found, listed and read (tests/bad_input: what is refused)."""

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

from .draft_files import CONFIG, random_weights, write_draft

GRIFFIN = random_weights(CONFIG, DraftLayout())
EAGLE = random_weights(CONFIG, DraftLayout(fusion=False, two_heads=False, fc_bias=False))


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


def test_checking_a_checkpoint_needs_no_vllm():
    code = "import sys, vllm_griffin.model.checkpoint; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
