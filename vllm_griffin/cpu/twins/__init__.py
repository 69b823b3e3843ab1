"""Twins of vLLM's Triton kernels for a process that would have to interpret them.

Each module replaces what it names in `vllm_griffin.cpu.patches` and is held against vLLM's own
kernel, in the interpreter, by ``tests/cpu``.
"""
