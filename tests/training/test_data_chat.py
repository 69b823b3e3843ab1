"""Chats by template: which tokens are the assistant's."""

import click
import pytest

from tests.training.data_target import MARKED, NO_PREFIX, PLAIN, tokenizer
from vllm_griffin.data.chat import ChatTemplate
from vllm_griffin.evaluate.prompts import encode

CHAT = [
    {"role": "system", "content": "be good"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "bye."},
]


def answers(template: str, messages: list[dict[str, str]] = CHAT) -> list[str]:
    """The text of each range of the assistant's tokens."""
    made = tokenizer(template)
    tokens, spans = ChatTemplate(made).document(messages)
    assert tokens == made.apply_chat_template(messages)["input_ids"]
    return ["".join(made.convert_ids_to_tokens(tokens[a:b])) for a, b in spans]


def test_prefix_difference_ends_with_the_end_of_turn() -> None:
    assert answers(PLAIN) == ["hello<|end|>", "bye.<|end|>"]


def test_the_templates_own_mark_is_taken() -> None:
    assert answers(MARKED) == ["hello", "bye."]


def test_without_an_end_of_turn_all_of_the_difference_counts() -> None:
    assert answers(PLAIN.replace("<|end|>", "!")) == ["hello!\n", "bye.!\n"]


def test_turns_that_later_ones_change_are_not_learnt() -> None:
    assert answers(NO_PREFIX) == ["bye.<|end|>"]
    # A single answer is rendered as it is.
    assert answers(NO_PREFIX, CHAT[:3]) == ["hello<|end|>"]
    never = PLAIN.replace("<|bot|>{{", "{{ messages | length }}<|bot|>{{")
    with pytest.raises(ValueError, match="up to turn 5 otherwise"):
        answers(never)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_templates_date_does_not_pass(template: str) -> None:
    """Or a run that goes on tomorrow would know none of today's prompts."""
    dated = "{{ strftime_now('%d %b %Y') }}" + template
    made = tokenizer(dated)
    for tokens in (
        ChatTemplate(made).prompt(CHAT[:2]),
        ChatTemplate(made).document(CHAT)[0],
        encode("hi", made),
    ):
        assert made.decode(tokens).startswith(
            made.decode(made("26 Jul 2024", add_special_tokens=False)["input_ids"])
        )


def test_a_token_across_the_border_is_not_the_assistants() -> None:
    from tokenizers import AddedToken

    made = tokenizer(PLAIN.replace("<|bot|>", "bot:"))
    made.add_tokens([AddedToken(":h", normalized=False)])
    tokens, spans = ChatTemplate(made).document(CHAT[1:3])
    assert [made.convert_ids_to_tokens(tokens[a:b]) for a, b in spans] == [[*"ello", "<|end|>"]]


def test_turns_after_the_last_answer_are_left_out() -> None:
    tokens, spans = ChatTemplate(tokenizer()).document(CHAT[:4])
    assert (tokens, spans) == ChatTemplate(tokenizer()).document(CHAT[:3])


def test_no_answer_and_refused_roles() -> None:
    with pytest.raises(ValueError, match="no answer of an assistant"):
        answers(PLAIN, CHAT[:2])
    with pytest.raises(ValueError, match="no such role"):
        answers(PLAIN, [{"role": "tool", "content": "x"}, *CHAT[1:]])


def test_prompts_and_the_users_turn() -> None:
    made = tokenizer()
    template = ChatTemplate(made)
    assert made.decode(template.prompt(CHAT[:2])).endswith("<|user|>hi<|end|>\n<|bot|>")
    start, ending = template.user_turn()
    assert (made.decode(start), ending) == ("<|user|>", "<|end|>")


def test_no_template_says_what_to_do() -> None:
    with pytest.raises(click.ClickException, match="--chat-template FILE"):
        ChatTemplate(tokenizer(None))
