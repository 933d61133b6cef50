import pytest
from data_files import BOS, EOS, bytewise

from fedalt.data.prompts import (
    Template,
    encode,
    encode_answer,
    encode_prompt,
    masked_example,
    opening_ids,
    read_template,
)
from fedalt.data.records import Chat, Completion, DataError, Instruction, LabeledText, Turn

PLAIN = bytewise()
DEFAULT = Template()


def encoded(record, tokenizer=PLAIN, template=DEFAULT, max_length=512, labels=()):
    return encode(record, tokenizer, template, max_length=max_length, labels=labels)


def test_the_default_template_has_two_headers():
    alone, about = Instruction("Do it.", "", "done"), Instruction("Do it.", "With this.", "done")
    assert DEFAULT.render(alone) == "### Instruction:\nDo it.\n\n### Response:\n"
    assert DEFAULT.render(about) == "### Instruction:\nDo it.\n\nWith this.\n\n### Response:\n"


def test_the_loss_is_on_the_answer_and_the_end_of_text():
    record = Instruction("Do it.", "", "done")
    example = encoded(record).example
    assert masked_example(example, PLAIN) == (DEFAULT.render(record), "done</s>")
    assert example.ids[example.answer_start :] == encode_answer("done", PLAIN)
    assert example.ids[-1] == EOS
    assert example.prompt_ids == encode_prompt(record, PLAIN, DEFAULT, max_length=512)


def test_an_own_template_places_instruction_and_input(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_bytes(b"\xef\xbb\xbf{{Q}} {instruction}|{input}\nA: ")
    record = Instruction("add {input}", "1 {instruction}", "2")
    assert read_template(file).render(record) == "{Q} add {input}|1 {instruction}\nA: "
    file.write_text("{instruction} =>")
    assert read_template(file).render(record) == "add {input}\n\n1 {instruction} =>"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{instruction} {output}", "unknown placeholder {output}"),
        ("{instruction} {}", "unknown placeholder {}"),
        ("{instruction!r}", "unknown placeholder {instruction!r:}"),
        ("{instruction.x}", "unknown placeholder {instruction.x}"),
        ("Answer:", "the placeholder {instruction} is missing"),
        ("{instruction", "written twice"),
        ("{instruction} }", "written twice"),
    ],
)
def test_a_wrong_template_is_an_error_that_names_its_file(tmp_path, text, wanted):
    file = tmp_path / "mine.txt"
    file.write_text(text)
    with pytest.raises(DataError) as caught:
        read_template(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert wanted in str(caught.value)
    with pytest.raises(DataError, match="cannot be read as a template"):
        read_template(tmp_path / "missing.txt")


def test_a_begin_of_text_token_is_put_where_the_tokenizer_puts_one():
    record = Completion("ab", "c")
    assert opening_ids(PLAIN) == ()
    assert encoded(record).example.ids[0] != BOS
    own = bytewise(bos=True)
    assert opening_ids(own) == (BOS,)
    assert encoded(record, own).example.ids.count(BOS) == 1
    told = bytewise()
    told.add_bos_token = True
    assert opening_ids(told) == (BOS,)


def test_a_completion_gets_no_template():
    assert masked_example(encoded(Completion("ab", " c")).example, PLAIN) == ("ab", " c</s>")


def test_a_prompt_too_long_loses_its_middle_and_the_answer_nothing():
    own = bytewise(bos=True)
    found = encoded(Completion("abcdefghijkl", "XY"), own, max_length=12)
    assert masked_example(found.example, own) == ("<s>abghijkl", "XY</s>")
    assert (found.prompt_cut, found.answer_cut) == (4, 0)
    whole = encoded(Completion("abcdefgh", "XY"), own, max_length=12)
    assert (len(whole.example.ids), whole.prompt_cut) == (12, 0)


def test_an_answer_too_long_is_flagged_and_keeps_its_beginning():
    found = encoded(Completion("ab", "XYZ"), max_length=3)
    assert masked_example(found.example, PLAIN) == ("b", "XY")
    assert (found.prompt_cut, found.answer_cut) == (1, 1)
    exact = encoded(Completion("ab", "XY"), max_length=3)
    assert masked_example(exact.example, PLAIN) == ("b", "XY")  # no room for the end of text
    assert exact.answer_cut == 0
    with pytest.raises(DataError, match="max_length=1"):
        encoded(Completion("ab", "XY"), max_length=1)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("max_length", range(2, 30))
def test_no_length_is_ever_exceeded_and_every_answer_has_a_prompt(max_length, bos):
    tokenizer = bytewise(bos=bos)
    for prompt in (1, 5, 25):
        for answer in (0, 1, 5, 25):
            record = Completion("p" * prompt, "a" * answer)
            found = encoded(record, tokenizer, max_length=max_length)
            ids, init = found.example.ids, found.example.answer_start
            assert len(ids) <= max_length
            assert init >= 1
            assert init + found.prompt_cut == prompt + bos
            assert len(ids) - init + found.answer_cut in (answer, answer + 1)


def test_messages_go_through_the_tokenizers_chat_template():
    chat = Chat((Turn("system", "S"), Turn("user", "Q")), "A")
    tokenizer = bytewise(bos=True, chat=True)
    found = encoded(chat, tokenizer).example
    # The template writes its own begin of text, if it wants one.
    assert masked_example(found, tokenizer) == ("<system>S\n<user>Q\n<assistant>", "A</s>")
    with pytest.raises(DataError, match="no chat template"):
        encoded(chat, bytewise())
    tokenizer.chat_template = "{{ raise_exception('no system, please') }}"
    with pytest.raises(DataError, match="refuses a conversation: no system, please"):
        encoded(chat, tokenizer)


def test_a_tokenizer_without_end_of_text_is_refused():
    with pytest.raises(DataError, match="no end-of-text token"):
        encode_answer("a", bytewise(eos_token=None))


def test_options_are_kept_as_texts():
    record = Completion("Q", "b", ("a", "b"))
    assert encoded(record).example.options == ("a", "b")
    assert encode_answer("a", PLAIN)[-1] == EOS


def test_a_classifiers_text_is_tokenised_as_a_pair_and_cut_to_length():
    tokenizer = bytewise(bos=True)
    found = encoded(LabeledText("ab", "cd", "no"), tokenizer, labels=("no", "yes")).example
    assert tokenizer.decode(found.ids) == "<s>ab<s>cd"
    assert (found.label, found.answer_start, found.options) == (0, 6, ("no", "yes"))
    assert masked_example(found, tokenizer)[1] == "no"
    cut = encoded(LabeledText("abcdef", None, "yes"), tokenizer, max_length=4, labels=("no", "yes"))
    assert tokenizer.decode(cut.example.ids) == "<s>abc"
    assert cut.prompt_cut == 3
    with pytest.raises(DataError, match="label 'maybe' is none of no, yes"):
        encoded(LabeledText("a", None, "maybe"), tokenizer, labels=("no", "yes"))


@pytest.mark.shared
@pytest.mark.parametrize("model", ["stories260k-llama", "books-5m", "babyllama-0.9m-char"])
def test_real_tokenizers_give_the_same_prompt_with_and_without_an_answer(shared_dir, model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / model)
    record = Instruction("Say yes.", "", "yes")
    example = encoded(record, tokenizer).example
    assert example.prompt_ids == tuple(tokenizer(DEFAULT.render(record)).input_ids)
    assert tokenizer.decode(example.ids[example.answer_start : -1]).strip() == "yes"
