"""The commands of ``vllm-griffin``, a module each; `vllm_griffin.cli` loads them when they are called."""
