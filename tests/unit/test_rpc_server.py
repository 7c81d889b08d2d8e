"""What a kubelet is told of a service."""

import asyncio
import threading

import httpx
import pytest

from zipserve.common.metrics import Metrics
from zipserve.common.rpc import server


def test_a_loop_that_hangs_does_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_ANSWER_S", 0.1)
    loop, go_on = asyncio.new_event_loop(), threading.Event()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        assert server._answers(loop)
        loop.call_soon_threadsafe(go_on.wait)
        assert not server._answers(loop)
        go_on.set()
        assert server._answers(loop)
    finally:
        go_on.set()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert not server._answers(loop)


@pytest.mark.parametrize(("ready", "lives"), [(True, True), (False, True), (True, False)])
def test_pages(ready: bool, lives: bool) -> None:
    port = Metrics("router").serve("127.0.0.1", 0, lambda: ready, lambda: lives)
    found = {path: httpx.get(f"http://127.0.0.1:{port}{path}").status_code for path in ("/live", "/health", "/metrics")}
    assert found == {"/live": 200 if lives else 503, "/health": 200 if ready and lives else 503, "/metrics": 200}
