"""The model card (README.md) of an exported checkpoint: where it comes from and what is in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.space import ModelShape
from moe_evo.shown import one_line

_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+", re.ASCII)
_MOST_MEMBERS = 256
"""In the table's row of a layer: as many as the experts of the largest models, so that one-shot merges are whole."""
_LOADING = {
    "transformers": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")""",
    "moe_evo": """import moe_evo

model = moe_evo.load_pruned("path/to/this/folder")  # layers differ in size: no stock config holds them""",
}


@dataclass(frozen=True)
class Treatment:
    """What was done to the weights of all experts, for the card.

    title: what follows 'MODEL with'. description: a sentence without its full stop. tag: for the Hub.
    """

    title: str
    description: str
    tag: str


def model_card(
    genome: Genome,
    shape: ModelShape,
    base_model: str,
    loader: str,
    facts: Mapping[str, str],
    provenance: Mapping[str, Any],
    treatment: Treatment | None = None,
) -> str:
    """The card as Markdown. loader: 'transformers' or 'moe_evo'. facts, provenance: listed as they are.

    treatment: where the experts themselves were changed, and `genome` keeps all of them.
    """
    base_model = one_line(base_model)
    is_smaller = genome.num_kept != shape.num_experts
    is_merged = not genome.is_pruning
    verbs = ["prunes"] * is_smaller + ["merges"] * is_merged
    title = f"{'fewer' if is_smaller else 'merged' if is_merged else 'all'} experts"
    found = f"Found by moe_evo: this model {' and '.join(verbs) or 'keeps all'} experts of {base_model}."
    done = ["expert-pruning"] * is_smaller + ["expert-merging"] * is_merged
    if treatment is not None:
        title, done = treatment.title, [treatment.tag]
        found = f"Made by moe_evo from {base_model}: {treatment.description}."
    lines = [
        "---",
        # a link on the Hub, which must not lead to another model of the same name
        *([f"base_model: {base_model}"] if _HUB_NAME.fullmatch(base_model) else []),
        f"tags: [{', '.join(['mixture-of-experts', *done, 'moe_evo'])}]",
        "---",
        "",
        f"# {base_model} with {title}",
        "",
        found,
        "",
        "```python",
        *_LOADING[loader].splitlines(),
        "```",
        "",
        "## Experts",
        "",
        "| MoE layer | decoder layer | experts | kept | active a token | made of |",
        "| ---: | ---: | ---: | ---: | ---: | --- |",
        *(_row(genome.layers[layer], shape, layer) for layer in range(shape.num_layers)),
        *(["", "Experts joined by + became one; the first has the largest share in it."] if is_merged else []),
        "",
        "## Size and check",
        "",
        *_bullets(facts),
        "",
        "## Provenance",
        "",
        *_bullets(provenance),
        "",
        "## Versions",
        "",
        *_bullets({name: _version(name) for name in ("moe_evo", "torch", "transformers")}),
        "",
    ]
    return "\n".join(lines)


def _row(layer: LayerGenome, shape: ModelShape, index: int) -> str:
    cells = (index, shape.decoder_layers[index], layer.num_experts, layer.num_kept, layer.top_k, _made_of(layer))
    return "| " + " | ".join(map(str, cells)) + " |"


def _made_of(layer: LayerGenome) -> str:
    """The experts of each slot, and of how many more it is made where a layer has too many to tell."""
    slots = layer.members
    most = max(_MOST_MEMBERS // len(slots), 1) if sum(map(len, slots)) > _MOST_MEMBERS else layer.num_experts
    told = ("+".join(map(str, experts[:most])) for experts in slots)
    more = (f" and {len(experts) - most} more" if len(experts) > most else "" for experts in slots)
    return ", ".join(map("".join, zip(told, more, strict=True)))


def _bullets(values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield f"{indent}- {one_line(key)}:"
            yield from _bullets(value, indent + "  ")
        else:
            yield f"{indent}- {one_line(key)}: {one_line(value)}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "not installed"
