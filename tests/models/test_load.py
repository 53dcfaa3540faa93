"""Loading: what comes back, what is refused in one line, and that it is quiet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_models import largest_difference, logits, random_merge, tiny_model, tokens
from transformers import MixtralForCausalLM

import moe_evo
from moe_evo.config.model import ModelConfig
from moe_evo.errors import ConfigError, ModelError
from moe_evo.models import view
from moe_evo.models.load import load_model, resolve_device
from moe_evo.models.placement import GROUPED_MM, suit_device
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel


def config(folder: Path, **options: object) -> ModelConfig:
    return ModelConfig(path=str(folder), device="cpu", **options)  # type: ignore[arg-type]


@pytest.fixture
def copied(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("mixtral"), tmp_path / "mixtral"))


@pytest.fixture
def embedded_tokenizer() -> list[Path]:
    """The files of the embedded model's tokenizer, which any folder can take."""
    folder = Path(moe_evo.__file__).parent / "data" / "model"
    return [folder / "tokenizer.json", folder / "tokenizer_config.json"]


def refused(model: ModelConfig) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(ModelSource(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_loading_says_nothing(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    moe = load_model(ModelSource(config(copied)))
    with moe.applied(random_merge(moe.shape, 4)):
        logits(moe.language_model, tokens())
    assert capfd.readouterr() == ("", "")


def test_view_is_ready_for_inference(mixtral: MoEModel) -> None:
    assert mixtral.device == torch.device("cpu") and mixtral.dtype == torch.float32
    assert not mixtral.language_model.training
    assert not any(weight.requires_grad for weight in mixtral.language_model.parameters())
    assert mixtral.tokenizer is None


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_dtype_is_as_configured(copied: Path, dtype: str, expected: torch.dtype) -> None:
    assert load_model(ModelSource(config(copied, dtype=dtype))).dtype == expected


def test_rows_that_grouped_mm_cannot_take_are_computed_eagerly(tmp_path: Path) -> None:
    tiny_model("mixtral", intermediate_size=23).save_pretrained(tmp_path)
    moe = load_model(ModelSource(config(tmp_path)))
    assert moe.language_model.config._experts_implementation == "eager"
    genome = random_merge(moe.shape, 4)
    eager_everywhere = tiny_model("mixtral", intermediate_size=23)
    eager_everywhere.set_experts_implementation("eager")
    with moe.applied(genome):
        assert torch.isfinite(logits(moe.language_model, tokens())).all()
    untouched = logits(moe.language_model, tokens())
    assert largest_difference(untouched, logits(eager_everywhere, tokens())) <= 1e-6


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", "grouped_mm"), ("bfloat16", "eager"), ("float16", "eager")]
)
def test_experts_in_16_bits_are_computed_one_after_the_other_on_a_cpu(copied: Path, dtype: str, expected: str) -> None:
    assert (
        load_model(ModelSource(config(copied, dtype=dtype))).language_model.config._experts_implementation == expected
    )


@pytest.mark.parametrize("path", ["/no/such/folder", "./no/such", "nothing-here", "a/b/c"])
def test_missing_folder_is_refused(path: str) -> None:
    assert "no such folder" in refused(ModelConfig(path=path))


def test_unknown_hugging_face_name_is_refused() -> None:
    message = refused(ModelConfig(path="moe-evo-nobody/nothing"))
    assert "not found on Hugging Face either" in message


def test_file_in_place_of_a_folder_is_refused(copied: Path) -> None:
    assert "is a file, expected a folder" in refused(config(copied / "config.json"))


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert "has no config.json" in refused(config(tmp_path))


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[]", "holds list, expected an object")])
def test_broken_config_is_refused(copied: Path, content: str, message: str) -> None:
    (copied / "config.json").write_text(content)
    assert message in refused(config(copied))


def test_config_that_the_library_refuses_is_refused(copied: Path) -> None:
    raw = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**raw, "layer_types": ["unknown"]}))
    assert "config.json cannot be used" in refused(config(copied))


def test_pickled_weights_are_refused(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    assert "has no weights; moe_evo reads *.safetensors" in refused(config(copied))
    torch.save(weights, copied / "pytorch_model.bin")
    assert "pickled weights only, which can run code" in refused(config(copied))


def test_pickled_weights_beside_an_unrelated_safetensors_file_are_not_read(copied: Path) -> None:
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").rename(copied / "adapter.safetensors")
    assert "cannot be loaded" in refused(config(copied))


def test_truncated_weights_are_refused(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert "cannot be loaded" in refused(config(copied))


def test_missing_weights_are_refused_and_not_made_up(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    weights.pop("model.layers.1.block_sparse_moe.gate.weight")
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights, model.layers.1.mlp.gate.weight (8, 32) among them" in refused(config(copied))


def test_broken_tokenizer_is_refused(copied: Path) -> None:
    (copied / "tokenizer.json").write_text("{}")
    assert "the tokenizer cannot be loaded" in refused(config(copied))


@pytest.mark.parametrize("device", ["cuda:7", "nonsense"])
def test_device_that_is_not_here_is_refused(copied: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"model.device: got '{device}'"):
        load_model(ModelSource(ModelConfig(path=str(copied), device=device)))


@pytest.mark.parametrize("device", ["meta", "meta:0"])
def test_meta_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=f"model.device: got '{device}', which holds no numbers") as caught:
        resolve_device(device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("gib", [None, 0.5])
def test_cache_budget_of_the_config_reaches_the_model(
    copied: Path, monkeypatch: pytest.MonkeyPatch, gib: float | None
) -> None:
    monkeypatch.setattr(view, "half_of_free_gib", lambda device: 7.0 if device.type == "cpu" else 0.0)
    budget = load_model(ModelSource(config(copied, merged_cache_gib=gib))).merged_cache.budget_bytes
    assert budget == (7.0 if gib is None else gib) * 2**30


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_code_of_a_checkpoint_never_takes_the_place_of_the_familys_own(
    copied: Path, embedded_tokenizer: list[Path], trust_remote_code: bool
) -> None:
    for file in embedded_tokenizer:
        shutil.copy(file, copied)
    marker = copied / "it-ran"
    (copied / "theirs.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise ImportError('theirs')\n")
    raw = json.loads((copied / "config.json").read_text())
    auto_map = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (copied / "config.json").write_text(json.dumps({**raw, "auto_map": auto_map}))
    moe = load_model(ModelSource(config(copied, trust_remote_code=trust_remote_code)))
    assert type(moe.language_model) is MixtralForCausalLM
    assert moe.tokenizer is not None and not marker.exists()


def test_trusted_code_of_a_tokenizer_is_used(copied: Path, embedded_tokenizer: list[Path]) -> None:
    for file in embedded_tokenizer:
        shutil.copy(file, copied)
    (copied / "theirs.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\nclass Theirs(PreTrainedTokenizerFast):\n    pass\n"
    )
    file = copied / "tokenizer_config.json"
    named = {**json.loads(file.read_text()), "tokenizer_class": "Theirs"}
    file.write_text(json.dumps({**named, "auto_map": {"AutoTokenizer": [None, "theirs.Theirs"]}}))
    assert type(ModelSource(config(copied, trust_remote_code=True)).tokenizer).__name__ == "Theirs"


def test_tokenizer_comes_without_the_weights(
    copied: Path, embedded_tokenizer: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert ModelSource(config(copied)).tokenizer is None
    for file in embedded_tokenizer:
        shutil.copy(file, copied)
    (copied / "model.safetensors").write_bytes(b"not read")
    alone = ModelSource(config(copied)).tokenizer
    assert alone is not None and capfd.readouterr() == ("", "")
    whole = load_model(ModelSource(ModelConfig(device="cpu"))).tokenizer
    assert alone("The cat sat").input_ids == whole("The cat sat").input_ids
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        _ = ModelSource(config(copied)).tokenizer


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ],
)
def test_hash_covers_the_files_of_the_tokenizer_whole(copied: Path, name: str) -> None:
    without = ModelSource(config(copied)).hash
    content = bytearray(8 * 2**20 * b"x")
    (copied / name).write_bytes(content)
    before = ModelSource(config(copied)).hash
    content[4_202_000] ^= 1  # between two blocks of the sample that is read of weights
    (copied / name).write_bytes(content)
    assert len({without, before, ModelSource(config(copied)).hash}) == 3


def test_hash_of_a_hugging_face_name_is_readable(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789" * 4
    snapshot = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / commit
    shutil.copytree(copied, snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert ModelSource(ModelConfig(path="owner/tiny", revision=commit)).hash == f"owner/tiny@{commit}"


def test_hash_is_that_of_config_and_weights(copied: Path, tmp_path: Path) -> None:
    first = ModelSource(config(copied)).hash
    twin = Path(shutil.copytree(copied, tmp_path / "twin"))
    (twin / "notes.txt").write_text("not part of the model")
    assert ModelSource(config(twin)).hash == first and len(first) == 64
    weights = bytearray((twin / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (twin / "model.safetensors").write_bytes(weights)
    assert ModelSource(config(twin)).hash != first


def test_embedded_model_loads_with_its_tokenizer() -> None:
    embedded = ModelConfig(device="cpu")
    moe = load_model(ModelSource(embedded))
    assert moe.shape == ModelSource(embedded).shape
    assert moe.shape.num_experts == (8, 8, 8, 8)
    text = "The cat sat"
    ids = moe.tokenizer(text, return_tensors="pt").input_ids
    assert logits(moe.language_model, ids).shape[:2] == ids.shape
    assert len(ModelSource(embedded).hash) == 64


def test_off_the_cpu_generate_keeps_the_experts_and_attention_builds_no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is a name here: what is looked at is what the libraries are told."""
    assert torch.backends.cuda.cudnn_sdp_enabled()
    model = tiny_model("mixtral")
    try:
        suit_device(model, torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with model._optimize_model_for_decode():
        assert model.get_experts_implementation()[""] == GROUPED_MM
    model.set_experts_implementation("grouped_mm")
    with model._optimize_model_for_decode():
        assert model.get_experts_implementation()[""] == "batched_mm", "what the other name is for"
