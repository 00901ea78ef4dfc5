"""How the nodes of a job meet: a rendezvous for torchrun that reads numbers and names, never a pickle.

torchrun's own default unpickles what it finds in its store, and the store has no password: it lists its keys to
everyone who can connect, so that even a random job name is no secret. It also listens on every interface.
"""

import errno
import logging
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from ipaddress import ip_address

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from stas.errors import TrainingError
from stas.system.stop import check_stop

log = logging.getLogger(__name__)
BACKEND = "stas"  # for torchrun's --rdzv-backend; --rdzv-conf node=INDEX says which node this is
PATIENCE = 600.0  # seconds to wait for the other nodes
PAUSE = 0.2  # seconds between two looks


def register() -> None:
    """Make BACKEND known to torchrun in this process."""
    rendezvous_handler_registry.register(BACKEND, _create)


def listen(host: str, port: int, nodes: int) -> socket.socket:
    """A socket that listens where the other nodes will connect.

    Args:
        host: a name or address of this node.
        port: the port; 0 takes a free one.
        nodes: how many will connect. A single node needs nobody from outside and listens on the loopback interface.

    Raises:
        TrainingError: the port is in use.
    """
    for address in ["127.0.0.1"] if nodes == 1 else _own_addresses(host):
        try:
            return socket.create_server((address, port), family=_family(address), backlog=1024)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # that address is no interface of this node
                raise TrainingError(f"{host}:{port}: cannot listen there ({error}): choose another port") from error
    log.warning("%s: not the address of one of this node's interfaces; listening on all of them", host)
    return socket.create_server(("", port), backlog=1024)


def _own_addresses(host: str) -> list[str]:
    """Addresses that may be this node's, best first. A loopback address counts only if it was asked for."""
    try:
        return [str(ip_address(host))]
    except ValueError:
        found = [*_resolve(host), *_resolve(socket.gethostname())]  # a cluster's DNS may not know `host` yet
        return [address for address in found if not ip_address(address).is_loopback]


def _resolve(host: str) -> list[str]:
    try:
        return [str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class _Meeting(RendezvousHandler):
    """Node 0 keeps the store; each node says there that it has come, and waits for the others."""

    def __init__(self, host: str, port: int, node: int, nodes: int, job: str) -> None:
        self.host, self.port, self.node, self.nodes, self.job = host, port, node, nodes, job

    @property
    def use_agent_store(self) -> bool:
        return True  # the ranks meet in the same store

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        host, port, store = self._serve() if self.node == 0 else self._connect()
        here = PrefixStore(self.job, store)
        here.set(f"node{self.node}", "here")
        for node in range(self.nodes):
            _wait(lambda node=node: here.check([f"node{node}"]), f"node {node} of {self.nodes}")
        return RendezvousInfo(here, self.node, self.nodes, RendezvousStoreInfo(host, port))

    def _serve(self) -> tuple[str, int, Store]:
        server = listen(self.host, self.port, self.nodes)
        address, port = server.getsockname()[:2]
        host = self.host if ip_address(address).is_unspecified else address
        return host, port, self._store(host, port, server.detach())

    def _connect(self) -> tuple[str, int, Store]:
        _wait(lambda: _answers(self.host, self.port), f"node 0 at {self.host}:{self.port}")
        return self.host, self.port, self._store(self.host, self.port)

    def _store(self, host: str, port: int, server: int | None = None) -> TCPStore:
        limit = timedelta(seconds=PATIENCE)
        own = {"is_master": True, "master_listen_fd": server} if server is not None else {"is_master": False}
        return TCPStore(host, port, self.nodes, timeout=limit, wait_for_workers=False, **own)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.job

    def shutdown(self) -> bool:
        return True


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    host, _, port = parameters.endpoint.rpartition(":")
    node = parameters.get_as_int("node")
    assert node is not None
    return _Meeting(host.strip("[]"), int(port), node, parameters.max_nodes, parameters.run_id)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def _wait(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds; look at requests to stop meanwhile.

    Raises:
        StoppedEarly: a signal asked this process to stop.
        TrainingError: it did not hold within PATIENCE.
    """
    end = time.monotonic() + PATIENCE
    while not condition():
        check_stop()
        if time.monotonic() > end:
            raise TrainingError(f"{what} did not come within {PATIENCE:.0f} seconds: look at that node's log")
        time.sleep(PAUSE)
