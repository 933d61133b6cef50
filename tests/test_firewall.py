"""A bad upload changes nothing: it is refused, told, kept apart, and its round did not happen."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from federation import START, ByteStates, MemoryStates, pull, run_one, simulate, trees_of
from runs_for_tests import adapters_of, save_model, scores_of, settings_for, write_clients
from test_contract import COHORTS, ROWS, SMALL, each_method
from test_resume import StopsAt

from fedalt.cli.progress import RoundLines
from fedalt.core import tree as trees
from fedalt.core.codec import encode, write
from fedalt.core.tree import Name
from fedalt.engine import robust
from fedalt.engine.dry_run import dry_run
from fedalt.engine.firewall import (
    Firewall,
    Refused,
    Screening,
    Size,
    check_broadcast,
    check_size,
    check_upload,
    too_large,
)
from fedalt.engine.robust import centre, cut_of
from fedalt.engine.schedule import Arm, Event
from fedalt.engine.states import client_of, server_of
from fedalt.methods.contract import Message
from fedalt.methods.fedalt import FedALT
from fedalt.methods.fedit import FedIT
from fedalt.runs.checkpoints import FileLedger, FileStates
from fedalt.runs.folder import StoreError
from fedalt.runs.lifecycle import resume_run, start_run
from fedalt.runs.quarantine import quarantine, refusals
from fedalt.runs.settings import SettingsError
from fedalt.runs.setup import prepare
from fedalt.training.orders import Fitted, Moments

SITE = "block.0.q"
EXTRA = Name(SITE, "unheard\x1b[2J\nof", "A")
ALL = ("a", "b", "c", "d")
ATTACKED = [ALL, ALL, ALL, ("a", "b"), ALL]
WITHOUT_B = [ALL, ("a", "c", "d"), ALL, ("a", "b"), ALL]
WATCHFUL = Screening(Firewall(norm_limit=20.0))


@dataclass(frozen=True)
class Signed(Fitted):
    """The answer to a fit that says whose it is, as a rehearsal's does not."""

    client_id: str = ""


def sign(client_id, number, order):
    answer = pull(client_id, number, order)
    if not isinstance(answer, Fitted):
        return answer
    return Signed(answer.tree, answer.examples, answer.moments, client_id)


@dataclass(frozen=True)
class Attacked:
    """A method one of whose clients spoils what it uploads."""

    method: Any
    spoil: Callable[[str, Message], Message]

    def __getattr__(self, name):
        return getattr(self.method, name)

    def local(self, client, message):
        steps, answer, who = self.method.local(client, message), None, ""
        while True:
            try:
                answer = yield steps.send(answer)
            except StopIteration as end:
                after, upload = end.value
                return after, self.spoil(who, upload)
            who = getattr(answer, "client_id", who)


def changed(upload, change):
    """The upload with its first tensor changed."""
    name = min(upload.tree)
    return replace(upload, tree={**upload.tree, name: change(upload.tree[name])})


def poked(number):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = number
        return tensor

    return lambda upload: changed(upload, change)


def facts(**others):
    return lambda upload: replace(upload, facts={**upload.facts, **others})


SPOILS = {
    "NaN": (poked(math.nan), "NaN"),
    "infinity": (poked(math.inf), "infinity"),
    "huge": (poked(1e30), "norm"),
    "a row more": (lambda u: changed(u, lambda t: torch.cat([t, t])), "expected"),
    "float64": (lambda u: changed(u, torch.Tensor.double), "float64"),
    "a name less": (
        lambda u: replace(u, tree={n: u.tree[n] for n in sorted(u.tree)[1:]}),
        "lacks 1",
    ),
    "a name more": (
        lambda u: replace(u, tree={**u.tree, EXTRA: torch.ones(2, 5)}),
        "unexpected tensors, first 'unheard",
    ),
    "a fact more": (facts(more=1), "facts"),
    "a fact less": (lambda u: replace(u, facts={}), "facts"),
    "a weight that is a text": (facts(weight="1"), "is a str"),
    "a weight of 1e30": (facts(weight=1e30), "weight"),
    "no weight": (facts(weight=0.0), "weight"),
    "a weight below 0": (facts(weight=-1.0), "weight"),
    "a weight that is NaN": (facts(weight=math.nan), "weight"),
}
FOUR = ["fedalt, by examples", "fedit", "fdlora, sync", "fedlease, two experts"]


def spoiled_run(method, spoil, gate=WATCHFUL):
    """Five rounds, in the second of which b uploads something bad; what was refused of them."""
    attacked = Attacked(method, lambda who, upload: spoil(upload) if who == "b" else upload)
    states, refused = ByteStates(), []
    for round_, cohort in enumerate(ATTACKED):
        now = attacked if round_ == 1 else method
        _, costs = simulate(now, [cohort], states, sign, gate)
        refused += [(round_, each.client_id, each.refused) for each in costs if each.refused]
    return states, refused


def assert_same_states(left, right):
    """Bit for bit the same states of all clients and the server, ledgers too."""
    assert left.keys() == right.keys()
    for key in left:
        (ours, our_ledgers), (theirs, their_ledgers) = left[key], right[key]
        assert ours == theirs, key
        for name, ledger in our_ledgers.items():
            theirs = their_ledgers[name]
            assert ledger.clients() == theirs.clients()
            assert all(encode(ledger[each]) == encode(theirs[each]) for each in ledger.clients())


@cache
def without_b(row):
    """The states of rounds that nobody spoils, b not being in the second."""
    return simulate(ROWS[row], WITHOUT_B, ByteStates())[0]


@pytest.mark.parametrize("row", FOUR)
@pytest.mark.parametrize(("spoil", "told"), SPOILS.values(), ids=SPOILS)
def test_who_uploads_something_bad_was_not_in_the_round(row, spoil, told):
    states, refused = spoiled_run(ROWS[row], spoil)
    ((round_, client_id, reason),) = refused
    assert (round_, client_id) == (1, "b")
    assert told in reason
    assert reason.isprintable()
    ((kept_of, kept_reason, data),) = states.refused
    assert (kept_of, kept_reason) == ("b", reason)
    assert data
    assert_same_states(states, without_b(row))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("gate", [Screening(), WATCHFUL], ids=["streaming", "waiting"])
def test_a_refused_client_of_any_method_was_not_in_the_round(row, gate):
    states, refused = spoiled_run(ROWS[row], SPOILS["a name more"][0], gate)
    assert [each[:2] for each in refused] == [(1, "b")]
    assert_same_states(states, without_b(row))


@each_method
def test_a_round_in_which_all_are_refused_has_not_happened(method):
    states, _ = simulate(method, [ALL], ByteStates())
    before = dict(states)
    all_bad = Attacked(method, lambda who, up: SPOILS["a name more"][0](up) if who else up)
    _, costs = simulate(all_bad, [ALL], states, sign)
    assert all(each.refused for each in costs)
    assert dict(states) == before


@each_method
def test_real_uploads_have_exactly_the_rehearsed_form_and_broadcasts_fit(method):
    states = MemoryStates()
    for cohort in COHORTS:
        server = server_of(method, START, states)
        for client_id in cohort:
            message = method.broadcast(server, client_id)
            forms = dry_run(method, START, client_id, message)
            client = client_of(method, START, states, client_id)
            check_broadcast(message, method, START, client)
            _, upload = run_one(method.local(client, message), pull, client_id)
            check_upload(upload, forms)
            shown = [
                {name: (each.shape, each.dtype) for name, each in form.tree.items()}
                for form in (upload, *forms)
            ]
            assert shown[0] in shown[1:]
            assert upload.facts.keys() in [form.facts.keys() for form in forms]
        _, costs = simulate(method, [cohort], states)
        assert not any(cost.refused for cost in costs)


@pytest.mark.parametrize("rows", ["fedlease, two experts", "fedlease, by examples"])
@pytest.mark.parametrize("attacked", [0, 1], ids=["while groups are found", "as a newcomer"])
def test_an_upload_of_zeros_keeps_no_one_from_being_grouped(rows, attacked):
    method = ROWS[rows]

    def spoil(who, upload):
        return Message(trees.zeros_like(upload.tree), upload.facts) if who == "b" else upload

    states, cohorts = MemoryStates(), [("a", "c", "d", "b")[: 4 - attacked], ALL, ALL]
    for round_, cohort in enumerate(cohorts):
        now = Attacked(method, spoil) if round_ == attacked else method
        simulate(now, [cohort], states, sign)
        grouped = server_of(method, START, states).clusters
        assert ("b" in grouped) == (round_ > attacked)
        assert {"a", "c", "d"} <= grouped.keys()


def test_a_rehearsal_tells_what_a_newcomer_and_the_others_may_send():
    method = ROWS["fdlora"]
    states, _ = simulate(method, [ALL])
    message = method.broadcast(server_of(method, START, states), "e")
    newcomer, known = dry_run(method, START, "e", message)
    assert not newcomer.tree
    assert {name.slot for name in known.tree} == {"shared"}
    assert not known.counts
    assert dry_run(ROWS["fdlora, heavy ball"], START, "e", message)[1].counts


BROADCAST = ROWS["fedit"].broadcast(ROWS["fedit"].init_server(START), "a")
A, B = Name(SITE, "shared", "A"), Name(SITE, "shared", "B")
BAD_BROADCASTS = {
    "an unknown site": ({Name("block.9.q", "shared", "A"): torch.ones(2, 5)}, "no such site"),
    "another width": ({A: torch.ones(2, 6)}, "expected 5 in place 1"),
    "two ranks": ({A: torch.ones(3, 5)}, "of rank 3, but its B of 2"),
    "another rank": ({A: torch.ones(3, 5), B: torch.ones(4, 3)}, "does not fit this client's"),
    "NaN": ({A: torch.full((2, 5), math.nan)}, "NaN"),
    "another slot": ({Name(SITE, "other", "A"): torch.ones(2, 5)}, "does not fit this client's"),
}


@pytest.mark.parametrize(("part", "told"), BAD_BROADCASTS.values(), ids=BAD_BROADCASTS)
def test_a_client_refuses_a_broadcast_it_cannot_train_with(part, told):
    method = ROWS["fedit"]
    client = method.init_client(START, "a")
    check_broadcast(BROADCAST, method, START, client)
    bad = Message({**BROADCAST.tree, **part}, BROADCAST.facts)
    with pytest.raises(Refused, match=told):
        check_broadcast(bad, method, START, client)


def test_a_broadcast_without_the_facts_of_its_method_is_refused():
    method = FedALT(lora=SMALL)
    message, client = method.broadcast(method.init_server(START), "a"), None
    for told, wrong in (
        ("has the facts", {"weight": 1.0}),
        ("expected a finite number", {**message.facts, "weight": math.inf}),
        ("is a int, expected a bool", {**message.facts, "included": 1}),
    ):
        with pytest.raises(Refused, match=told):
            check_broadcast(Message({}, wrong), method, START, client)


def test_who_is_too_large_is_told_by_the_median():
    sizes = {each: Size(norm, 1.0) for each, norm in zip("abcd", (1.0, 2.0, 2.0, 8.1), strict=True)}
    assert too_large(sizes, 4.0).keys() == {"d"}
    assert not too_large(sizes, 4.1)
    assert not too_large({each: sizes[each] for each in "ad"}, 4.0)  # nobody knows who is right
    zeros = {each: replace(size, norm=0.0) for each, size in sizes.items()}
    assert not too_large({**zeros, "d": Size(5.0, 1.0)}, 4.0)
    heavy = {**sizes, "a": Size(1.0, 4.5)}
    assert "weight is 4.5, more than 4.1 times the median 1 " in too_large(heavy, 4.1)["a"]
    empty = Size(None, None)  # who sends no tensors has no part in what is usual
    assert too_large({**sizes, "e": empty, "f": empty, "g": empty}, 4.0).keys() == {"d"}


def test_many_bytes_are_refused_before_they_are_read():
    check_size(10, 10)
    with pytest.raises(Refused, match="has 11 bytes, but at most 10"):
        check_size(11, 10)
    _, costs = simulate(
        FedIT(lora=SMALL), [ALL], screening=Screening(Firewall(max_upload_bytes=100))
    )
    assert all("at most 100" in each.refused for each in costs)


@pytest.mark.parametrize(
    ("kind", "trim", "numbers", "expected"),
    [
        ("median", 0.1, (30.0, 1.0, 2.0), 2.0),
        ("median", 0.1, (1.0, 100.0, 3.0, 2.0), 2.5),
        ("median", 0.1, (7.0,), 7.0),
        ("trimmed_mean", 0.2, (1.0, 2.0, 3.0, 7.0, 1e30), 4.0),
        ("trimmed_mean", 0.1, (1.0, 2.0, 3.0, 7.0, 1e30), 4.0),  # a tenth of five is one
        ("trimmed_mean", 0.0, (1.0, 2.0, 6.0), 3.0),
        ("trimmed_mean", 0.4, (1.0, 5.0), 3.0),
    ],
)
def test_the_centre_of_numbers(tmp_path, kind, trim, numbers, expected):
    files = []
    for number in numbers:
        files.append(tmp_path / f"{len(files)}")
        write(files[-1], Message({A: torch.full((2, 3), number)}, {"weight": number}))
    assert torch.equal(centre(files, kind, trim)[A], torch.full((2, 3), expected))


def test_a_tenth_of_thirty_is_three():
    assert cut_of("trimmed_mean", 0.1, 30) == 3


def test_the_centre_is_found_name_by_name_in_blocks_that_cut_through_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(robust, "_BLOCK", 35)
    stream = torch.Generator().manual_seed(0)
    names = {
        Name("s/1", "t", "B"): (3, 4),
        Name("s.0", "t", "A"): (7,),
        Name("s", "s", "G"): (2, 9),
    }
    uploads = [
        Message({name: torch.randn(shape, generator=stream) for name, shape in names.items()})
        for _ in range(5)
    ]
    files = [tmp_path / str(number) for number in range(5)]
    for file, upload in zip(files, uploads, strict=True):
        write(file, upload)
    found = centre(files, "median", 0.1)
    for name in names:
        every = np.stack([upload.tree[name].numpy() for upload in uploads])
        assert np.array_equal(found[name].numpy(), np.median(every, axis=0))
    write(files[0], Message({A: torch.ones(2)}))
    with pytest.raises(ValueError, match="no float32 upload of the same shapes"):
        centre(files, "median", 0.1)


@pytest.mark.parametrize("row", [row for row, method in ROWS.items() if method.averages])
def test_methods_that_only_average_take_any_centre_for_the_mean(row):
    method = ROWS[row]
    states, _ = simulate(method, [ALL, ALL])
    server, uploads = server_of(method, START, states), {}
    for client_id in ALL:
        client = client_of(method, START, states, client_id)
        steps = method.local(client, method.broadcast(server, client_id))
        uploads[client_id] = run_one(steps, pull, client_id)[1]
    weights = {each: float(upload.facts["weight"]) for each, upload in uploads.items()}
    total = trees.Tree()
    for each, upload in uploads.items():
        trees.accumulate(total, upload.tree, weights[each])
    mean = trees.cast(trees.scale(total, 1 / sum(weights.values())), torch.float32)
    same = [(each, Message(mean, upload.facts)) for each, upload in uploads.items()]
    expected = trees_of(method.aggregate(server, uploads.items()))
    for name, tensor in trees_of(method.aggregate(server, same)).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_a_median_is_where_a_liar_cannot_move_it():
    method = FedIT(lora=SMALL)
    liar = Attacked(method, lambda who, up: poked(1e6)(up) if who == "b" else up)
    states, costs = simulate(liar, [ALL[:3]], train=sign, screening=Screening(robust="median"))
    assert not any(cost.refused for cost in costs)
    uploads = []
    message = method.broadcast(method.init_server(START), "")
    for client_id in ALL[:3]:
        steps = method.local(method.init_client(START, client_id), message)
        uploads.append(run_one(steps, pull, client_id)[1])
    uploads[1] = poked(1e6)(uploads[1])
    for name, tensor in states["server"].adapter.items():
        every = torch.stack([upload.tree[name] for upload in uploads])
        assert torch.equal(tensor, every.median(dim=0).values)


@pytest.mark.parametrize("method", ["fedalt", "fedlease", "flexlora", "local"])
def test_a_method_that_does_more_than_average_has_no_robust_mean(tmp_path, method):
    rounds = {"rounds": 2, "robust": "median"}
    with pytest.raises(SettingsError, match="does more with uploads") as told:
        settings_for(tmp_path, tmp_path, method={"name": method}, rounds=rounds)
    assert "fedit, " in str(told.value)
    assert "fedalt," not in str(told.value)
    assert settings_for(tmp_path, tmp_path, method={"name": "fedit"}, rounds=rounds)


def test_the_firewalls_settings_are_checked(tmp_path):
    limit = settings_for(tmp_path, tmp_path, firewall={"norm_limit": 8}).firewall.norm_limit
    assert limit == 8.0
    for wrong in ({"norm_limit": 1.0}, {"max_upload_bytes": 0}, {"quarantine_bytes": -1}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            settings_for(tmp_path, tmp_path, firewall=wrong)
    with pytest.raises(SettingsError, match="trim"):
        settings_for(tmp_path, tmp_path, rounds={"trim": 0.5})


def test_what_is_refused_lies_in_files_that_no_client_id_can_choose(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    upload = encode(Message({A: torch.ones(2, 5)}))

    def refuse(client_id, data, round_=3):
        quarantine(run, round_, client_id, reason="why", data=data, limit=2 * len(upload))

    refuse("alice", upload)
    refuse("../../alice", b"no upload at all")
    refuse("bob", upload)  # no room any more
    refuse("alice", upload)  # the same round once more, after a crash
    refuse("alice", b"and again")
    lines = refusals(run)
    assert [line["client"] for line in lines] == ["alice", "../../alice", "bob", "alice"]
    size = len(upload)
    assert lines[0] == {
        "round": 3,
        "client": "alice",
        "reason": "why",
        "bytes": size,
        "file": "quarantine/0003-alice.safetensors",
    }
    assert (run / lines[0]["file"]).read_bytes() == upload
    assert (run / lines[1]["file"]).read_bytes() == b"no upload at all"
    assert lines[1]["file"].endswith(".bin")
    assert lines[2]["file"] is None
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert len(list((run / "quarantine").iterdir())) == 3
    assert (run / lines[3]["file"]).read_bytes() == b"and again"
    refuse("alice", b"once more")
    assert refusals(run)[4]["file"] == "quarantine/0003-alice-2.bin"


@pytest.mark.parametrize("client_id", ["..", ".", "", "a/b", "/etc"])
def test_a_ledger_has_no_place_for_an_id_that_leads_elsewhere(tmp_path, client_id):
    with pytest.raises(StoreError, match="cannot name a folder"):
        FileLedger(tmp_path, 0).put(client_id, Message({}))


def test_a_reason_can_be_shown_on_a_terminal_whatever_it_quotes():
    reason = str(Refused("it is from \x1b[2Jmars\r\n" + "x" * 10_000))
    assert reason.startswith(r"it is from \x1b[2Jmars\r\nxxx")
    assert len(reason) < 600


def test_a_dropped_value_is_the_one_of_the_round_before(tmp_path):
    for round_ in (0, 1):
        states = FileStates(tmp_path, round_)
        for key in ("clients/a", "moments/a/0", "moments/ab/0"):
            states.put(key, Moments(steps=round_))
    states.drop("clients/a")
    states.drop("moments/a")
    after = FileStates(tmp_path, 2)
    found = [after.get(key, Moments) for key in ("clients/a", "moments/a/0", "moments/ab/0")]
    assert [each.steps for each in found] == [0, 0, 1]


def test_an_upload_of_an_attempt_that_was_cut_short_is_not_in_the_ledger(tmp_path):
    FileLedger(tmp_path / "server" / "latest", 1).put("a", Message({}, {"weight": 1.0}))
    FileStates(tmp_path, 1).begin()
    assert "a" not in FileLedger(tmp_path / "server" / "latest", 2)


@dataclass(frozen=True)
class Hears:
    """A watcher who writes down what is refused, and what the command would say of it."""

    told: list[Event]
    said: list[str]

    def on_event(self, event):
        if event.what == "refuse":
            self.told.append(event)
        RoundLines(3, self.said.append).on_event(event)

    def on_record(self, line):
        pass


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A real run whose client b, known by its number of examples, uploads something huge."""
    folder = tmp_path_factory.mktemp("federation")
    model, data = save_model(folder / "model"), write_clients(folder / "data", ("a", "c", "d"))
    write_clients(data, ("b",), count=8)
    settings = settings_for(
        model,
        data,
        method={"weighting": "examples"},
        training={"carry_optimizer": True, "pass_tokens": 1},
        rounds={"rounds": 3},
        firewall={"norm_limit": 10},
    )
    prepared = prepare(replace(settings, local_baseline=False))
    examples = float(prepared.counts["b"]["train"])

    def spoil(_, upload):
        return poked(1e6)(upload) if upload.facts["weight"] == examples else upload

    arm = Arm("own", Attacked(settings.method, spoil))
    return replace(prepared, parts=replace(prepared.parts, arms=(arm,)))


@pytest.fixture(scope="module")
def run_of(attacked, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    heard = Hears([], [])
    start_run(attacked, run, heard)
    return run, heard


def test_a_real_run_goes_on_without_the_refused_and_says_so(run_of):
    run, heard = run_of
    lines = refusals(run)
    assert [(line["round"], line["client"]) for line in lines] == [(0, "b"), (1, "b"), (2, "b")]
    assert all("the upload's norm is" in line["reason"] for line in lines)
    assert all((run / line["file"]).stat().st_size == line["bytes"] for line in lines)
    refused = [line for line in scores_of(run) if "refused" in line]
    assert [line["client"] for line in refused] == ["b"] * 3
    assert [event.client_id for event in heard.told] == ["b"] * 3
    assert "warning: round 1/3: upload of client 'b' rejected: the upload's norm" in heard.said[0]
    assert not (run / "waiting").exists()
    assert not list((run / "clients" / "b").glob("*"))
    assert not list((run / "moments" / "b").rglob("*.safetensors"))
    assert list((run / "clients" / "a").glob("*"))
    assert FileLedger(run / "server" / "latest", 3).clients() == ["a", "c", "d"]


@pytest.mark.parametrize("round_", [0, 1])
def test_a_run_interrupted_at_a_refusal_goes_on(attacked, run_of, tmp_path, round_):
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        start_run(attacked, run, StopsAt("refuse", round_))
    resume_run(attacked, run)
    assert adapters_of(run) == adapters_of(run_of[0])
    assert scores_of(run) == scores_of(run_of[0])
    assert refusals(run) == refusals(run_of[0])
