"""What is kept of the full model, and how far a smaller one is from it, against brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_lessons import readings
from tiny_models import tiny_model

from moe_evo.recovery import lessons as module
from moe_evo.recovery.lessons import (
    UNLABELLED,
    Lessons,
    Reading,
    batches_of,
    bytes_of_lessons,
    has_lessons,
    logits_of,
    read_lessons,
    write_lessons,
)
from moe_evo.recovery.losses import cross_entropies, divergences

CPU = torch.device("cpu")


def written(folder: Path, model, what: list[Reading], *, top_k: int = 5, batch_tokens: int = 30) -> Lessons:
    write_lessons(folder, "learned", what, model, CPU, top_k=top_k, batch_tokens=batch_tokens)
    return read_lessons(folder, "learned")


def alone(model, tokens) -> torch.Tensor:
    """(T, V) log-probabilities of one sequence by itself."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(tokens)])).logits[0].double().log_softmax(-1)


def test_lessons_are_what_the_model_expects_of_each_sequence_alone(tmp_path: Path) -> None:
    model, what = tiny_model("mixtral"), readings()
    lessons = written(tmp_path, model, what)
    known = {tuple(row.tolist()): number for number, row in enumerate(lessons.rows(range(len(lessons))))}
    assert len(lessons) == len(what) == len(known)
    for one in what:
        number = known[one.tokens]
        places = lessons.positions([number])
        expected = alone(model, one.tokens)
        largest, ids = expected.topk(5)
        assert lessons.ids[places].tolist() == ids.tolist()
        torch.testing.assert_close(lessons.log_probs[places].double(), largest, rtol=1e-3, atol=1e-3)
        rest = (1 - largest.exp().sum(-1)).log()
        torch.testing.assert_close(lessons.rest[places].double(), rest, rtol=1e-3, atol=1e-3)
        assert int(lessons.starts[number]) == one.start
        labels = [UNLABELLED] * (len(one.tokens) - len(one.labels)) + list(one.labels)
        assert lessons.labels[places].tolist() == labels
        weights = lessons.weights([number], 0.25).tolist()
        assert weights == [0.25] * one.start + [1.0] * (len(one.tokens) - one.start)


def test_shards_are_read_as_one_and_take_the_bytes_that_are_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, what = tiny_model("mixtral"), readings(60)
    whole = written(tmp_path / "one", model, what)
    monkeypatch.setattr(module, "_SHARD_POSITIONS", 100)
    parts = written(tmp_path / "many", model, what)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    for name in ("lengths", "starts", "tokens", "labels", "ids", "log_probs", "rest"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    planned = bytes_of_lessons(len(whole.tokens), 5)
    (file,) = (tmp_path / "one").glob("*.safetensors")
    assert planned <= file.stat().st_size < planned + 2000


def test_lessons_are_there_only_when_all_were_written(tmp_path: Path) -> None:
    class Dying:
        config = tiny_model("mixtral").config

        def __call__(self, **_):
            raise RuntimeError("dead")

    assert not has_lessons(tmp_path, "learned")
    with pytest.raises(RuntimeError, match="dead"):
        written(tmp_path, Dying(), readings())
    assert not has_lessons(tmp_path, "learned")
    written(tmp_path, tiny_model("mixtral"), readings())
    assert has_lessons(tmp_path, "learned") and not has_lessons(tmp_path, "validation")


def test_the_divergence_is_the_whole_one_where_all_tokens_are_stored(tmp_path: Path) -> None:
    full, small = tiny_model("mixtral"), tiny_model("mixtral", seed=1)
    lessons = written(tmp_path, full, readings(), top_k=96)
    for number in range(len(lessons)):
        (row,), places = lessons.rows([number]), lessons.positions([number])
        p, q = alone(full, row.tolist()), alone(small, row.tolist())
        expected = (p.exp() * (p - q)).sum(-1)
        got = divergences(logits_of(small, [row], CPU), *_stored(lessons, places))
        torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-3)


def test_tokens_that_are_not_stored_count_as_one(tmp_path: Path) -> None:
    full, small = tiny_model("mixtral"), tiny_model("mixtral", seed=1)
    whole, few = (written(tmp_path / str(k), full, readings(), top_k=k) for k in (96, 4))
    logits = logits_of(small, few.rows([3]), CPU)
    places = few.positions([3])
    got = divergences(logits, *_stored(few, places))
    p, q = alone(full, few.rows([3])[0].tolist()), logits.double().log_softmax(-1)
    ids = few.ids[places].long()
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(1, ids, True)
    rest = [torch.where(kept, 0.0, one.exp()).sum(-1).log() for one in (p, q)]
    expected = torch.where(kept, p.exp() * (p - q), 0.0).sum(-1) + rest[0].exp() * (rest[0] - rest[1])
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-3)
    assert (got <= divergences(logits, *_stored(whole, whole.positions([3]))) + 1e-3).all()


def _stored(lessons: Lessons, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return lessons.ids[places], lessons.log_probs[places], lessons.rest[places]


def test_a_model_does_not_diverge_from_itself_and_its_gradient_is_finite(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    lessons = written(tmp_path, model, readings())
    logits = logits_of(model, lessons.rows([2]), CPU).detach().requires_grad_()
    # a token that the full model rules out, and one that the smaller one does
    sharp = torch.where(torch.arange(96) == 7, 0.0, -1e4).half()
    lessons.log_probs[lessons.positions([2])] = sharp[:5]
    found = divergences(logits, *_stored(lessons, lessons.positions([2])))
    found.sum().backward()
    assert found.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()


def test_cross_entropy_counts_labelled_positions_only() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, UNLABELLED, 0, UNLABELLED])
    found = cross_entropies(logits, labels)
    assert found[1] == found[3] == 0
    torch.testing.assert_close(found[[0, 2]], -logits.log_softmax(-1)[[0, 2], [3, 0]])


def test_batches_hold_every_sequence_once_and_no_more_tokens_than_allowed() -> None:
    lengths = np.random.default_rng(0).integers(1, 20, size=50).tolist()
    batches = batches_of(lengths, range(50), 40, 100)
    assert sorted(number for batch in batches for number in batch) == list(range(50))
    assert all(len(batch) * max(lengths[number] for number in batch) <= 40 for batch in batches)
    assert [batch for batch in batches_of([100, 3], [0, 1], 40, 100) if 0 in batch] == [[0]]  # alone, as it is longer
