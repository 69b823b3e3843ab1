"""Evaluation of drafts: acceptance in this plugin's vLLM engine, or by replay of stored outputs."""

from vllm_griffin.evaluate.replay import replay_outputs
from vllm_griffin.tree_shape import TreeShape

__all__ = ["TreeShape", "replay_outputs"]
