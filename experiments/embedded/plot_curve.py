"""Draw the learning curve of train.py: validation accuracy by task over the wall-clock minutes.

python experiments/embedded/plot_curve.py learning_curve.jsonl learning_curve.png
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def draw(curve: Path, figure: Path) -> None:
    """One thin line a task, the mean as a thick one."""
    records = [json.loads(line) for line in curve.read_text(encoding="utf-8").splitlines()]
    minutes = [record["minutes"] for record in records]
    canvas, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for task in records[0]["accuracy"]:
        axes.plot(minutes, [r["accuracy"][task] for r in records], linewidth=1, label=task)
    means = [record["mean_accuracy"] for record in records]
    axes.plot(minutes, means, color="black", linewidth=2.5, label="mean")
    axes.set_xlabel("minutes of training on one CPU core")
    axes.set_ylabel("validation accuracy")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    canvas.savefig(figure, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__.strip())
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
