"""How nodes meet: nothing that a stranger puts into the store is run, and nobody outside can reach one node's store."""

import base64
import os
import pickle
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch._C._distributed_c10d import TCPStore

from stas.system.rendezvous import listen
from tests.support.launch import started, wait_until

ROOT = Path(__file__).parents[2]


class Command:
    """Unpickled, it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.trace}",)


def ports_of(pid: int) -> set[int]:
    return {each.laddr.port for each in psutil.Process(pid).net_connections() if each.status == psutil.CONN_LISTEN}


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_pickle_of_a_stranger_is_not_run(nodes: int, tmp_path: Path):
    trace = tmp_path / "ran"
    bits = base64.b64encode(pickle.dumps(Command(trace)))
    line = [sys.executable, "-m", "stas", "launch", "--processes", str(3 - nodes)]
    if nodes > 1:
        with listen("127.0.0.1", 0, 2) as free:
            place = f"127.0.0.1:{free.getsockname()[1]}"
        line += ["--nodes", "2", "--node", "0", "--rendezvous", place, "--job", "7.0"]
    with started([*line, "train", "--recipe", "lite0", "--workspace", str(tmp_path)]) as process:
        wait_until(lambda: process.poll() is not None or ports_of(process.pid), "the store")
        limit = timedelta(seconds=5)
        store = TCPStore(
            "127.0.0.1", min(ports_of(process.pid)), is_master=False, timeout=limit, wait_for_workers=False
        )
        written, end = set(), time.monotonic() + 5
        while process.poll() is None and time.monotonic() < end and not trace.exists():
            try:  # the store lists its keys, so that no name in it is a secret
                for key in {"torch.rendezvous.7.0", *store.list_keys()}:
                    store.set(key.removeprefix("/"), bits.decode())
                    written.add(key)
            except RuntimeError:
                break  # the job is over
            time.sleep(0.02)
    assert written and not trace.exists()


@pytest.mark.parametrize(
    ("host", "nodes", "reachable"),
    [("127.0.0.1", 1, "127.0.0.1"), ("example.invalid", 1, "127.0.0.1"), ("127.0.0.2", 2, "127.0.0.2")],
)
def test_the_store_listens_only_where_it_must(host: str, nodes: int, reachable: str):
    with listen(host, 0, nodes) as server:
        assert server.getsockname()[0] == reachable


def test_an_address_of_another_machine_falls_back_to_all_interfaces(caplog: pytest.LogCaptureFixture):
    with listen("192.0.2.1", 0, 2) as server:
        assert server.getsockname()[0] == "0.0.0.0"
    assert "not the address of one of this node's interfaces" in caplog.text


def test_nothing_unpickles_what_the_network_brings():
    pattern = re.compile(r"_object\w*\(|rdzv-backend\", \"c10d|--standalone")
    for path in (ROOT / "stas").rglob("*.py"):
        assert not re.search(pattern, path.read_text().replace("gather_objects(", "")), path
