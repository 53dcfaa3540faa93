"""Reading the coefficients that EEP publishes (`searched_coeff/{task}_budget_{K}.pth`).

A file is a dict of (K, E) matrices: W_EM under `layers.G` and `others`, W_RM under `transfer.G` and
`others_transfer`, where G is a layer or a range like `[0-7]` and `others` is every layer left over.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from moe_evo.errors import GenomeError
from moe_evo.genomes.genome import Genome, LayerGenome, Matrix
from moe_evo.genomes.space import ModelShape, check_fits
from moe_evo.models.transformers_border import LIBRARY_ERRORS
from moe_evo.shown import shown

_GROUP = re.compile(r"(layers|transfer)\.(?:(\d+)|\[(\d+)-(\d+)\])")


def load_eep_coefficients(path: str | Path, shape: ModelShape, top_k: int | None = None) -> Genome:
    """The genome in the file, for a model of `shape`; top_k defaults to the model's.

    The matrices are meant for router mode 'eep'. Raises GenomeError for a file that cannot be read
    safely, is not in EEP's format, or does not fit the model.
    """
    matrices = _read(Path(path), max(shape.num_experts))
    merging = _by_layer(matrices, "layers", "others", shape.num_layers, path)
    mapping = _by_layer(matrices, "transfer", "others_transfer", shape.num_layers, path)
    active = shape.top_k if top_k is None else (top_k,) * shape.num_layers
    try:
        genome = Genome(tuple(map(LayerGenome, merging, mapping, active)))
        check_fits(genome, shape)
    except GenomeError as error:
        raise GenomeError(f"{path}: {error}") from error
    return genome


def _read(path: Path, num_experts: int) -> dict[str, Matrix]:
    """The matrices by name. num_experts: more rows or columns than these are refused before they take memory."""
    try:
        _check_stored(path)
        with warnings.catch_warnings():  # about pickles that are refused a moment later
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise GenomeError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise GenomeError(
            f"{path}: holds more than tensors, or no tensors at all; it is not loaded, as it could run code"
        ) from error
    except GenomeError:
        raise
    except (*LIBRARY_ERRORS, EOFError, struct.error, zipfile.BadZipFile, zlib.error) as error:
        raise GenomeError(f"{path}: is not a torch file of EEP coefficients") from error
    if not isinstance(content, dict) or not content:
        raise GenomeError(f"{path}: holds {type(content).__name__}, expected a dict of matrices")
    matrices = {}
    for key, value in content.items():
        if not (isinstance(key, str) and isinstance(value, Tensor) and value.ndim == 2):
            raise GenomeError(f"{path}: entry {shown(key, 80)} is not a matrix (num_kept, num_experts)")
        if max(value.shape) > num_experts:
            raise GenomeError(
                f"{path}: entry {shown(key, 80)} is of shape {tuple(value.shape)}, the model has {num_experts} experts"
            )
        if value.layout != torch.strided or value.is_meta or value.is_quantized or not value.is_floating_point():
            kind = "a tensor without numbers" if value.is_meta else f"{value.dtype} in {value.layout}"
            raise GenomeError(f"{path}: entry {shown(key, 80)} is {kind}, expected a dense matrix of floats")
        matrices[key] = value.detach().to(torch.float32).numpy()
    return matrices


def _check_stored(path: Path) -> None:
    """Raise GenomeError for an archive whose parts are packed, as torch packs none: they could be of any size."""
    if not zipfile.is_zipfile(path):  # the older format of torch
        return
    with zipfile.ZipFile(path) as archive:
        if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
            raise GenomeError(f"{path}: is packed, as torch saves no file; save it with torch.save")
        if archive.testzip() is not None:
            raise GenomeError(f"{path}: is damaged, its checksums are wrong; fetch it anew")


def _by_layer(matrices: dict[str, Matrix], prefix: str, others: str, num_layers: int, path: str | Path) -> list[Matrix]:
    """One matrix a layer, from the keys `prefix`.G and `others`."""
    found: dict[int, Matrix] = {}
    for key, matrix in matrices.items():
        if key in ("others", "others_transfer"):
            continue
        match = _GROUP.fullmatch(key)
        if match is None:
            raise GenomeError(f"{path}: unknown entry {shown(key, 80)}, expected layers.G, transfer.G and others")
        if match[1] != prefix:
            continue
        first, last = (match[2], match[2]) if match[2] else (match[3], match[4])
        if len(first) > 9 or len(last) > 9:
            raise GenomeError(f"{path}: entry {shown(key, 80)} names no layer of the model, which has {num_layers}")
        for layer in range(int(first), int(last) + 1):
            if layer >= num_layers or layer in found:
                raise GenomeError(
                    f"{path}: entry {shown(key, 80)} names layer {layer}, "
                    + ("which another entry names too" if layer in found else f"the model has {num_layers}")
                )
            found[layer] = matrix
    missing = [layer for layer in range(num_layers) if layer not in found]
    if missing and others not in matrices:
        raise GenomeError(f"{path}: has no entry {prefix} for layer {missing[0]}, and no {others!r}")
    return [found[layer] if layer in found else matrices[others] for layer in range(num_layers)]
