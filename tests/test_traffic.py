"""Changes in the place of whole messages: both sides read the same, whatever was missed."""

import copy
from dataclasses import replace

import pytest
import torch
from federation import (
    START,
    USUAL,
    ByteStates,
    MemoryStates,
    one_by_one,
    pull,
    run_groups,
    served,
    simulate,
)
from test_contract import ALL, COHORTS, SMALL

from fedalt.core import tree as trees
from fedalt.core.codec import encode
from fedalt.core.noise import Randomness
from fedalt.core.seeds import generator
from fedalt.engine.changes import Change, Known, ReferenceLackedError, change_of, message_of
from fedalt.engine.dry_run import dry_run
from fedalt.engine.firewall import Refused
from fedalt.engine.privacy import Release
from fedalt.engine.states import server_of
from fedalt.engine.traffic import Coding, Traffic
from fedalt.methods.contract import Message
from fedalt.methods.fedalt import FedALT
from fedalt.methods.fedit import FedIT
from fedalt.methods.fedlease import FedLEASE

FEDALT, FEDIT = FedALT(lora=SMALL), FedIT(lora=SMALL)
INT8 = Traffic(upload="int8", download="int8")
LEVELS = {"int8": 127, "int4": 7}


def upload_of(coding: Coding, seed: int) -> Message:
    """An upload of random numbers, a change of a tenth from one seed to the next."""
    first = coding._first("a").tree
    moved = {
        name: tensor + sum(torch.randn(tensor.shape, generator=generator(at)) for at in range(seed))
        for name, tensor in first.items()
    }
    return Message(moved, {"weight": 1})


def test_by_default_nothing_is_another_number_or_byte():
    states, costs = simulate(FEDALT, COHORTS)
    coded, same = simulate(FEDALT, COHORTS, traffic=Traffic(upload="float32", download="exact"))
    assert costs == [replace(cost, seconds=costs[at].seconds) for at, cost in enumerate(same)]
    assert states.keys() == coded.keys() == {"server", *(f"clients/{who}" for who in ALL)}
    (first, *_), server = costs, FEDALT.init_server(START)
    assert first.download_bytes == len(encode(FEDALT.broadcast(server, "a")))


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_errors_are_part_of_the_next_change_so_that_they_do_not_add_up(kind):
    coding, states = Coding(FEDALT, START, Traffic(upload=kind)), MemoryStates()
    received = first = coding._first("a")
    summed = trees.zeros_like(first.tree)
    for round_ in range(1, 8):
        upload = upload_of(coding, round_)
        change = coding.send(states, "a", upload)
        step = {name: (upload.tree[name] - received.tree[name]).abs().max() for name in upload.tree}
        read = message_of(change, received)
        summed = trees.add(summed, trees.subtract(read.tree, received.tree))
        received = Known.of(read.tree)
        assert received.digest == states["clients/a/sent"].digest
        for name, tensor in upload.tree.items():
            bound = step[name] / LEVELS.get(kind, 256) * 1.01 + 1e-6
            assert (read.tree[name] - tensor).abs().max() <= bound
            whole = tensor - first.tree[name]  # the sum of all changes, up to one step's error
            assert (summed[name] - whole).abs().max() <= bound + 1e-5


def test_a_rejected_upload_leaves_both_references_where_they_were():
    def huge_once(client_id, number, order):
        done = pull(client_id, number, order)
        if client_id == "b" and rejecting:
            done = replace(done, tree={name: t * float("nan") for name, t in done.tree.items()})
        return done

    rejecting = False
    states, _ = simulate(FEDALT, [ALL], train=huge_once, traffic=INT8)
    before = copy.deepcopy(dict(states))
    rejecting = True
    states, costs = simulate(FEDALT, [ALL], states, train=huge_once, traffic=INT8)
    assert [cost.client_id for cost in costs if cost.refused] == ["b"]
    for key in ("clients/b/sent", "server/received/b"):
        assert states[key].digest == before[key].digest
    for key in ("clients/a/sent", "server/received/a"):
        assert states[key].digest != before[key].digest
    rejecting = False
    states, costs = simulate(FEDALT, [ALL], states, traffic=INT8)
    assert not any(cost.refused for cost in costs)
    for who in ALL:
        assert states[f"clients/{who}/sent"].digest == states[f"server/received/{who}"].digest


def test_who_missed_a_round_is_sent_what_the_others_have_in_full():
    states, _ = simulate(FEDALT, [ALL, ALL, ("a", "c")], traffic=INT8)
    coding = Coding(FEDALT, START, INT8, ALL)
    downlink = coding.downlink(states, server_of(FEDALT, START, states))
    assert isinstance(downlink.sent("a"), Change)
    assert isinstance(downlink.sent("b"), Message)
    assert isinstance(downlink.sent("stranger"), Message)
    before, _ = simulate(FEDALT, [ALL, ALL], traffic=INT8)
    had = coding.downlink(before, server_of(FEDALT, START, before)).known("a")
    read = message_of(downlink.sent("a"), had)
    assert trees.equal(read.tree, downlink.sent("b").tree)
    assert trees.equal(read.tree, downlink.message("a").tree)
    assert len(encode(downlink.sent("a"))) < len(encode(downlink.sent("b")))


def test_a_change_of_something_else_is_never_read():
    coding = Coding(FEDALT, START, INT8)
    states, other = MemoryStates(), Known.of({})
    change = coding.send(states, "a", upload_of(coding, 1))
    with pytest.raises(ReferenceLackedError, match="but the reference here is ''"):
        message_of(change, other)
    forms = dry_run(FEDALT, START, "a", FEDALT.broadcast(FEDALT.init_server(START), "a"))
    assert (
        coding.open(MemoryStates(), "a", change, forms).tree.keys()
        == upload_of(coding, 1).tree.keys()
    )
    with pytest.raises(Refused, match="the upload cannot be read: a change of"):
        coding.open(MemoryStates(), "a", replace(change, reference="0" * 32), forms)
    with pytest.raises(Refused, match="sent in int4, expected int8"):
        coding.open(MemoryStates(), "a", replace(change, kind="int4"), forms)
    short = {name: tensor[:1] for name, tensor in upload_of(coding, 1).tree.items()}
    wrong = change_of(Message(short, {"weight": 1}), coding._first("a"), "int8", 0)
    with pytest.raises(Refused, match=r"as \(1, 5\), expected \(2, 5\)"):
        coding.open(MemoryStates(), "a", wrong, forms)


def test_who_is_expected_to_have_uploaded_something_else_sends_all_of_it():
    coding, states = Coding(FEDALT, START, INT8), MemoryStates()
    upload = upload_of(coding, 1)
    assert coding.send(states, "a", upload, expected="0" * 32) is upload
    assert trees.equal(states["clients/a/sent"].tree, upload.tree)
    first = coding._first("b").digest
    assert isinstance(coding.send(states, "b", upload, expected=first), Change)


@pytest.mark.parametrize("method", [FEDALT, FEDIT, FedLEASE(lora=SMALL, warm_up=1)], ids=repr)
def test_a_resumed_run_equals_a_straight_one_bit_by_bit(method):
    straight, _ = simulate(method, COHORTS, ByteStates(), traffic=INT8)
    first, _ = simulate(method, COHORTS[:2], ByteStates(), traffic=INT8)
    resumed, _ = simulate(method, COHORTS[2:], copy.deepcopy(first), traffic=INT8)
    assert straight.keys() == resumed.keys()
    assert all(straight[key][0] == resumed[key][0] for key in straight)


def test_clients_with_messages_of_their_own_have_references_of_their_own():
    method = FedLEASE(lora=SMALL, warm_up=1)
    states, costs = simulate(method, [ALL] * 4, traffic=INT8)
    assert states["server/published"].apart
    assert {f"server/published/{who}" for who in ALL} <= states.keys()
    assert max(cost.download_bytes for cost in costs[-3:]) < min(
        cost.download_bytes for cost in simulate(method, [ALL] * 4)[1][-3:]
    )


def large(factor):
    def train(client_id, number, order):
        done = pull(client_id, number, order)
        if client_id != "b" or not hasattr(done, "tree"):
            return done
        return replace(done, tree={name: t * factor for name, t in done.tree.items()})

    return train


@pytest.mark.parametrize("download", ["float32", "bf16", "int8"])
def test_one_client_a_million_times_larger_is_refused_by_name(download):
    traffic = Traffic(download=download)
    states, costs = simulate(FEDALT, [ALL], train=large(1e6), traffic=traffic)
    (refused,) = [cost for cost in costs if cost.refused]
    assert refused.client_id == "b"
    assert "more than" in refused.refused
    assert "download = 'exact'" in refused.refused
    expected, _ = simulate(FEDALT, [("a", "c")])
    assert states["server"].latest.clients() == ["a", "c"]
    assert trees.equal(states["server"].total, expected["server"].total)


def test_one_client_with_a_hundred_times_the_weight_is_refused_by_name():
    def weighty(client_id, number, order):
        return replace(pull(client_id, number, order), examples=1000 if client_id == "b" else 10)

    method = FedALT(lora=SMALL, weighting="examples")
    _, costs = simulate(method, [ALL], train=weighty, traffic=Traffic(download="int4"))
    (refused,) = [cost for cost in costs if cost.refused]
    assert refused.client_id == "b"
    assert "the upload's norm times its weight" in refused.refused
    _, costs = simulate(FEDALT, [ALL], train=weighty, traffic=Traffic(download="int4"))
    assert not any(cost.refused for cost in costs)


def test_where_noise_hides_a_client_nobody_is_rejected_by_what_others_have_sent():
    states = ByteStates()
    release = Release(states, 0.0, Randomness(0), carries=True)
    execute, traffic = one_by_one(large(1e6)), Traffic(download="float32")
    outcome = run_groups(
        FEDALT, START, states, [sorted(ALL)], execute, release=release, traffic=traffic
    )
    assert not any(client.refused for client in outcome.clients)


def test_one_client_a_million_times_larger_passes_where_sums_are_exact_or_nobody_subtracts():
    _, costs = simulate(FEDALT, [ALL], train=large(1e6))
    assert not any(cost.refused for cost in costs)
    _, costs = simulate(FEDIT, [ALL], train=large(1e6), traffic=Traffic(download="float32"))
    assert not any(cost.refused for cost in costs)


def test_a_total_in_float32_leaves_room_for_the_others_below_the_limit():
    factor, float32 = 2.0**12, Traffic(download="float32")
    exact, _ = simulate(FEDALT, [ALL], train=large(factor))
    rounded, costs = simulate(FEDALT, [ALL], train=large(factor), traffic=float32)
    assert not any(cost.refused for cost in costs)
    theirs = served(FEDALT, exact, ["b"])["b"].tree
    ours = served(FEDALT, rounded, ["b"], traffic=float32)["b"].tree
    largest = max(tensor.abs().max() for tensor in trees.select(ours, "individual").values())
    for name, tensor in trees.select(ours, "rest_of_world").items():
        # Half a unit in the last place of the total, shared by the other two.
        assert (tensor - theirs[name]).abs().max() <= largest * 2.0**-24 * 1.01


def test_a_late_upload_counts_less_in_a_mean():
    from fedalt.engine.uploads import Upload, UploadStore

    states = MemoryStates()
    with states.spooling() as folder:
        store = UploadStore(folder, states, USUAL)
        message = Message({}, {"weight": 4})
        store.spool(Upload("a", message, 0.0, counts=0.5), message, b"")
        store.spool(Upload("b", message, 0.0), message, b"")
        assert [spooled.size.weight for spooled in store.accepted.values()] == [2.0, 4.0]


def test_published_anew_it_is_the_state_itself_in_full():
    states, _ = simulate(FEDALT, [ALL, ALL], traffic=INT8)
    coding, server = Coding(FEDALT, START, INT8, ALL), server_of(FEDALT, START, states)
    assert coding.publish(states, server) < 2.0**-24
    downlink = coding.downlink(states, server)
    assert isinstance(downlink.sent("a"), Message)
    for name, tensor in downlink.sent("a").tree.items():
        assert torch.equal(tensor, server.total[name].float())
