"""Where `model.path` points: a folder here, or a name on Hugging Face. Imports nothing slow, so that a mistyped folder
is told at once.
"""

from __future__ import annotations

import importlib.resources
import re
from difflib import get_close_matches
from pathlib import Path

from moe_evo.config.model import EMBEDDED_MODELS
from moe_evo.errors import ModelError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def location(path: str) -> Path | str:
    """A local folder, or else a Hugging Face name; raises ModelError for neither.

    What has the form owner/model is a name on Hugging Face only where no folder `owner` is here, nor one that is
    nearly called so and has a folder `model`.
    """
    if path in EMBEDDED_MODELS:
        path = str(importlib.resources.files("moe_evo") / "data" / EMBEDDED_MODELS[path].folder)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    near = _nearest(folder)
    is_local = folder.exists() or folder.parent.is_dir() or not _HUB_NAME.fullmatch(path)
    if is_local or near is not None:
        what = "is a file, expected a folder" if folder.exists() else "no such folder"
        advice = "" if near is None else f"did you mean {near}? Or "
        raise ModelError(f"{path}: {what}; {advice}give a checkpoint folder or a Hugging Face name owner/model")
    return path


def is_hub_name(path: str) -> bool:
    """Whether the model has to be looked for on Hugging Face."""
    try:
        return isinstance(location(path), str)
    except ModelError:
        return False


def _nearest(folder: Path) -> Path | None:
    """The folder that is probably meant: one spelt alike beside it, or of its name in one spelt like its parent."""
    if folder.parent.is_dir():
        near = get_close_matches(folder.name, _folders_in(folder.parent), n=1)
        return folder.parent / near[0] if near else None
    if not folder.parent.parent.is_dir():
        return None
    near = get_close_matches(folder.parent.name, _folders_in(folder.parent.parent), n=3)
    found = (folder.parent.parent / one / folder.name for one in near)
    return next((one for one in found if one.is_dir()), None)


def _folders_in(folder: Path) -> list[str]:
    try:
        return sorted(one.name for one in folder.iterdir() if one.is_dir())
    except OSError:
        return []
