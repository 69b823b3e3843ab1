"""Drafts from one layout on disk to another, weights bit for bit.

* `griffin`: this project's. `model.safetensors` without an embedding that is the target's; `config.json`
  with `architectures` and the draft's `tree`.
* `published`: what the published GRIFFIN and EAGLE code loads. `pytorch_model.bin` with `embed_tokens`;
  a Llama's `config.json`.
* `speculators`: as `griffin`, but the config names the target, so that `vllm serve DRAFT` is enough.

Any of them is read, and no code of a checkpoint is run.
"""

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vllm_griffin import provenance
from vllm_griffin.model.checkpoint import CheckpointError, DraftCheckpoint, find_folder
from vllm_griffin.model.config import PAPER_TREE, read_json, read_sizes
from vllm_griffin.model.embedding import add_embedding, leave_out_embedding
from vllm_griffin.model.speculators import verifier_name, wrap
from vllm_griffin.report import ReportError
from vllm_griffin.tree_shape import TreeShape
from vllm_griffin.whole_file import write_json

Form = Literal["griffin", "published", "speculators"]
# What training leaves beside a draft and stays true of the weights. The card is written anew, but keeps
# the license of the old one.
COMPANIONS = ("run.json", "log.jsonl", "vocabulary.json", "README.md")


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        folder: Where.
        network: The network's name: GRIFFIN, EAGLE, or an ablation of GRIFFIN.
        embedding: "left out" (it is the target's), "kept" (it is the draft's own, or the form wants it),
            "added" (the target's), or "none" (the source had none, and the form wants none).
        tree: The tree defaults in its config; None for the published form, which has no place for them.
    """

    folder: Path
    network: str
    embedding: str
    tree: TreeShape | None


def convert(
    source: str | Path,
    target: str | Path,
    output: Path,
    to: Form = "griffin",
    *,
    tree: TreeShape | None = None,
    verifier: str | None = None,
    revision: str | None = None,
) -> Conversion:
    """Write a draft in another layout, with `provenance.json` and a model card; whole or not at all.

    Args:
        source: Draft: a folder, or a hub id.
        target: The model that it drafts for: a folder, or a hub id.
        output: A new or empty folder.
        to: The layout to write.
        tree: Tree defaults; the source's own, else the paper's, if None.
        verifier: The target's name in the speculators layout; `target` if None.
        revision: Of the source on the hub.

    Raises:
        CheckpointError: Source or target cannot be used, or do not fit each other; the file and the key
            are named. Or the output cannot be written.
    """
    draft = DraftCheckpoint.open(source, revision=revision)
    layout = draft.validate()
    target_folder = find_folder(target)
    draft.check_target(*read_sizes(target_folder, "hidden_size", "vocab_size"))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not an empty folder: give a new one")
    tensors = dict(draft.weights())
    if to == "published":
        embedding = add_embedding(tensors, target_folder, draft.config.vocab_size)
        config, tree = _published_config(draft), None
    else:
        embedding = leave_out_embedding(tensors, target_folder)
        tree = tree or _default_tree(draft)
        config = _griffin_config(draft, tree)
    if to == "speculators":
        name = verifier_name(verifier if verifier is not None else target)
        architectures = read_json(target_folder / "config.json").get("architectures")
        config = wrap(config, name, architectures or [])
    record = {
        "source": str(source),
        "revision": revision,
        "files": _hashes(draft),
        "target": str(target),
        "network": layout.name,
        "output": str(output),
        "layout": to,
        "embedding": embedding,
        **provenance.describe(),
    }
    _write(output, config, tensors, record, draft.folder)
    return Conversion(output, layout.name, embedding, tree)


def _default_tree(draft: DraftCheckpoint) -> TreeShape:
    try:
        return TreeShape(*(PAPER_TREE | draft.tree_defaults()).values())
    except ValueError as error:
        raise CheckpointError(
            f"{draft.config.source}: {error}; choose another with --tree"
        ) from error


def _griffin_config(draft: DraftCheckpoint, tree: TreeShape) -> dict[str, Any]:
    layout = draft.layout
    eagle = not layout.fusion and not layout.two_heads
    changes: dict[str, Any] = {
        "architectures": ["EagleLlamaForCausalLM" if eagle else "GriffinForCausalLM"],
        "tree": tree.fields,
    }
    return {"model_type": "llama"} | draft.raw_config | _bias_entry(draft) | changes


def _published_config(draft: DraftCheckpoint) -> dict[str, Any]:
    """With the old names of fields, which is what the published code's `transformers` reads."""
    config = {"model_type": "llama"} | draft.raw_config | _bias_entry(draft)
    config["architectures"] = ["LlamaForCausalLM"]
    config.pop("tree", None)
    heads, own = draft.config.num_attention_heads, draft.config.head_dim
    if own * heads != draft.config.hidden_size:
        raise CheckpointError(
            f"{draft.config.source}: `head_dim` {own} has no place in the published layout, where it is "
            f"hidden_size / num_attention_heads = {draft.config.hidden_size} / {heads}"
        )
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    if config.pop("rope_parameters", None):
        rope = dict(draft.config.rope_parameters)
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = (
            None if kind == "default" else {"type": kind, "rope_type": kind, **rope}
        )
    return config


def _bias_entry(draft: DraftCheckpoint) -> dict[str, bool]:
    """`qkv_bias` says what the tensors say; without biases it need not be there."""
    named = "qkv_bias" in draft.raw_config or draft.layout.qkv_bias
    return {"qkv_bias": draft.layout.qkv_bias} if named else {}


def _hashes(draft: DraftCheckpoint) -> dict[str, str]:
    files = {draft.folder / "config.json", draft.source}
    files |= {info.file for info in draft.tensors.values()}
    digests = {}
    for file in sorted(files):
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _write(
    output: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    record: dict[str, Any],
    source: Path,
) -> None:
    """Fill a folder beside `output`, which then takes its name."""
    from vllm_griffin.card import write_card

    output = output.absolute()
    # Copies, since views of one storage would be saved whole, or not at all.
    copies = {k: t.clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    scratch: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        made = scratch / output.name
        made.mkdir()
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if record["layout"] == "published":
            torch.save(copies, made / "pytorch_model.bin")
        else:
            save_file(copies, made / "model.safetensors", metadata={"format": "pt"})
            (made / "model.safetensors").chmod(0o644)
        write_json(made / "provenance.json", record)
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, made / name)
        try:
            write_card(made, name=record["output"])
        except (CheckpointError, ReportError) as error:
            # It names the copy, which goes.
            raise CheckpointError(str(error).replace(str(made), str(source))) from error
        made.replace(output)
    # torch and safetensors report a full disk with types of their own.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{output} could not be written: {error}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
