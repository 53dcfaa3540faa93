"""Exporting a genome as a real, smaller checkpoint that computes what was scored.

Write beside the target, reload with the loader that users will use, compare logits with the view, and
only then move into place.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moe_evo.config.model import ExpertsMode, RouterMode
from moe_evo.errors import ExportError
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.space import check_fits
from moe_evo.models.agreement import TOLERANCES, relative_difference
from moe_evo.models.export.model_card import Treatment, model_card
from moe_evo.models.export.pruned import load_pruned, save_pruned
from moe_evo.models.export.target_folder import EXPORT_RECORD, check_target, written_beside
from moe_evo.models.export.written_config import consistent, readable_by_all, tokenizer_readable_by_all
from moe_evo.models.merging import is_selection
from moe_evo.models.transformers_border import LIBRARY_ERRORS, one_line, quiet, tokenizer_errors, transformers
from moe_evo.models.variants.dynamic_routing import DynamicRouting
from moe_evo.models.view import MoEModel
from moe_evo.models.weight_shapes import is_whole

Loader = Literal["transformers", "moe_evo"]


@dataclass(frozen=True)
class ExportReport:
    """What was written. Bytes are those of the weights in the exported dtype.

    max_logit_difference: largest absolute difference between the reloaded checkpoint and the view on
    random tokens. loader: who can load it, stock 'transformers' or 'moe_evo' (`load_pruned`).
    """

    folder: Path
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    max_logit_difference: float
    loader: Loader


def export_checkpoint(
    moe: MoEModel,
    genome: Genome,
    folder: str | Path,
    *,
    overwrite: bool = False,
    provenance: Mapping[str, Any],
    treatment: Treatment | None = None,
) -> ExportReport:
    """Write model, tokenizer, generation config and model card of `genome` into `folder`.

    provenance: plain data for the model card and moe_evo.json (base model, scores, versions, ...).
    treatment: what the card says of experts whose own weights were changed before.
    Raises GenomeError for a genome of another model, and ExportError where the folder is taken, no
    architecture can hold the genome, memory runs out, or the reloaded checkpoint computes something else.
    """
    folder = Path(folder).expanduser().absolute()
    check_fits(genome, moe.shape)
    check_router(genome, moe.router_mode, renormalises=moe.family.renormalises(moe.language_model.config))
    check_fixed_top_k(moe.dynamic_routing)
    check_own_experts("meo" if moe.computes_meo else "own")
    if not all(map(is_whole, moe.language_model.parameters())):
        raise ExportError(f"{folder}: parts of the model are not in this process; export with model.sharding single")
    check_target(folder, Path(moe.language_model.config.name_or_path), overwrite=overwrite)
    is_uniform = len(set(genome.num_kept)) == 1 and len(set(genome.top_k)) == 1
    loader: Loader = "transformers" if is_uniform else "moe_evo"
    try:
        with written_beside(folder) as temporary, quiet():
            before = _size(moe.language_model.state_dict())
            expected = _view_logits(moe, genome)
            after = _write(moe, genome, temporary, loader)
            difference = _verify(moe, expected, temporary, loader)
            report = ExportReport(folder, before[0], after[0], before[1], after[1], difference, loader)
            _write_card(moe, genome, temporary, report, provenance, treatment)
    except torch.OutOfMemoryError as error:
        raise ExportError(
            f"{folder}: nothing was written, as {moe.device} ran out of memory "
            f"({one_line(error)}); export on the CPU with --device cpu"
        ) from error
    return report


def check_router(genome: Genome, router_mode: RouterMode, *, renormalises: bool) -> None:
    """Raise ExportError for genomes whose mapped probabilities no stock router computes."""
    if router_mode == "exported":
        return
    for index, layer in enumerate(genome.layers):
        if not _same_in_both_modes(layer, renormalises=renormalises):
            raise ExportError(
                f"genome layer {index}: router mode 'eep' maps probabilities after the softmax, which no stock "
                "architecture can hold; export one that only prunes, or search with model.router: exported"
            )


def check_own_experts(experts: ExpertsMode) -> None:
    """Raise ExportError for a model whose tokens merge their experts."""
    if experts == "meo":
        raise ExportError(
            "model.experts: got 'meo', which merges experts anew for every token, as no stock architecture does; "
            "export with 'own', or search with it"
        )


def check_fixed_top_k(dynamic_routing: DynamicRouting | None) -> None:
    """Raise ExportError where tokens do without some of their experts."""
    if dynamic_routing is not None:
        raise ExportError(
            f"{dynamic_routing.option}: a stock architecture runs all top_k experts for every token; export without "
            "it, and route so where the model is served"
        )


def _same_in_both_modes(layer: LayerGenome, *, renormalises: bool) -> bool:
    if not is_selection(layer.router_mapping):
        return False
    is_permutation = bool((layer.router_mapping.sum(axis=0) == 1).all())
    return renormalises or is_permutation  # the sum over all experts cancels, or nothing is left out


def exported_state(moe: MoEModel, genome: Genome) -> dict[str, Tensor]:
    """State dict of the smaller model; what the genome does not touch is shared with the big one."""
    state: dict[str, Tensor] = dict(moe.language_model.state_dict())
    names = {module: name for name, module in moe.language_model.named_modules()}
    for layer, gene in zip(moe.layers, genome.layers, strict=True):
        if gene.is_identity:
            continue
        mapped = layer.mapped_router(gene.router_mapping)
        state.update({f"{names[layer.router]}.{name}": rows for name, rows in mapped.items()})
        merged = layer.merged_tensors(gene.expert_merging)
        state.update({f"{names[layer.experts]}.{name}": stacked for name, stacked in merged.items()})
    return state


def _view_logits(moe: MoEModel, genome: Genome) -> Tensor:
    """What was evaluated, on the random tokens of `_verify`."""
    with torch.inference_mode(), moe.applied(genome):
        logits: Tensor = moe.language_model(input_ids=moe.random_tokens(), use_cache=False).logits
    moe.merged_cache.clear()  # frees memory for the exported model, which has the same merged layers
    return logits


def _write(moe: MoEModel, genome: Genome, folder: Path, loader: Loader) -> tuple[int, int]:
    """Returns the number of parameters and of bytes."""
    state = exported_state(moe, genome)
    size = _size(state)
    try:
        if loader == "transformers":
            _save_stock(moe, state, genome, folder)
        else:
            save_pruned(moe.language_model, state, genome, folder)
    except ValueError as error:  # for one, a generation config that contradicts itself
        raise ExportError(f"transformers refuses to save the model ({one_line(error)})") from error
    if moe.tokenizer is not None:
        with tokenizer_errors(ExportError, f"{folder}: the tokenizer cannot be written"):
            moe.tokenizer.save_pretrained(folder)
        _let_all_read_tokenizer(folder / "tokenizer_config.json")
    return size


def _let_all_read_tokenizer(file: Path) -> None:
    if file.is_file():
        with _rewritten(file) as written:
            told = tokenizer_readable_by_all(written)
            written.clear()
            written |= told


def _save_stock(moe: MoEModel, state: dict[str, Tensor], genome: Genome, folder: Path) -> None:
    config = copy.deepcopy(moe.language_model.config)
    setattr(config, moe.family.experts_field, genome.num_kept[0])
    setattr(config, moe.family.top_k_field, genome.top_k[0])
    with torch.device("meta"):  # only a shell: the tensors that are saved come from `state`
        shell = transformers.AutoModelForCausalLM.from_config(config, dtype=moe.dtype)
    shell.generation_config = moe.language_model.generation_config
    shell.save_pretrained(folder, state_dict={**state, **_biases_from_zero(moe, state)})
    with _rewritten(folder / "config.json") as written:
        # transformers 5 renames this field in some families; earlier readers know the original name only
        written.setdefault(moe.family.experts_field, genome.num_kept[0])
        told = consistent(written, num_kept=genome.num_kept[0], top_k=genome.top_k[0])
        written |= readable_by_all(told, moe.family)


def _biases_from_zero(moe: MoEModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Correction biases of routers with groups, raised in a layer by one number so that none is below 0.

    They take part in the choice of experts only, which depends on their differences. transformers 4 takes 0 for the
    score of experts that a token may not use, and would choose them before experts whose score is less.
    """
    if moe.shape.num_expert_groups == 1:
        return {}
    found = {name: one for name, one in state.items() if name.endswith(".e_score_correction_bias")}
    return {name: bias - bias.min() for name, bias in found.items() if bool((bias < 0).any())}


@contextmanager
def _rewritten(file: Path) -> Iterator[dict[str, Any]]:
    """The object in a JSON file, which is written again when the block is left."""
    content = json.loads(file.read_text(encoding="utf-8"))  # of the library, which writes 10**30 for no limit
    yield content
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _verify(moe: MoEModel, expected: Tensor, folder: Path, loader: Loader) -> float:
    """Reload, compare with the view's logits `expected`, and return the largest absolute difference."""
    try:
        exported = _reload(moe, folder) if loader == "transformers" else load_pruned(folder, device=moe.device)
    except torch.OutOfMemoryError:
        raise
    except LIBRARY_ERRORS as error:
        raise ExportError(f"the exported checkpoint cannot be loaded again ({one_line(error)})") from error
    with torch.inference_mode():
        got = exported(input_ids=moe.random_tokens(), use_cache=False).logits
    difference = relative_difference(got, expected)
    if not difference <= TOLERANCES[moe.dtype]:
        raise ExportError(
            f"the exported checkpoint differs from what was evaluated by {difference:.1e} of the largest logit, "
            f"expected at most {TOLERANCES[moe.dtype]:.0e}; nothing was written"
        )
    return float((got.float() - expected.float()).abs().max())


def _reload(moe: MoEModel, folder: Path) -> Any:
    exported, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=moe.dtype,
        use_safetensors=True,
        output_loading_info=True,
        experts_implementation=moe.language_model.get_experts_implementation()[""],
    )
    wrong = sorted({*found["missing_keys"], *found["unexpected_keys"]})
    if wrong:
        raise ExportError(f"the exported checkpoint has missing or unexpected weights, {wrong[0]} among them")
    return exported.to(moe.device).eval()


def _write_card(
    moe: MoEModel,
    genome: Genome,
    folder: Path,
    report: ExportReport,
    provenance: Mapping[str, Any],
    treatment: Treatment | None,
) -> None:
    source = moe.language_model.config.name_or_path or "model"
    # the folder's name, not its path: a card is read on other machines
    base_model = str(provenance.get("base_model") or (Path(source).name if Path(source).exists() else source))
    facts = {
        "parameters": f"{report.parameters_before:,} -> {report.parameters_after:,}",
        "weights": f"{report.bytes_before:,} -> {report.bytes_after:,} bytes ({str(moe.dtype).split('.')[-1]})",
        "largest difference of logits to the evaluated model": f"{report.max_logit_difference:.1e}",
    }
    card = model_card(genome, moe.shape, base_model, report.loader, facts, provenance, treatment)
    (folder / "README.md").write_text(card, encoding="utf-8")
    record = {
        "base_model": base_model,
        "genome": genome.digest,
        "treatment": None if treatment is None else treatment.description,
        "is_pruning": genome.is_pruning,
        "kept": genome.kept,
        "top_k": genome.top_k,
        "router": moe.router_mode,
        "provenance": dict(provenance),
    }
    text = json.dumps(record, indent=2, default=_plain) + "\n"
    (folder / EXPORT_RECORD).write_text(text, encoding="utf-8")


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else str(value)


def _size(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Parameters and bytes, tied weights once."""
    distinct = {tensor.data_ptr(): tensor for tensor in state.values()}.values()
    return sum(t.numel() for t in distinct), sum(t.numel() * t.element_size() for t in distinct)
