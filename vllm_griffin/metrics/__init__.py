"""Metrics of draft trees, beside vLLM's own counters for speculative decoding (docs/metrics.md)."""
