"""One tiny checkpoint and one loaded view a family, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, tiny_model

from moe_evo.config.model import ModelConfig
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny checkpoint of a family."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(model_type: str) -> Path:
        path = root / model_type
        if not path.exists():
            tiny_model(model_type).save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session")
def load(checkpoint: Callable[[str], Path]) -> Callable[[str], MoEModel]:
    """The view of a family, with the self-check run; views restore themselves, so tests share them."""
    loaded: dict[str, MoEModel] = {}

    def view(model_type: str) -> MoEModel:
        if model_type not in loaded:
            loaded[model_type] = load_model(ModelSource(ModelConfig(path=str(checkpoint(model_type)), device="cpu")))
        return loaded[model_type]

    return view


@pytest.fixture(params=sorted(CONFIGS))
def moe(request: pytest.FixtureRequest, load: Callable[[str], MoEModel]) -> MoEModel:
    return load(request.param)


@pytest.fixture
def mixtral(load: Callable[[str], MoEModel]) -> MoEModel:
    return load("mixtral")
