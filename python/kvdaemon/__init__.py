"""Client of kvd, the KV-cache daemon of an inference node.

A session stores and loads whole blocks of bytes by 32-byte hashes, in memory that all engines and scripts of the node share::

    import kvdaemon

    with kvdaemon.connect("/run/kvd/default/kvd.sock") as session:
        blocks = session.register({"model": "demo", "weights": "v1"}, block_bytes=1 << 20)
        blocks.store([h1, h2], [buffer1, buffer2])   # ['stored', 'stored']
        blocks.lookup([h1, h2, h3])                  # [Run(start=0, length=2, where='host')]
        blocks.load([h1, h2], [out1, out2])          # ['loaded', 'loaded']

Buffers are anything with the buffer protocol (bytes, bytearray, memoryview, numpy arrays, ...), contiguous, one block each,
or one buffer with all blocks one after the other; to load into, writable. Hashes are a list of 32-byte ``bytes``, or one
``bytes`` with all of them one after the other, which is faster. The GIL is released around everything that waits or copies.

The vLLM connector is in :mod:`kvdaemon.vllm`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from kvdaemon import _native
from kvdaemon._native import KvdError, __version__, opaque_block
from kvdaemon._paths import default_socket

if TYPE_CHECKING:
    from typing_extensions import Buffer

    Hashes = bytes | Sequence[bytes]
    Buffers = Buffer | Sequence[Buffer]

__all__ = ["KvdError", "Namespace", "Run", "Session", "__version__", "connect", "default_socket"]

HASH_BYTES = 32
_FIELDS = frozenset(
    "tenant model weights kv_dtype cell_encoding hash adapter scales rope overrides quantization compute_dtype speculative "
    "weights_epoch engine_build machine_isa rank_layout block_tokens groups".split()
)
"""Names that the record's format knows."""


class Run(NamedTuple):
    """Consecutive blocks of a lookup that are in the same place."""

    start: int
    """Position of the first in the list of hashes."""
    length: int
    """Number of blocks."""
    where: str
    """``host``, ``nvme``, ``object``, ``fetching`` (on its way up) or ``filling`` (being stored, not loadable yet)."""


def pack_hashes(hashes: Hashes) -> bytes:
    """Hashes as one ``bytes``.

    Raises:
        KvdError: kind ``invalid``, when one has another length than 32 bytes.
    """
    if isinstance(hashes, (bytes, bytearray, memoryview)):
        return bytes(hashes)
    packed = b"".join(hashes)
    if len(packed) != HASH_BYTES * len(hashes):
        raise _invalid(f"{len(hashes)} hashes have {len(packed)} bytes: pass 32 bytes for each")
    return packed


def _invalid(text: str) -> KvdError:
    error = KvdError(text)
    error.kind = "invalid"
    return error


def record_fields(namespace: Mapping[str, Any], tenant: str, block_bytes: int | None) -> list[tuple[str, str]]:
    """The complete fields of a namespace record, from those that a script cares about.

    With ``block_bytes`` the inside of a block is opaque; without it, ``namespace`` says all of ``block_tokens`` and
    ``group.0.kind``, ``group.0.layers``, ``group.0.heads``, ``group.0.cell_bytes``.
    """
    fields: dict[str, str] = {
        "tenant": tenant,
        "model": "-",
        "weights": "-",
        "kv_dtype": "bytes",
        "cell_encoding": "opaque",
        "hash": "caller",
        "groups": "1",
    }
    if block_bytes is not None:
        tokens, cell = opaque_block(block_bytes)
        fields |= {"block_tokens": str(tokens), "group.0.kind": "opaque", "group.0.layers": "1", "group.0.heads": "1"}
        fields["group.0.cell_bytes"] = str(cell)
    for name, value in namespace.items():
        plain = name in _FIELDS or name.startswith(("x.", "group."))
        fields[name if plain else f"x.{name}"] = str(value)
    return sorted(fields.items())


class Namespace:
    """Blocks that may be taken for one another: all of one record, of the same size. Made by :meth:`Session.register`."""

    def __init__(self, native: _native.Namespace) -> None:
        self._native = native

    @property
    def id(self) -> bytes:
        """BLAKE3 of the namespace's record, 32 bytes."""
        return self._native.id

    @property
    def block_bytes(self) -> int:
        """Size of every block, in bytes."""
        return self._native.block_bytes

    def lookup(self, hashes: Hashes, *, leading: bool = False) -> list[Run]:
        """Which blocks are there? What no run covers is absent.

        Args:
            hashes: block hashes, a prompt's in order.
            leading: only the run from the first hash on matters; others don't count as used.

        Raises:
            KvdError: ``unavailable`` without a daemon, ``invalid`` for malformed hashes.
        """
        return [Run(*run) for run in self._native.lookup(pack_hashes(hashes), leading=leading)]

    def store(self, hashes: Hashes, buffers: Buffers) -> list[str]:
        """Stores blocks; ``buffers`` may be changed as soon as this returns.

        Returns:
            One word for each block: ``stored``, ``present`` (was there already), ``filling`` (somebody else stores it now),
            ``no_space``, ``stale`` (took too long), ``failed:<reason>``.

        Raises:
            KvdError: ``unavailable`` without a daemon, ``invalid`` for malformed hashes or buffers of another size.
        """
        return self._native.store(pack_hashes(hashes), buffers)

    def load(self, hashes: Hashes, buffers: Buffers) -> list[str]:
        """Loads blocks into writable buffers. A buffer whose word is not ``loaded`` may hold anything.

        Returns:
            One word for each block: ``loaded`` (checked against its checksum), ``absent``, ``failed:<reason>``.

        Raises:
            KvdError: ``unavailable`` without a daemon, ``invalid`` for malformed hashes or buffers of another size.
        """
        return self._native.load(pack_hashes(hashes), buffers)


class Session:
    """A connection to the daemon. Threads may share it; their calls wait for each other. Made by :func:`connect`."""

    def __init__(self, native: _native.Session) -> None:
        self._native = native
        self._namespaces: list[Namespace] = []

    @property
    def tenant(self) -> str:
        """The tenant whose socket this is."""
        return self._native.tenant

    @property
    def daemon_version(self) -> str:
        """The daemon's version."""
        return self._native.daemon_version

    def register(self, namespace: Mapping[str, Any], *, block_bytes: int | None = None) -> Namespace:
        """Joins a namespace.

        Args:
            namespace: what must agree for blocks to be interchangeable, as names and values; see docs/formats.md. Names that
                the format does not know are kept as private ones (``x.<name>``).
            block_bytes: size of every block in bytes, when the record does not describe what is inside.

        Raises:
            KvdError: ``invalid`` when the record is not complete or not legal, ``unavailable`` without a daemon.
        """
        fields = record_fields(namespace, self.tenant, block_bytes)
        joined = Namespace(self._native.register(fields))
        if block_bytes is not None and joined.block_bytes != block_bytes:
            raise _invalid(f"the record describes blocks of {joined.block_bytes} bytes, not {block_bytes}")
        self._namespaces.append(joined)
        return joined

    def lookup(self, hashes: Hashes, *, leading: bool = False) -> list[Run]:
        """:meth:`Namespace.lookup` of the one namespace of this session."""
        return self._only().lookup(hashes, leading=leading)

    def store(self, hashes: Hashes, buffers: Buffers) -> list[str]:
        """:meth:`Namespace.store` of the one namespace of this session."""
        return self._only().store(hashes, buffers)

    def load(self, hashes: Hashes, buffers: Buffers) -> list[str]:
        """:meth:`Namespace.load` of the one namespace of this session."""
        return self._only().load(hashes, buffers)

    def _only(self) -> Namespace:
        if len(self._namespaces) != 1:
            raise _invalid(f"this session has {len(self._namespaces)} namespaces: call the method of one of them")
        return self._namespaces[0]

    def status(self) -> dict[str, Any]:
        """What the daemon says of itself; see docs/formats.md."""
        said: dict[str, Any] = json.loads(self._native.status())
        return said

    def ping(self) -> None:
        """Waits for an answer of the daemon.

        Raises:
            KvdError: ``unavailable`` when none comes in time.
        """
        self._native.ping()

    def close(self) -> None:
        """Ends the session. Closing twice is fine."""
        self._native.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(socket: str | None = None, *, label: str = "", timeout: float = 5.0) -> Session:
    """Connects to the daemon.

    Args:
        socket: path of the tenant's socket; None: where ``kvd serve`` puts the default tenant's.
        label: shown by ``kvd status``.
        timeout: seconds after which a call without an answer fails.

    Raises:
        KvdError: ``unavailable`` when there is no daemon, ``unsupported`` when it speaks another version.
    """
    return Session(_native.Session(socket or default_socket(), label, timeout))
