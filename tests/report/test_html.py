"""What notebooks show: names are text, numbers are seen, and nothing is fetched."""

from __future__ import annotations

import numpy as np

from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.report.html import kept_map, learning_curve, table

HOSTILE = "<script>alert(1)</script>&"


def test_cells_are_text() -> None:
    text = table(HOSTILE, [HOSTILE], [[HOSTILE]], bold=[0])
    assert "<script" not in text and text.count("&lt;script&gt;") == 3


def test_control_characters_are_shown_by_their_numbers() -> None:
    text = table("\x1b[31m", ["\x07"], [["\u202e"]]) + learning_curve([0.5], None, "\x9b")
    assert text.isprintable() and r"\x1b[31m" in text and r"\u202e" in text


def test_a_map_has_a_square_for_every_expert_that_there_is() -> None:
    merged = LayerGenome(np.array([[1, 0.25, 0, 0], [0, 0, 1, 0]]), np.eye(2, 4), 1)
    text = kept_map(Genome((merged, LayerGenome.from_kept([1], 2, 1))))
    assert text.count("<rect") == 4 + 2
    assert text.count("rgb(0,114,178)") == 3 and text.count("#eeeeee") == 2
    assert "layer 0, expert 1: weight 0.25" in text


def test_a_curve_has_a_dot_for_every_success_and_the_full_model() -> None:
    text = learning_curve([0.5, None, 0.75, 0.6], 0.9)
    assert text.count("<circle") == 3 and text.count("<polyline") == 1 and "full model 0.900" in text
    assert "4 evaluations" in text


def test_a_curve_of_one_fitness_or_of_none_is_no_trouble() -> None:
    assert learning_curve([0.5], 0.5).count("<circle") == 1
    assert learning_curve([], 0.5) == learning_curve([None], None) == ""
