"""Where the tensors of a safetensors file begin: all that processes of a connection must know."""


def head_length(data: bytes) -> int:
    """How many bytes come before a file's tensors; at most all of them if it is no such file."""
    return min(len(data), 8 + int.from_bytes(data[:8], "little"))
