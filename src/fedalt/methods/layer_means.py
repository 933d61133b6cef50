"""Where every layer has groups of its own: means of each group and of the rest, and their mix."""

from collections.abc import Sequence

import torch

from fedalt.adapters.plan import HEAD
from fedalt.core.tree import Name, Tree, select
from fedalt.methods.contract import Ledger, Message
from fedalt.methods.experts import expert
from fedalt.methods.layer_cuts import Groups, layer_of
from fedalt.methods.mean import Totals

EXPERT, EXTERNAL, LAM = "expert", "external", "lam"


def external(number: int) -> str:
    """The slot of the mean of all clients that are not in a group."""
    return f"external_{number}"


def means_by_layer(uploads: Ledger, groups: Groups) -> Tree:
    """Of every layer and group, the mean of its members in slot expert_0 and so on.

    Beside it, in slot external_0 and so on, is that of all others, if there are any. Uploads lie in
    one slot of any name and are weighted by their fact "weight".
    """
    totals = {layer: Totals() for layer in groups}
    for client in uploads.clients():
        upload = uploads[client]
        for layer, of_layer in groups.items():
            tree = {name: t for name, t in upload.tree.items() if layer_of(name.site) == layer}
            for group in set(of_layer.values()):
                at = group if group == of_layer[client] else -1 - group
                totals[layer].add(at, Message(tree, upload.facts))
    means = (mean for of_layer in totals.values() for mean in of_layer.means())
    return {
        name._replace(slot=expert(at) if at >= 0 else external(-1 - at)): tensor
        for at, mean in means
        for name, tensor in mean.items()
    }


def means_for(client: str, means: Tree, groups: Groups) -> Tree:
    """A client's part of these means: of its group in every layer, and of the others there."""
    tree: Tree = {}
    for name, tensor in means.items():
        own = groups[layer_of(name.site)][client]
        slot = {expert(own): EXPERT, external(own): EXTERNAL}.get(name.slot)
        if slot is not None:
            tree[name._replace(slot=slot)] = tensor
    return tree


def slots_of(tree: Tree) -> Sequence[str]:
    """The slots that are bound: the group's mean and, if some layer has any, that of others."""
    return (EXPERT, EXTERNAL) if select(tree, EXTERNAL) else (EXPERT,)


def mixed(tree: Tree, lam_rate: float) -> Tree:
    """The tree that is bound: B of both means times lam and 1 - lam, lam = sigmoid(lam_rate z).

    In a layer with one group there are no others, and the mean counts whole. The gradient of z is
    that of the logit, without the factor `lam_rate`: AdamW's steps are as long either way, but the
    norm to which gradients are cut is that of all numbers, and z would take it from the adapter.
    """
    bound = select(tree, HEAD)
    for name, tensor in select(tree, EXPERT).items():
        bound[name], others = tensor, name._replace(slot=EXTERNAL)
        if EXTERNAL in slots_of(tree):
            bound[others] = tree.get(others, torch.zeros_like(tensor))
        if others in tree and name.factor == "B":
            z = tree[Name(layer_of(name.site), LAM, "weight")]
            lam = torch.sigmoid(lam_rate * z.detach() + (z - z.detach()))
            bound[name], bound[others] = lam * tensor, (1 - lam) * tree[others]
    return bound
