"""`ChatFormat`: a chat as the tokenizer's template writes it, up to where the assistant's answer begins.

Some templates open a block in which the model thinks, or leave it to the model to open one. A score looks at what comes
first, so that all genomes would score 0, and log-likelihoods of answers would stand in the middle of thoughts. So
unless the config says otherwise the thinking is switched off, or its block is closed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from moe_evo.config.task import TaskConfig
from moe_evo.errors import TaskError
from moe_evo.shown import shown
from moe_evo.tasks.frozen_clock import with_frozen_clock

Messages = Sequence[Mapping[str, str]]

_OPENED = re.compile(r"<(?P<name>think|thinking|thought|reasoning)>(?P<line_end>\n?)\s*$")
_SWITCH = "enable_thinking"  # Qwen 3, GLM 4.5, SmolLM 3 and others
_CHANNEL, _CHANNEL_OPENING = "<|channel|>final<|message|>", "<|start|>assistant"  # gpt-oss' harmony
_QUESTION: Messages = ({"role": "user", "content": "?"},)


class ChatFormat:
    """The chat template of a tokenizer, with its clock standing still, as a task uses it.

    generation_prefix: what stands behind the template's opening of the answer. arguments: of the template.
    note: for the user, where the template would have let the model think; else None. Raises TaskError.
    """

    def __init__(self, config: TaskConfig, task: str, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise TaskError(
                f"task {task}: chat_template: got true, but the model's tokenizer has no chat template; "
                "set chat_template to false or use a model tuned for chat"
            )
        self._tokenizer = tokenizer
        self._template = tokenizer.get_chat_template() if hasattr(tokenizer, "get_chat_template") else ""
        frozen = with_frozen_clock(self._template)
        self._options = {} if frozen == self._template else {"chat_template": frozen}
        self.arguments: dict[str, Any] = dict(config.chat_template_kwargs)
        self._check_arguments(task)
        self.note: str | None = None
        if config.generation_prefix is None:
            self.generation_prefix = self._without_thinking(task)
        else:
            self.generation_prefix = config.generation_prefix

    def rendered(self, messages: Messages, where: str) -> str:
        """The chat up to where the answer begins; raises TaskError, which begins with `where`."""
        return self._written(messages, where, self.arguments) + self.generation_prefix

    def _written(self, messages: Messages, where: str, arguments: Mapping[str, Any]) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True, **self._options, **arguments
                )
            )
        except (TemplateError, ArithmeticError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise TaskError(f"{where}: the chat template refuses it ({reason})") from error

    def _check_arguments(self, task: str) -> None:
        unread = [name for name in self.arguments if not re.search(rf"\b{re.escape(name)}\b", self._template)]
        if unread:
            raise TaskError(
                f"task {task}: chat_template_kwargs: got {shown(unread)}, expected names that the chat template "
                "reads; leave out the others"
            )

    def _without_thinking(self, task: str) -> str:
        """What has to stand behind the template's opening so that the answer comes at once; switches thinking off."""
        opening = self._opening(self.arguments)
        if _SWITCH in self._template and _SWITCH not in self.arguments:
            switched_off = self._opening({**self.arguments, _SWITCH: False})
            if switched_off not in ("", opening):
                self.arguments[_SWITCH] = False
                self._tell(task, f"chat_template_kwargs {_SWITCH}: false")
                opening = switched_off
        prefix = ""
        if opened := _OPENED.search(opening):
            prefix = f"{'' if opened['line_end'] else chr(10)}\n</{opened['name']}>\n\n"
        elif _CHANNEL in self._template and opening.endswith(_CHANNEL_OPENING):
            prefix = _CHANNEL
        if prefix:
            self._tell(task, f"generation_prefix {prefix!r}")
        return prefix

    def _opening(self, arguments: Mapping[str, Any]) -> str:
        """A chat of one question up to its answer; '' where the template refuses it, or these arguments."""
        try:
            return self._written(_QUESTION, "", arguments)
        except TaskError:
            return ""

    def _tell(self, task: str, how: str) -> None:
        self.note = (
            f"task {task}: the chat template lets the model think before it answers, which is left out by {how}; "
            "set it yourself for another way (generation_prefix '' lets the model think)"
        )
