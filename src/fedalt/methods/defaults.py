"""Parts of the contract that many methods answer alike; a method's class names those it takes."""

from typing import Any

from fedalt.methods.contract import Deploy, Message, Serving


def at_once(serving: Serving) -> Deploy:
    """What a client serves where nothing has to be trained for it."""
    return serving
    yield  # a generator all the same, as in methods that train before they serve


def deploy_shared(self: Any, client: Any, message: Message) -> Deploy:
    """A client serves what is shared."""
    return at_once(self.shared(client, message))


def nothing_shared(self: Any, client: Any, message: Message) -> None:
    """What is shared, if anything, is of no use alone."""


def kept_in_averages(self: Any, server: Any, client_id: str) -> None:
    """An average does not tell what one client put in."""
