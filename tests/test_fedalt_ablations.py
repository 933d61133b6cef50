"""FedALT's ablations: each switch by itself, and all of them off."""

from dataclasses import replace

import pytest
import torch
from federation import (
    SITES,
    START,
    MemoryStates,
    assert_same_servings,
    one_by_one,
    pull,
    run_groups,
    run_one,
    served,
    servings,
    simulate,
)
from runs_for_tests import save_model, settings_for, write_clients
from test_fedalt import LORA, rest_of_world, uploads_of

from fedalt.adapters.plan import MIXER
from fedalt.core import tree as trees
from fedalt.core.tree import Name, select
from fedalt.engine.states import server_of
from fedalt.federation.agreement import write_agreement
from fedalt.methods import METHODS
from fedalt.methods.contract import Message
from fedalt.methods.fedalt import INDIVIDUAL, REST_OF_WORLD, FedALT
from fedalt.methods.fedalt_ablations import FedALTAblations
from fedalt.runs.setup import prepare


def test_with_all_switches_off_it_is_fedalt_bit_for_bit():
    cohorts = [("a", "b", "c"), ("a", "c"), ("b",)]
    method, ablations = FedALT(lora=LORA), FedALTAblations(lora=LORA)
    straight, costs = simulate(method, cohorts)
    switched, same_costs = simulate(ablations, cohorts)
    assert [(cost.upload_bytes, cost.download_bytes) for cost in costs] == [
        (cost.upload_bytes, cost.download_bytes) for cost in same_costs
    ]
    assert_same_servings(served(method, straight, "abc"), served(ablations, switched, "abc"))


def test_the_name_fedalt_with_a_switch_is_an_ablation_and_without_one_the_method():
    entry = METHODS.entries["fedalt"]
    assert entry.method(("weighting",)) == FedALT()
    assert entry.method(("weighting", "gate")) == FedALTAblations()
    assert METHODS.name_of(FedALTAblations(gate="half")) == "fedalt"


def test_a_rest_of_world_that_is_asked_to_train_does():
    orders = {}

    def watch(client_id, number, order):
        orders[client_id] = {name.slot for name in order.train}
        return pull(client_id, number, order)

    simulate(FedALTAblations(lora=LORA, train_row=True), [("a",)], train=watch)
    assert orders["a"] == {INDIVIDUAL, REST_OF_WORLD, MIXER, "head"}


def test_a_trained_rest_of_world_is_forgotten_after_the_round():
    method = FedALTAblations(lora=LORA, train_row=True)
    states, _ = simulate(method, [("a", "b")] * 2)
    assert trees.equal(rest_of_world(method, states, "a"), uploads_of(states, "b")["b"])


def test_the_global_mean_counts_its_reader():
    method = FedALTAblations(lora=LORA, row="global_mean")
    states, _ = simulate(method, [("a", "b")])
    uploads = uploads_of(states, "ab")
    for name, tensor in rest_of_world(method, states, "a").items():
        expected = (uploads["a"][name] + uploads["b"][name]) / 2
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("gate", "weights"), [("half", (0.5, 0.5)), ("one_over_clients", (1 / 3, 2 / 3))]
)
def test_fixed_gates_replace_the_mixer(gate, weights):
    method = FedALTAblations(lora=LORA, gate=gate)
    states, _ = simulate(method, [("a", "b", "c")])
    serving = served(method, states, "a")["a"]
    assert serving.plan.combine.weights == pytest.approx(weights)
    assert not select(serving.tree, MIXER)


def weights_of(method, start, cohorts, clients):
    """The fixed weights of each round's orders, then those that each client serves with."""
    seen = []

    def watch(client_id, number, order):
        seen.append(order.plan.combine.weights)
        return pull(client_id, number, order)

    states = MemoryStates()
    for cohort in cohorts:
        run_groups(method, start, states, [cohort], one_by_one(watch))
    own = [servings(method, start, states, each, watch)[0] for each in clients]
    return seen, [serving.plan.combine.weights for serving in own]


@pytest.mark.parametrize("clients", [1, 2, 3, 8])
def test_one_over_k_counts_the_whole_federation_from_the_first_round_on(clients):
    method = FedALTAblations(lora=LORA, gate="one_over_clients")
    start = replace(START, clients=clients)
    names = [f"c{number}" for number in range(clients)]
    cohorts = [names[:1], names[:2], names]  # the others come later, and count from the beginning
    trained, own = weights_of(method, start, cohorts, names)
    assert {*trained, *own} == {(1 / clients, 1 - 1 / clients)}


def test_one_over_k_follows_who_joins_and_who_leaves():
    method = FedALTAblations(lora=LORA, gate="one_over_clients")
    server = method.init_server(replace(START, clients=2))
    for each in "abc":
        _, upload = run_one(
            method.local(method.init_client(START, each), method.broadcast(server, each)),
            pull,
            each,
        )
        server = method.aggregate(server, [(each, upload)])
    assert method.broadcast(server, "a").facts["clients"] == 3
    for left, of in (("a", 2), ("b", 1)):
        server = method.without(server, left)
        assert method.broadcast(server, "c").facts["clients"] == of


def test_a_newcomer_counts_in_one_over_k_once_more_have_uploaded_than_there_were_at_first():
    method = FedALTAblations(lora=LORA, gate="one_over_clients")
    server = method.init_server(replace(START, clients=3))
    message = Message(START.adapter(LORA.slot(INDIVIDUAL)), {"weight": 1.0})
    counts = []
    for each in ("a", "new", "b", "c"):
        server = method.aggregate(server, [(each, message)])
        counts.append(method.broadcast(server, each).facts["clients"])
    assert counts == [3, 3, 3, 4]  # "new" takes the place of who has not yet uploaded


def test_a_run_tells_its_method_how_many_clients_there_are(tmp_path):
    model, data = save_model(tmp_path / "model"), write_clients(tmp_path / "data", clients="abcd")
    method = {"name": "fedalt", "gate": "one_over_clients", "rank": 2}
    prepared = prepare(settings_for(model, data, method=method))
    server = prepared.parts.settings.method.init_server(prepared.parts.init)
    assert prepared.parts.settings.method.broadcast(server, "a").facts["clients"] == 4
    terms = write_agreement(tmp_path, "six", tuple("abcdef"), (), prepared.parts)
    assert terms.init.clients == 6


def test_a_shared_mixer_is_the_mean_of_all_mixers():
    method = FedALTAblations(lora=LORA, share_mixer=True)
    states, _ = simulate(method, [("a", "b")])
    name = Name("block.0.q", MIXER, "G")
    mean = (states["clients/a"].mixer[name] + states["clients/b"].mixer[name]) / 2
    for serving in served(method, states, "ab").values():
        torch.testing.assert_close(serving.tree[name], mean, rtol=0, atol=1e-6)


def test_a_frozen_a_is_never_sent_and_the_rest_of_world_is_the_mean_of_the_products():
    method = FedALTAblations(lora=LORA, freeze_a=True)
    start = method.init_client(START, "a").individual
    states, _ = simulate(method, [("a", "b", "c"), ("a", "c")])
    sent = method.broadcast(server_of(method, START, states), "a").tree
    assert {(name.slot, name.factor) for name in sent} == {(INDIVIDUAL, "B")}
    uploads, row = uploads_of(states, "abc"), rest_of_world(method, states, "a")
    for site in SITES:
        a, b = (Name(site, REST_OF_WORLD, factor) for factor in "AB")
        assert torch.equal(row[a], start[Name(site, INDIVIDUAL, "A")])
        assert uploads["b"][b].any()
        mean = sum(uploads[each][b] @ uploads[each][a] for each in "bc") / 2
        torch.testing.assert_close(row[b] @ row[a], mean)


@pytest.mark.parametrize("other", [{"train_row": True}, {"shared_start": False}])
def test_a_frozen_a_has_to_be_everybodys(other):
    with pytest.raises(ValueError, match="is only for freeze_a=False, and here freeze_a=True"):
        FedALTAblations(freeze_a=True, **other)


@pytest.mark.parametrize("gate", ["half", "one_over_clients"])
@pytest.mark.parametrize("other", [{"share_mixer": True}, {"mixer_init": "zeros"}])
def test_fixed_weights_have_no_mixer_to_be_set(gate, other):
    with pytest.raises(ValueError, match=f"is only for gate='mixer', and here gate='{gate}'"):
        FedALTAblations(gate=gate, **other)
