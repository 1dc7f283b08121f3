"""The tokenizer: byte-level BPE, with each fixed part of the suite's prompts as one token.

So a prompt costs its instruction and three or four tokens more. The parts are read off the
prompts themselves; the folder of a model made for other prompts no longer encodes them compactly
(a test looks), and then the model has to be made again.
"""

from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from teams_hpc.rewriting.operations import OPERATIONS, rewrite_request
from teams_hpc.rewriting.reviewer import Pair, verdict_messages

BEGIN, REPLY, END, PAD = "<|begin|>", "<|reply|>", "<|end|>", "<|pad|>"
_FIRST, _SECOND = "\ue000", "\ue001"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|reply|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|reply|>{% endif %}"
)


def fixed_parts() -> list[str]:
    """What all prompts of a sort have in common, in the order of the operations."""
    prompts = [
        rewrite_request(operation, _FIRST, given, request_id="", seed=0).messages[0].content
        for operation in OPERATIONS
        for given in ("", _SECOND)
    ]
    prompts.append(verdict_messages(Pair(before=_FIRST, after=_SECOND))[0].content)
    parts = (part for prompt in prompts for part in prompt.replace(_SECOND, _FIRST).split(_FIRST))
    return list(dict.fromkeys(part for part in parts if part))


def train_tokenizer(texts: Iterable[str], vocab_size: int, longest: int) -> Any:
    """A tokenizer of `vocab_size` tokens whose merges are learnt from `texts`."""
    special, parts = [BEGIN, END, PAD, REPLY], fixed_parts()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(parts),
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(part, normalized=False, special=False) for part in parts])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHAT_TEMPLATE
    return made
