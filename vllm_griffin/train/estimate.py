"""What a training run will take, measured on a few steps of it: ``vllm-griffin train --dry-run``."""

import resource
import tempfile
from dataclasses import dataclass

import torch

from vllm_griffin.data.shards import States
from vllm_griffin.data.show import duration, size
from vllm_griffin.train.loop import Trainer
from vllm_griffin.train.network import Draft
from vllm_griffin.train.settings import Settings
from vllm_griffin.train.setup import TargetParts


@dataclass
class Estimate:
    """Of a run: `documents` and `slots` of an epoch, `held_out` documents, `epochs`, `parameters` that are
    trained, `seconds` of all steps without validation, seconds of a step by pass count, bytes of the
    checkpoint on disk (twice while it is written), peak bytes of memory so far.
    """

    documents: int
    held_out: int
    slots: int
    epochs: float
    parameters: int
    seconds: float
    step_seconds: dict[int, float]
    disk: int
    memory: int

    def rows(self) -> list[tuple[str, str]]:
        """The same for people."""
        steps = ", ".join(f"{s:.2f} s with {p} passes" for p, s in self.step_seconds.items())
        return [
            ("documents", f"{self.documents} to train on, {self.held_out} held out"),
            ("rows (slots) an epoch", f"{self.slots}, {self.epochs:.1f} epochs"),
            ("parameters trained", f"{self.parameters / 1e6:.1f}M"),
            ("disk", size(self.disk)),
            ("memory", f"{size(self.memory)} at most so far"),
            ("a step", steps),
            ("time", f"{duration(self.seconds)} without validation"),
        ]


def estimate(
    draft: Draft, states: States, target: TargetParts, settings: Settings, *, fresh: bool
) -> Estimate:
    """Run two steps of each pass count in a scratch folder, and time the second."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(draft, states, target, settings, scratch, fresh=fresh)
        times = {
            passes: trainer.timed_steps(stage, 2)[-1][0]
            for stage, (passes, _) in enumerate(settings.stages)
        }
        trainer.save()
        disk = (trainer.folder / "checkpoint.pt").stat().st_size
    slots = sum(len(states.documents[i].tokens) - 1 for i in trainer.training)
    return Estimate(
        documents=len(trainer.training),
        held_out=len(trainer.validation),
        slots=slots,
        epochs=settings.total_steps * settings.batch_tokens / slots,
        parameters=sum(p.numel() for p in draft.parameters() if p.requires_grad),
        seconds=sum(times[passes] * steps for passes, steps in settings.stages),
        step_seconds=times,
        disk=2 * disk,
        memory=_peak_memory(),
    )


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
