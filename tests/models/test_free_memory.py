"""Free memory as the system and the container tell it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch
from tiny_models import tiny_model

from moe_evo.models import free_memory
from moe_evo.models.free_memory import free_bytes, half_of_free_gib, held_bytes, share_memory
from moe_evo.models.view import MoEModel

CPU = torch.device("cpu")


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 4,000 KiB of free memory, and no limits below it yet."""
    free = {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", free.__getitem__)
    monkeypatch.setattr(free_memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(free_memory, "_own_cgroup", lambda: "pods/ours")
    return tmp_path


def limit(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("memory_", "memory.")).write_text(f"{content}\n", encoding="ascii")


def test_default_budget_is_half_of_the_free_memory_of_the_device(
    cgroups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("moe_evo.models.view.half_of_free_gib", half_of_free_gib)
        assert MoEModel(tiny_model("mixtral")).merged_cache.budget_bytes == 500 * 4096
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (6 * 2**30, 80 * 2**30))
    assert half_of_free_gib(torch.device("cuda:1")) == 3.0 and asked == [torch.device("cuda:1")]
    monkeypatch.delitem(os.sysconf_names, "SC_AVPHYS_PAGES")
    assert free_bytes(CPU) is None and half_of_free_gib(CPU) == 1.0


@pytest.mark.usefixtures("cgroups")
def test_processes_that_share_memory_take_a_fair_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "_num_sharing", 1)
    alone = half_of_free_gib(CPU)
    share_memory(4)
    assert half_of_free_gib(CPU) == alone / 4 == 1000 * 4096 / 2**33


def test_how_much_a_process_holds_is_told_with_and_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = psutil.Process().memory_info().rss
    assert held_bytes() == pytest.approx(measured, rel=0.2)
    monkeypatch.setattr(Path, "read_text", _no_such_file)
    assert held_bytes() >= 0.8 * measured, "the most that was held"


def _no_such_file(*_: object) -> str:
    raise FileNotFoundError


def test_the_real_system_answers() -> None:
    free = free_bytes(CPU)
    assert free is None or free > 2**20


def test_the_tightest_limit_around_a_process_counts_and_caches_of_files_can_go(cgroups: Path) -> None:
    limit(cgroups / "pods" / "ours", memory_max="max", memory_current=10, memory_stat="inactive_file 3")
    assert free_bytes(CPU) == 1000 * 4096
    limit(cgroups / "pods", memory_max=9_000_000, memory_current=8_000_000, memory_stat="anon 5\ninactive_file 250")
    assert free_bytes(CPU) == 1_000_250
    limit(cgroups / "pods" / "ours", memory_max=500, memory_current=900, memory_stat="inactive_file 3")
    assert free_bytes(CPU) == 0


def test_limits_of_the_first_version_of_cgroups_count_as_well(cgroups: Path) -> None:
    stat = "inactive_file 1\ntotal_inactive_file 7"
    place = cgroups / "memory" / "pods" / "ours"
    limit(place, memory_limit_in_bytes=(1 << 63) - 4096, memory_usage_in_bytes=5, memory_stat=stat)
    assert free_bytes(CPU) == 1000 * 4096
    limit(place, memory_limit_in_bytes=2000, memory_usage_in_bytes=1500, memory_stat=stat)
    assert free_bytes(CPU) == 507
