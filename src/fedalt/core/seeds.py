"""Random numbers that depend on what they are for, never on who drew before."""

import hashlib

import torch


def seed_of(*parts: str | int) -> int:
    """A 63-bit seed from the parts that name its purpose, such as (run, client, round)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for one purpose."""
    return torch.Generator(device=device).manual_seed(seed_of(*parts))
