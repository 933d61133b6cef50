"""Where the tensors of a safetensors file begin; the connection's processes need no more of it."""


def head_length(data: bytes) -> int:
    """How many bytes of a file come before its tensors; all of what is no such file, or less."""
    return min(len(data), 8 + int.from_bytes(data[:8], "little"))
