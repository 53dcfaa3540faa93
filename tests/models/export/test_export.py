"""Exported checkpoints compute what was scored, and nothing is ever half written or lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import largest_difference, logits, random_merge, random_pruning, tiny_model, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_evo
from moe_evo.config.model import ModelConfig
from moe_evo.errors import ExportError, GenomeError, ModelError
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.models.agreement import TOLERANCES
from moe_evo.models.export import export, target_folder
from moe_evo.models.export.export import export_checkpoint
from moe_evo.models.export.model_card import model_card
from moe_evo.models.export.pruned import load_pruned
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel

PROVENANCE = {"base_model": "tiny/random", "search": {"algorithm": "eep", "seed": 0}, "test accuracy": 0.5}


def view_logits(moe: MoEModel, genome: Genome) -> torch.Tensor:
    with moe.applied(genome):
        return logits(moe.language_model, tokens())


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def listing(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("make", [random_pruning, random_merge])
def test_stock_reload_has_the_logits_of_the_view(
    moe: MoEModel, make: Callable[..., Genome], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    genome = make(moe.shape, 4)
    report = export_checkpoint(moe, genome, tmp_path / "small", provenance=PROVENANCE)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    assert largest_difference(logits(stock, tokens()), view_logits(moe, genome)) <= 2e-6
    assert report.loader == "transformers" and report.max_logit_difference <= 2e-6
    assert report.parameters_after == sum(weight.numel() for weight in stock.parameters()) + sum(
        buffer.numel() for name, buffer in stock.named_buffers() if "correction_bias" in name
    )
    assert report.bytes_after == 4 * report.parameters_after < report.bytes_before
    assert folder_bytes(tmp_path / "small") < folder_bytes(checkpoint(moe.shape.family))
    raw_config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (raw_config[moe.family.experts_field], raw_config["num_experts_per_tok"]) == (4, 2)


def test_lower_top_k_is_exported(moe: MoEModel, tmp_path: Path) -> None:
    genome = random_pruning(moe.shape, 4, top_k=1)
    export_checkpoint(moe, genome, tmp_path / "small", provenance={})
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert stock.config.num_experts_per_tok == 1
    assert largest_difference(logits(stock, tokens()), view_logits(moe, genome)) <= 2e-6


def test_dtype_is_the_one_that_was_evaluated(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    moe = load_model(ModelSource(ModelConfig(path=str(checkpoint("mixtral")), device="cpu", dtype="bfloat16")))
    genome = random_merge(moe.shape, 4)
    report = export_checkpoint(moe, genome, tmp_path / "small", provenance={})
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert stock.dtype == torch.bfloat16 and report.bytes_after == 2 * report.parameters_after
    expected = view_logits(moe, genome)
    assert largest_difference(logits(stock, tokens()), expected) <= TOLERANCES[torch.bfloat16] * expected.abs().max()
    stock.set_experts_implementation("eager")  # as moe_evo computes them in 16 bits on a CPU
    assert largest_difference(logits(stock, tokens()), expected) == 0


def test_exported_embedded_model_brings_tokenizer_and_generation_config(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    moe = load_model(ModelSource(ModelConfig(device="cpu")))
    export_checkpoint(moe, random_pruning(moe.shape, 4), tmp_path / "small", provenance=PROVENANCE)
    assert capfd.readouterr() == ("", "")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert tokenizer("good film").input_ids == moe.tokenizer("good film").input_ids
    assert (tmp_path / "small" / "generation_config.json").is_file()
    again = load_model(ModelSource(ModelConfig(path=str(tmp_path / "small"), device="cpu")))
    assert again.shape.num_experts == (4, 4, 4, 4)


def test_model_card_tells_where_it_comes_from(mixtral: MoEModel, tmp_path: Path) -> None:
    genome = random_pruning(mixtral.shape, 4)
    export_checkpoint(mixtral, genome, tmp_path / "small", provenance=PROVENANCE)
    card = (tmp_path / "small" / "README.md").read_text()
    kept = ", ".join(map(str, genome.kept[1]))
    for line in ("base_model: tiny/random", f"| 1 | 1 | 8 | 4 | 2 | {kept} |", "  - algorithm: eep", "- torch: "):
        assert line in card.splitlines() or line in card
    record = json.loads((tmp_path / "small" / "moe_evo.json").read_text())
    assert record["genome"] == genome.digest and record["provenance"] == PROVENANCE


@pytest.mark.parametrize(
    ("make", "num_kept", "title", "does", "tags"),
    [
        (random_pruning, 4, "fewer", "prunes", "expert-pruning, "),
        (random_merge, 4, "fewer", "prunes and merges", "expert-pruning, expert-merging, "),
        (random_merge, 8, "merged", "merges", "expert-merging, "),
        (random_pruning, 8, "all", "keeps all", ""),
    ],
)
def test_model_card_says_what_was_done(
    mixtral: MoEModel, make: Callable[..., Genome], num_kept: int, title: str, does: str, tags: str
) -> None:
    card = model_card(make(mixtral.shape, num_kept), mixtral.shape, "tiny/random", "transformers", {}, {})
    assert f"# tiny/random with {title} experts" in card.splitlines()
    assert f"Found by moe_evo: this model {does} experts of tiny/random." in card.splitlines()
    assert f"tags: [mixture-of-experts, {tags}moe_evo]" in card.splitlines()
    assert "evolution" not in card  # a random search finds genomes too


def test_model_card_tells_which_experts_became_one_and_stays_short(mixtral: MoEModel) -> None:
    pair = np.eye(8, dtype=np.float32)[[0, 3, 5]]
    pair[0, 6], pair[0, 0] = 0.7, 0.3
    merged = LayerGenome(pair, np.eye(8)[[0, 3, 5]], 2)
    whole = LayerGenome.from_kept([1, 4, 7], 8, 2)
    genome = Genome((merged, *(whole,) * (mixtral.shape.num_layers - 1)))
    card = model_card(genome, mixtral.shape, "tiny/random", "transformers", {}, {}).splitlines()
    assert "| 0 | 0 | 8 | 3 | 2 | 6+0, 3, 5 |" in card and "| 1 | 1 | 8 | 3 | 2 | 1, 4, 7 |" in card
    assert "Experts joined by + became one; the first has the largest share in it." in card
    dense = np.random.default_rng(0).random((64, 128))
    shape = replace(mixtral.shape, num_experts=(128,), top_k=(2,), decoder_layers=(0,))
    large = model_card(Genome((LayerGenome(dense, dense, 2),)), shape, "tiny/random", "transformers", {}, {})
    (row,) = (line for line in large.splitlines() if line.startswith("| 0 "))
    first = np.argsort(-dense[0])[:4]
    assert f"| {'+'.join(map(str, first))} and 124 more, " in row and len(row) < 2000


@pytest.mark.parametrize("base_model", ["moe_evo embedded Mixtral", "Mixtral-8x7B", "/data/models", "a/b/c", "é/x"])
def test_model_card_links_hub_names_only(mixtral: MoEModel, base_model: str) -> None:
    genome = random_pruning(mixtral.shape, 4)
    card = model_card(genome, mixtral.shape, base_model, "transformers", {}, {})
    assert "base_model:" not in card and f"# {base_model} with fewer experts" in card
    linked = model_card(genome, mixtral.shape, "mistralai/Mixtral-8x7B-v0.1", "transformers", {}, {})
    assert "base_model: mistralai/Mixtral-8x7B-v0.1" in linked.splitlines()


@pytest.mark.parametrize(("source", "told"), [("owner/tiny", "owner/tiny"), (".", "small")])
def test_base_model_is_a_hub_name_whole_and_a_folder_without_its_path(tmp_path: Path, source: str, told: str) -> None:
    moe = MoEModel(tiny_model("mixtral"))
    (tmp_path / "small").mkdir()
    moe.language_model.config._name_or_path = str(tmp_path / "small") if source == "." else source
    export_checkpoint(moe, random_pruning(moe.shape, 4), tmp_path / "exported", provenance={})
    assert json.loads((tmp_path / "exported" / "moe_evo.json").read_text())["base_model"] == told


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("differs", ["num_kept", "top_k"])
def test_layers_of_different_size_go_to_our_own_loader(
    load: Callable[[str], MoEModel], model_type: str, differs: str, tmp_path: Path
) -> None:
    moe = load(model_type)
    last = moe.shape.num_layers - 1
    num_kept: Any = [4] * last + [6] if differs == "num_kept" else 4
    top_k: Any = [1] * last + [2] if differs == "top_k" else 2
    genome = random_merge(moe.shape, num_kept, top_k=top_k)
    report = export_checkpoint(moe, genome, tmp_path / "small", provenance=PROVENANCE)
    assert report.loader == "moe_evo" and "moe_evo.load_pruned" in (tmp_path / "small" / "README.md").read_text()
    assert report.bytes_after < report.bytes_before
    small = moe_evo.load_pruned(tmp_path / "small", device="cpu")
    expected = view_logits(moe, genome)
    assert largest_difference(logits(small, tokens()), expected) <= 2e-6
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    with torch.inference_mode(), moe.applied(genome):
        generated = moe.language_model.generate(tokens(), **options)
    assert torch.equal(small.generate(tokens(), **options), generated)
    with pytest.raises(ValueError, match="moe_evo_pruned"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_load_pruned_refuses_other_folders(mixtral: MoEModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_pruned(tmp_path)
    export_checkpoint(mixtral, random_pruning(mixtral.shape, 4), tmp_path / "stock", provenance={})
    with pytest.raises(ModelError, match="load it with transformers"):
        load_pruned(tmp_path / "stock")
    export_checkpoint(mixtral, random_merge(mixtral.shape, [2, 3, 4]), tmp_path / "ours", provenance={})
    weights = next((tmp_path / "ours").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:4000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_pruned(tmp_path / "ours")
    weights.unlink()
    with pytest.raises(ModelError, match=r"lacks \d+ weights"):
        load_pruned(tmp_path / "ours")


def test_genome_of_another_model_is_refused(mixtral: MoEModel, tmp_path: Path) -> None:
    with pytest.raises(GenomeError, match="made for"):
        export_checkpoint(mixtral, Genome.from_kept([[0]], 4, 1), tmp_path / "small", provenance={})
    assert not list(tmp_path.iterdir())


def test_eep_genome_that_no_stock_architecture_holds_is_refused(tmp_path: Path) -> None:
    moe = MoEModel(tiny_model("mixtral"), router_mode="eep")
    with pytest.raises(ExportError, match=r"no stock architecture can hold; .*search with model\.router: exported"):
        export_checkpoint(moe, random_merge(moe.shape, 4), tmp_path / "small", provenance={})
    olmoe = MoEModel(tiny_model("olmoe"), router_mode="eep")
    with pytest.raises(ExportError, match="no stock architecture"):
        export_checkpoint(olmoe, random_pruning(olmoe.shape, 4), tmp_path / "small", provenance={})
    assert not list(tmp_path.iterdir())


def test_eep_genome_whose_router_only_selects_is_exported(tmp_path: Path) -> None:
    moe = MoEModel(tiny_model("mixtral"), router_mode="eep")
    merges, prunes = random_merge(moe.shape, 4), random_pruning(moe.shape, 4)
    genome = Genome(
        tuple(
            LayerGenome(merged.expert_merging, pruned.router_mapping, 2)
            for merged, pruned in zip(merges.layers, prunes.layers, strict=True)
        )
    )
    report = export_checkpoint(moe, genome, tmp_path / "small", provenance={})
    assert report.max_logit_difference <= 1e-5


def test_existing_folder_is_never_overwritten_unasked(mixtral: MoEModel, tmp_path: Path) -> None:
    genome, folder = random_pruning(mixtral.shape, 4), tmp_path / "small"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep me")
    for overwrite, message in ((False, "is not empty"), (True, "was not written by moe_evo")):
        with pytest.raises(ExportError, match=message):
            export_checkpoint(mixtral, genome, folder, overwrite=overwrite, provenance={})
    assert listing(folder) == {"mine.txt": b"keep me"}
    with pytest.raises(ExportError, match="is not a folder"):
        export_checkpoint(mixtral, genome, folder / "mine.txt", overwrite=True, provenance={})


def test_empty_folder_is_filled_and_an_old_export_replaced(mixtral: MoEModel, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "small"
    folder.mkdir(parents=True)
    export_checkpoint(mixtral, random_pruning(mixtral.shape, 4), folder, provenance={})
    (folder / "notes.txt").write_text("mine")
    export_checkpoint(mixtral, random_pruning(mixtral.shape, 6), folder, overwrite=True, provenance={})
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_local_experts == 6
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == ["small"]


def test_checkpoint_of_somebody_else_is_not_overwritten(mixtral: MoEModel, tmp_path: Path) -> None:
    tiny_model("mixtral", seed=1).save_pretrained(tmp_path / "theirs")
    before = listing(tmp_path / "theirs")
    with pytest.raises(ExportError, match="was not written by moe_evo, so it is not overwritten") as caught:
        export_checkpoint(mixtral, random_pruning(mixtral.shape, 4), tmp_path / "theirs", overwrite=True, provenance={})
    assert "\n" not in str(caught.value) and listing(tmp_path / "theirs") == before


def test_the_model_itself_is_not_overwritten(checkpoint: Callable[[str], Path], mixtral: MoEModel) -> None:
    source = checkpoint("mixtral")
    before = listing(source)
    with pytest.raises(ExportError, match="is the model that is being exported"):
        export_checkpoint(mixtral, random_pruning(mixtral.shape, 4), source, overwrite=True, provenance={})
    assert listing(source) == before


@pytest.mark.parametrize("failure", ["difference", "disk", "rename"])
def test_failed_export_leaves_everything_as_it_was(
    mixtral: MoEModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    folder = tmp_path / "small"
    export_checkpoint(mixtral, random_pruning(mixtral.shape, 4), folder, provenance={})
    before, message = listing(folder), "cannot be written"

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if failure == "difference":
        message = "differs from what was evaluated"
        monkeypatch.setattr(export, "relative_difference", lambda *_: float("nan"))
    elif failure == "disk":
        monkeypatch.setattr(export, "model_card", full_disk)
    else:
        monkeypatch.setattr(target_folder, "_exchanged", lambda *_: False)  # as on a file system that cannot
        real, calls = target_folder.os.replace, []

        def second_fails(source: Path, target: Path) -> None:
            calls.append(source)
            if len(calls) == 2:
                full_disk()
            real(source, target)

        monkeypatch.setattr(target_folder.os, "replace", second_fails)
    with pytest.raises(ExportError, match=message):
        export_checkpoint(mixtral, random_pruning(mixtral.shape, 6), folder, overwrite=True, provenance={})
    assert listing(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_view_is_done_and_its_merged_layers_are_gone_before_the_export_is_built(
    mixtral: MoEModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_layers, build = [], export.exported_state

    def refuse(*_: object) -> None:
        raise AssertionError("the view is used beside the exported model")

    def watched(moe: MoEModel, genome: Genome) -> dict[str, torch.Tensor]:
        kept_layers.append(len(moe.merged_cache))
        monkeypatch.setattr(MoEModel, "applied", refuse)
        return build(moe, genome)

    monkeypatch.setattr(export, "exported_state", watched)
    report = export_checkpoint(mixtral, random_merge(mixtral.shape, 4), tmp_path / "small", provenance={})
    assert kept_layers == [0] and report.max_logit_difference <= 2e-6


@pytest.mark.parametrize("step", ["_view_logits", "exported_state", "_reload", "load_pruned", "relative_difference"])
def test_memory_that_runs_out_is_told_in_one_line(
    mixtral: MoEModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")

    monkeypatch.setattr(export, step, out_of_memory)
    genome = random_merge(mixtral.shape, [2, 3, 4] if step == "load_pruned" else 4)
    with pytest.raises(ExportError, match=r"Tried to allocate .* export on the CPU with --device cpu") as caught:
        export_checkpoint(mixtral, genome, tmp_path / "small", provenance={})
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_kept", [4, [2, 4, 8]])
def test_generation_config_that_contradicts_itself_is_reported(num_kept: Any, tmp_path: Path) -> None:
    moe = MoEModel(tiny_model("mixtral"))
    moe.language_model.generation_config.temperature = 0.5
    moe.language_model.generation_config.do_sample = False
    with pytest.raises(ExportError, match="refuses to save the model") as caught:
        export_checkpoint(moe, random_merge(moe.shape, num_kept), tmp_path / "small", provenance={})
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_parent_that_is_a_file_is_refused(mixtral: MoEModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="is not a folder"):
        export_checkpoint(mixtral, random_pruning(mixtral.shape, 4), tmp_path / "file" / "small", provenance={})
