"""Evaluation of drafts: acceptance in this plugin's vLLM engine, or by replay of stored outputs."""
