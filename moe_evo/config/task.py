"""The config of a task: where its examples are, and how answers are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_evo.config.check import is_pattern, require, require_name, require_path, require_text
from moe_evo.shown import cut

AUTO, DEFAULT = "auto", "default"
"""Values of `kind` and `metric`: take the kind that the examples' fields fit, and the first metric of the kind.

DEFAULT as `search_metric`: the same as `metric`.
"""

_OF_CHATS = {
    "system": "use prefix for a text before every prompt",
    "chat_template_kwargs": "set chat_template: true",
    "generation_prefix": "use answer_prefix for a text before every answer",
}
"""Options that mean nothing without a chat template, and what to do then."""

SPLITS = ("search", "validation", "test")

HUB = "hf:"
"""What stands before the name or folder of a dataset that the library `datasets` reads."""

FIELDS = ("prompt", "choices", "label", "answers", "text", "messages", "system")
"""What a task reads of a row."""

Column = str | list[str]
"""A column by name, a Jinja template, or several of them that make a list."""

_MOST_TOKENS = 2**30


def is_template(column: str) -> bool:
    """Whether a text is a Jinja template, rather than the name of a column."""
    return "{{" in column or "{%" in column


@dataclass(frozen=True)
class TaskConfig:
    """One task: where its examples are and how answers are scored.

    Args:
        name: Name in results; default: the data's file or folder name.
        kind: 'choice', 'generation', 'perplexity', 'distillation', or 'auto' by the examples' fields; or the kind of
            another package, by its name or as package.module:name.
        data: A file (JSONL, JSON, CSV, TSV, Parquet or Arrow, perhaps packed as .gz or .zst), a folder of them, or the
            name of an embedded task (arith, city, gloss, infl, langid, nli, sarcasm, sentiment, syll). A folder holds
            search.jsonl (or train.jsonl), validation.jsonl and test.jsonl, or the same in another format; a single
            file is split by a hash of the prompt. hf:OWNER/NAME, hf:OWNER/NAME@REVISION or hf:FOLDER is a dataset of
            the library `datasets`.
        subset: A Hugging Face dataset's configuration, such as ARC-Easy.
        splits: Which of the folder's or dataset's splits is taken as which, as in '{search: train, validation: dev,
            test: test}'. Two that take the same one divide it by a hash of the prompt, in their split_shares.
        fields: Which columns are prompt, choices, label, answers, text, messages and system: names, or Jinja templates
            over the row, as in '{prompt: "{{ question }}?", choices: [a, b], label: right}'. Default: the columns that
            are called so.
        metric: What is reported, and chooses the winner: accuracy, accuracy_norm, log_likelihood, probability or
            probability_norm (choice); exact_match, contains, f1, first_option, number_match, rouge_l, sentence_bleu,
            sentence_chrf, log_likelihood, or that of another package, as its name or package.module:name
            (generation); log_likelihood (perplexity); negative_kl (distillation). 'default' is the first of them.
            Several count with weights that add up to 1, as in '0.7 f1 + 0.3 rouge_l'.
        extract: A regular expression: of a generated text, only its last match is compared, or of that its first group.
        search_metric: What the search maximises on the search split: another metric of the same kind, such as
            probability (choice) or log_likelihood (generation), which are smoother. 'default' is the same as metric.
        split_shares: Shares of search, validation and test where one file is split by hash.
        drop_repeated: Leave out examples that stand in two splits, or among the few-shot examples, too: what is in test
            stays there, else what is in validation. By default a task with such examples is refused.
        num_search: Most examples of the search split that are used; 0 means all.
        num_validation: The same for the validation split.
        num_test: The same for the test split.
        system: Text of the system turn; needs chat_template.
        prefix: Text that is put before every prompt.
        few_shot: A file with the same columns as the data, whose examples, with answers, are put before every prompt.
        chat_template: Wrap the prompt as a user's turn with the tokenizer's chat template.
        chat_template_kwargs: Arguments of the chat template, as in '{enable_thinking: false}'.
        generation_prefix: Text behind the chat template's opening of the assistant's turn. Default: what ends or skips
            a block of thinking, where the template opens one or lets the model do so; '' lets the model think.
        answer_prefix: Text before every answer, also of few-shot examples, such as ' Answer:'; the answer that is
            scored or generated begins behind it.
        max_new_tokens: Longest answer that is generated.
        stop: A generated answer ends before this text; default: the end of the line (a model that begins
            its answer with one then answers nothing).
        max_length: Longest prompt with answer, in tokens; longer prompts lose their beginning.
    """

    name: str = ""
    kind: str = AUTO
    data: str = ""
    subset: str = ""
    splits: dict[str, str] = field(default_factory=dict, hash=False)
    fields: dict[str, Column] = field(default_factory=dict, hash=False)
    metric: str = DEFAULT
    extract: str = ""
    search_metric: str = DEFAULT
    split_shares: tuple[float, float, float] = (0.3, 0.2, 0.5)
    drop_repeated: bool = False
    num_search: int = 0
    num_validation: int = 0
    num_test: int = 0
    system: str = ""
    prefix: str = ""
    few_shot: str | None = None
    chat_template: bool = False
    chat_template_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict, hash=False)
    generation_prefix: str | None = None
    answer_prefix: str = ""
    max_new_tokens: int = 32
    stop: str = "\n"
    max_length: int = 2048

    def __post_init__(self) -> None:
        where = f"tasks ({cut(self.name or self.data or 'unnamed', 80)})"
        require(bool(self.data), f"{where}.data", self.data, "a file, a folder or an embedded task")
        require_name(f"{where}.name", self.name)
        for option, path in (("data", self.data), ("few_shot", self.few_shot)):
            require_path(f"{where}.{option}", path)
        for option in ("prefix", "stop", "system", "subset", "generation_prefix", "answer_prefix"):
            require_text(f"{where}.{option}", getattr(self, option) or "")
        require(is_pattern(self.extract), f"{where}.extract", self.extract, "a regular expression")
        for option, allowed in (("splits", SPLITS), ("fields", FIELDS)):
            wrong = [name for name in getattr(self, option) if name not in allowed]
            require(not wrong, f"{where}.{option}", wrong, f"names among {', '.join(allowed)}")
        columns = [
            one for of_field in self.fields.values() for one in ([of_field] if isinstance(of_field, str) else of_field)
        ]
        is_named = all(self.splits.values()) and all(columns) and all(self.fields.values())
        require(is_named, f"{where}.fields", self.fields, "names of columns, or templates, none empty")
        for option, advice in _OF_CHATS.items():
            value = getattr(self, option)
            require(
                not value or self.chat_template, f"{where}.{option}", value, f"none without chat_template; {advice}"
            )
        require(
            not self.subset or self.data.startswith(HUB), f"{where}.subset", self.subset,
            "none, as data is no Hugging Face dataset (hf:OWNER/NAME)",
        )  # fmt: skip
        shares_ok = min(self.split_shares) > 0 and abs(sum(self.split_shares) - 1) < 1e-6
        require(shares_ok, f"{where}.split_shares", self.split_shares, "three positive shares with sum 1")
        for option in ("num_search", "num_validation", "num_test"):
            require(getattr(self, option) >= 0, f"{where}.{option}", getattr(self, option), "0 (all) or more")
        for option, least in (("max_new_tokens", 1), ("max_length", 2)):
            value = getattr(self, option)
            require(least <= value <= _MOST_TOKENS, f"{where}.{option}", value, f"{least} to {_MOST_TOKENS:,}")

    @property
    def sets_search_metric(self) -> bool:
        """Whether the search maximises something else than `metric`."""
        return self.search_metric not in (DEFAULT, self.metric)

    def num_examples(self, split: str) -> int:
        """Most examples of `split` that are used; 0 means all."""
        return int(getattr(self, f"num_{split}"))


def fitness_label(tasks: Sequence[TaskConfig]) -> str:
    """Name of what a search maximises: 'fitness', or as 'fitness (probability)' where a task sets search_metric."""
    if not any(task.sets_search_metric for task in tasks):
        return "fitness"
    metrics = [task.metric if task.search_metric == DEFAULT else task.search_metric for task in tasks]
    return f"fitness ({', '.join(dict.fromkeys(one if one != DEFAULT else 'default metric' for one in metrics))})"
