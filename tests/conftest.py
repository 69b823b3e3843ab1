"""The environment of every test, set before anything imports vLLM."""

import os

import torch

DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
if not torch.cuda.is_available():
    DEFAULTS |= {"VLLM_GRIFFIN_CPU": "1", "TRITON_INTERPRET": "1"}

for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)
