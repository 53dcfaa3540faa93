"""`moe-evo doctor`: checks of this machine's software, hardware and numerics that a run depends on.

Every check is independent and gives one line, so that one that fails does not hide the others.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import TrackingConfig
from moe_evo.errors import ConfigError
from moe_evo.versions import ADVICE, installed_version, needed_packages, release, tested_versions

if TYPE_CHECKING:  # torch is imported when a model is looked at, not before
    from moe_evo.models.view import MoEModel

State = Literal["ok", "note", "absent", "broken"]

_EXTRAS = {
    "deepspeed": "needed for model.sharding zero3",
    "lm_eval": "needed by benchmarks/throughput.py",
}


@dataclass(frozen=True)
class Check:
    """A check's result.

    state: 'note' is a remark, 'absent' is not here and only some runs need it, 'broken' does not work.
    """

    name: str
    state: State
    detail: str


def checks() -> Iterator[Check]:
    """Run all checks, and yield each result as it is done; takes about a minute."""
    yield _guarded("python", _python)
    for package, extra in needed_packages().items():
        yield _guarded(package, partial(_package, package, extra))
    for name, check in (
        ("gpu", _gpu),
        ("memory", _memory),
        ("disk", _disk),
        ("ray cluster", _ray),
        ("wandb mode", _wandb),
        ("chromium", _chromium),
        ("embedded model", _embedded_model),
    ):
        yield _guarded(name, check)
    for family in _families():
        yield _guarded(f"family {family}", partial(_family, family))
    if installed_version("deepspeed") is not None:
        yield _guarded("zero3", _zero3)


def require_nothing_broken(found: Sequence[Check]) -> None:
    """Raise ConfigError, in one line, where something does not work."""
    broken = [check.name for check in found if check.state == "broken"]
    if broken:
        raise ConfigError(f"doctor: broken here: {', '.join(broken)}; see the lines above")


Finding = tuple[State, str]


def _guarded(name: str, check: Callable[[], Finding]) -> Check:
    try:
        return Check(name, *check())
    except Exception as error:  # noqa: BLE001 - whatever fails is the check's result
        return Check(name, "broken", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _python() -> Finding:
    where = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    return ("ok" if sys.version_info >= (3, 11) else "broken"), where


def _package(package: str, extra: str | None) -> Finding:
    installed = installed_version(package)
    if installed is None:
        if extra is None:
            return "broken", f"not installed; {ADVICE}"
        return "absent", f"{_EXTRAS.get(extra, f'part of {extra}')}: pip install 'moe_evo[{extra}]'"
    locked, oldest = (tested_versions()[which].get(package) for which in ("locked", "oldest"))
    tested = f"tested: {oldest} to {locked}" if oldest else f"tested: {locked}"
    if oldest and release(installed) < release(oldest):
        return "broken", f"{installed} is too old ({tested}); {ADVICE}"
    if locked and release(installed)[:2] > release(locked)[:2]:
        return "note", f"{installed} is newer than what was tested ({tested}); if something breaks, {ADVICE}"
    return "ok", f"{installed} ({tested})"


def _gpu() -> Finding:
    import torch

    driver = _nvidia_driver()
    if not torch.cuda.is_available():
        if driver:
            return "note", f"driver {driver} is here, but torch {torch.__version__} cannot use it; install a CUDA build"
        return "ok", "none, so everything runs on the CPU"
    found = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        ones = torch.ones((64, 64), device=f"cuda:{number}", dtype=torch.bfloat16)
        assert float((ones @ ones).sum()) == 64**3, "a product on this GPU is wrong"
        name = torch.cuda.get_device_name(number)
        found.append(f"{name} ({free / 2**30:.0f} of {total / 2**30:.0f} GiB free)")
    return "ok", f"{', '.join(found)}; driver {driver or 'unknown'}, CUDA {torch.version.cuda}"


def _nvidia_driver() -> str:
    """The driver's version; '' where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout.strip() else ""


def _memory() -> Finding:
    import torch

    from moe_evo.models.free_memory import free_bytes

    free = free_bytes(torch.device("cpu"))
    if free is None:
        return "ok", "this system does not tell how much is free"
    state: State = "ok" if free > 2**30 else "note"
    return state, f"{free / 2**30:.1f} GiB free for this process, limits of containers counted"


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    return ("ok" if free > 2**30 else "note"), f"{free / 2**30:.1f} GiB free in {Path.cwd()}"


def _ray() -> Finding:
    """Start Ray as `cluster.address local` does, with one actor."""
    from moe_evo.gangs.connection import answers_on, connected

    with connected("local"):
        answers_on()
    address = os.environ.get("RAY_ADDRESS")
    return "ok", "a local one starts and answers" + (f"; RAY_ADDRESS is {address}" if address else "")


def _wandb() -> Finding:
    from moe_evo.tracking.wandb_run import wandb_mode

    key = "set" if os.environ.get("WANDB_API_KEY") else "not set"
    return "ok", f"{wandb_mode(TrackingConfig())} (WANDB_MODE {os.environ.get('WANDB_MODE', 'not set')}, key {key})"


def _zero3() -> Finding:
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        from moe_evo.models.zero3 import imported_deepspeed

        imported_deepspeed()
    return "ok", "DeepSpeed can be imported"


def _chromium() -> Finding:
    found = [name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)]
    if found and shutil.which("chromedriver"):
        return "ok", f"{found[0]} with chromedriver"
    return "absent", "only the tests of the report page want it, with chromedriver"


def _embedded_model() -> Finding:
    """Load the embedded model with its self-check, and test the sharing of layers on the device of a run."""
    from moe_evo.models.load import load_model
    from moe_evo.models.source import ModelSource

    return _sharing(load_model(ModelSource(ModelConfig())))


def _families() -> Sequence[str]:
    from moe_evo.models.families import FAMILIES

    return sorted(FAMILIES)


def _family(family: str) -> Finding:
    """The same checks for a tiny random model of a family."""
    from moe_evo.models.self_check import self_check
    from moe_evo.models.tiny import tiny_model
    from moe_evo.models.transformers_border import quiet
    from moe_evo.models.view import MoEModel

    with quiet():
        model = MoEModel(tiny_model(family))
    self_check(model)
    return _sharing(model)


def _sharing(model: MoEModel) -> Finding:
    from moe_evo.evaluation.engine.sharing import sharing_for

    switched_off = (*model.switched_off, *sharing_for(model, EvaluationConfig()).switched_off)
    if switched_off:
        return "note", "; ".join(map(str, switched_off))
    return "ok", f"on {model.device.type}: hooks, token trees, shared layers, prefixes and prompts hold"
