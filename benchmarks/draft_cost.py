"""What drafting costs at least: the weights that a step has to read, of a target and of GRIFFIN's network.

    python benchmarks/draft_cost.py llama-3-8b --output docs/results/draft_cost.json

Small batches wait for weights. A plain step reads the target's once, its embedding apart, of which it looks
up some rows; a tree of depth D runs the draft D times, each time over the network and its LM head. Counted
from shapes: no memory is measured, and nothing but weights is counted.
"""

from pathlib import Path
from typing import Any

import click
from common import write_table
from shapes import NAMED


def weights(shape: str) -> dict[str, int]:
    """Numbers to read: by a plain step, in the draft's fusion and layer, in one token's row of an LM head."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from vllm_griffin.train.network import Draft, NetworkConfig

    config = NAMED[shape].config("auto")
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        draft = Draft(NetworkConfig.from_dict(config, fusion=True, two_heads=True))

    def numbers(module: torch.nn.Module) -> int:
        return sum(x.numel() for x in module.parameters())

    # A tied embedding is read whole, as the LM head.
    looked_up = 0 if NAMED[shape].tied else numbers(target.get_input_embeddings())
    return {
        "plain": numbers(target) - looked_up,
        "fusion": numbers(draft.fc),
        "layer": numbers(draft.layers),
        "row": NAMED[shape].hidden,
    }


@click.command()
@click.argument("shape", type=click.Choice(list(NAMED)))
@click.option("--depth", default=6, show_default=True, help="Of the tree.")
@click.option("--draft-vocab", default=8192, show_default=True, help="Beside the whole vocabulary.")
@click.option("--acceptance", default=5.38, show_default=True, help="Tokens a step.")
@click.option("--verify", default=1.1, show_default=True, help="Verification, in plain steps.")
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
def main(
    shape: str, depth: int, draft_vocab: int, acceptance: float, verify: float, output: Path
) -> None:
    """The floor of a draft's cost in plain steps, and the speed-up that it leaves."""
    from vllm_griffin import provenance
    from vllm_griffin.whole_file import write_json

    made = provenance.describe()
    read = weights(shape)
    network = read["fusion"] + read["layer"]
    rows: list[dict[str, Any]] = []
    for vocabulary in (0, draft_vocab, NAMED[shape].vocab):
        cost = depth * (network + vocabulary * read["row"]) / read["plain"]
        speedup = acceptance / (verify + cost)
        rows.append({"draft_vocabulary": vocabulary, "cost": cost, "speedup": speedup})
    setting = {"shape": shape, "depth": depth, "acceptance": acceptance, "verify": verify}
    write_json(output, {"provenance": made, "setting": setting, "weights": read, "rows": rows})
    lines = [
        [f"{row['draft_vocabulary']:,}", f"{row['cost']:.2f}", f"{row['speedup']:.1f}"]
        for row in rows
    ]
    head = ("tokens in the draft's LM head", "draft at least, plain steps", "speed-up at most")
    notes = [
        f"{shape}, tree of depth {depth}, {acceptance} tokens a step, verification {verify} plain steps.",
        f"Weights in billions: a plain step {read['plain'] / 1e9:.2f}, fusion {read['fusion'] / 1e9:.3f}, "
        f"draft's layer {read['layer'] / 1e9:.3f}.",
    ]
    write_table(output, made, head, lines, notes, times=False)


if __name__ == "__main__":
    main()
