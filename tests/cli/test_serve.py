"""`serve`: the gateway of a settings file, as a process of its own."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.cli.kit import clean_environment, document, process, settings
from tests.ports import free_port
from tests.servers import POLL_S

from asgi_llm_guard.cli.serve import application
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity import ApiKeys
from asgi_llm_guard.telemetry import instrument
from asgi_llm_guard.testing import FakeProvider

SECRET = "0123456789abcdef0123456789abcdef"
BUDGET = '[[policies]]\nkind = "budget"\nlimits = ["$5/1d"]\nper = "caller"\nname = "budget"\n'


def gateway(folder: Path, provider: str, text: str = BUDGET, *, storage: str | None = None) -> None:
    key, record = ApiKeys.generate("team", secret=SECRET)
    (folder / "keys.toml").write_text(record.to_toml(), "utf-8")
    (folder / "key").write_text(key, "utf-8")
    settings(
        folder,
        f'{text}\n[identity]\nkind = "api_keys"\nfile = "keys.toml"\nsecret = "{SECRET}"\n'
        f'[gateway]\n[[gateway.deployments]]\nprovider = "openai"\nmodel_name = "gpt-4o-mini"\n'
        f'api_key = "key-of-nobody"\napi_base = "{provider}"\n',
        storage=storage,
    )


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server on a free port, once it answers."""
    port = free_port()
    program = "from asgi_llm_guard.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, "serve", "--port", str(port), "--log-level", "warning", *arguments],
        cwd=folder,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        url = f"http://127.0.0.1:{port}"
        try:
            until = time.monotonic() + 60
            while running.poll() is None and time.monotonic() < until:
                try:
                    urllib.request.urlopen(f"{url}/healthz", timeout=60).close()
                    break
                except OSError:
                    time.sleep(POLL_S)
            yield url, running
        finally:
            if running.poll() is None:
                running.kill()
            running.communicate()


def asked(url: str, body: dict[str, Any] | None = None, *, key: str = "") -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


CHAT = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}


@pytest.mark.parametrize("workers", [1, 2])
def test_serve_answers_settles_and_ends(tmp_path: Path, workers: int) -> None:
    """S10: a gateway from a settings file answers, charges, is ready, and at SIGTERM ends with 0 and nothing held."""
    with FakeProvider().serve() as provider:
        gateway(tmp_path, provider)
        key = (tmp_path / "key").read_text("utf-8")
        with serving(tmp_path, "--workers", str(workers)) as (url, running):
            status, health = asked(f"{url}/readyz")
            assert (status, health["checks"]["storage"]) == (200, "ok")
            status, answer = asked(f"{url}/v1/chat/completions", CHAT, key=key)
            assert (status, answer["object"]) == (200, "chat.completion")
            assert asked(f"{url}/v1/chat/completions", CHAT, key="lg-wrong-key-of-nobody")[0] == 403
            assert asked(f"{url}/v1/models", key=key)[0] == 200
            running.send_signal(signal.SIGTERM)
            out, errors = running.communicate(timeout=60)
    assert (running.returncode, out, errors) == (0, "", "")
    total = document("usage", "--config", tmp_path / "guard.toml", "--since", "1h")["total"]
    assert (total["calls"], total["estimated"]) == (1, 0)
    assert total["cost_nanousd"] > 0


def test_serve_mounts_the_administration(tmp_path: Path) -> None:
    """S5: with [admin], its pages are under its path and closed to callers; other paths are the gateway's."""
    from asgi_llm_guard.admin.options import AdminCredential

    with FakeProvider().serve() as provider:
        _, credential = AdminCredential.generate("ops", role="admin", secret=SECRET)
        admin = (
            f'[admin]\nsecret = "{SECRET}"\n[[admin.credentials]]\nname = "ops"\nrole = "admin"\n'
            f'digest = "{credential.digest}"\n'
        )
        gateway(tmp_path, provider, BUDGET + admin)
        key = (tmp_path / "key").read_text("utf-8")
        with serving(tmp_path) as (url, _):
            assert asked(f"{url}/admin/api/usage", key=key)[0] in {401, 403}
            assert asked(f"{url}/usage/v1/usage", key=key)[0] == 200
            assert asked(f"{url}/administrator", key=key)[0] == 404


@pytest.mark.parametrize("telemetry", [True, False])
def test_serve_tells_telemetry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, telemetry: bool) -> None:
    """S17: with --telemetry the guard of each process is instrumented, and only then."""
    with FakeProvider().serve() as provider:
        gateway(tmp_path, provider, BUDGET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_GUARD_CONFIG", str(tmp_path / "guard.toml"))
    monkeypatch.setenv("ASGI_LLM_GUARD_SERVE_TELEMETRY", "1" if telemetry else "")
    guard = application()._guard
    if telemetry:
        with pytest.raises(ConfigurationError, match="instrumented already"):
            instrument(guard)
    else:
        instrument(guard).uninstrument()
    asyncio.run(guard.aclose())


def test_a_stop_reaches_a_running_service(tmp_path: Path) -> None:
    """S8: `kill` on the command line has a running service refuse the caller within seconds, and `--lift` takes it back."""
    with FakeProvider().serve() as provider:
        gateway(tmp_path, provider, f'{BUDGET}[control]\nurl = "sqlite:///{tmp_path / "control.db"}"\n')
        key = (tmp_path / "key").read_text("utf-8")
        with serving(tmp_path) as (url, _):
            assert asked(f"{url}/v1/chat/completions", CHAT, key=key)[0] == 200
            arguments = ("--reason", "a test", "--config", tmp_path / "guard.toml")
            document("kill", "caller", "team", "--yes", *arguments)
            assert _until(url, key, 403)[1]["error"]["code"] == "stopped"
            document("kill", "--lift", "caller:team", *arguments)
            assert _until(url, key, 200)[0] == 200


def _until(url: str, key: str, status: int) -> tuple[int, Any]:
    """The first answer with this status, or the last one of a minute."""
    until = time.monotonic() + 60
    while True:
        answer = asked(f"{url}/v1/chat/completions", CHAT, key=key)
        if answer[0] == status or time.monotonic() > until:
            return answer


@pytest.mark.parametrize("workers", ["1", "2"])
def test_serve_refuses_another_programs_file(tmp_path: Path, workers: str) -> None:
    """S3: a file that is no database is told in a line, and not by workers that end and are started again for ever."""
    (tmp_path / "notes.txt").write_text("Not a database.", "utf-8")
    gateway(tmp_path, "http://127.0.0.1:1/v1", storage="sqlite:///notes.txt")
    ran = process("serve", "--workers", workers, "--port", str(free_port()), cwd=tmp_path)
    assert ran.returncode == 3
    assert "notes.txt) is no SQLite file; correct the path" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("text", "storage", "arguments", "said"),
    [
        ("", None, (), "gateway: is missing"),
        ("[gateway]\ndeployments = []\n", None, (), "gateway: deployments: none is left"),
        ("[gateway]\nfoo = 1\n", None, (), "foo: unknown key"),
        ("[gateway]\ndeployments = []\n", "memory://", ("--workers", "2"), "2 workers are asked for"),
    ],
    ids=["no gateway", "no deployment", "unknown key", "no shared storage"],
)
def test_serve_refuses_to_start(
    tmp_path: Path, text: str, storage: str | None, arguments: tuple[str, ...], said: str
) -> None:
    """Settings that describe no gateway, or one whose processes would not share their counters: exit 3, in a line."""
    settings(tmp_path, text, storage=storage)
    ran = process("serve", *arguments, cwd=tmp_path)
    assert ran.returncode == 3
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr
