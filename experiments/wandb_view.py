"""Save the workspace of `experiments/wandb.md` in a W&B project: python experiments/wandb_view.py --entity TEAM

Needs a key (WANDB_API_KEY) and `pip install wandb-workspaces`; without either it says so and exits with code 2.
Written against the public interface of wandb-workspaces 0.3; it has not been run against the service.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description="Save a workspace for searches in a W&B project.")
    parser.add_argument("--entity", required=True, help="W&B team or user")
    parser.add_argument("--project", default="moe_evo", help="W&B project")
    parser.add_argument("--name", default="moe_evo searches", help="name of the saved view")
    arguments = parser.parse_args()
    if not os.environ.get("WANDB_API_KEY"):
        return _fail("no key: set WANDB_API_KEY")
    try:
        workspaces = importlib.import_module("wandb_workspaces.workspaces")
        panels = importlib.import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        return _fail(f"{error}: pip install wandb-workspaces")
    sections = [
        workspaces.Section(name=name, panels=content, is_open=True) for name, content in _sections(panels).items()
    ]
    workspace = workspaces.Workspace(
        entity=arguments.entity,
        project=arguments.project,
        name=arguments.name,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis="evaluations"),
        runset_settings=workspaces.RunsetSettings(groupby=[workspaces.Config("ratio"), workspaces.Config("algorithm")]),
    )
    workspace.save()
    print(workspace.url)
    return 0


def _sections(panels: Any) -> dict[str, list[Any]]:
    """Panels by the title of their section."""

    def line(title: str, *keys: str) -> Any:
        return panels.LinePlot(title=title, x="evaluations", y=list(keys))

    def scatter(title: str, x: str, y: str) -> Any:
        return panels.ScatterPlot(title=title, x=panels.SummaryMetric(x), y=panels.SummaryMetric(y))

    gangs = ("gangs/busy", "gangs/loading", "gangs/waiting", "gangs/restarts", "queue/waiting", "queue/under_way")
    return {
        "Search": [
            line("best so far", "best/fitness", "random/best/fitness"),
            line("fitness", "fitness"),
            line("validation", "validation/search", "validation/random"),
        ],
        "Size and quality": [
            scatter("test score by share of experts kept", "share_kept", "best/test"),
            panels.BarPlot(title="gain over the full model (test)", metrics=["gain/test"]),
        ],
        "Is it still searching": [
            line(
                "children better than their parents",
                *(f"operators/{name}" for name in ("swap_mutation", "gaussian_mutation", "row_crossover")),
            ),
            line("spread", "population/std", "population/best20_std"),
            line("diversity", "population/unique_share", "population/best20_unique_layers"),
        ],
        "Cluster": [line("rate", "evaluations_per_s"), line("gangs", *gangs), line("failures", "failures")],
        "The winner": [
            panels.MediaBrowser(media_keys=["best/kept_experts", "best/expert_merging", "best/router_mapping"]),
        ],
    }


def _fail(reason: str) -> int:
    print(f"wandb_view: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
