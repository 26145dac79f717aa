"""The main program of a worker process, run as a script: what must be in place before anything slow is imported.

It watches the parent, so that the worker leaves with it even in the middle of an import, and reports why it failed, even
if that was an import.
"""

import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import NoReturn

PARENT_CHECK_SECONDS = 0.5
MAX_REPORT = 2**16  # bytes: it is sent in one piece
MAX_TRACEBACK = 10_000  # characters, the last ones


def main() -> NoReturn:
    """Run one worker to its end. Arguments: rank, the parent's process id, and the file descriptors of `Workers`."""
    rank, parent, socket_fd, mailbox_fd, store_fd = (int(argument) for argument in sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    rings = socket.socket(fileno=socket_fd)
    failure: tuple[str, bool, Exception | None] | None
    try:
        from nanovllm.engine.worker import run_worker

        failure = run_worker(rank, rings, mailbox_fd, store_fd)
    except BaseException:
        failure = (traceback.format_exc(), False, None)
    if failure is not None:
        what, lost_peer, user_error = failure
        report = pickle.dumps((what[-MAX_TRACEBACK:], lost_peer, user_error))
        if len(report) > MAX_REPORT:
            report = pickle.dumps((what[-MAX_TRACEBACK:], lost_peer, None))
        with suppress(OSError):
            rings.send(report)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if failure is None else 1)  # the destructors of a group whose other ranks have gone may wait for them


def _leave_with(parent: int) -> None:
    """End this process within a second of its parent, even in the middle of a collective.

    Not by PR_SET_PDEATHSIG, which counts the end of the thread that started the worker as the end of the parent.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    del sys.path[0]  # this file's folder
    main()
