"""Model Runner V2 on a machine without a GPU: Triton's interpreter and torch twins.

Switched on by ``VLLM_GRIFFIN_CPU=1`` and independent of griffin itself, so that a run without
griffin on the same runner can be compared with one that has it.
"""
