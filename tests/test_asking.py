"""Answers end where model, card or chat template say, are greedy, and fit behind their prompts."""

from dataclasses import replace

import pytest
import torch
import transformers
from bases import base_of, example, letters, random_serving_tree
from tiny import CAUSAL, VOCAB, gpt2, llama, opt
from transformers import GenerationConfig, RobertaConfig, RobertaForCausalLM

from fedalt.adapters.plan import Slot, single
from fedalt.adapters.reach import positions_of
from fedalt.data.prompts import cut_prompt, encode, encode_prompt
from fedalt.data.records import Completion
from fedalt.evaluation import Scoring, generate, score
from fedalt.evaluation.asking import ends, fitted, longest_answer
from fedalt.methods.contract import Serving

PLAN = single(Slot("individual", 2, 4))
PROMPTS = [example(text, "").prompt_ids for text in ("which", "and which of these", "a")]
LONG = example("abcdefghij" * 7, "").prompt_ids  # 70 tokens, the tiny models number 64


def greedy(base, prompt, steps, stop=()):
    """The likeliest token, one after the other, without any generation code."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(base.adapted.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in stop:
                break
    return ids[len(prompt) :]


def said(base, ids):
    return base.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("where", ["generation_config", "config"])
@pytest.mark.parametrize("beams", [1, 2])
def test_every_end_that_a_model_names_ends_an_answer(where, beams):
    base = base_of(llama())
    scoring = Scoring(max_new_tokens=12, beams=beams)
    longer = generate(base, None, PROMPTS, scoring)
    # Set after loading: what counts is what is there when an answer is written.
    second = base.tokenizer(longer[0]).input_ids[3]
    getattr(base.adapted.model, where).eos_token_id = [2, second]
    assert second in ends(base)
    shorter = generate(base, None, PROMPTS, scoring)
    assert len(shorter[0]) < len(longer[0])
    for prompt, answer in zip(PROMPTS, shorter, strict=True):
        written = base.adapted.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            num_beams=beams,
            do_sample=False,
            use_cache=True,
            eos_token_id=[2, second],
            pad_token_id=0,
        )[0, len(prompt) :]
        assert answer == said(base, written)


def test_an_end_that_a_chat_template_writes_ends_an_answer_and_is_no_part_of_it():
    base = base_of(llama())
    longer = generate(base, None, PROMPTS, Scoring(max_new_tokens=12))
    end = longer[0][3]
    base.tokenizer.add_tokens(end)  # a token by itself, yet not one that decoding leaves out
    base.tokenizer.chat_template = (
        "{% for m in messages %}" + "{{ m.content }}" + end + "{% endfor %}"
    )
    assert base.tokenizer.convert_tokens_to_ids(end) in ends(base)
    assert generate(base, None, PROMPTS, Scoring(max_new_tokens=12))[0] == longer[0].split(end)[0]


CARD = {
    "repetition_penalty": 2.0,
    "no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 3.0,
    "bad_words_ids": [[5], [6], [7], [8]],
    "suppress_tokens": [5, 6, 7, 8, 9, 10, 11],
    "begin_suppress_tokens": list(range(3, 60)),
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 9,
    "min_length": 40,
    "min_new_tokens": 11,
    "sequence_bias": [[[5], -10.0], [[9], 30.0]],
    "exponential_decay_length_penalty": (1, 100.0),
    "length_penalty": 9.0,
    "early_stopping": True,
    "max_time": 1e-9,
    "stop_strings": ["a", "e", "i"],
    "cache_implementation": "static",
    "num_return_sequences": 2,
    "num_beams": 3,
    "renormalize_logits": True,
    "temperature": 0.1,
    "max_length": 3,
    "prompt_lookup_num_tokens": 2,
    "output_scores": True,
    "guidance_scale": 5.0,
    "token_healing": True,
    "do_sample": True,
}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("setting", CARD)
def test_nothing_else_of_a_models_card_changes_its_answers(setting, beams):
    base = base_of(llama())
    scoring = Scoring(max_new_tokens=12, beams=beams)
    plain = generate(base, None, PROMPTS, scoring)
    if beams == 1:
        assert plain == [said(base, greedy(base, prompt, 12, {2})) for prompt in PROMPTS]
    card = GenerationConfig(eos_token_id=2, pad_token_id=0)
    setattr(card, setting, CARD[setting])
    base.adapted.model.generation_config = card
    assert generate(base, None, PROMPTS, scoring) == plain
    assert base.adapted.model.generation_config is card


def roberta():
    """Numbers its positions from behind the padding id: of 66 rows, 64 are of use."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = RobertaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=66,
            is_decoder=True,
            initializer_range=0.2,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        )
        return RobertaForCausalLM(config).eval()


def test_positions_are_those_that_a_model_can_number():
    assert positions_of(gpt2()) == positions_of(llama()) == positions_of(opt()) == 64
    assert positions_of(roberta()) == 64
    assert positions_of(CAUSAL["bloom"]()) is None
    small = gpt2()
    small.resize_token_embeddings(70)  # words, not positions
    assert positions_of(small) == 64


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("model", [gpt2, opt, roberta, llama])
@pytest.mark.parametrize("new_tokens", [20, 60, 200])
def test_answers_fit_behind_prompts_of_any_length(model, beams, new_tokens):
    base = base_of(model())
    scoring = Scoring(max_new_tokens=new_tokens, beams=beams, batch_size=4)
    prompts = [*PROMPTS, LONG, LONG[:64], LONG[:33], LONG[:50]]
    together = generate(base, None, prompts, scoring)
    assert together == [generate(base, None, [prompt], scoring)[0] for prompt in prompts]
    for prompt in prompts:
        asked = fitted(base, prompt, scoring)
        assert len(asked) + longest_answer(base, asked, scoring) <= 64
        assert longest_answer(base, asked, scoring) >= min(new_tokens, 32)
    if beams == 1 and model is not roberta:
        asked = fitted(base, LONG, scoring)
        room = longest_answer(base, asked, scoring)
        assert together[3] == said(base, greedy(base, asked, room, {2}))


def test_a_prompt_is_cut_alike_at_once_or_twice_and_keeps_its_opening():
    tokenizer = letters()
    prompt = (1, *LONG)
    for first in range(2, 70):
        for room in range(2, first + 1):
            once = cut_prompt(prompt, tokenizer, room)
            assert cut_prompt(cut_prompt(prompt, tokenizer, first), tokenizer, room) == once
            assert (once[0], once[-1], len(once)) == (1, prompt[-1], room)


def test_scoring_and_asking_write_the_same_about_a_prompt_that_fills_all_positions():
    base = base_of(gpt2())
    serving = Serving(PLAN, random_serving_tree(base, PLAN))
    record = Completion("abcdefghij" * 9, "xyz", ("xyz", "x" * 12))
    kept = encode(record, base.tokenizer, None, max_length=64).example
    scoring = Scoring(max_new_tokens=20)
    scored = score(base, serving, [kept], scoring)
    asked = encode_prompt(record, base.tokenizer, None, max_length=64)
    assert scored.predictions == tuple(generate(base, serving, [asked], scoring))
    # The longer, wrong option stands behind the same prompt, and fits, too.
    assert len(kept.prompt_ids) + 12 + 1 == 64
    assert scored.metrics["accuracy"] in (0.0, 1.0)


def test_an_answer_brings_its_end_along_and_a_prompt_its_beginning():
    tokenizer = letters()
    tokenizer.add_bos_token = True
    plain = encode(Completion("ab", "cd"), tokenizer, None, max_length=64).example
    brought = encode(Completion("<s>ab", "cd</s>"), tokenizer, None, max_length=64).example
    if tokenizer("<s>ab").input_ids.count(1) == 1:
        assert brought == replace(plain, answer="cd")
    assert plain.ids.count(1) == 1
    assert plain.ids[-1] == 2


def test_transformers_still_takes_from_a_card_what_a_call_leaves_open():
    """Without which the tests above would prove nothing."""
    base = base_of(llama())
    before = said(base, greedy(base, PROMPTS[0], 12))
    base.adapted.model.generation_config.repetition_penalty = 2.0
    after = base.adapted.model.generate(
        torch.tensor([PROMPTS[0]]),
        generation_config=transformers.GenerationConfig(max_new_tokens=12, pad_token_id=0),
    )
    assert said(base, after[0, len(PROMPTS[0]) :]) != before
