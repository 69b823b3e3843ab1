"""The target's hidden states at stored outputs, kept on disk beside them: one file per output.

A file is named after the target and the output's tokens: a changed target or answer never meets an old one.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_griffin.data.hidden import load_target
from vllm_griffin.evaluate.outputs import Output
from vllm_griffin.model.files import fingerprint
from vllm_griffin.whole_file import whole_file


class OutputStates:
    """Outputs, and the target's hidden states after its final norm at their tokens."""

    def __init__(self, outputs: Sequence[Output], folder: Path, target: Path) -> None:
        """Look for states in `folder`, where `fill` puts them; nothing is read yet."""
        self.outputs = list(outputs)
        self.folder = folder
        self.target = target
        self._name = fingerprint(target)

    def features(self, number: int) -> Tensor:
        """Hidden states [tokens - 1, h], float32: all but the last token's, which no draft sees."""
        file = self._file(self.outputs[number])
        try:
            return load_file(file)["hidden"].float()
        except SafetensorError as error:
            raise ValueError(
                f"{file} is damaged ({error}): remove it, and it is made anew"
            ) from error

    def missing(self) -> list[int]:
        """Numbers of the outputs without stored states."""
        return [i for i, output in enumerate(self.outputs) if not self._file(output).exists()]

    @torch.inference_mode()
    def fill(self, done: Callable[[], None] = lambda: None) -> None:
        """Run the target (Hugging Face, float32) once over each output without states.

        `done` is called after each. What was stored stays if the run is cut off.
        """
        wanted = self.missing()
        if not wanted:
            return
        model = load_target(self.target, torch.float32)
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in wanted:
            output = self.outputs[number]
            tokens = torch.tensor([output.text[:-1]], device=model.device)
            hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
            file = self._file(output)
            try:
                with whole_file(file) as scratch:
                    save_file({"hidden": hidden.cpu().contiguous()}, scratch)
            except SafetensorError as error:
                raise OSError(f"cannot write {file} ({error}); what is finished is kept") from error
            done()

    def _file(self, output: Output) -> Path:
        name = hashlib.sha256(f"{self._name} {output.text}".encode()).hexdigest()[:24]
        return self.folder / f"{name}.safetensors"
