"""The two halves of fedalt as Flower looks for them."""

from fedalt.flower.apps import client, server

__all__ = ["client", "server"]
