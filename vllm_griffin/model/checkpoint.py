"""Draft checkpoints on disk or on the hub: find files, list tensors, refuse what does not fit.

A folder holds `config.json` and one of `model.safetensors`, `pytorch_model.bin`, or either in
shards with an index. Nothing here imports vLLM, so that a checkpoint can be checked anywhere.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from vllm_griffin.model.config import (
    CheckpointError,
    DraftConfig,
    read_json,
    tree_acceptance,
    tree_defaults,
)
from vllm_griffin.model.files import TensorInfo, read_tensors, scan_tensors
from vllm_griffin.model.layout import DraftLayout, Shape, expected_shapes
from vllm_griffin.model.speculators import HUB_ID, flatten
from vllm_griffin.model.vocabulary import VOCABULARY_FILE, default_size, most_frequent

__all__ = [
    "CheckpointError",
    "DraftCheckpoint",
    "DraftConfig",
    "DraftLayout",
    "TensorInfo",
    "expected_shapes",
    "tree_defaults",
]

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
FLOATS = ("float64", "float32", "float16", "bfloat16")
# Old Hugging Face checkpoints carry this buffer; it follows from the config.
IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class DraftCheckpoint:
    """An opened checkpoint. The weight files are looked at when something asks for them.

    Attributes:
        folder: Where the files are.
        raw_config: `config.json` as it is; one in the speculators layout in the plain form.
        config: What the network needs of it.
    """

    folder: Path
    raw_config: dict[str, Any]
    config: DraftConfig

    @classmethod
    def open(
        cls, path: str | Path, revision: str | None = None, cache_dir: str | None = None
    ) -> "DraftCheckpoint":
        """Open a local folder, or download a repository of the Hugging Face hub.

        Args:
            path: A folder, or a hub id such as `husj576/GRIFFIN-llama3-instruct-8B`.
            revision: Branch, tag or commit on the hub; a folder has none.
            cache_dir: Where downloads go; the hub's own default if None.

        Raises:
            CheckpointError: Not found, a folder with a revision, or `config.json` is missing, malformed or
                not supported.
        """
        folder = find_folder(path, revision, cache_dir)
        file = folder / "config.json"
        raw = flatten(read_json(file), str(file))
        return cls(folder, raw, DraftConfig.from_dict(raw, str(file)))

    @property
    def has_weights(self) -> bool:
        """Whether there is a weight file; `load_format="dummy"` needs none."""
        return find_weights(self.folder) is not None

    @cached_property
    def source(self) -> Path:
        """The weight file, or the index of its shards.

        Raises:
            CheckpointError: There is none.
        """
        found = find_weights(self.folder)
        if found is None:
            names = ", ".join(WEIGHT_FILES)
            raise CheckpointError(
                f"{self.folder}: no weights, expected one of {names} or their .index.json"
            )
        return found

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """key -> shape, dtype and file, without the data.

        Raises:
            CheckpointError: A weight file or index is missing, damaged or malformed.
        """
        listed = list_tensors(self.source)
        return {key: info for key, info in listed.items() if not IGNORED.fullmatch(key)}

    @cached_property
    def layout(self) -> DraftLayout:
        """Which network the tensors make; without weights, what the config says."""
        if not self.has_weights:
            return DraftLayout.from_config(self.config)
        shapes = {key: info.shape for key, info in self.tensors.items()}
        return DraftLayout.detect(shapes, self.config)

    def expected_shapes(self) -> dict[str, Shape]:
        """The keys this checkpoint must have, with their shapes."""
        return expected_shapes(self.config, self.layout)

    def validate(self) -> DraftLayout:
        """Compare every tensor with what the layout needs.

        Raises:
            CheckpointError: The first problem, and how many more: missing key, extra key, wrong
                shape or dtype; or a file that cannot be read.
        """
        problems = list(self._problems())
        if problems:
            more = len(problems) - 1
            rest = f"; and {more} more problem{'s' * (more > 1)} with its keys" if more else ""
            raise CheckpointError(problems[0] + rest)
        return self.layout

    def _problems(self) -> Iterator[str]:
        tensors = self.tensors
        expected, name = self.expected_shapes(), self.layout.name
        if not {"fc.fc.weight", "fc.weight"} & tensors.keys():
            yield (
                f"{self.source}: missing key `fc.fc.weight` (GRIFFIN) or `fc.weight` (EAGLE): "
                "this is not a draft of either layout"
            )
        for key, shape in expected.items():
            info = tensors.get(key)
            if info is None:
                yield f"{self.source}: missing key `{key}` of shape {list(shape)} ({name} layout)"
            elif info.shape != shape:
                yield (
                    f"{info.file}: `{key}` has shape {list(info.shape)}, expected {list(shape)} "
                    f"({name} layout)"
                )
            elif info.dtype not in FLOATS:
                yield f"{info.file}: `{key}` is {info.dtype}, expected one of {', '.join(FLOATS)}"
        for key in sorted(tensors.keys() - expected.keys()):
            yield f"{tensors[key].file}: unexpected key `{key}` ({name} layout)"

    def check_target(self, hidden_size: int, vocab_size: int) -> None:
        """Refuse a draft for another target; see `DraftConfig.check_target`."""
        self.config.check_target(hidden_size, vocab_size)

    def tree_defaults(self) -> dict[str, int]:
        """Tree settings this draft recommends; see `tree_defaults`."""
        return tree_defaults(self.raw_config, self.config.source)

    def tree_acceptance(self) -> dict[str, float] | None:
        """Acceptance length by tree, as measured; see `tree_acceptance`."""
        return tree_acceptance(self.raw_config, self.config.source)

    def vocabulary(self, size: int | None = None) -> list[int] | None:
        """Ids of the tokens to draft from, ascending; None: all of them.

        Args:
            size: How many, the most frequent ones; None: as many as `config.json` says.

        Raises:
            CheckpointError: See `vllm_griffin.model.vocabulary.most_frequent`.
        """
        size = size or default_size(self.raw_config, self.config.source)
        if size is None:
            return None
        return most_frequent(self.folder, self.config.vocab_size, size)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every (key, tensor), file by file, on the CPU and in the file's own dtype.

        Raises:
            CheckpointError: A file cannot be read, or a tensor holds a NaN or an infinity.
        """
        for file in sorted({info.file for info in self.tensors.values()}):
            keys = [key for key, info in self.tensors.items() if info.file == file]
            for key, tensor in read_tensors(file, keys):
                # NaN and infinities reach the extremes, which cost 0.2 s a gigabyte; isfinite takes 5.
                if not torch.stack(tensor.aminmax()).isfinite().all():
                    raise CheckpointError(
                        f"{file}: `{key}` holds a NaN or an infinity: train or convert the draft again"
                    )
                yield key, tensor


def find_folder(
    path: str | Path, revision: str | None = None, cache_dir: str | None = None
) -> Path:
    """A local folder as it is, or a repository of the hub, downloaded; see `DraftCheckpoint.open`."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{path}: a folder has no revision {revision!r}: leave it out")
        return folder
    if folder.exists():
        raise CheckpointError(f"{path}: a model is a folder (or a hub id), this is a file")
    if isinstance(path, Path) or not HUB_ID.fullmatch(path):
        raise CheckpointError(f"{path}: no such folder")
    return _download(path, revision, cache_dir)


def _download(repo: str, revision: str | None, cache_dir: str | None) -> Path:
    """Fetch config and weights, `.bin` files only where there are no safetensors."""
    from huggingface_hub import snapshot_download

    folder = ""
    try:
        for suffix in ("safetensors", "bin"):
            folder = snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=[
                    "config.json",
                    VOCABULARY_FILE,
                    f"*.{suffix}",
                    f"*.{suffix}.index.json",
                ],
            )
            if any(Path(folder).glob(f"*.{suffix}")):
                break
    # Network, permission, unknown repository and offline mode all raise different types.
    except Exception as error:
        raise CheckpointError(
            f"{repo}: no such folder, and it could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''})"
        ) from error
    return Path(folder)


def find_weights(folder: Path) -> Path | None:
    """The weight file of a model's folder, or the index of its shards; None if it has neither."""
    for name in WEIGHT_FILES:
        for file in (folder / name, folder / f"{name}.index.json"):
            if file.is_file():
                return file
    return None


def list_tensors(source: Path) -> dict[str, TensorInfo]:
    """key -> shape, dtype and file of all that a weight file, or an index with its shards, holds.

    Raises:
        CheckpointError: A file is missing, damaged or malformed.
    """
    if source.suffix != ".json":
        return scan_tensors(source)
    weight_map = _read_index(source)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        file = _shard_file(source, shard)
        tensors |= {
            k: t for k, t in scan_tensors(file).items() if weight_map.get(k, shard) == shard
        }
    for key, shard in weight_map.items():
        if key not in tensors:
            raise CheckpointError(f"{source}: says `{key}` is in {shard}, where it is not")
    return tensors


def read_weight(folder: Path, key: str) -> Tensor | None:
    """One tensor of a model's folder, in its file's dtype; None if the folder's weights have none.

    Raises:
        CheckpointError: A file is missing, damaged or malformed.
    """
    weights = find_weights(folder)
    info = list_tensors(weights).get(key) if weights else None
    if info is None:
        return None
    ((_, tensor),) = read_tensors(info.file, [key])
    return tensor


def _shard_file(source: Path, shard: str) -> Path:
    file = source.parent / shard
    if not os.path.isfile(file):
        raise CheckpointError(f"{source}: names the shard {shard!r:.200}, which is missing")
    root, real = source.parent.resolve(), file.resolve()
    if root.parent.name == "snapshots":
        # The hub's cache has the files themselves in `blobs`, beside its snapshots.
        root = root.parents[1]
    if not real.is_relative_to(root):
        raise CheckpointError(
            f"{source}: names the shard {shard!r}, which is a link to {real}, outside the folder: "
            "put the file itself there"
        )
    return file


def _read_index(source: Path) -> dict[str, str]:
    """key -> shard. A shard must lie in the folder: an index comes from a stranger."""
    weight_map = read_json(source).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{source}: has no `weight_map` from keys to shards")
    suffix = Path(source.name.removesuffix(".index.json")).suffix
    for key, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{source}: `{key}` is in {shard!r}, expected the name of a file")
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or "\\" in shard:
            raise CheckpointError(f"{source}: `{key}` is in {shard!r}, which is outside the folder")
        if path.suffix != suffix:
            raise CheckpointError(f"{source}: `{key}` is in {shard!r}, expected a {suffix} file")
    return weight_map
