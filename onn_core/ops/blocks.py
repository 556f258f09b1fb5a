"""Rows or tokens in blocks, so that what is made of them is small."""


def blocks_of(n: int, size: int) -> list[slice]:
    """0:n in slices of `size`, the last of them perhaps shorter."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
