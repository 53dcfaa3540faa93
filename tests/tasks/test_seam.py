"""Where prompt and answer meet, against lm-evaluation-harness' own rule, for every kind of tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tasks as tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moe_evo.config.task import TaskConfig
from moe_evo.errors import TaskError
from moe_evo.tasks.data import read_task
from moe_evo.tasks.examples import Example
from moe_evo.tasks.prompt import PromptFormat

TEXTS = [
    *tiny.CORPUS, "the answer is the answers of the answerer", "an answer: paris", "it is a pity, it is",
    "un-answered: 12 and 30, 1230", "the cats and dogs are answering yes", "no\nyes\n\nno maybe",
]  # fmt: skip
SPECIAL = ["<pad>", "<s>", "</s>"]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: byte-level BPE without a mark in front of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentence_piece_bpe() -> Tokenizer:
    """As Llama 2 and Mixtral: BPE over whole texts, with a word mark in front of every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    """As T5 and ALBERT: the most probable pieces, words marked in front."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<pad>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT: a piece that does not begin a word is another token than the same letters alone."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


TOKENIZERS = {one.__name__: one for one in (byte_level, sentence_piece_bpe, unigram, word_piece)}
ADDED = {
    "nothing": "$A",
    "a beginning": "<s> $A",
    "an end": "$A </s>",
    "both": "<s> $A </s>",
    "separators": "<s> $A <pad>",
}


def wrapped(tokenizer: Tokenizer, template: str, **names: str) -> Any:
    """The tokenizer as transformers has it; template: what is put around every text."""
    special = [(token, number) for number, token in enumerate(SPECIAL)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    known = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **names}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **known)


def encode_pair(tokenizer: Any, template: str, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """As lm-evaluation-harness (`TemplateLM._encode_pair`); what begins every text is put in front."""

    def encode(text: str) -> list[int]:
        return [1] * template.startswith("<s>") + list(tokenizer(text, add_special_tokens=False)["input_ids"])

    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    whole_enc = encode(context + continuation)
    context_enc = encode(context)
    return context_enc, whole_enc[len(context_enc) :]


def format_of(folder: Path, tokenizer: Any, **options: Any) -> PromptFormat:
    rows = [{"prompt": prompt, "choices": ["b c", "d e"], "label": 0} for prompt in ("a cat", "f")]
    data = read_task(TaskConfig(data=tiny.write_splits(folder / "any", rows), **options))
    return PromptFormat(data.config, data, tokenizer)


def example(prompt: str, *choices: str) -> Example:
    return Example("here:1", prompt=prompt, choices=choices, label=0)


@pytest.mark.parametrize("template", ADDED.values(), ids=ADDED)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prompts_and_answers_are_cut_as_the_harness_cuts_them(tmp_path: Path, kind: str, template: str) -> None:
    """Every text is cut at every place."""
    tokenizer = wrapped(TOKENIZERS[kind](), template)
    format = format_of(tmp_path, tokenizer)
    spans = empty = 0
    for text in TEXTS:
        for place in range(1, len(text)):
            prompt, answer = text[:place], text[place:]
            if not prompt.strip() or not answer.strip():
                continue
            context, continuation = encode_pair(tokenizer, template, prompt, answer)
            whole = [1] * template.startswith("<s>") + tokenizer(text, add_special_tokens=False)["input_ids"]
            spans += whole[: len(context)] != context
            if continuation:
                found = format.pair_tokens(example(prompt, answer, "?"), (answer,))
                assert found == (tuple(context), [tuple(continuation)]), (prompt, answer)
            else:
                empty += 1
                with pytest.raises(TaskError, match=r"^here:1: the answer .* has no tokens of its own") as caught:
                    format.pair_tokens(example(prompt, answer, "?"), (answer,))
                assert "\n" not in str(caught.value)
    assert spans > 10 and empty > 0, "the texts are such that tokens span the seam"


def seam_of(kind: str) -> tuple[Any, list[dict[str, Any]]]:
    """A tokenizer, and a row of which one choice joins the prompt's last token and another does not."""
    template = "<s> $A </s>"
    tokenizer = wrapped(TOKENIZERS[kind](), template)
    for text in TEXTS:
        for place in range(1, len(text)):
            prompt, answer = text[:place], text[place:]
            if prompt[-1].isspace() or answer[0].isspace() or len(answer) < 3:
                continue
            context, continuation = encode_pair(tokenizer, template, prompt, answer)
            whole = encode_pair(tokenizer, template, text, " x")[0]
            if continuation and whole[: len(context)] != context:
                return tokenizer, [{"prompt": prompt, "choices": [answer, " paris"], "label": 0}]
    raise AssertionError("no token spans any seam")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_choice_that_joins_the_prompts_end_has_the_likelihood_of_the_whole_texts_tokens(
    tmp_path: Path, kind: str
) -> None:
    model, (tokenizer, rows) = tiny.tiny_llama(), seam_of(kind)
    rows = [*rows, {"prompt": "one two", "choices": [" three", " four"], "label": 0}]
    task = tiny.make_task(tmp_path / "u", rows, tokenizer, metric="log_likelihood")
    expected = [
        tiny.answer_log_likelihood(model, *encode_pair(tokenizer, "<s> $A </s>", row["prompt"], row["choices"][0]))
        for row in rows
    ]
    np.testing.assert_allclose(tiny.run_task(task, model, tokenizer).score, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_beginning_of_a_text_is_never_doubled(tmp_path: Path, kind: str) -> None:
    tokenizer = wrapped(TOKENIZERS[kind](), "<s> $A")
    written = format_of(tmp_path, tokenizer, prefix="<s>").prompt_tokens(example("one two", "a", "b"))
    assert written[:1] == (1,) and written.count(1) == 1
    assert written == format_of(tmp_path, tokenizer).prompt_tokens(example("<s>one two", "a", "b"))
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    chat = format_of(tmp_path, tokenizer, chat_template=True)
    context, (answer,) = chat.pair_tokens(example("one two", "a", "b"), (" three",))
    assert context.count(1) == 1 and context[0] == 1 and 1 not in answer
    assert answer == tuple(tokenizer("<s>one two three", add_special_tokens=False)["input_ids"][len(context) :])


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", ADDED.values(), ids=ADDED)
def test_what_a_tokenizer_puts_behind_every_text_is_no_part_of_prompts_and_texts(
    tmp_path: Path, kind: str, template: str
) -> None:
    tokenizer = wrapped(TOKENIZERS[kind](), template)
    own = (*(1,) * template.startswith("<s>"), *tokenizer("a cat and", add_special_tokens=False)["input_ids"])
    assert format_of(tmp_path, tokenizer).prompt_tokens(example("a cat and", "b", "c")) == own
    data = read_task(TaskConfig(data=tiny.write_splits(tmp_path / "texts", [{"text": "a cat and"}, {"text": "yes"}])))
    assert PromptFormat(data.config, data, tokenizer).text_tokens(data.splits["search"][0]) == own
