"""From chat messages to the tokens of a local model.

A tokenizer without a chat template (base models) gets a plain format: the messages one after the
other, then "Answer:".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teams_hpc.errors import EngineError
from teams_hpc.llm.base import Completion, Message, ScoreRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatText:
    """How one model's prompts are written.

    Attributes:
        tokenizer: Of the model's folder.
        stop_ids: Tokens that end a reply; at least one.
        longest: Most tokens of a prompt with its reply.
        model: The folder, for messages.
    """

    tokenizer: Any
    stop_ids: frozenset[int]
    longest: int
    model: Path

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt, ready for the assistant's reply."""
        return self._tokens(self._text(messages))

    def plain(self, text: str) -> list[int]:
        """A text by itself, no chat around it."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def encode_options(
        self, request: ScoreRequest, longest: int | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """What all options share, and the rest of each, end of turn included.

        Prompt and option are tokenised together, since tokens may merge where they meet.

        Raises:
            EngineError: A prompt is too long for the model.
        """
        most = longest or self.longest
        prompt = self._text(request.messages)
        separator = "" if self._has_template else " "
        eos: int | None = self.tokenizer.eos_token_id
        end = [min(self.stop_ids) if eos is None else eos]
        whole = [self._tokens(prompt + separator + option) + end for option in request.options]
        shared = min(len(self._tokens(prompt)), *(len(ids) - 1 for ids in whole))
        while any(ids[:shared] != whole[0][:shared] for ids in whole):
            shared -= 1
        length = max(len(ids) for ids in whole)
        if length > most:
            raise EngineError(
                f"a prompt to be judged has {length} tokens, more than the {most} positions of "
                f"{self.model}; use a reviewer with a longer context"
            )
        return whole[0][:shared], [ids[shared:] for ids in whole]

    def completion(self, request_id: str, num_prompt: int, tokens: Sequence[int]) -> Completion:
        """The reply whose tokens these are, the end of turn included if it was reached."""
        is_stopped = bool(tokens) and tokens[-1] in self.stop_ids
        kept = tokens[:-1] if is_stopped else tokens
        return Completion(
            id=request_id,
            text=self.tokenizer.decode(kept, skip_special_tokens=True),
            finish_reason="stop" if is_stopped else "length",
            prompt_tokens=num_prompt,
            completion_tokens=len(tokens),
        )

    def too_long(self, request_id: str, num_prompt: int) -> Completion:
        """The answer to a prompt that leaves no place for a reply."""
        return Completion(
            id=request_id,
            text="",
            finish_reason="error",
            prompt_tokens=num_prompt,
            completion_tokens=0,
            error=f"the prompt has {num_prompt} tokens, the model {self.longest} positions",
        )

    @property
    def _has_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    def _text(self, messages: Sequence[Message]) -> str:
        if not self._has_template:
            return "\n\n".join([*(message.content for message in messages), "Answer:"])
        turns = [{"role": message.role, "content": message.content} for message in messages]
        text: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return text

    def _tokens(self, text: str) -> list[int]:
        # A chat template writes its own special tokens; elsewhere the tokenizer adds them.
        add_special = not self._has_template
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special)["input_ids"]
        if add_special and ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        return ids
