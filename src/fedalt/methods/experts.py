"""Experts and their routers: the slots they lie in, and the plan that chooses among them."""

from fedalt.adapters.plan import MIXER, ROUTER, Plan, Router
from fedalt.adapters.start import Start
from fedalt.core.tree import Tree, apply, move
from fedalt.methods.lora import Lora


def expert(number: int) -> str:
    """The slot of a group's expert."""
    return f"expert_{number}"


def router_of(number: int) -> str:
    """The slot in which the server keeps a group's router."""
    return f"router_{number}"


def draw_router(start: Start, experts: int) -> Tree:
    """A router over so many experts, in slot router."""
    return move(start.mixer(2 * experts - 1), MIXER, ROUTER)


def first_rows(router: Tree, experts: int) -> Tree:
    """The rows that a router over so many experts has; one over a single expert is left out."""
    return apply(lambda g: g[: 2 * experts - 1], router) if experts > 1 else {}


def routed(lora: Lora, experts: int, router: Router) -> Plan:
    """So many experts and a router over them, which one expert does without."""
    if experts == 1:
        return lora.plan(expert(0))
    slots = tuple(lora.slot(expert(number)) for number in range(experts))
    return Plan(slots, router, lora.dropout)
