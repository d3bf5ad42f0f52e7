"""One thread's connection to the daemon, and the namespaces that it has joined."""

from __future__ import annotations

from collections.abc import Mapping

import kvdaemon

_FOUND = ("host", "nvme", "object", "fetching")
_MOST_HASHES = 4096


class Line:
    """A session of its own: calls of other threads don't wait for it."""

    def __init__(self, socket: str, label: str, timeout_s: float, record: Mapping[str, str], row_bytes: int, turn: int) -> None:
        self._session = kvdaemon.connect(socket, label=label, timeout=timeout_s)
        self._record, self._row_bytes = record, row_bytes
        self._spaces: dict[int, kvdaemon.Namespace] = {}
        self.turn = turn
        """Lines of an earlier turn than the tier's are to be closed."""

    def space(self, group: int) -> kvdaemon.Namespace:
        """The namespace of a KV-cache group: rows of different groups are different things of one size."""
        found = self._spaces.get(group)
        if found is None:
            record = {**self._record, "x.group": str(group)}
            found = self._spaces[group] = self._session.register(record, block_bytes=self._row_bytes)
        return found

    def find(self, keys: list[bytes]) -> list[bool]:
        """Which of these chunks can be loaded."""
        found = [False] * len(keys)
        for group, places in by_group(keys).items():
            for at in range(0, len(places), _MOST_HASHES):
                some = places[at : at + _MOST_HASHES]
                for start, length, where in self.space(group).lookup(hashes([keys[i] for i in some])):
                    for i in some[start : start + length]:
                        found[i] = where in _FOUND
        return found

    def ping(self) -> None:
        """Waits for an answer."""
        self._session.ping()

    def close(self) -> None:
        """Ends the session; the arena is unmapped."""
        self._session.close()


def by_group(keys: list[bytes]) -> dict[int, list[int]]:
    """Positions of the keys of each KV-cache group. A key is a block hash, then the group in four bytes."""
    groups: dict[int, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(int.from_bytes(key[-4:], "big"), []).append(i)
    return groups


def hashes(keys: list[bytes]) -> bytes:
    """Their block hashes, 32 bytes each."""
    return b"".join(key[:-4].rjust(kvdaemon.HASH_BYTES, b"\0") for key in keys)
