"""A target for chats: the small model with a tokenizer of letters, and chat templates for it."""

import shutil
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|end|>", "<|user|>", "<|bot|>", "<|system|>", "<unk>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz .:!?\nAB0123456789"

# The end of a turn is no EOS, and is followed by what is never generated.
PLAIN = """{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}<|end|>
{% elif m['role'] == 'system' %}<|system|>{{ m['content'] }}<|end|>
{% elif m['role'] == 'assistant' %}<|bot|>{{ m['content'] }}<|end|>
{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|bot|>{% endif %}"""

# The same, with the assistant's tokens marked, without the end of the turn.
MARKED = PLAIN.replace(
    "<|bot|>{{ m['content'] }}<|end|>\n",
    "<|bot|>{% generation %}{{ m['content'] }}{% endgeneration %}<|end|>\n",
)

# An earlier answer is shortened when another follows, as some templates do with reasoning.
NO_PREFIX = PLAIN.replace(
    "<|bot|>{{ m['content'] }}",
    "<|bot|>{{ m['content'] if loop.last else 'x' }}",
)


def tokenizer(template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    """One token a letter."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[2:6],
    )
    made.chat_template = template
    return made


def chat_target(small_target: Path, folder: Path, template: str | None = PLAIN) -> Path:
    """A copy of the small target with this tokenizer."""
    shutil.copytree(small_target, folder)
    tokenizer(template).save_pretrained(folder)
    return folder
