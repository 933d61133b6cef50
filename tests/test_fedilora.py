"""FediLoRA: which layer is repaired and how far, by hand; the mean is the owner-only mean."""

import pytest
import torch
from federation import SITES, MemoryStates, pull, simulate

from fedalt.core import tree as trees
from fedalt.core.tree import Name
from fedalt.methods.fedilora import FediLoRA, repaired
from fedalt.methods.lora import Lora
from fedalt.methods.own_ranks import SHARED
from fedalt.methods.unequal_ranks import UnequalRanks

LORA = Lora(rank=2, alpha=4, dropout=0.0)
RANKS = {"a": 1, "b": 3}
METHOD = FediLoRA(lora=LORA, ranks=RANKS)
OWNER_MEAN = UnequalRanks(variant="owner_mean", lora=LORA, ranks=RANKS)


def adapter(**rows):
    tree = {}
    for site, row in rows.items():
        tree[Name(site, SHARED, "A")] = torch.tensor([row], dtype=torch.float32)
        tree[Name(site, SHARED, "B")] = torch.tensor([[7.0], [8.0]])
    return tree


BEGUN = adapter(x=[1, 0], y=[1, 0], z=[1, 0])
TRAINED = adapter(x=[2, 0], y=[3, 4], z=[4, 3])  # cosines 1, 0.6 and 0.8


def test_the_strangest_layer_alone_moves_towards_what_it_began_as():
    after = repaired(TRAINED, BEGUN, 0.95)
    wanted = {**TRAINED, Name("y", SHARED, "A"): torch.tensor([[2.2, 2.4]])}  # 0.4 and 0.6 of them
    torch.testing.assert_close(after, wanted)
    for name in TRAINED:
        assert torch.equal(after[name], TRAINED[name]) == (name != Name("y", SHARED, "A"))


def test_a_layer_that_is_like_enough_needs_no_repair():
    assert trees.equal(repaired(TRAINED, BEGUN, 0.6), TRAINED)
    assert not trees.equal(repaired(TRAINED, BEGUN, 0.61), TRAINED)


def test_a_layer_that_has_turned_round_becomes_what_it_was():
    turned = adapter(x=[2, 0], y=[-5, 0], z=[4, 3])
    name = Name("y", SHARED, "A")
    for limit in (0.0, 0.95):
        assert torch.equal(repaired(turned, BEGUN, limit)[name], BEGUN[name])


def test_of_a_layer_that_did_not_move_nothing_is_changed():
    assert trees.equal(repaired(BEGUN, BEGUN, 1.0), BEGUN)


def test_the_form_of_a_repaired_upload_is_found_without_numbers():
    meta = [trees.on(tree, "meta") for tree in (TRAINED, BEGUN)]
    found = repaired(*meta, 0.95)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in TRAINED.items()
    }


def uploads(method, cohorts, states):
    """What every client trained and what it sent, in the last round."""
    trained, sent = {}, {}

    def watch(client_id, number, order):
        fitted = pull(client_id, number, order)
        trained[client_id] = order.tree, trees.select(fitted.tree, SHARED)
        return fitted

    class Watching(type(method)):
        def aggregate(self, server, replies):
            replies = list(replies)
            sent.update({client_id: upload.tree for client_id, upload in replies})
            return super().aggregate(server, replies)

    simulate(Watching(**vars(method)), cohorts, states, train=watch)
    return trained, sent


def test_the_first_round_has_nothing_to_repair_with_and_is_the_owner_only_mean():
    ours, theirs = MemoryStates(), MemoryStates()
    simulate(METHOD, [("a", "b", "c")], ours)
    simulate(OWNER_MEAN, [("a", "b", "c")], theirs)
    assert trees.equal(ours["server"].adapter, theirs["server"].adapter)


def test_later_a_client_sends_what_it_trained_but_for_one_repaired_layer():
    states, _ = simulate(METHOD, [("a", "b", "c")])
    trained, sent = uploads(METHOD, [("a", "b", "c")], states)
    for client, (begun, after) in trained.items():
        different = [name for name in after if not torch.equal(after[name], sent[client][name])]
        assert [name.factor for name in different] == ["A"]
        assert torch.equal(sent[client][different[0]], repaired(after, begun, 0.95)[different[0]])


def test_a_row_is_the_mean_of_its_owners_alone():
    states = MemoryStates()
    _, sent = uploads(METHOD, [("a", "b", "c")], states)
    for site in SITES:
        name = Name(site, SHARED, "A")
        a, b, c = (sent[client][name] for client in "abc")
        wanted = torch.stack([(a[0] + b[0] + c[0]) / 3, (b[1] + c[1]) / 2, b[2]])
        torch.testing.assert_close(states["server"].adapter[name], wanted)


@pytest.mark.parametrize("limit", [-0.1, 1.1])
def test_a_limit_is_a_cosine_of_like_layers(limit):
    with pytest.raises(ValueError, match="limit"):
        FediLoRA(lora=LORA, limit=limit)
