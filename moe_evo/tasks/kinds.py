"""The kinds of task: what a row of their data holds, what may count as the score, and what makes scores.

No torch here, so that all data are checked before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from moe_evo.config.task import DEFAULT
from moe_evo.errors import ConfigError
from moe_evo.plugins import Registry
from moe_evo.tasks.answer_metrics import ANSWER_METRICS, BESIDE
from moe_evo.tasks.examples import Example, parse_answers, parse_choice, parse_input, parse_text
from moe_evo.tasks.overlap_metrics import SentenceScore
from moe_evo.tasks.weighted_metric import canonical, checked_parts, parts_of

SHARE = "a share from 0 to 1"
NATS = "in nats"


ScorerMaker = str | Callable[[Any], Any]
"""Makes a `Scorer` of a `PromptFormat`: a function, or its name as 'package.module:name'."""


@dataclass(frozen=True)
class Kind:
    """One kind of task.

    metrics: what may count as the score, each with its unit; the first is the default. Fitness over several tasks is a
    mean, so that their metrics must have one unit. parse: from a row of JSON, a metric and `file:line` to an
    `Example`; raises TaskError. scorer: makes a `Scorer` of a `PromptFormat`; as 'package.module:name' it is imported
    when a model is about to be scored, and not for checking data. scorers: of the metrics that another scorer computes,
    by metric. compares_answers: generated texts are compared, so that any of `ANSWER_METRICS` may count, too.

    >>> from moe_evo.tasks.examples import parse_text
    >>> kind = Kind({"negative_length": "tokens"}, parse_text, scorer="my_package.lengths:LengthScorer")
    >>> KINDS.register("length")(kind).metrics
    {'negative_length': 'tokens'}
    >>> KINDS["length"].parse({"text": "one two"}, "negative_length", "data.jsonl:1").text
    'one two'
    """

    metrics: Mapping[str, str]
    parse: Callable[[Any, str, str], Example]
    scorer: ScorerMaker
    compares_answers: bool = False
    scorers: Mapping[str, ScorerMaker] = field(default_factory=dict)

    def metric(self, name: str, option: str, kind: str) -> str:
        """The metric of this name, or several with weights, checked; raises ConfigError.

        option, kind: for the complaint.
        """
        parts = checked_parts(name, option)
        for _, part in parts:
            self._check(part, option, kind)
        makers = {self.scorers.get(part, self.scorer) for _, part in parts}
        if len({self.unit(part) for _, part in parts}) > 1 or len(makers) > 1:
            raise ConfigError(f"{option}: got {name!r}, expected metrics of one unit, which are computed together")
        return canonical(name)

    def _check(self, name: str, option: str, kind: str) -> None:
        if name in self.metrics:
            return
        if not self.compares_answers:
            allowed = ", ".join(self.metrics)
            raise ConfigError(f"{option}: got {name!r}, expected {allowed} or {DEFAULT} for a task of kind {kind}")
        metric = ANSWER_METRICS.get(name, option, [DEFAULT, *self.metrics])
        if isinstance(metric, SentenceScore):
            metric.require(option)

    def unit(self, metric: str) -> str:
        """Of a score; answers are compared from 0 to 1."""
        return self.metrics.get(parts_of(metric)[0][1], SHARE)

    def build_scorers(self, metrics: Iterable[str], format: Any) -> dict[str, Any]:
        """The `Scorer` of each metric, for a `PromptFormat`; one for all metrics that it computes."""
        makers = {metric: self.scorers.get(parts_of(metric)[0][1], self.scorer) for metric in metrics}
        made = {maker: _scorer(maker, format) for maker in dict.fromkeys(makers.values())}
        return {metric: made[maker] for metric, maker in makers.items()}


def _scorer(maker: ScorerMaker, format: Any) -> Any:
    if not isinstance(maker, str):
        return maker(format)
    module, _, name = maker.partition(":")
    return getattr(import_module(module), name)(format)


KINDS: Registry[Kind] = Registry(
    "kind of task",
    ["moe_evo.tasks"],
    {
        "choice": Kind(
            {
                "accuracy": SHARE,
                "accuracy_norm": SHARE,
                "log_likelihood": NATS,
                "probability": SHARE,
                "probability_norm": SHARE,
            },
            parse_choice,
            "moe_evo.tasks.choice:ChoiceScorer",
        ),
        "generation": Kind(
            dict.fromkeys(BESIDE, SHARE) | {"log_likelihood": NATS},
            parse_answers,
            "moe_evo.tasks.generation:GenerationScorer",
            compares_answers=True,
            scorers={"log_likelihood": "moe_evo.tasks.answer_likelihood:AnswerLikelihoodScorer"},
        ),
        "perplexity": Kind({"log_likelihood": NATS}, parse_text, "moe_evo.tasks.perplexity:PerplexityScorer"),
        "distillation": Kind({"negative_kl": NATS}, parse_input, "moe_evo.tasks.distillation:DistillationScorer"),
    },
    lambda thing: None if isinstance(thing, Kind) else f"got {thing!r}, expected a moe_evo.tasks.kinds.Kind",
)
