"""Which documents share a row."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Put documents into as few rows as may be: the largest first, each where the least room is left that holds it.

    Args:
        sizes: Tokens of each document, at most `length`.
        length: Tokens of a row.

    Returns:
        The numbers of each row's documents.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), in order
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        at = bisect_left(rooms, (sizes[number], 0))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(number)
        insort(rooms, (room - sizes[number], row))
    return rows
