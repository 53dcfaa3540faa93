"""A front in Weights & Biases: a real offline run, read back with wandb's own reader."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tracked_runs import CONFIG, Record, search

from moe_evo.config.run import SelectionConfig
from moe_evo.config.search import SearchConfig
from moe_evo.records.folder import RunFolder


def test_the_front_is_a_table_with_its_objectives_on_every_split(tmp_path: Path) -> None:
    objectives = SearchConfig(
        algorithm="surrogate", objectives=["quality", "parameters"], num_kept={"min": 2, "max": 8}, evaluations=12
    )
    config = replace(CONFIG, search=objectives, selection=SelectionConfig(finalists=2, baselines=[]))
    search(tmp_path / "run", config)
    record, result = Record(tmp_path / "run"), RunFolder(tmp_path / "run").read_result()
    table = json.loads((record.folder / "files" / record.summary["front.path"]).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["key"] for row in rows] == [point.row.key for point in result.front]
    for row, point in zip(rows, result.front, strict=True):
        assert row["test/quality"] == point.row.test.fitness and row["loader"] == point.row.loader
        assert row["search/experts"] == row["num_kept"] == sum(point.row.num_kept) / 4
    assert record.run["config"]["update"]["objectives"] == "quality+parameters"
    assert record.run["display_name"] == "syll-keep2to8-surrogate-seed0"
