"""Tensor files: list what is in one, read tensors from it. Safetensors, and `torch.save` files."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_griffin.model.config import CheckpointError

# Names of the safetensors format that differ from torch's only in spelling.
SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
LFS_POINTER = b"version https://git-lfs"
SAMPLE = 1 << 20  # bytes of a weight file's beginning and end that name it


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its shape, its dtype by torch's name, and the file."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


def scan_tensors(file: Path) -> dict[str, TensorInfo]:
    """List the tensors of one file without reading their data.

    Raises:
        CheckpointError: The file is damaged, cut short, or does not hold tensors.
    """
    if file.suffix == ".bin":
        saved = _open_saved(file)
        return {
            key: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), file)
            for key, tensor in saved.items()
        }
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            return {
                key: TensorInfo(tuple(s.get_shape()), _dtype_name(s.get_dtype()), file)
                for key, s in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(file, "safetensors", error) from error


def read_tensors(file: Path, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Read the given tensors of one file, one at a time, on the CPU.

    Raises:
        CheckpointError: As `scan_tensors`.
    """
    if file.suffix == ".bin":
        saved = _open_saved(file)
        for key in keys:
            yield key, saved[key]
        return
    try:
        with safe_open(file, framework="pt") as opened:
            for key in keys:
                yield key, opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, "safetensors", error) from error


def _open_saved(file: Path) -> dict[str, Tensor]:
    """Map a `torch.save` file into memory; `weights_only`, because a pickle may run code."""
    try:
        saved: Any = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    # For a damaged file: RuntimeError, UnpicklingError, EOFError, KeyError and more.
    except Exception as error:
        raise _unreadable(file, "torch.save", error) from error
    if not isinstance(saved, dict):
        raise CheckpointError(f"{file}: expected a dict of tensors, found a {type(saved).__name__}")
    for key, value in saved.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{file}: has the key {key!r}, expected names of tensors")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: `{key}` is a {type(value).__name__}, expected a tensor")
        # Neither a sparse tensor nor one of the meta device has the numbers that its shape promises.
        if value.layout is not torch.strided or value.device.type != "cpu":
            kind = f"{value.layout} on {value.device}"
            raise CheckpointError(f"{file}: `{key}` is {kind}, expected an ordinary tensor")
    return saved


def _dtype_name(name: str) -> str:
    return SAFETENSORS_DTYPES.get(name, name.lower())


def _unreadable(file: Path, kind: str, error: Exception) -> CheckpointError:
    try:
        with file.open("rb") as stream:
            pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        pointer = False
    if pointer:
        return CheckpointError(f"{file}: a Git LFS pointer, not the weights; run `git lfs pull`")
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CheckpointError(
        f"{file}: not a readable {kind} file, damaged or cut short? ({first_line})"
    )


def fingerprint(model: Path, *, whole: bool = False) -> str:
    """A digest of a model folder: its config, and its weight files.

    Of each file its size, beginning and end count, which a change elsewhere does not alter.

    Args:
        whole: Read all of the files.
    """
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for file in sorted([*model.glob("*.safetensors"), *model.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as weights:
            if whole:
                digest.update(hashlib.file_digest(weights, "sha256").digest())
                continue
            digest.update(weights.read(SAMPLE))
            weights.seek(max(0, size - SAMPLE))
            digest.update(weights.read(SAMPLE))
    return digest.hexdigest()
