"""From an example to tokens: prefix, few-shot examples, chat template, and where the answer begins.

Prompt and answer are cut as lm-evaluation-harness cuts them: both are tokenised together, the
answer's tokens are those that come after as many as the prompt has alone, and spaces at the prompt's end go to the
answer.
"""

from __future__ import annotations

from typing import Any

from moe_evo.config.task import TaskConfig
from moe_evo.errors import TaskError
from moe_evo.tasks.chat import ChatFormat
from moe_evo.tasks.data import TaskData
from moe_evo.tasks.examples import Example, Turn

SHOT_SEPARATOR = "\n\n"

Tokens = tuple[int, ...]


def answer_text(example: Example) -> str:
    """The right answer as it is shown after the prompt of a few-shot example."""
    return example.choices[example.label] if example.label is not None else example.answers[0]


class PromptFormat:
    """How one task's prompts look to the model, and the tokens they become.

    shortened: of the inputs that were too long for `max_length`, by `Example.where`, how many tokens each had.
    """

    def __init__(self, config: TaskConfig, data: TaskData, tokenizer: Any) -> None:
        self.config = config
        self.data = data
        self._tokenizer = tokenizer
        limit = getattr(tokenizer, "model_max_length", None) or config.max_length
        self.max_length = min(config.max_length, int(limit))
        self._num_behind = _num_added_behind(tokenizer)
        self._chat = ChatFormat(config, data.name, tokenizer) if config.chat_template else None
        self.shortened: dict[str, int] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user on what the prompts are made of, and on those that were too long so far."""
        thinking = None if self._chat is None else self._chat.note
        return tuple(filter(None, [thinking, self._shortened_note]))

    def prompt(self, example: Example) -> str:
        """The whole text before the answer; raises TaskError for a chat without a chat template, or one it refuses."""
        if self._chat is not None:
            return self._chat.rendered(self._messages(example), example.where) + self.config.answer_prefix
        if example.turns or example.system:
            raise TaskError(
                f"{example.where}: has several turns or a system text, expected a prompt alone, as the task has no "
                "chat_template"
            )
        shots = (shot.prompt + self._answered(shot) + SHOT_SEPARATOR for shot in self.data.few_shot)
        return "".join([self.config.prefix, *shots, example.prompt, self.config.answer_prefix])

    def following_answer(self, example: Example) -> str:
        """The right answer as it follows the prompt: a choice as it is written, others at least a space apart."""
        before, answer = example.prompt + self.config.answer_prefix, answer_text(example)
        apart = example.label is not None or before[-1:].isspace() or answer[:1].isspace()
        return answer if apart else f" {answer}"

    def _answered(self, shot: Example) -> str:
        """What stands behind the prompt of a few-shot example."""
        begins = self.config.answer_prefix
        if self._chat is not None:
            return (begins + self.following_answer(shot) if begins else answer_text(shot)).strip()
        return begins + self.following_answer(shot)

    def _messages(self, example: Example) -> list[dict[str, str]]:
        """The chat: a system's turn where there is one, few-shot examples, what was said before, and the prompt."""
        turns: list[Turn] = []
        for shot in self.data.few_shot:
            turns += [*shot.turns, ("user", shot.prompt), ("assistant", self._answered(shot))]
        turns += [*example.turns, ("user", example.prompt)]
        first = next(place for place, (role, _) in enumerate(turns) if role == "user")
        turns[first] = ("user", self.config.prefix + turns[first][1])
        if system := example.system or self.config.system:
            turns.insert(0, ("system", system))
        return [{"role": role, "content": content} for role, content in turns]

    def prompt_tokens(self, example: Example, reserved_tokens: int = 0) -> Tokens:
        """Tokens of the prompt, cut from the left so that `reserved_tokens` more fit into max_length."""
        return self._shortened(self._encode(self.prompt(example)), reserved_tokens, example)

    def bare_tokens(self, example: Example, reserved_tokens: int = 0) -> Tokens:
        """As `prompt_tokens`, of the prompt without spaces at its end: what `pair_tokens` puts before answers."""
        return self._shortened(self._encode(self.prompt(example).rstrip()), reserved_tokens, example)

    def pair_tokens(self, example: Example, answers: tuple[str, ...]) -> tuple[Tokens, list[Tokens]]:
        """Tokens of the prompt, and of each answer after it; the prompt is the same for all."""
        prompt = self.prompt(example)
        bare = prompt.rstrip()
        spaces = prompt[len(bare) :]
        context = self._encode(bare)
        # where the assistant's turn begins afresh, a space that parts prompt and answer is out of place
        is_fresh = self._chat is not None and not self.config.answer_prefix
        texts = [answer.lstrip() if is_fresh else answer for answer in answers]
        tokens = [self._after(bare, context, spaces + text, example) for text in texts]
        return self._shortened(context, max(map(len, tokens)), example), tokens

    def text_tokens(self, example: Example) -> Tokens:
        """Tokens of a text, cut at the right."""
        tokens = self._encode(example.text)
        if len(tokens) > self.max_length:
            self.shortened[example.where] = len(tokens)
        return tokens[: self.max_length]

    def decode(self, tokens: Any) -> list[str]:
        """The text of each row of tokens."""
        return list(self._tokenizer.batch_decode(tokens, skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """The text of one token, also of a special one."""
        return str(self._tokenizer.decode([token]))

    def _encode(self, text: str) -> Tokens:
        """The tokens of a text that goes on: without those that the tokenizer puts behind every text."""
        adds = self._chat is None  # a chat template writes its own special tokens
        tokens = self._tokenizer(text, add_special_tokens=adds)["input_ids"]
        if adds:
            tokens = tokens[: len(tokens) - self._num_behind]
        bos = self._tokenizer.bos_token_id
        begins_twice = bos is not None and tuple(tokens[:2]) == (bos, bos)  # the text has one of its own
        return tuple(tokens[begins_twice:])

    def _after(self, bare: str, context: Tokens, answer: str, example: Example) -> Tokens:
        tokens = self._encode(bare + answer)[len(context) :]
        if not tokens:
            raise TaskError(
                f"{example.where}: the answer {answer!r} has no tokens of its own, as the tokenizer joins it with the "
                f"prompt's end {bare[-12:]!r}; put a space between them"
            )
        return tokens

    def _shortened(self, context: Tokens, reserved_tokens: int, example: Example) -> Tokens:
        if not context:
            raise TaskError(f"{example.where}: the prompt has no tokens, expected at least 1")
        keep = self.max_length - reserved_tokens
        bos = self._tokenizer.bos_token_id
        begins = context[:1] if bos is not None and context[0] == bos else ()
        if keep < len(begins) + 1:
            raise TaskError(
                f"{example.where}: an answer of {reserved_tokens} tokens leaves no room for the prompt in max_length "
                f"{self.max_length}; raise max_length or shorten the answer"
            )
        if len(context) <= keep:
            return context
        whole = len(context) + reserved_tokens
        self.shortened[example.where] = max(whole, self.shortened.get(example.where, 0))
        return begins + context[len(context) - keep + len(begins) :]

    @property
    def _shortened_note(self) -> str | None:
        number = len(self.shortened)
        if not number:
            return None
        is_text = any(one.text for part in self.data.splits.values() for one in part)
        what, end = ("texts", "end") if is_text else ("prompts with their answers", "beginning")
        of = sum(map(len, self.data.splits.values()))
        limit = "max_length" if self.max_length == self.config.max_length else "what the tokenizer takes"
        return (
            f"task {self.data.name}: {number} of {of} {what} are longer than {self.max_length} tokens ({limit}), and "
            f"lose their {end}; the longest has {max(self.shortened.values()):,}"
        )


def _num_added_behind(tokenizer: Any) -> int:
    """How many special tokens the tokenizer puts behind every text, such as an end or a separator."""
    own, whole = (list(tokenizer("a", add_special_tokens=adds)["input_ids"]) for adds in (False, True))
    places = (place for place in range(len(whole)) if whole[place : place + len(own)] == own)
    place = next(places, len(whole) - len(own))
    return len(whole) - len(own) - place
