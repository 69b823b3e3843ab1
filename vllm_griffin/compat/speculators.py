"""Zero-flag serving: vLLM learns that drafts in the speculators layout may be of method griffin."""

import sys
from typing import Any


def register_layout() -> None:
    """Adds griffin to vLLM's table of speculators; cheap, and safe to repeat.

    ``vllm serve DRAFT`` looks there for a draft's ``speculators_model_type``, takes the verifier that the
    draft names for the model, and the method for the speculative config. That is a front end's business, so
    elsewhere there is nothing to do.
    """
    if "vllm.engine.arg_utils" not in sys.modules:
        return
    try:
        from vllm.transformers_utils.configs.speculators.algos import register_speculator
    except ImportError as error:
        # An engine that does not want griffin must start all the same.
        from vllm.logger import init_logger

        init_logger("vllm.griffin").warning(
            "vllm-griffin: vLLM's table of speculators has moved (%s); name the target and give "
            "--speculative-config to serve griffin drafts, or install vllm 0.32.",
            error,
        )
        return
    register_speculator("griffin")(_describe_draft)


def _describe_draft(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
    """Adds to the draft's own fields what the speculators layout keeps outside of them."""
    pre_trained_config["architectures"] = config_dict.get("architectures")
