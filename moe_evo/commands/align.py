"""Reorders the neurons of experts that `moe-evo prune` merges, and writes genome and order beside the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.commands.named_genome import GENOME_IN_CHECKPOINT
from moe_evo.config.model import ModelConfig
from moe_evo.errors import ConfigError
from moe_evo.files.write import write_whole
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.space import SearchSpace
from moe_evo.plain import Plain
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # torch is imported when a model is about to be loaded, not before
    from moe_evo.criteria.merges import Merge
    from moe_evo.criteria.observer import Observer
    from moe_evo.evaluation.evaluator import Evaluator
    from moe_evo.models.experts.alignment import Permutations
    from moe_evo.models.experts.alignment_file import Alignment


def aligns(model: ModelConfig, method: str, wanted: bool | None) -> bool:
    """Whether to reorder the neurons of merged experts; wanted: None follows the method's paper.

    Raises ConfigError where the method merges nothing, or where the model's neurons are reordered already.
    """
    from moe_evo.criteria.merges import MERGES, Merge
    from moe_evo.criteria.registry import METHODS

    merge = METHODS[method]
    if wanted and not isinstance(merge, Merge):
        raise ConfigError(f"--aligned: got true, but {method} merges nothing; expected one of {', '.join(MERGES)}")
    if wanted and model.alignment is not None:
        raise ConfigError("--aligned: got true beside --model.alignment, expected only one of them")
    if wanted is None:
        return isinstance(merge, Merge) and merge.aligns and model.alignment is None
    return wanted


def align(evaluator: Evaluator, genome: Genome, model_hash: str, tracker: Tracker) -> Alignment:
    """Reorder the neurons of the loaded model so that those of experts that `genome` merges correspond.

    model_hash: of the model as it was loaded.
    """
    from moe_evo.models.experts.alignment_file import Alignment

    tracker.message("aligning the neurons of experts that are merged")
    of = f"of {evaluator.model.shape.num_layers}"
    found = _align(evaluator, genome, lambda layer: tracker.message(f"aligned MoE layer {layer + 1} {of}"))
    return Alignment(model_hash, found)


def aligned_progressively(
    evaluator: Evaluator, merge: Merge, observer: Observer, space: SearchSpace, model_hash: str, tracker: Tracker
) -> tuple[Genome, Alignment]:
    """The `progressive_genome` of a merge, with neurons reordered layer by layer.

    Each layer is observed behind the aligned merges of the layers before it. The loaded model is left with its
    neurons reordered, as by `align`.
    """
    from moe_evo.models.experts.alignment_file import Alignment

    orders = []

    def merged(number: int, gene: LayerGenome) -> None:
        layers = list(evaluator.model.shape.identity().layers)
        layers[number] = gene
        orders.append(_align(evaluator, Genome(tuple(layers)))[number])
        tracker.message(f"merged and aligned MoE layer {number + 1} of {len(layers)}")

    genome = merge.progressive_genome(observer, space, merged)
    return genome, Alignment(model_hash, tuple(orders))


def _align(evaluator: Evaluator, genome: Genome, done: Callable[[int], None] = lambda layer: None) -> Permutations:
    from moe_evo.models.experts.alignment import align_neurons, alignment_of

    found = alignment_of(evaluator.model, genome, done)
    align_neurons(evaluator.model, found)
    if evaluator.states is not None:
        evaluator.states.clear()  # these hidden states were computed with neurons in the old order
    return found


def save_beside(
    checkpoint: Path, genome: Genome, alignment: Alignment | str | None, provenance: Plain
) -> dict[str, str]:
    """Write into a checkpoint's folder the files with which the genome can be evaluated again; returns their paths.

    alignment: the order of neurons that was found, or the path of `model.alignment`.
    """
    from moe_evo.genomes.file import save_genome
    from moe_evo.models.experts.alignment_file import save_alignment

    files = {"genome": checkpoint / GENOME_IN_CHECKPOINT}
    folder = files["genome"].parent
    folder.mkdir(exist_ok=True)
    save_genome(files["genome"], genome, provenance)
    if alignment is not None:
        files["alignment"] = folder / "alignment.safetensors"
        if isinstance(alignment, str):
            write_whole(files["alignment"], Path(alignment).read_bytes())
        else:
            save_alignment(files["alignment"], alignment)
    return {name: str(path) for name, path in files.items()}
