"""Draft trees: growing them level by level, and keeping them between two steps.

Knows tokens, parents and scores; nothing of GRIFFIN and nothing of vLLM.
"""

from vllm_griffin.tree.grow import Frontier, TreeGrower
from vllm_griffin.tree.share import share_nodes
from vllm_griffin.tree.slots import DraftTrees

__all__ = ["DraftTrees", "Frontier", "TreeGrower", "share_nodes"]
