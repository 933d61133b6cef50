import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalt.data.records import (
    Chat,
    Completion,
    DataError,
    Instruction,
    LabeledText,
    Turn,
    listed_options,
    parse_record,
    question_key,
    record_key,
)


def test_the_four_forms_are_told_apart_by_their_fields():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert parse_record({"instruction": "i", "output": "o"}) == Instruction("i", "", "o")
    assert parse_record({"prompt": "p", "completion": "c"}) == Completion("p", "c")
    assert parse_record({"messages": turns}) == Chat((Turn("user", "hi"),), "yo")
    assert parse_record({"text": "t", "label": "x"}) == LabeledText("t", None, "x")
    pair = {"sentence1": "s", "sentence2": "u", "label": 3}
    assert parse_record(pair) == LabeledText("s", "u", "3")
    assert parse_record({**pair, "sentence2": None}) == LabeledText("s", None, "3")
    assert parse_record({**pair, "sentence2": ""}) == LabeledText("s", None, "3")  # an empty cell


def test_dollys_context_and_response_are_input_and_output():
    wanted = Instruction("i", "c", "r")
    assert parse_record({"instruction": "i", "context": "c", "response": "r"}) == wanted
    assert parse_record({"instruction": "i", "input": "c", "context": "", "output": "r"}) == wanted
    assert parse_record({"instruction": "i", "input": None, "output": "r"}).question == "i"


def test_extra_fields_do_no_harm():
    value = {"instruction": "i", "output": "o", "text": "### i o", "prompt": "x", "category": 3}
    assert parse_record(value) == Instruction("i", "", "o")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ([], "expected a JSON object"),
        ({}, "no known record form"),
        ({"question": "q", "answer": "a"}, "got answer, question"),
        ({"instruction": "i"}, "field 'output' is missing beside 'instruction'"),
        ({"sentence1": "s"}, "field 'label' is missing beside 'sentence1'"),
        ({"instruction": "i", "output": 7}, "field 'output': expected text, got 7"),
        ({"instruction": "i", "output": math.nan}, "field 'output': expected text, got nan"),
        ({"instruction": "i", "output": None}, "field 'output': expected text, got null"),
        ({"instruction": " \n", "output": "o"}, "field 'instruction' is empty"),
        ({"instruction": "i", "input": [], "output": "o"}, "field 'input': expected text"),
        ({"instruction": "i", "input": "a", "context": "b", "output": "o"}, "'context' differ"),
        ({"instruction": "i", "output": "a", "response": "b"}, "'response' differ"),
        ({"instruction": "i", "output": "o", "prompt": "p", "completion": "c"}, "two record forms"),
        ({"instruction": "\ud800", "output": "o"}, "half of a surrogate pair"),
        ({"text": "t", "label": True}, "field 'label'"),
        ({"text": "t", "label": 0.5}, "field 'label'"),
        ({"text": "t", "label": ""}, "field 'label'"),
        ({"messages": "hi"}, "field 'messages': expected a list"),
        ({"messages": [{"role": "user"}, {}]}, "field 'messages[0]'"),
        ({"messages": [{"role": "human", "content": ""}] * 2}, "'human' is none of system"),
        ({"messages": [{"role": "user", "content": ""}] * 2}, "last role is 'user'"),
        ({"messages": [{"role": "user", "content": 1}] * 2}, "field 'messages[0]'.content"),
        ({"instruction": "i", "output": "o", "options": "yes"}, "field 'options'"),
        ({"instruction": "i", "output": "o", "options": ["a", "a "]}, "all different"),
    ],
)
def test_an_unusable_record_is_named_with_its_field(value, wanted):
    with pytest.raises(DataError, match=wanted.replace("[", r"\[").replace("]", r"\]")):
        parse_record(value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "instruction",
                        "input",
                        "output",
                        "prompt",
                        "completion",
                        "messages",
                        "text",
                        "label",
                        "sentence1",
                        "sentence2",
                        "options",
                        "role",
                        "content",
                        "context",
                    ]
                ),
                inner,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_value_is_a_record_or_a_data_error(value):
    try:
        record = parse_record(value)
    except DataError:
        return
    json.dumps(vars(record)).encode()
    assert record_key(record) >= 0


@pytest.mark.parametrize("context", ["", " ", "an article"])
def test_options_of_an_instruction_count_beside_an_input_too(context):
    instruction = "Which topic?\nOPTIONS:\n- World\n- Sports"
    fields = {"instruction": instruction, "input": context, "output": "World"}
    assert parse_record(fields).options == ("World", "Sports")
    fields["input"] = "Which?\nOPTIONS:\n- World\n- Art"
    assert parse_record(fields).options == ("World", "Art")


def test_options_are_read_from_the_end_of_the_question():
    assert listed_options("Is it?\n\nOPTIONS:\n- yes\n- not sure \n") == ("yes", "not sure")
    assert listed_options("OPTIONS:\r\n- a\r\n- b") == ("a", "b")
    assert listed_options("OPTIONS:\n- a\n- b\nWhich one?") == ()
    assert listed_options("OPTIONS:\n- only one") == ()
    assert listed_options("OPTIONS: - a - b") == ()
    assert listed_options("noOPTIONS:\n- a\n- b") == ()


def test_the_options_field_comes_before_the_list_in_the_text():
    question = "Q\nOPTIONS:\n- a\n- b"
    record = parse_record({"instruction": question, "output": "a", "options": ["a", "c"]})
    assert record.options == ("a", "c")
    assert parse_record({"prompt": question, "completion": "a"}).options == ("a", "b")
    asked = {"instruction": "Choose.", "input": question, "output": "a"}
    assert parse_record(asked).options == ("a", "b")


@pytest.mark.parametrize("options", [[" yes", " no"], ["yes", "no"]])
def test_white_space_around_an_answer_is_around_every_option(options):
    record = parse_record({"prompt": "Is it?", "completion": " yes", "options": options})
    assert (record.answer, record.options) == (" yes", (" yes", " no"))
    chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "no\n"}]
    assert parse_record({"messages": chat, "options": options}).options == ("yes\n", "no\n")
    other = {"prompt": "Is it?", "completion": " perhaps", "options": options}
    assert parse_record(other).options == ("yes", "no")  # which the data check tells


def test_keys_are_blind_to_case_and_white_space_alone():
    one, same = Completion("The  Cat\n", "sat"), Completion("the cat", "Sat ")
    other = Completion("the cat", "stood")
    assert record_key(one) == record_key(same) != record_key(other)
    assert question_key(one) == question_key(other)
    assert record_key(Completion("a b", "c")) != record_key(Completion("a", "b c"))
