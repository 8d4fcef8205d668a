"""The log of a run, to the last line. Prefect sends it in batches from a thread, and gives up what is waiting when the process ends."""

from __future__ import annotations

import threading

from prefect.logging.handlers import APILogWorker

PATIENCE = 300.0  # seconds; a server that is being restarted takes one


def deliver() -> None:
    """Waits until the server has all lines that were said so far: for the end of a flow, whose server may be away just then.

    MEASURED: server killed in the middle of a stage of 12 s and back 22 s later: without this, not one of its 120 lines arrived.
    """
    # in a thread: where there is an event loop, Prefect would hand back a coroutine instead of waiting
    waiting = threading.Thread(target=APILogWorker.drain_all, kwargs={"timeout": PATIENCE}, daemon=True)
    waiting.start()
    waiting.join(PATIENCE)
