"""The oracles of FedALT that need no model; those of the mixed layer are in test_layer.py."""

import torch
from federation import EXAMPLES, SITES, START, pull, simulate

from fedalt.adapters.plan import MIXER
from fedalt.core import tree as trees
from fedalt.core.tree import move, select
from fedalt.engine.states import client_of, server_of
from fedalt.methods.fedalt import INDIVIDUAL, REST_OF_WORLD, FedALT
from fedalt.methods.lora import Lora
from fedalt.training.orders import Fitted

LORA = Lora(rank=2, alpha=4, dropout=0.0)
METHOD = FedALT(lora=LORA)
P = sum(LORA.rank * (d_in + d_out) for d_in, d_out in SITES.values())


def rest_of_world(method, states, client_id):
    message = method.broadcast(server_of(method, START, states), client_id)
    shared = method.shared(client_of(method, START, states, client_id), message)
    return select(shared.tree, REST_OF_WORLD)


def uploads_of(states, clients):
    return {
        each: move(states[f"clients/{each}"].individual, INDIVIDUAL, REST_OF_WORLD)
        for each in clients
    }


def test_identical_clients_make_the_rest_of_world_equal_to_the_individual_adapter():
    states, _ = simulate(
        METHOD, [("a", "b", "c")], train=lambda _, number, order: pull("a", number, order)
    )
    for client, upload in uploads_of(states, "abc").items():
        assert trees.equal(rest_of_world(METHOD, states, client), upload)


def test_of_two_clients_each_gets_the_others_upload_bit_for_bit():
    states, _ = simulate(METHOD, [("a", "b")] * 2)
    uploads = uploads_of(states, "ab")
    assert trees.equal(rest_of_world(METHOD, states, "a"), uploads["b"])
    assert trees.equal(rest_of_world(METHOD, states, "b"), uploads["a"])


def test_the_rest_of_world_leaves_its_reader_out_and_averages_to_the_mean_of_all():
    states, _ = simulate(METHOD, [("a", "b", "c")])
    uploads = uploads_of(states, "abc")
    rows = {each: rest_of_world(METHOD, states, each) for each in "abc"}
    for name in uploads["a"]:
        torch.testing.assert_close(
            rows["a"][name], (uploads["b"][name] + uploads["c"][name]) / 2, rtol=0, atol=1e-6
        )
        mean = sum(upload[name] for upload in uploads.values()) / 3
        torch.testing.assert_close(
            sum(row[name] for row in rows.values()) / 3, mean, rtol=0, atol=1e-6
        )


def test_one_client_a_million_times_larger_costs_the_others_no_precision():
    def huge(client_id, number, order):
        fitted = pull(client_id, number, order)
        factor = 1e6 if client_id == "a" else 1.0
        tree = {
            name: tensor * factor if name in order.train else tensor
            for name, tensor in fitted.tree.items()
        }
        return Fitted(tree, fitted.examples)

    states, _ = simulate(METHOD, [("a", "b", "c")], train=huge)
    uploads = uploads_of(states, "abc")
    row = rest_of_world(METHOD, states, "b")  # a and c
    alone = rest_of_world(METHOD, states, "a")  # b and c, after subtracting a's huge part
    for name in row:
        expected = (uploads["b"][name] + uploads["c"][name]) / 2
        torch.testing.assert_close(alone[name], expected, rtol=1e-6, atol=1e-7)


def test_in_the_first_round_the_rest_of_world_adds_nothing():
    states, _ = simulate(METHOD, [])
    row = rest_of_world(METHOD, states, "a")
    assert all(not tensor.any() for name, tensor in row.items() if name.factor == "B")


def test_a_single_client_has_no_rest_of_world_and_divides_by_nothing():
    states, _ = simulate(METHOD, [("a",)] * 3)
    row = rest_of_world(METHOD, states, "a")
    assert all(not tensor.any() for name, tensor in row.items() if name.factor == "B")


def test_a_newcomer_gets_the_mean_of_everyone():
    states, _ = simulate(METHOD, [("a", "b")])
    uploads = uploads_of(states, "ab")
    for name, tensor in rest_of_world(METHOD, states, "new").items():
        expected = (uploads["a"][name] + uploads["b"][name]) / 2
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


def test_an_absent_clients_last_upload_stays_in_the_total():
    states, _ = simulate(METHOD, [("a", "b", "c"), ("a", "b"), ("a",)])
    uploads = uploads_of(states, "abc")
    for name, tensor in rest_of_world(METHOD, states, "a").items():
        expected = (uploads["b"][name] + uploads["c"][name]) / 2
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


def test_weights_by_examples_make_a_weighted_mean():
    method = FedALT(lora=LORA, weighting="examples")
    states, _ = simulate(method, [("a", "b", "c")] * 2)
    uploads = uploads_of(states, "abc")
    b, c = EXAMPLES["b"], EXAMPLES["c"]
    for name, tensor in rest_of_world(method, states, "a").items():
        expected = (b * uploads["b"][name] + c * uploads["c"][name]) / (b + c)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


def test_the_rest_of_world_is_frozen_and_the_mixer_trains():
    orders = {}

    def watch(client_id, number, order):
        orders[client_id] = {name.slot for name in order.train}
        return pull(client_id, number, order)

    simulate(METHOD, [("a",)], train=watch)
    assert orders["a"] == {INDIVIDUAL, MIXER, "head"}


def test_message_bytes_equal_the_closed_forms():
    # Upload: P float32 numbers. Download: the total, P float64 numbers. The rest is names.
    _, costs = simulate(METHOD, [("a", "b")] * 2)
    first, later = costs[0], costs[2]
    assert first.download_bytes < 600  # before anyone has uploaded the total is empty
    assert 0 < later.upload_bytes - 4 * P < 4000
    assert 0 < later.download_bytes - 8 * P < 4000
