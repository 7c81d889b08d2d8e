"""NIXL without us, the control: a bare agent on each side, polled as tightly as Python can, or with pauses.

Where the kernel does a part of the work, as it does for TCP, tight polling takes from it the core that it needs.
"""

import select
import time
from contextlib import suppress
from typing import Any

from zipserve.common.errors import TransferError
from zipserve.common.transport import ArenaInfo, Range


def open_agent(name: str, arenas: list[ArenaInfo]) -> Any:
    """An agent over UCX that has the arenas registered."""
    from nixl._api import nixl_agent, nixl_agent_config  # noqa: PLC0415  # takes seconds

    agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    for arena in arenas:
        agent.register_memory([(arena.base_address, arena.size_bytes, arena.device_id, arena.kind.name)], "DRAM")
    return agent


class RawSource:
    """The side that is read from."""

    def __init__(self, arenas: list[ArenaInfo]) -> None:
        self._agent = open_agent("raw-source", arenas)
        self.metadata: bytes = self._agent.get_agent_metadata()

    def poll_until_asked(self, requests: int, pause_s: float) -> None:
        """Polls until there is something to read from a file descriptor."""
        while not select.select([requests], [], [], pause_s)[0]:
            self._agent.get_new_notifs()


class RawReader:
    """The side that reads, in the calling thread."""

    def __init__(self, arenas: list[ArenaInfo], metadata: bytes) -> None:
        """
        Args:
            metadata: of the source's agent, which must be polling.
        """
        self._agent = open_agent("raw-reader", arenas)
        self._peer = self._agent.add_remote_agent(metadata)
        self._agent.make_connection(self._peer)

    def read(self, ranges: list[Range], pause_s: float) -> float:
        """Reads all ranges as one READ.

        Returns:
            Seconds from addresses to bytes.

        Raises:
            TransferError: it failed.
        """
        started = time.perf_counter()
        agent = self._agent
        local = [(r.local_address, r.size_bytes, r.local_device) for r in ranges]
        remote = [(r.remote_address, r.size_bytes, r.remote_device) for r in ranges]
        handle = agent.initialize_xfer(
            "READ", agent.get_xfer_descs(local, "DRAM"), agent.get_xfer_descs(remote, "DRAM"), self._peer
        )
        state = agent.transfer(handle)
        while state == "PROC":
            if pause_s:
                time.sleep(pause_s)
            state = agent.check_xfer_state(handle)
        seconds = time.perf_counter() - started
        with suppress(Exception):
            agent.release_xfer_handle(handle)
        if state != "DONE":
            raise TransferError("a raw read failed")
        return seconds
