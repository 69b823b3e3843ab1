"""Hidden states from vLLM, for targets that need several GPUs: its ``extract_hidden_states`` method.

vLLM's example connector writes, for each finished request, what left the target's layers. The states
after the last layer come without the final norm, which drafts are trained on; it is applied here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from torch import Tensor, nn

from vllm_griffin.data.documents import Document
from vllm_griffin.data.engine import complete, engine
from vllm_griffin.data.hidden import Source
from vllm_griffin.model.checkpoint import find_folder, read_weight

NORM = "model.norm.weight"


@contextmanager
def vllm_states(
    target: str, max_length: int, seed: int, tensor_parallel: int, **arguments: Any
) -> Iterator[Source]:
    """Hidden states by a vLLM engine with `tensor_parallel` GPUs; `arguments` are more of `vllm.LLM`'s.

    Raises:
        click.ClickException: The folder's weights have no final norm.
    """
    norm, layers = final_norm(target)
    with TemporaryDirectory(prefix="vllm-griffin-") as folder:
        settings: dict[str, Any] = {
            "speculative_config": {
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                # Layer ids count the layers passed: this one is behind the last.
                "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [layers]}},
            },
            "kv_transfer_config": _connector()
            | {
                "kv_role": "kv_producer",
                "kv_connector_extra_config": {"shared_storage_path": folder},
            },
            # A cached prefix would be another request's, whose states were written with it.
            "enable_prefix_caching": False,
        }
        # One more token is sampled, and thrown away.
        with engine(target, max_length + 1, seed, tensor_parallel, **settings, **arguments) as llm:

            def states(documents: Sequence[Document]) -> list[Tensor]:
                return _extract(llm, documents, norm)

            yield states


def _connector() -> dict[str, str]:
    if torch.cuda.is_available():
        return {"kv_connector": "ExampleHiddenStatesConnector"}
    return {
        "kv_connector": "CpuHiddenStatesConnector",
        "kv_connector_module_path": "vllm_griffin.data.cpu_connector",
    }


@torch.inference_mode()
def _extract(llm: Any, documents: Sequence[Document], norm: nn.Module) -> list[Tensor]:
    from vllm import SamplingParams
    from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
        cleanup_hidden_states,
        load_hidden_states,
    )

    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    outputs = complete(llm, [d.tokens for d in documents], [params] * len(documents))
    _finish_writes(llm)
    found = []
    for document, output in zip(documents, outputs, strict=True):
        path = output.kv_transfer_params["hidden_states_path"]
        written = load_hidden_states(path)
        cleanup_hidden_states(path)
        if written["token_ids"].tolist() != document.tokens:
            raise RuntimeError(f"vLLM wrote the states of other tokens than prompt {document.id}'s")
        # [len, layers = 1, h]
        found.append(norm(written["hidden_states"][:, 0]).to(torch.float16))
    return found


def _finish_writes(llm: Any) -> None:
    """Let an engine of this process write what it holds back; one with its own process does so by itself."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    while core is not None and core.scheduler.has_finished_requests():
        llm.llm_engine.step()


def final_norm(target: str) -> tuple[nn.Module, int]:
    """The target's final norm as Hugging Face computes it, and how many layers come before it.

    Raises:
        click.ClickException: The folder's weights have no `model.norm.weight`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(target)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    norm: nn.Module = model.base_model.norm.to_empty(device="cpu")
    weight = read_weight(find_folder(target), NORM)
    if weight is None:
        raise click.ClickException(f"{target} has no {NORM} in its weights")
    norm.load_state_dict({"weight": weight})
    return norm.eval(), config.num_hidden_layers
