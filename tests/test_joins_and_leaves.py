"""Clients that join a run late or leave it: who trains when, and what of them stays."""

CLIENTS = ("a", "b", "c")
STAYS = {"b": {"leaves": 2}, "c": {"joins": 1}}
