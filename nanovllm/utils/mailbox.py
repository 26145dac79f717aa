"""Mailbox: one message at a time in shared memory, from one process to several.

The memory is an anonymous file that workers inherit as a file descriptor: it has no name in /dev/shm, cannot be left
behind however the processes end, and no other user can open it. It grows with the messages, so that none is too long.
"""

import mmap
import os
import struct

_DOORBELL = struct.Struct("<Q")  # bytes of the message
DOORBELL_SIZE = _DOORBELL.size
_FIRST_SIZE = 2**16


def anonymous_file(name: str) -> int:
    """A new file in memory, closed with its last file descriptor, which is returned. `name` is for who looks into /proc.

    Raises:
        OSError: this system has none.
    """
    if not hasattr(os, "memfd_create"):
        raise OSError("tensor_parallel_size above 1 needs Linux: it shares memory between processes by memfd_create")
    return os.memfd_create(name)


class Mailbox:
    """One process's view of the memory.

    Args:
        fd: of an anonymous file; the mailbox closes it.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory: mmap.mmap | None = None

    def write(self, message: bytes) -> bytes:
        """Replace the message, which all readers must be done with.

        Returns:
            What tells a reader that it is there, for `read`: short enough for a packet.
        """
        if self._memory is None or len(message) > len(self._memory):
            os.ftruncate(self.fd, max(2 * len(message), _FIRST_SIZE))
            self._map()
        assert self._memory is not None
        self._memory[: len(message)] = message
        return _DOORBELL.pack(len(message))

    def read(self, doorbell: bytes) -> memoryview:
        """The message, in place: valid until the writer is told that it has been read."""
        (size,) = _DOORBELL.unpack(doorbell)
        if self._memory is None or size > len(self._memory):
            self._map()
        assert self._memory is not None
        return memoryview(self._memory)[:size]

    def close(self) -> None:
        """Give the memory back."""
        self._memory = None
        os.close(self.fd)

    def _map(self) -> None:
        self._memory = mmap.mmap(self.fd, os.fstat(self.fd).st_size)
