"""Methods that tests add to vLLM's workers, one per rank, to see what each of them decided."""

from typing import Any

import torch
from vllm.config import set_current_vllm_config

from vllm_griffin.kernels.tree_order import OrderedTree


class RankProbe:
    """Mixed into the worker by ``worker_extension_cls``; tests call it by ``collective_rpc``."""

    model_runner: Any
    vllm_config: Any

    def record_decisions(self) -> None:
        """From here on keep every walk and every tree, bit for bit."""
        speculator = self.model_runner.speculator
        verifier, trees = speculator.verifier_slot.verifier, speculator.trees
        take_walk, store = verifier.take_walk, trees.store
        self.decisions: list[tuple] = []

        def taking() -> Any:
            walk = take_walk()
            if walk is not None:
                self.decisions.append(("walk", *(t.tolist() for t in walk)))
            return walk

        def storing(slots: torch.Tensor, tree: OrderedTree, valid: torch.Tensor) -> None:
            parts = [t.tolist() for t in tree]
            self.decisions.append(("tree", slots.tolist(), valid.tolist(), *parts))
            store(slots, tree, valid)

        verifier.take_walk, trees.store = taking, storing

    def decided(self) -> list[tuple]:
        """What was recorded since the last call."""
        decisions, self.decisions = self.decisions, []
        return decisions

    def draft_from(self, tokens: list[int]) -> None:
        """As an engine that starts with a ``draft_vocab_size``."""
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.speculator.model.draft_from(tokens)

    def logits(self, rows: int) -> tuple[list[list[float]], list[list[float]]]:
        """Of the target's and of the draft's head, for the same hidden states on each rank."""
        draft = self.model_runner.speculator.model
        generator = torch.Generator().manual_seed(rows)
        hidden = torch.randn(rows, draft.config.hidden_size, generator=generator)
        with torch.inference_mode():
            whole = self.model_runner.model.compute_logits(hidden)
            return whole.tolist(), draft.compute_logits(hidden).tolist()
