"""Requests of several clients share passes, join and leave, and get what each would get alone."""

import queue
import threading
import time
from dataclasses import replace

import pytest
import torch
from bases import base_of, letters, random_serving_tree
from data_files import bytewise

from fedalt.adapters.plan import Mixer, Plan, Router, Similarity, Slot, Sum
from fedalt.core.settings import Scoring
from fedalt.evaluation import generate
from fedalt.methods.contract import Serving
from fedalt.serving.answer import Text
from fedalt.serving.batch import Adapters, can_share
from fedalt.serving.engine import ClosedError, Engine, QueueFullError, Request
from fedalt.serving.models import exported

TWO = (Slot("a", 2, 4.0), Slot("b", 2, 4.0))
PLANS = {
    "mixer": Plan(TWO, Mixer()),
    "another mixer": Plan(TWO, Mixer()),
    "router": Plan(TWO, Router(1, "paper", True)),
    "router of another cluster": Plan(TWO, Router(0, "paper", True)),
    "sum": Plan(TWO, Sum((0.5, 1.0))),
    "sum of another rank": Plan((Slot("a", 3, 4.0),), Sum((1.0,))),
    "similarity": Plan(TWO, Similarity(0.5, 0, 1)),
    "base": None,
}
PROMPTS = ("ask me", "a", "what is it that you want to know", "hello you", "zzzz zz")


@pytest.fixture(scope="module")
def base():
    return base_of()


@pytest.fixture(scope="module")
def clients(base):
    """Adapters of one client for each plan."""
    found = {}
    for seed, (name, plan) in enumerate(PLANS.items()):
        serving = None
        if plan is not None:
            references = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
            serving = Serving(plan, random_serving_tree(base, plan, seed), references)
        found[name] = Adapters.of(base, name, serving)
    return found


class Asked:
    """A request and what comes of it."""

    def __init__(self, adapters, text, most=12, **how):
        self.tokens, self.end, self.done = [], None, threading.Event()
        prompt = tuple(letters()(text)["input_ids"])
        self.request = Request(adapters, prompt, most, self.tell, **how)

    def tell(self, token, end):
        self.tokens += [] if token is None else [token]
        if end:
            self.end = end
            self.done.set()

    def wait(self):
        assert self.done.wait(60)
        return self.tokens


def engine_of(base, **limits):
    return Engine(base, **{"rows": 4, "queue": 64, **limits})


def alone(base, asked):
    """What `fedalt generate` writes."""
    scoring = Scoring(max_new_tokens=asked.request.max_tokens)
    return generate(base, asked.request.adapters.serving, [asked.request.prompt], scoring)[0]


def text_of(base, tokens):
    text = Text(base)
    return "".join(text.add(token, last=at == len(tokens) - 1) for at, token in enumerate(tokens))


def test_all_kinds_of_clients_at_once_get_what_each_gets_alone(base, clients):
    asked = [
        Asked(adapters, PROMPTS[(at + n) % len(PROMPTS)], most=3 + 5 * n + at)
        for n in range(3)
        for at, adapters in enumerate(clients.values())
    ]
    expected = [alone(base, each) for each in asked]
    assert len(set(expected)) > 12
    engine = engine_of(base)
    for each in asked[:5]:
        engine.submit(each.request)
    engine.start()
    for each in asked[5:]:  # while others are being answered
        time.sleep(0.01)
        engine.submit(each.request)
    found = [text_of(base, each.wait()) for each in asked]
    engine.close()
    assert found == expected
    assert {each.end for each in asked} <= {"stop", "length"}
    assert engine.counts["rows"] > 1.2 * engine.counts["passes"]
    assert engine.running == engine.waiting == 0


def test_clients_of_one_kind_and_the_base_model_share_every_pass(base, clients):
    names = ("mixer", "another mixer", "base")
    asked = [Asked(clients[name], "ask me", most=6) for name in names]
    engine = engine_of(base)
    for each in asked:
        engine.submit(each.request)
    engine.start()
    for each in asked:
        each.wait()
    engine.close()
    longest = max(len(each.tokens) for each in asked)
    assert engine.counts["passes"] == longest - 1  # the first token comes with the prompt
    assert [text_of(base, each.tokens) for each in asked] == [alone(base, each) for each in asked]


def test_a_model_that_bears_no_padding_is_asked_row_by_row(base, clients):
    strict = replace(base, bears_padding_before=False)
    assert can_share(base)
    assert not can_share(strict)
    asked = [Asked(adapters, PROMPTS[at % 5], 4) for at, adapters in enumerate(clients.values())]
    engine = engine_of(strict)
    for each in asked:
        engine.submit(each.request)
    engine.start()
    found = [text_of(base, each.wait()) for each in asked]
    engine.close()
    assert found == [alone(base, each) for each in asked]


def test_a_seed_gives_the_same_answer_whoever_else_is_asked(base, clients):
    def sampled(seed, top_p=1.0):
        return Asked(clients["mixer"], "ask me", 8, temperature=1.5, top_p=top_p, seed=seed)

    first, again, other = sampled(1), sampled(1), sampled(2)
    likeliest, greedy = sampled(3, top_p=1e-6), Asked(clients["mixer"], "ask me", 8)
    engine = engine_of(base, rows=3)
    engine.start()
    engine.submit(first.request)
    first.wait()
    for each in (again, other, likeliest, greedy):
        engine.submit(each.request)
    for each in (again, other, likeliest, greedy):
        each.wait()
    engine.close()
    assert first.tokens == again.tokens != other.tokens
    assert likeliest.tokens == greedy.tokens


@pytest.mark.parametrize(
    "how", [{"temperature": 1e-40}, {"temperature": 1e-7}, {"temperature": 1.0, "top_p": 1e-300}]
)
def test_no_wish_of_one_request_ends_the_answers_of_all(base, clients, how):
    strange = Asked(clients["mixer"], "ask me", 8, **how)
    greedy = Asked(clients["mixer"], "ask me", 8)
    engine = engine_of(base)
    for each in (strange, greedy):
        engine.submit(each.request)
    engine.start()
    assert strange.wait() == greedy.wait()
    engine.close()
    assert {strange.end, greedy.end} <= {"stop", "length"}


def test_where_logits_are_no_numbers_the_choice_is_the_greedy_one(clients):
    request = Asked(clients["mixer"], "a", temperature=1.0).request
    logits = torch.tensor([0.0, float("inf"), 1.0])
    assert request.choose(logits) == 1


def test_limits_and_those_who_have_gone(base, clients):
    engine = engine_of(base, queue=3)
    late = Asked(clients["sum"], "a", deadline=time.monotonic() - 1)
    gone, last = Asked(clients["sum"], "a"), Asked(clients["sum"], "a", 3)
    for each in (late, gone, last):
        engine.submit(each.request)
    with pytest.raises(QueueFullError):
        engine.submit(Asked(clients["sum"], "a").request)
    gone.request.gone = True
    engine.start()
    engine.close()
    assert (late.tokens, late.end) == ([], "late")
    assert (gone.tokens, gone.end) == ([], None)
    assert len(last.wait()) <= 3
    with pytest.raises(ClosedError):
        engine.submit(last.request)


def test_who_hangs_up_while_waiting_makes_room(base, clients):
    engine = engine_of(base, queue=3)
    gone = [Asked(clients["sum"], "a") for _ in range(2)]
    stays, next_ = Asked(clients["sum"], "ask me", 3), Asked(clients["sum"], "ask me", 3)
    for each in (gone[0], stays, gone[1]):
        engine.submit(each.request)
    for each in gone:
        each.request.gone = True
    assert engine.waiting == 1
    engine.submit(next_.request)
    assert engine.waiting == 2
    engine.start()
    engine.close()
    assert stays.tokens == next_.tokens != []
    assert not gone[0].tokens


def test_who_hangs_up_while_being_answered_leaves_the_others_alone(base, clients):
    slow = queue.Queue()
    engine = engine_of(base)
    asked = [Asked(clients[name], "hello you", 14) for name in ("mixer", "another mixer", "mixer")]
    gone = asked[0].request
    gone.tell = lambda token, end: (slow.put(token), setattr(gone, "gone", True))
    for each in asked:
        engine.submit(each.request)
    engine.start()
    for each in asked[1:]:
        assert text_of(base, each.wait()) == alone(base, each)
    engine.close()
    assert slow.qsize() <= 2


def test_an_error_in_a_pass_is_told_to_all_and_ends_the_engine(base, clients):
    engine = engine_of(base)
    ended = threading.Event()
    engine.on_failure = ended.set
    wrong = Asked(clients["mixer"], "a")
    wrong.request.prompt = (10**6,)  # no such token
    engine.submit(wrong.request)
    threading.excepthook, before = (lambda _: None), threading.excepthook
    engine.start()
    assert wrong.done.wait(60)
    assert wrong.end == "failed"
    assert ended.wait(60)
    threading.excepthook = before
    with pytest.raises(ClosedError):
        engine.submit(wrong.request)
    engine.close()


def test_text_is_told_as_soon_as_nothing_can_change_it(base):
    ids = letters()(" ab stop it stay ")["input_ids"]

    def told(stops=(), stripped=True):
        text = Text(base, stops, stripped)
        pieces = []
        for at, token in enumerate(ids):
            pieces.append(text.add(token, last=at == len(ids) - 1))
            if text.stopped:
                break
        return pieces

    assert "".join(told()) == "ab stop it stay"
    assert "".join(told(stripped=False)) == " ab stop it stay "
    assert told(["top"]) == ["", "a", "b", "", " s", "", "", ""]
    assert "".join(told(["stay", "it"])) == "ab stop"
    assert "".join(told(["never"])) == "ab stop it stay"
    assert "".join(told(["ay b"])) == "ab stop it stay"  # begun, but never there


def test_nothing_of_a_stop_is_told_while_one_of_its_signs_is_unfinished(base):
    bytes_ = replace(base, tokenizer=bytewise())
    ids = bytes_.tokenizer("x a\u20acb y")["input_ids"]  # the sign has three bytes, a token each

    def told(*stops):
        text, pieces = Text(bytes_, stops), []
        while not text.stopped and len(text.ids) < len(ids):
            pieces.append(text.add(ids[len(text.ids)], last=len(text.ids) == len(ids) - 1))
        return pieces

    assert "".join(told("a\u20acb")) == "x"
    assert "".join(told("a\u20acc")) == "x a\u20acb y"
    assert told() == ["x", "", " a", "", "", "\u20ac", "b", "", " y"]


def test_what_an_export_that_was_killed_has_left_is_not_served(tmp_path):
    for name in ("anna", ".ben.0badcafe.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    assert exported(tmp_path) == {"anna": tmp_path / "anna"}
