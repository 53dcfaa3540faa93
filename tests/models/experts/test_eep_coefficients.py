"""Reading EEP's files: the synthetic ones are written here in the published format."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_evo.errors import GenomeError
from moe_evo.genomes.space import ModelShape
from moe_evo.models.experts.eep_coefficients import load_eep_coefficients

SHAPE = ModelShape("mixtral", (8,) * 6, (2,) * 6, tuple(range(6)))


def matrix(seed: int, num_kept: int = 3) -> torch.Tensor:
    return torch.randn(num_kept, 8, generator=torch.Generator().manual_seed(seed))


def write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def grouped() -> dict[str, torch.Tensor]:
    return {
        "layers.[0-1]": matrix(0),
        "layers.[2-3]": matrix(1),
        "others": matrix(2),
        "transfer.[0-1]": matrix(3),
        "transfer.[2-3]": matrix(4),
        "others_transfer": matrix(5),
    }


def test_ranges_and_others_are_expanded_to_layers(tmp_path: Path) -> None:
    genome = load_eep_coefficients(write(tmp_path / "squad_budget_3.pth", grouped()), SHAPE)
    for layer, (merging, mapping) in enumerate([(0, 3), (0, 3), (1, 4), (1, 4), (2, 5), (2, 5)]):
        assert np.array_equal(genome.layers[layer].expert_merging, matrix(merging).numpy())
        assert np.array_equal(genome.layers[layer].router_mapping, matrix(mapping).numpy())
    assert genome.top_k == (2,) * 6
    assert not genome.is_pruning


def test_single_layers_and_another_top_k(tmp_path: Path) -> None:
    content = {"others": matrix(9), "others_transfer": matrix(9)}
    content |= {f"layers.{layer}": matrix(layer) for layer in range(5)}
    content |= {f"transfer.{layer}": matrix(layer) for layer in range(5)}
    genome = load_eep_coefficients(write(tmp_path / "rte.pth", content), SHAPE, top_k=1)
    assert genome.top_k == (1,) * 6
    assert np.array_equal(genome.layers[4].expert_merging, matrix(4).numpy())
    assert np.array_equal(genome.layers[5].expert_merging, matrix(9).numpy())


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, (f"touch {self.marker}",))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    path = write(tmp_path / "evil.pth", {"layers.0": Malicious(marker)})
    with pytest.raises(GenomeError, match="could run code") as caught:
        load_eep_coefficients(path, SHAPE)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds list, expected a dict"),
        ({}, "holds dict, expected a dict of matrices"),
        ({"layers.0": torch.zeros(3)}, "entry 'layers.0' is not a matrix"),
        ({"layers.0": 3}, "entry 'layers.0' is not a matrix"),
        ({**grouped(), "model.norm": matrix(0)}, "unknown entry 'model.norm'"),
        ({**grouped(), "layers.7": matrix(0)}, "names layer 7, the model has 6"),
        ({**grouped(), "layers.1": matrix(0)}, "names layer 1, which another entry names too"),
        ({key: value for key, value in grouped().items() if key != "others"}, "no entry layers for layer 4"),
        ({**grouped(), "others": matrix(0, num_kept=4)}, "router_mapping: got shape"),
        ({"others": torch.eye(4), "others_transfer": torch.eye(4)}, "made for 6 MoE layers of 4 experts"),
        ({"others": matrix(0, 1), "others_transfer": matrix(0, 1)}, "top_k: got 2 with 1 experts kept"),
    ],
)
def test_files_in_another_format_are_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(GenomeError, match=message) as caught:
        load_eep_coefficients(write(tmp_path / "other.pth", content), SHAPE)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_torch_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GenomeError, match="no such file"):
        load_eep_coefficients(tmp_path / "missing.pth", SHAPE)
    for name, content in {"empty.pth": b"", "text.pth": b"hello", "zip.pth": b"PK\x03\x04broken"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(GenomeError) as caught:
            load_eep_coefficients(tmp_path / name, SHAPE)
        assert "\n" not in str(caught.value)
