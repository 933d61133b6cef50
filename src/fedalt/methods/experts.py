"""Experts and their routers: the slots they lie in, and the plan that chooses among them."""

from collections.abc import Mapping

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import MIXER, ROUTER, Plan, Router
from fedalt.core.tree import Tree, apply, move, select
from fedalt.methods.contract import Message
from fedalt.methods.lora import Lora
from fedalt.methods.mean import Totals


def expert(number: int) -> str:
    """The slot of a group's expert."""
    return f"expert_{number}"


def router_of(number: int) -> str:
    """The slot in which the server keeps a group's router."""
    return f"router_{number}"


def draw_router(init: Initializer, experts: int) -> Tree:
    """A router over so many experts, in slot router."""
    return move(init.mixer(2 * experts - 1), MIXER, ROUTER)


def first_rows(router: Tree, experts: int) -> Tree:
    """The rows that a router over so many experts has; one over a single expert is left out."""
    return apply(lambda g: g[: 2 * experts - 1], router) if experts > 1 else {}


def routed(lora: Lora, experts: int, router: Router) -> Plan:
    """So many experts and a router over them, which one expert does without."""
    if experts == 1:
        return lora.plan(expert(0))
    slots = tuple(lora.slot(expert(number)) for number in range(experts))
    return Plan(slots, router, lora.dropout)


def regrouped(
    experts: Tree,
    routers: Tree,
    totals: Totals,
    newcomers: Mapping[str, Message],
    groups: Mapping[str, int],
) -> tuple[Tree, Tree]:
    """Experts and routers with the means of groups in place of what those groups had.

    The first experts are means of the uploads of newcomers, which hold one slot, of any name. Their
    routers all begin as those rows of one router that are needed; without groups it stays.
    """
    if experts or not groups:
        for group, mean in totals.means():
            experts = {**experts, **select(mean, expert(group))}
            routers = {**routers, **move(mean, ROUTER, router_of(group))}
        return experts, routers
    rows, routers = first_rows(routers, max(groups.values()) + 1), {}
    for client_id, upload in newcomers.items():
        totals.add(groups[client_id], upload)
    for group, mean in totals.means():
        experts = {**experts, **{name._replace(slot=expert(group)): mean[name] for name in mean}}
        routers = {**routers, **move(rows, ROUTER, router_of(group))}
    return experts, routers
