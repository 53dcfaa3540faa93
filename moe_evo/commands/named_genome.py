"""Finds the genome that the command line names: a file, a run's winner, a list of kept experts, or the full model."""

from __future__ import annotations

from pathlib import Path

from moe_evo.config.model import RouterMode
from moe_evo.errors import GenomeError
from moe_evo.genomes.file import genome_from_kept_json, load_genome, load_metadata
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.space import ModelShape
from moe_evo.records.folder import RunFolder

GENOME_IN_CHECKPOINT = Path("moe_evo") / "genome.safetensors"
"""The genome's file in a checkpoint of `moe-evo prune`: in a subfolder, where no loader looks for weights."""


def named_genome(text: str, shape: ModelShape, router: RouterMode, alignment: str | None) -> Genome:
    """A genome by name: a .safetensors or EEP .pth file, the folder of a run or checkpoint, a kept-list, or 'full'.

    router: mode of the model's router. alignment: digest of the model's alignment, if it has one.
    """
    if text == "full":
        return shape.identity()
    if text.lstrip().startswith("["):  # tested before any path: a list can be longer than a file's name may be
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
    """The file of the genome in a checkpoint's or a run's folder; raises GenomeError or RunError."""
    if (folder / GENOME_IN_CHECKPOINT).is_file():
        return folder / GENOME_IN_CHECKPOINT
    if not any((folder / name).is_file() for name in ("config.yaml", "sweep.yaml")):
        raise GenomeError(
            f"{folder}: has no genome: found neither {GENOME_IN_CHECKPOINT}, as moe-evo prune writes it, nor the "
            "config.yaml of a run; give the file of a genome"
        )
    run = RunFolder.existing(folder)
    run.read_result()  # raises RunError where the run is not finished
    return run.best


def _check_provenance(path: Path, genome: Genome, router: RouterMode, alignment: str | None) -> None:
    """Raise GenomeError where a genome was made for another router mode or order of neurons than the model's.

    It would compute another function there.
    """
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
