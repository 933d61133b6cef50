"""Conversations as chat templates render them: ends, calls of tools, what is left out."""

import json
from dataclasses import replace

import pytest
import torch
from data_files import BOS, EOS, bytewise

from fedalt.data.chat_template import ends_of, turn_end
from fedalt.data.folder import open_data
from fedalt.data.prompts import Template, encode, encode_prompt, masked_example
from fedalt.data.records import Chat, DataError, Turn, parse_record, record_key
from fedalt.data.task import Task
from fedalt.training.batches import collate

CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.reasoning_content and loop.last %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "lookup", "arguments": {"word": "cat"}},
}
TOOL = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}


def chatty(template=CHATML, **names):
    """A tokenizer with the tokens of ChatML, of which only one is known as special."""
    tokenizer = bytewise(bos=True, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = template
    return tokenizer


def user(content="Q", **more):
    return {"role": "user", "content": content, **more}


def assistant(content="A", **more):
    return {"role": "assistant", "content": content, **more}


def shown(tokenizer, *messages, **fields):
    record = parse_record({"messages": list(messages), **fields})
    return masked_example(encode(record, tokenizer, Template(), max_length=500).example, tokenizer)


def test_an_answer_ends_with_the_token_that_ends_a_turn_and_with_no_other():
    tokenizer = chatty()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_end(tokenizer) == end
    assert ends_of(tokenizer) == (EOS, end)
    prompt, answer = shown(tokenizer, user(), assistant())
    assert (prompt, answer) == (
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
        "A<|im_end|>",
    )


@pytest.mark.parametrize(
    ("behind", "wanted"),
    [
        ("<|im_end|>", "A<|im_end|>"),
        ("<|im_end|>\n</s>", "A<|im_end|>"),  # Phi-3 writes a second one at the end of all
        ("</s>", "A</s>"),
        ("\n", "A</s>"),  # none of its own: the end of text
        ("", "A</s>"),
        (";\n### End\n", "A;\n### End</s>"),
    ],
)
def test_what_a_template_writes_behind_an_answer_is_its_end(behind, wanted):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}"
        + behind
        + "{% else %};{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert shown(chatty(template), user(), assistant())[1] == wanted


def test_a_template_that_begins_a_text_is_not_helped():
    tokenizer = chatty(PLAIN)
    record = parse_record({"messages": [user(), assistant()]})
    ids = encode(record, tokenizer, Template(), max_length=500).example.ids
    assert ids.count(BOS) == 1
    asked = encode_prompt(Chat((Turn("user", "Q"),), ""), tokenizer, Template(), max_length=500)
    assert ids[: len(asked)] == asked
    cut = encode(record, tokenizer, Template(), max_length=12).example
    assert (cut.ids[0], len(cut.ids)) == (BOS, 12)


def test_the_ids_are_those_of_transformers_own_rendering():
    tokenizer = chatty()
    messages = [user("How many?"), assistant("Three."), user("And now?"), assistant("Four.")]
    record = parse_record({"messages": messages})
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    ids = encode(record, tokenizer, Template(), max_length=500).example.ids
    assert list(ids) == whole[: len(ids)]
    assert tokenizer.decode(whole[len(ids) :]) == "\n"


@pytest.mark.parametrize(
    "answer",
    [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"name": "lookup", "arguments": '{"word": "cat"}'}]},
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "lookup", "arguments": '{"word": "cat"}'},
        },
    ],
)
def test_a_call_of_a_tool_is_the_answer(answer):
    tokenizer = chatty()
    record = parse_record({"messages": [user(), answer], "tools": [TOOL]})
    example = encode(record, tokenizer, Template(), max_length=500).example
    told = '<tool_call>lookup {"word": "cat"}</tool_call>'
    prompt, answered = masked_example(example, tokenizer)
    assert answered == told + "<|im_end|>"
    assert "lookup" in prompt
    # What a model that writes it has said, for exact match and the like.
    assert example.answer == told
    assert record.answer == '{"name": "lookup", "arguments": {"word": "cat"}}'


def test_a_template_that_wants_arguments_as_json_text_gets_them_so():
    joined = CHATML.replace("c.function.arguments | tojson", "'' + c.function.arguments")
    answer = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert shown(chatty(joined), user(), answer) == shown(chatty(), user(), answer)


def test_calls_results_and_tools_before_the_answer_are_rendered():
    turns = [
        user(),
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
        {"role": "function", "name": "lookup", "content": "3 cats"},
        assistant("Three."),
    ]
    prompt, answer = shown(chatty(), *turns, functions=[TOOL["function"]])
    assert '"name": "lookup"' in prompt
    assert 'Let me see.<tool_call>lookup {"word": "cat"}' in prompt
    assert "<|im_start|>tool\n3 cats" in prompt
    assert answer == "Three.<|im_end|>"
    keys = {record_key(parse_record({"messages": [*turns[:at], assistant()]})) for at in (1, 2, 3)}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("messages", "fields", "place"),
    [
        ([user(), {"role": "assistant", "tool_calls": [CALL]}], {}, "messages[1].tool_calls[0]"),
        ([user(), assistant(tool_calls=[CALL])], {}, "messages[1].tool_calls[0]"),
        ([user(), assistant(reasoning_content="hm")], {}, "messages[1].reasoning_content"),
        ([user(name="Eve"), assistant()], {}, "messages[0].name"),
        ([user(), assistant()], {"tools": [TOOL]}, "tools[0]"),
        (
            [
                user(),
                assistant("", tool_calls=[CALL]),
                {"role": "tool", "content": "3"},
                assistant(),
            ],
            {},
            "messages[1].tool_calls[0]",
        ),
    ],
)
def test_what_a_template_would_leave_out_is_refused(messages, fields, place):
    with pytest.raises(DataError) as caught:
        shown(chatty(PLAIN), *messages, **fields)
    assert f"leaves out field '{place}" in str(caught.value)


def test_a_role_that_a_template_skips_is_refused():
    template = "{% for m in messages if m.role in ('user', 'assistant') %}" + CHATML.partition(
        "{% for m in messages %}"
    )[2].replace("{% endfor %}{% if add", "{% endfor %}{% if add")
    with pytest.raises(DataError, match=r"leaves out field 'messages\[0\].content'"):
        shown(chatty(template), {"role": "system", "content": "S"}, user(), assistant())
    assert shown(chatty(template), user(), assistant())[1] == "A<|im_end|>"


def test_thoughts_before_an_answer_are_trained_where_the_template_writes_them():
    tokenizer = chatty()
    earlier = [user(), assistant("A", reasoning_content="old"), user("R")]
    prompt, answer = shown(tokenizer, *earlier, assistant("B", reasoning_content="hm"))
    assert answer == "<think>hm</think>B<|im_end|>"
    assert "old" not in prompt  # as the template wants it: only the last ones count
    record = parse_record({"messages": [*earlier, assistant("B", reasoning_content="hm")]})
    assert encode(record, tokenizer, Template(), max_length=500).example.answer == (
        "<think>hm</think>B"
    )


def test_a_template_that_asks_otherwise_than_it_goes_on_is_refused():
    template = PLAIN.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    with pytest.raises(DataError, match="does not continue its own prompt") as caught:
        shown(chatty(template), user(), assistant())
    assert "'<think>\\n'" in str(caught.value)
    assert "'A<|im_end|>\\n'" in str(caught.value)


def test_parts_of_text_are_one_text_and_other_parts_are_refused():
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "R"}]
    assert shown(chatty(), user(parts), assistant()) == shown(chatty(), user("QR"), assistant())
    image = [{"type": "text", "text": "Q"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(DataError, match=r"messages\[0\]'.content\[1\]: .* of type 'image_url'"):
        shown(chatty(), user(image), assistant())


@pytest.mark.parametrize(
    ("messages", "fields", "wanted"),
    [
        ([user(), user()], {}, "the last role is 'user'; expected 'assistant'"),
        ([user(), assistant(None)], {}, "field 'messages[1]'.content: expected text, got null"),
        ([user(tool_calls=[CALL]), assistant()], {}, "only 'assistant' does"),
        ([user(), assistant(tool_calls="lookup")], {}, "tool_calls: expected a list of calls"),
        ([user(), assistant(tool_calls=[{}])], {}, "a function with a name and arguments"),
        (
            [user(), assistant(function_call={"name": "f", "arguments": "{"})],
            {},
            "its arguments are no valid JSON",
        ),
        (
            [user(), assistant(function_call={"name": "f", "arguments": "[" * 100_000})],
            {},
            "its arguments are no valid JSON",
        ),
        (
            [user(), assistant(function_call={"name": "f", "arguments": '{"x": 1, "x": 2}'})],
            {},
            "in its arguments the key 'x' is given twice in one object",
        ),
        (
            [user(), assistant(function_call={"name": "f", "arguments": "[1]"})],
            {},
            "expected an object as arguments, got a list of 1",
        ),
        (
            [user(), assistant(function_call={"name": "f"}, tool_calls=[CALL])],
            {},
            "both 'tool_calls' and 'function_call'",
        ),
        ([user(), assistant()], {"tools": "[" * 100_000}, "field 'tools': expected a list"),
        ([user(), assistant()], {"tools": '[{"x": 1, "x": 2}]'}, "the key 'x' is given twice"),
        ([user(), assistant()], {"tools": "lookup"}, "field 'tools': expected a list of tools"),
        ([user(), assistant()], {"tools": ["lookup"]}, "field 'tools': expected a list of tools"),
        ([{"role": "critic", "content": "c"}, assistant()], {}, "role 'critic' is none of system"),
        ([user(name="\ud800"), assistant()], {}, "half of a surrogate pair"),
    ],
)
def test_a_conversation_that_nothing_could_read_is_named(messages, fields, wanted):
    with pytest.raises(DataError) as caught:
        parse_record({"messages": messages, **fields})
    assert wanted in str(caught.value)


def test_nulls_and_empty_lists_are_nothing():
    bare = parse_record({"messages": [user(), assistant()]})
    api = {"tool_calls": None, "function_call": None, "name": "", "annotations": []}
    assert parse_record({"messages": [user(), assistant(**api)], "tools": []}) == bare
    assert bare == Chat((Turn("user", "Q"),), "A")
    assert json.loads(
        json.dumps(
            vars(
                parse_record(
                    {
                        "messages": [user(), assistant(tool_calls=[CALL])],
                        "tools": json.dumps([TOOL]),
                    }
                )
            )
        )
    )["whole"]


def test_the_day_that_a_template_tells_is_always_the_same():
    day = (
        "{% if date_string is not defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now( '%d %b %Y') %}{% endif %}{% endif %}"
        '{{ date_string }}, {{ strftime_now("%Y-%m-%d") }}|'
    )
    dated = chatty(day + CHATML)
    prompt, _ = shown(dated, user(), assistant())
    assert prompt.startswith("26 Jul 2024, 2024-07-26|")
    asked = encode_prompt(Chat((Turn("user", "Q"),), ""), dated, Template(), max_length=500)
    assert dated.decode(asked) == prompt
    with pytest.raises(DataError, match="tells what day it is, in a form that is not written out"):
        shown(chatty("{% set f = '%Y' %}{{ strftime_now(f) }}" + CHATML), user(), assistant())


def test_options_of_a_conversation_end_as_its_answer_does():
    tokenizer = chatty()
    record = parse_record({"messages": [user(), assistant("yes")], "options": ["no", "yes"]})
    example = encode(record, tokenizer, Template(), max_length=500).example
    assert example.options == ("no", "yes")
    assert [tokenizer.decode(ids) for ids in example.option_ids] == [
        "no<|im_end|>",
        "yes<|im_end|>",
    ]
    assert example.option_ids[1] == example.ids[example.answer_start :]


def test_a_conversation_needs_no_end_of_text_where_the_template_has_an_end():
    assert shown(chatty(eos_token=None), user(), assistant())[1] == "A<|im_end|>"
    with pytest.raises(DataError, match="has a token that ends an answer"):
        shown(
            chatty("{% for m in messages %}{{ m.content }}{% endfor %}", eos_token=None),
            user(),
            assistant(),
        )


def trained(tokenizer, *messages, max_length=500):
    """The example with all answers, and the stretches of its text that the loss is on."""
    record = parse_record({"messages": list(messages)})
    options = {"max_length": max_length, "all_answers": True}
    example = encode(record, tokenizer, Template(), **options).example
    batch = collate([[example]], 0, torch.device("cpu"))
    assert batch.targets.tolist() == [example.ids[at + 1] for at in batch.predicting.tolist()]
    texts, before = [], None
    for at in (batch.predicting + 1).tolist():
        texts += [""] if at - 1 != before else []
        texts[-1] += tokenizer.decode([example.ids[at]])
        before = at
    return example, texts


TURNS = (
    {"role": "system", "content": "S"},
    user("Q1"),
    assistant("AB"),
    user("Q2"),
    assistant("CD"),
    user("Q3"),
    assistant("E"),
)


def test_all_answers_of_a_conversation_are_trained_each_with_its_end():
    tokenizer = chatty()
    example, texts = trained(tokenizer, *TURNS)
    assert texts == ["AB<|im_end|>", "CD<|im_end|>", "E<|im_end|>"]
    assert len(example.earlier) == 6  # a byte is a token
    whole = encode(parse_record({"messages": list(TURNS)}), tokenizer, Template(), max_length=500)
    assert replace(example, earlier=()) == whole.example
    assert trained(tokenizer, user(), assistant())[0].earlier == ()
    begun = trained(chatty(PLAIN), *TURNS)
    assert (begun[0].ids[0], begun[1]) == (BOS, texts)


def test_an_answer_whose_template_ends_only_the_last_has_no_end_before():
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert trained(chatty(template), *TURNS)[1] == ["AB;", "CD;", "E;</s>"]


def test_what_a_prompt_loses_is_not_trained():
    example, texts = trained(chatty(), *TURNS, max_length=44)
    assert len(example.ids) == 44
    assert texts[-1] == "E<|im_end|>"
    assert all(0 < at < example.answer_start for at in example.earlier)


def test_an_earlier_answer_that_a_template_writes_otherwise_cannot_be_trained():
    last_question = (
        "{% set seen = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set seen.last = loop.index %}{% endif %}{% endfor %}"
    )
    behind = "{{ '-' if m.role == 'assistant' and loop.index > seen.last else '' }}{{ m.content }}"
    forgetful = chatty(last_question + CHATML.replace("{{ m.content }}", behind))
    record = parse_record({"messages": list(TURNS)})
    assert encode(record, forgetful, Template(), max_length=500)
    with pytest.raises(DataError, match=r"once the conversation goes on.*--train-on last"):
        encode(record, forgetful, Template(), max_length=500, all_answers=True)


def test_training_takes_all_answers_and_scoring_the_last_alone(tmp_path):
    lines = [
        json.dumps({"messages": [user(), assistant(), user(), assistant(f"{n}")]}) for n in (1, 2)
    ]
    for split in ("train", "test"):
        (tmp_path / f"a.{split}.jsonl").write_text("\n".join(lines))
    task = Task(folder=open_data(tmp_path), tokenizer=chatty(), all_answers=True)
    assert [len(example.earlier) for example in task.examples("a", "train")] == [2, 2]
    assert [len(example.earlier) for example in task.examples("a", "test")] == [0, 0]
