"""Chat templates that fail, for one chat or for all: the message names the template and the record."""

from __future__ import annotations

from typing import Any

import pytest
from support.small import byte_tokenizer

from recondense.config.schema import from_dict
from recondense.config.stages import require_stages
from recondense.data.corpus import Corpora
from recondense.data.examples import make_examples
from recondense.data.instruction_records import Record, read_record
from recondense.data.prompts import RefusedChat, check_template, mark_answers, render_documents
from recondense.data.texts import Texts, Tokenizing
from recondense.errors import UserError

PLAIN = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# What fails for chats with the word BAD, and what the message says.
FAILURES = {
    "raise_exception": ("{{ raise_exception('no BAD words') }}", "no BAD words"),
    "undefined variable": ("{{ messages[0].nothing.at_all }}", "nothing"),
    "undefined function": ("{{ strftime_later('%d') }}", "strftime_later"),
    "wrong types": ("{{ 'a' + 1 }}", "can only concatenate str"),
    "no number": ("{{ 1 / 0 }}", "division by zero"),
    "out of range": ("{{ 'abc'.index('z') }}", "substring not found"),
    "unsafe": ("{{ messages.__class__.__mro__ }}", ""),
}


def tokenizer_with(template: Any, name: str = "some/model") -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.name_or_path = name
    return tokenizer


def failing(kind: str) -> Any:
    failure, _ = FAILURES[kind]
    return tokenizer_with("{% if 'BAD' in messages[0]['content'] %}" + failure + "{% endif %}" + PLAIN)


def chat(question: str, number: int = 1) -> Record:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "An answer."}]
    return read_record({"messages": messages}, "chat", f"chats.jsonl, line {number}")


@pytest.mark.parametrize("kind", FAILURES)
def test_a_chat_that_the_template_fails_on_is_left_out_and_counted(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, (_, reason) = failing(kind), FAILURES[kind]
    records = [chat("Good?"), chat("BAD?", 2), chat("Fine?", 3), chat("BAD!", 4)]
    with pytest.raises(RefusedChat) as caught:
        mark_answers(records[1], tokenizer)
    assert str(caught.value).startswith("chats.jsonl, line 2: the chat template of some/model says: ")
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    with caplog.at_level("INFO", logger="recondense"):
        texts = render_documents(records, tokenizer, "the calibration texts")
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "the calibration texts: 2 of 4 are left out: the chat template rejects the chat (chats.jsonl, "
    )
    assert texts == render_documents([records[0], records[2]], tokenizer)
    examples = make_examples(records, tokenizer, 100)
    assert (len(examples.kept), examples.left_out) == (2, 2)


@pytest.mark.parametrize("kind", FAILURES)
def test_a_template_that_fails_on_all_chats_is_one_sentence(kind: str) -> None:
    expected = (
        r"^the validation texts: .* rejects all of 2 chats \(chats.jsonl, line 1: the chat template of some/model"
    )
    with pytest.raises(UserError, match=expected) as caught:
        render_documents([chat("BAD?"), chat("BAD!", 2)], failing(kind), "the validation texts")
    assert "\n" not in str(caught.value) and "model.tokenizer" in str(caught.value)
    with pytest.raises(UserError, match="the chat template of some/model"):
        make_examples([chat("BAD?"), chat("BAD!", 2)], failing(kind), 100)


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m.content }}", "{{ messages[0 }}", "{% endif %}", "{{ 'a' | no_filter }}"]
)
@pytest.mark.parametrize("marked", ["", "{% generation %}{% endgeneration %}"])
def test_a_template_that_cannot_be_read_is_one_sentence(template: str, marked: str) -> None:
    tokenizer = tokenizer_with(marked + template)
    for make in (
        lambda: render_documents([chat("Good?")], tokenizer),
        lambda: make_examples([chat("a")], tokenizer, 9),
    ):
        with pytest.raises(UserError, match=r"the chat template of some/model (cannot be read \(line 1: |says: )"):
            make()


def test_templates_without_a_default_one() -> None:
    with pytest.raises(UserError, match="the chat template of some/model says: "):
        render_documents([chat("Good?")], tokenizer_with({"rag": PLAIN, "tools": PLAIN}))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
        "{{ messages[0]['content'] }}",
        "",
    ],
)
def test_a_template_that_leaves_out_the_answers_is_named(template: str) -> None:
    with pytest.raises(UserError, match="line 1: it leaves out the assistant's messages"):
        make_examples([chat("Good?")], tokenizer_with(template), 100)


def _template(user: str = "m.content", answer: str = "m.content", system: str = "m.content") -> str:
    cases = f"{{% if m.role == 'user' %}}{{{{ {user} }}}}{{% elif m.role == 'system' %}}{{{{ {system} }}}}{{% else %}}"
    return f"{{% for m in messages %}}<{{{{ m.role }}}}>{cases}{{{{ {answer} }}}}{{% endif %}};{{% endfor %}}"


def _told(*answers: str, system: str = "Be kind.") -> Record:
    messages = [{"role": "system", "content": system}]
    for number, content in enumerate(answers):
        messages += [
            {"role": "user", "content": f" A question,\nnumber {number}? "},
            {"role": "assistant", "content": content},
        ]
    return read_record({"messages": messages}, "chat", "chats.jsonl, line 1")


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        (_template(user="m.text"), "user"),
        (_template(user="''"), "user"),
        (_template(user="m.content if loop.last or loop.index < 3 else ''"), "user"),
        (_template(answer="m.text"), "assistant"),
        (_template(user="m.text", answer="m.text"), "assistant and the user"),
        (_template(answer="''").replace("{{ '' }}", "{% generation %}<end>{% endgeneration %}"), "assistant"),
    ],
)
def test_a_template_that_leaves_out_what_was_said_is_named(template: str, roles: str) -> None:
    records = [_told("One.", "Two.")] * 3
    message = f"^chats.jsonl, line 1: the chat template of some/model leaves out the messages of the {roles}; mend it"
    for make in (
        lambda: render_documents(records, tokenizer_with(template)),
        lambda: make_examples(records, tokenizer_with(template), 500),
    ):
        with pytest.raises(UserError, match=message):
            make()


@pytest.mark.parametrize(
    ("template", "warns"),
    [
        (_template(), False),
        (_template(user="m.content | trim", answer="m.content | trim"), False),
        (_template(user="m.content.split() | join(' ')"), False),
        (_template(answer="m.content.split('</think>')[-1]"), False),
        (_template(answer="m.content if loop.last else m.content.split('</think>')[-1]"), False),
        (_template(answer="m.content | replace('</think>', '\n</think>\n\n')"), False),
        (_template(system="''"), True),
    ],
)
def test_what_templates_may_change(template: str, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    """White space, reasoning, and system messages, which a line names once."""
    records = [_told("<think>One, at some length.</think>One.", "<think>Two, or more than that.</think>Two.")] * 20
    with caplog.at_level("WARNING", logger="recondense"):
        for _ in range(2):
            assert len(render_documents(records, tokenizer_with(template))) == 20
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["the chat template of some/model leaves out system messages"] * warns


@pytest.mark.parametrize(
    ("template", "odd"),
    [
        (_template(answer="m.content.split('</think>')[-1]"), {"answer": "<think>Cut off.</think>"}),
        (_template(user="m.content | replace('/no_think', '')"), {"question": "What is 2 + 2? /no_think"}),
        (_template(user="m.content | tojson"), {"question": 'Who said "I came" first?'}),
    ],
)
@pytest.mark.parametrize("all_of_them", [False, True])
def test_one_odd_chat_is_no_fault_of_the_template(template: str, odd: dict[str, str], all_of_them: bool) -> None:
    chats = [{"question": "A question?", "answer": "An answer."}] * 7
    chats = [{**chat, **odd} for chat in chats] if all_of_them else [*chats, {**chats[0], **odd}]
    records = [
        read_record(
            {"messages": [{"role": "user", "content": c["question"]}, {"role": "assistant", "content": c["answer"]}]},
            "chat",
        )
        for c in chats
    ]
    if all_of_them and "answer" in odd:  # nothing is there to learn from
        with pytest.raises(UserError, match="leaves out the messages of the assistant"):
            check_template(records, tokenizer_with(template))
    else:
        check_template(records, tokenizer_with(template))


def test_empty_messages_are_not_left_out() -> None:
    turns = [("user", ""), ("assistant", ""), ("user", "Again?"), ("assistant", "Yes.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    record = read_record({"messages": messages}, "chat")
    assert render_documents([record], tokenizer_with(_template()))[0].count("Again?") == 1


def test_only_some_chats_are_rendered_to_check_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, calls = tokenizer_with(_template()), []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: calls.append(1) or render(*a, **k))
    check_template([_told("One.")] * 1000, tokenizer)
    assert len(calls) < 40


def test_answers_that_cannot_be_located_matter_only_in_training() -> None:
    """The text is known, so a calibration set can be made of it."""
    last_only = (
        "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] + ';' }}{% endif %}"
        "{% endfor %}"
    )
    turns = [("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    record = read_record({"messages": messages}, "chat", "chats.jsonl, line 7")
    tokenizer = tokenizer_with(last_only)
    assert render_documents([record], tokenizer) == ["One?;Three?;Four.;<|endoftext|>"]
    with pytest.raises(UserError, match=r"^chats.jsonl, line 7: the tokenizer's chat template changes earlier turns"):
        make_examples([record], tokenizer, 100)
    unmarked = tokenizer_with(PLAIN + "{% if false %}{% generation %}{% endgeneration %}{% endif %}")
    assert render_documents([record], unmarked)[0].startswith("<user>One?")
    with pytest.raises(UserError, match="does not mark the assistant's messages"):
        make_examples([record], unmarked, 100)


def test_a_run_goes_on_without_the_chats_that_its_template_refuses() -> None:
    records: list[str] = [chat("Good?"), chat("BAD?"), *(chat(f"Good {number}?") for number in range(40))]
    config = from_dict(
        {
            "data": {"sequence_length": 64, "calibration": {"num_samples": 3, "max_length": 16}},
            "evaluation": {"perplexity_windows": None},
            "recovery": {"objective": "finetune"},
        }
    )
    texts = Texts(Corpora(train=records, validation=records, calibration=records))
    tokens = Tokenizing(texts, failing("raise_exception")).tokens(config, require_stages(config))
    assert tokens.calibration is not None and len(tokens.calibration) == 2  # of the first three
    assert tokens.validation is not None and tokens.stages["recovery"].counts["left_out"] == 1
