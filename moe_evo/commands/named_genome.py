"""The genome that a command line names: a file, the winner of a run, a list of kept experts, or the full model."""

from __future__ import annotations

from pathlib import Path

from moe_evo.config.model import RouterMode
from moe_evo.errors import GenomeError
from moe_evo.genomes.file import genome_from_kept_json, load_genome, load_metadata
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.space import ModelShape
from moe_evo.records.folder import RunFolder

GENOME_IN_CHECKPOINT = Path("moe_evo") / "genome.safetensors"
"""In the folder of a checkpoint that `moe-evo prune` made: where no loader looks for weights."""


def named_genome(text: str, shape: ModelShape, router: RouterMode, alignment: str | None) -> Genome:
    """A genome by name: a .safetensors or EEP .pth file, the folder of a run or checkpoint, a kept-list, or 'full'.

    router, alignment: of the model that it is for; the latter by its digest.
    """
    if text == "full":
        return shape.identity()
    if text.lstrip().startswith("["):  # before any path is looked at: a list can be longer than a name
        return genome_from_kept_json(text, shape)
    path = Path(text)
    if len(path.name) <= 255 and path.is_dir():
        path = _genome_in(path)
    if path.suffix == ".json":
        return genome_from_kept_json(path, shape)
    if path.suffix == ".pth":
        from moe_evo.models.experts.eep_coefficients import load_eep_coefficients

        return load_eep_coefficients(path, shape)
    if len(path.name) > 255 or not path.exists():
        raise GenomeError(
            f"{text}: no such file; give a .safetensors genome, an EEP .pth file, the folder of a run or of a "
            "checkpoint that moe-evo prune made, a kept-list such as [[0,3],[1,2]], or 'full'"
        )
    genome = load_genome(path)
    _check_provenance(path, genome, router, alignment)
    return genome


def _genome_in(folder: Path) -> Path:
    """The genome of a checkpoint's folder, or the best one of a run's; raises GenomeError or RunError."""
    if (folder / GENOME_IN_CHECKPOINT).is_file():
        return folder / GENOME_IN_CHECKPOINT
    if not any((folder / name).is_file() for name in ("config.yaml", "sweep.yaml")):
        raise GenomeError(
            f"{folder}: has no genome: found neither {GENOME_IN_CHECKPOINT}, as moe-evo prune writes it, nor the "
            "config.yaml of a run; give the file of a genome"
        )
    run = RunFolder.existing(folder)
    run.read_result()  # or say that it is not finished
    return run.best


def _check_provenance(path: Path, genome: Genome, router: RouterMode, alignment: str | None) -> None:
    """A genome means another function under the other router mode, and a merge of experts ordered otherwise."""
    provenance = load_metadata(path).get("provenance", {})
    made_with = provenance.get("alignment", alignment)
    if made_with != alignment and not genome.is_pruning:
        wanted = "without model.alignment" if made_with is None else f"with the model.alignment {made_with}"
        beside = path.with_name("alignment.safetensors")
        advice = (
            f"add --model.alignment {beside}" if made_with and beside.exists() else "give the one that it was made with"
        )
        raise GenomeError(f"{path}: merges experts {wanted}, got {alignment or 'none'}; {advice}")
    searched = provenance.get("router", router)
    if searched != router:
        raise GenomeError(
            f"{path}: was searched with model.router {searched}, got {router}; add --model.router {searched}"
        )
