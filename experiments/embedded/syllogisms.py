"""Categorical syllogisms: their wording, and their validity decided by going through all models.

A form is (quantifier of the first premise, whether its terms a, b are swapped, quantifier of the
second premise, whether its terms b, c are swapped, quantifier of the conclusion about a and c).
"""

import itertools

Form = tuple[int, bool, int, bool, int]

# fmt: off
TERMS = (
    "tigers", "lions", "bees", "dolphins", "elephants", "insects", "birds", "whales", "cats",
    "dogs", "horses", "snakes", "doctors", "teachers", "engineers", "artists", "students",
    "farmers", "lawyers", "parents", "children", "adults", "writers", "chefs", "singers",
    "actors", "athletes", "scientists", "soldiers", "nurses",
)
# fmt: on


def forms(*, valid: bool) -> list[Form]:
    """All valid, or all invalid, forms among the 256."""
    quantifiers, order = range(4), (False, True)
    every = itertools.product(quantifiers, order, quantifiers, order, quantifiers)
    return [form for form in every if is_valid(form) is valid]


def wording(form: Form, a: str, b: str, c: str) -> str:
    """Premises and conclusion about three terms, in words."""
    first, first_swapped, second, second_swapped, conclusion = form
    premises = (
        statement(first, *((b, a) if first_swapped else (a, b))),
        statement(second, *((c, b) if second_swapped else (b, c))),
    )
    return f"{premises[0]}; {premises[1]}. So {statement(conclusion, a, c)}"


def statement(quantifier: int, subject: str, predicate: str) -> str:
    """The categorical statement in words: A, E, I and O of the traditional square."""
    return (
        f"All {subject} are {predicate}",
        f"No {subject} are {predicate}",
        f"Some {subject} are {predicate}",
        f"Some {subject} are not {predicate}",
    )[quantifier]


def is_valid(form: Form) -> bool:
    """Whether the conclusion holds in every model of the premises with no empty term.

    A model is the set of the inhabited regions among the seven of three overlapping terms.
    """
    first, first_swapped, second, second_swapped, conclusion = form
    regions = [r for r in itertools.product((0, 1), repeat=3) if any(r)]
    for inhabited in itertools.product((False, True), repeat=len(regions)):
        model = [r for r, present in zip(regions, inhabited, strict=True) if present]
        if not all(any(r[term] for r in model) for term in range(3)):
            continue
        if not holds(model, first, *((1, 0) if first_swapped else (0, 1))):
            continue
        if not holds(model, second, *((2, 1) if second_swapped else (1, 2))):
            continue
        if not holds(model, conclusion, 0, 2):
            return False
    return True


def holds(model: list[tuple[int, ...]], quantifier: int, subject: int, predicate: int) -> bool:
    """Whether the categorical statement about two terms is true in the model."""
    both = any(r[subject] and r[predicate] for r in model)
    subject_only = any(r[subject] and not r[predicate] for r in model)
    return (not subject_only, not both, both, subject_only)[quantifier]
