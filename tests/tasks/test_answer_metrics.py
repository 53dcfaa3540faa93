"""Oracles for the comparison of generated texts with right answers."""

from __future__ import annotations

import pytest

from moe_evo.tasks.answer_metrics import contains, exact_match, f1, first_option, number_match
from moe_evo.tasks.examples import Example, numbers_in


def example(*answers: str, choices: tuple[str, ...] = ()) -> Example:
    return Example("here:1", prompt="?", choices=choices, answers=answers)


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [("Paris", ["paris"], 1), ("  PARIS \n", ["Paris"], 1), ("New  York", ["new york"], 1),
     ("Paris.", ["paris"], 0), ("", ["paris"], 0), ("b", ["a", "B"], 1)],
)  # fmt: skip
def test_exact_match_is_blind_to_case_and_spacing_only(text, answers, expected):
    assert exact_match(text, example(*answers)) == expected


def test_contains_finds_any_answer():
    assert contains("I think it is  New York.", example("boston", "new york")) == 1
    assert contains("I think", example("boston")) == 0


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("the cat", ["a cat!"], 1.0),  # articles and punctuation do not count
        ("cat dog", ["cat"], 2 / 3),  # precision 1/2, recall 1
        ("cat", ["cat sat on mat"], 0.4),  # precision 1, recall 1/4
        ("cat cat", ["cat"], 2 / 3),  # a word is shared once
        ("dog", ["cat"], 0.0),
        ("dog bone", ["cat", "dog"], 2 / 3),  # the best of the answers
        ("", ["cat"], 0.0),
        ("the", ["a"], 1.0),  # nothing is left of either
    ],
)
def test_f1_is_that_of_squad(text, answers, expected):
    assert f1(text, example(*answers)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("B, not A", 1), ("A or B", 0), ("Banana b", 1), ("neither", 0), ("(B)", 1)],
)
def test_first_option_takes_the_first_whole_word(text, expected):
    assert first_option(text, example("B", choices=("A", "B"))) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("A good question. The answer is B", "B"),
        ("It is a tricky one, but I think B.", "B"),
        ("A nice a-b test: C", "C"),
        ("I'd say it's a tie between C and B", "C"),
        ("A", "A"), ("A.", "A"), ("(a)", "A"), ("A is right, not B", "A"), ("A because B is wrong", "A"),
        ("answer: a", "A"), ("a) is right, b) is not", "A"), ("A, as B is not", "A"), ("**A** or B", "A"),
        ("A\nB", "A"), ("it is a dog", None), ("I think so", None), ("I", "I"), ("I is right", "I"), ("i.", "I"),
    ],
)  # fmt: skip
def test_first_option_does_not_take_english_words_for_choices(text, named):
    letters = "ABCDEFGHI"
    found = [one for one in letters if first_option(text, example(one, choices=tuple(letters)))]
    assert found == ([] if named is None else [named])


@pytest.mark.parametrize(
    ("text", "choices", "named"),
    [
        ("It told us that IT is from the US", ("US", "IT"), "IT"),
        ("it may be March", ("May", "March"), "March"),
        ("MAY, not March", ("May", "March"), "May"),
        ("it is may", ("May", "March"), "May"),
        ("Yes, there is no doubt", ("yes", "no"), "yes"),
        ("There is no doubt: Yes", ("Yes", "No"), "Yes"),
        ("NO.", ("yes", "no"), "no"),
        ("die Strasse", ("Straße", "Strasse"), "Strasse"),
        ("us", ("US", "us"), "us"),
        ("New   York", ("new york", "york"), "new york"),
        ("(x+1)", ("x+1", "x"), "x+1"),
    ],
)
def test_first_option_minds_the_capitals_of_choices_as_far_as_the_text_does(text, choices, named):
    assert [one for one in choices if first_option(text, example(one, choices=choices))] == [named]


def test_first_option_prefers_the_longer_of_two_that_begin_alike():
    assert first_option("new york city", example("new york", choices=("new", "new york"))) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2 + 40 = 42", 1), ("42.0", 1), ("the answer is 1,042", 0), ("42 or 43", 0), ("-42", 0), ("none", 0), ("42.", 1)],
)
def test_number_match_reads_the_last_number(text, expected):
    assert number_match(text, example("#### 42")) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3,4", [3, 4]), ("1,234", [1234]), ("1,234,567.5", [1234567.5]), ("12,34", [12, 34]), ("1,2345", [1, 2345]),
        ("1000,200", [1000, 200]), ("3, 4", [3, 4]), ("3,-4", [3, -4]), ("1.5,2.5", [1.5, 2.5]),
        ("5,", [5]), (",5", [5]), ("7,000", [7000]), ("(1,000)", [1000]), ("$1,000.", [1000]), ("1,2,3", [1, 2, 3]),
        ("0.5,123", [0.5, 123]),
        (".5", [0.5]), ("-.5", [-0.5]), ("is .25.", [0.25]), ("wait...5", [5]),
        ("v1.2", [1.2]), ("\u22125", [-5]),
        ("3\u22125", [3, 5]), ("2e3", [2000]), ("1.5E-3", [0.0015]), ("2eggs", [2]), ("3e", [3]), ("10-20", [10, 20]),
    ],
)  # fmt: skip
def test_a_comma_belongs_to_a_number_where_it_separates_thousands(text, expected):
    assert numbers_in(text) == expected


def test_numbers_are_read_with_signs_separators_and_fractions():
    assert numbers_in("5-3, -7 and 1,234.5; x-2 3.") == [5.0, 3.0, -7.0, 1234.5, 2.0, 3.0]
