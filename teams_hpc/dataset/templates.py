"""From an instruction, its input and its response to tokens.

`alpaca` is the prompt that Alpaca-style fine-tuning of base models uses (two variants, with and
without an input). `chat` is the tokenizer's own chat template. Either way a prompt is tokenised as
it will be when the model is used, and the response ends with the token that ends a turn.

Rows are data: text that looks like a special token (`<s>` is also HTML) never becomes one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from jinja2 import TemplateError

from teams_hpc.errors import WorkError

TemplateName = Literal["alpaca", "chat"]

_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
# Some templates print today's date unless they are given one; equal work must give equal tokens.
_FIXED_DATE = "26 Jul 2024"
_USER, _REPLY = "\ue000\ue001", "\ue002\ue003"


@dataclass(frozen=True, slots=True)
class Row:
    """The texts of one training example."""

    instruction: str
    input: str
    response: str

    @property
    def user_message(self) -> str:
        """Instruction and input as one chat message."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised example.

    Attributes:
        tokens: Prompt, response, end-of-turn token.
        prompt_length: How many of them are the prompt, at least one.
    """

    tokens: list[int]
    prompt_length: int


def alpaca_prompt(instruction: str, input_text: str) -> str:
    """The Alpaca prompt of an instruction, up to where the response begins."""
    # The texts go in last and at once: braces in them mean nothing.
    template = _ALPACA_WITH_INPUT if input_text else _ALPACA
    return template.format(instruction=instruction, input=input_text)


class PromptFormat(Protocol):
    """Turns rows into examples."""

    @property
    def name(self) -> TemplateName: ...

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Tokenise rows, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class AlpacaFormat:
    """The Alpaca prompt, then the response, then `eos`."""

    tokenizer: Any
    name: TemplateName = "alpaca"

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        prompts = [alpaca_prompt(row.instruction, row.input) for row in rows]
        wholes = [prompt + row.response for prompt, row in zip(prompts, rows, strict=True)]
        start, end = _leading_tokens(self.tokenizer), [int(self.tokenizer.eos_token_id)]
        first, joint = (_tokenize(self.tokenizer, texts) for texts in (prompts, wholes))
        replies = [_continuation(*pair) for pair in zip(first, joint, strict=True)]
        straddled = [row.response for row, ids in zip(rows, replies, strict=True) if ids is None]
        alone = iter(_tokenize(self.tokenizer, straddled) if straddled else ())
        return [
            Example(
                start + prompt + (next(alone) if reply is None else reply) + end,
                len(start) + len(prompt),
            )
            for prompt, reply in zip(first, replies, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The tokenizer's chat template, cut after the end of the assistant's turn."""

    tokenizer: Any
    name: TemplateName = "chat"

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        return [self._encode(row) for row in rows]

    def _encode(self, row: Row) -> Example:
        special = _special_tokens(self.tokenizer)
        if any(token in row.user_message or token in row.response for token in special):
            return self._encode_in_pieces(row)
        prompt, reply = self._render(row.user_message, row.response)
        reply, end = self._cut(reply)
        texts = [prompt, prompt + reply, reply]
        first, whole, alone = _tokenize(self.tokenizer, texts, parse_special=True)
        response = _continuation(first, whole)
        return Example(first + (alone if response is None else response) + end, len(first))

    def _encode_in_pieces(self, row: Row) -> Example:
        """Tokenise template and texts apart, so that only the template's special tokens count."""
        prompt, reply = self._render(_USER, _REPLY)
        reply, end = self._cut(reply)
        texts = {_USER: row.user_message.strip(), _REPLY: row.response.strip()}
        first = self._tokenize_around(prompt, _USER, texts[_USER])
        return Example(
            first + self._tokenize_around(reply, _REPLY, texts[_REPLY]) + end, len(first)
        )

    def _tokenize_around(self, rendered: str, placeholder: str, text: str) -> list[int]:
        before, _, after = rendered.partition(placeholder)
        [head], [tail] = (
            _tokenize(self.tokenizer, [part], parse_special=True) for part in (before, after)
        )
        return head + _tokenize(self.tokenizer, [text])[0] + tail

    def _render(self, user: str, reply: str) -> tuple[str, str]:
        """The prompt as it stands before the assistant speaks, and what follows it.

        Raises:
            WorkError: The template fails, or doesn't begin a conversation with its own prompt.
        """
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        try:
            whole = self._apply(messages, add_generation_prompt=False)
            for add_generation_prompt in (True, False):
                prompt = self._apply(messages[:1], add_generation_prompt=add_generation_prompt)
                if prompt and whole.startswith(prompt):
                    return prompt, whole[len(prompt) :]
        except TemplateError as error:
            raise WorkError(f"sft.model: its chat template fails: {error}; {_REMEDY}") from None
        raise WorkError(
            "sft.model: its chat template writes a finished conversation differently from the "
            f"prompt for it, so prompt and response can't be told apart; {_REMEDY}"
        )

    def _apply(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                date_string=_FIXED_DATE,
            )
        )

    def _cut(self, reply: str) -> tuple[str, list[int]]:
        """Drop white space after the end of the turn; add `eos` where nothing ends it."""
        trimmed = reply.rstrip()
        if trimmed.endswith(tuple(_special_tokens(self.tokenizer))):
            return trimmed, []
        return reply, [int(self.tokenizer.eos_token_id)]


_REMEDY = "remove the template from the model's folder to train with the Alpaca prompt"


def choose_format(tokenizer: Any) -> PromptFormat:
    """The tokenizer's chat template where there is one, the Alpaca prompt otherwise."""
    return ChatFormat(tokenizer) if tokenizer.chat_template else AlpacaFormat(tokenizer)


def _tokenize(
    tokenizer: Any, texts: Sequence[str], *, parse_special: bool = False
) -> list[list[int]]:
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=not parse_special,
        return_attention_mask=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _continuation(prompt: list[int], whole: list[int]) -> list[int] | None:
    """The response's tokens as they follow a prompt that was tokenised without it.

    Taken from the joint tokenisation; None if a token there straddles the boundary: then the
    response is tokenised alone.
    """
    return whole[len(prompt) :] if whole[: len(prompt)] == prompt else None


def _leading_tokens(tokenizer: Any) -> list[int]:
    """`[bos]` where the tokenizer puts one before every text by itself, else nothing."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return [int(bos)] if bos is not None and ids[:1] == [bos] else []


def _special_tokens(tokenizer: Any) -> list[str]:
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
