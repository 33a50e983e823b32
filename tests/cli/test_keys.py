"""`keys`: of a keys file, and of administration data."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from tests.cli.kit import call, document, settings

from asgi_llm_guard.control import Control
from asgi_llm_guard.identity import ApiKeys

SECRET = "0123456789abcdef0123456789abcdef"
ENVIRONMENT = {"LLM_GUARD_IDENTITY__SECRET": SECRET}
FILE = '[identity]\nkind = "api_keys"\nfile = "keys.toml"\n'


def caller_of(keys: ApiKeys, key: str) -> Any:
    return keys({"headers": [(b"authorization", f"Bearer {key}".encode())]})


def test_new_gives_an_entry_that_works(tmp_path: Path) -> None:
    """A new key is shown once, beside an entry that a keys file takes as it is; the secret is that of the environment."""
    file = settings(tmp_path, FILE)
    told = document(
        "keys", "new", "--config", file, "--caller", "team", "--department", "research", "--department", "sales",
        "--max-iterations", "9", "--expires", "90d", env=ENVIRONMENT,
    )  # fmt: skip
    (tmp_path / "keys.toml").write_text(told["entry"], "utf-8")
    identity = caller_of(ApiKeys.from_file(tmp_path / "keys.toml", secret=SECRET), told["key"])
    assert (identity.caller, identity.departments, identity.params) == (
        "team",
        ("research", "sales"),
        {"max_iterations": 9},
    )
    (listed,) = document("keys", "list", "--config", file, env=ENVIRONMENT)["keys"]
    assert listed["id"] == told["id"]
    assert 89 < (listed["expires_at_ms"] / 1000 - time.time()) / 86_400 <= 90
    shown = call("keys", "list", "--config", file, env=ENVIRONMENT).stdout
    assert "team" in shown
    assert told["key"] not in shown
    assert told["digest"] not in shown


def test_hash_reads_the_key_from_stdin(tmp_path: Path) -> None:
    """T25: a key that there is becomes an entry without being an argument, and is not shown."""
    file = settings(tmp_path, FILE)
    arguments = ("keys", "hash", "--config", file, "--id", "old", "--caller", "team")
    told = document(*arguments, stdin="key-of-somebody-1234\n", env=ENVIRONMENT)
    assert told["digest"] == ApiKeys.hash("key-of-somebody-1234", SECRET)
    ran = call(*arguments, stdin="key-of-somebody-1234\n", env=ENVIRONMENT)
    assert "key-of-somebody" not in ran.output
    assert call(*arguments, stdin="short\n", env=ENVIRONMENT).exit_code == 3


def test_the_secret_may_be_in_a_file(tmp_path: Path) -> None:
    """Without a secret in the settings, that of the file which the keys file names is taken."""
    file = settings(tmp_path, FILE)
    (tmp_path / "keys.toml").write_text('secret_file = "keys.secret"\n', "utf-8")
    (tmp_path / "keys.secret").write_text(f"{SECRET}\n", "utf-8")
    told = document("keys", "hash", "--config", file, "--id", "a", "--caller", "b", stdin="key-of-somebody-1234")
    assert told["digest"] == ApiKeys.hash("key-of-somebody-1234", SECRET)
    (tmp_path / "keys.toml").write_text("", "utf-8")
    ran = call("keys", "new", "--config", file, "--caller", "team")
    assert ran.exit_code == 3
    assert "LLM_GUARD_IDENTITY__SECRET" in ran.stderr


def test_settings_without_keys(tmp_path: Path) -> None:
    """Where neither administration data nor a keys file is configured, the error says what would be."""
    ran = call("keys", "list", "--config", settings(tmp_path, ""))
    assert ran.exit_code == 3
    assert "neither `control`" in ran.stderr


@pytest.mark.parametrize("when", ["yesterday", "2020-01-01", "soon"])
def test_keys_end_in_the_future(tmp_path: Path, when: str) -> None:
    """A key that has ended already is not made."""
    ran = call("keys", "new", "--config", settings(tmp_path, FILE), "--caller", "t", "--expires", when, env=ENVIRONMENT)
    assert ran.exit_code == 2
    assert "--expires" in ran.stderr


def test_overlap_that_is_no_duration(tmp_path: Path) -> None:
    """A mistake of the command line is one, exit 2, before anything is looked at."""
    ran = call("keys", "rotate", "k1", "--config", settings(tmp_path, FILE), "--overlap", "long", "--reason", "x")
    assert (ran.exit_code, "--overlap: expected a number and a unit" in ran.stderr) == (2, True), ran.output


def test_revoking_needs_administration_data(tmp_path: Path) -> None:
    """Keys of a file are not changed by the program: it says where keys that can be are kept."""
    file = settings(tmp_path, FILE)
    ran = call("keys", "revoke", "k1", "--reason", "lost", "--yes", "--config", file, env=ENVIRONMENT)
    assert ran.exit_code == 3
    assert "--control" in ran.stderr


def test_keys_are_listed_and_revoked_in_administration_data(tmp_path: Path) -> None:
    """S6: keys of administration data are listed without digests; revoking one is audited with who and why."""
    url = f"sqlite:///{tmp_path / 'control.db'}"

    async def made() -> Any:
        from asgi_llm_guard.control.changes import Actor

        control = Control(url, secret=SECRET)
        _, key = await control.new_key("team", actor=Actor(name="test"), departments=["research"])
        await control.aclose()
        return key

    key = asyncio.run(made())
    arguments = ("--config", settings(tmp_path, ""), "--control", url)
    (listed,) = document("keys", "list", *arguments)["keys"]
    assert (listed["id"], listed["caller"], listed["revoked"]) == (key.id, "team", False)
    assert key.digest not in call("keys", "list", *arguments).output
    assert document("keys", "revoke", key.id, "--reason", "lost a laptop", "--yes", *arguments) == {"revoked": key.id}
    assert document("keys", "list", *arguments)["keys"] == []
    assert document("keys", "list", "--all", *arguments)["keys"][0]["revoked"] is True

    async def audited() -> Any:
        control = Control(url, secret=SECRET)
        try:
            return (await control.audit())[0]
        finally:
            await control.aclose()

    entry = asyncio.run(audited())
    assert (entry.verb, entry.reason, entry.address) == ("revoke_key", "lost a laptop", "cli")
    assert entry.actor.startswith("os:")


def test_rotated_keys_hold_both_for_a_while(tmp_path: Path) -> None:
    """T25: a key of administration data is shown once; its rotation gives another, and the old one ends when it is told."""
    url = f"sqlite:///{tmp_path / 'control.db'}"
    file = settings(tmp_path, f'[control]\nurl = "{url}"\n')
    env = {"LLM_GUARD_CONTROL__SECRET": SECRET}
    first = document("keys", "new", "--caller", "team", "--reason", "a test", "--config", file, env=env)
    second = document("keys", "rotate", first["id"], "--overlap", "1d", "--reason", "due", "--config", file, env=env)
    assert first["key"] != second["key"]
    rows = {row["id"]: row for row in document("keys", "list", "--config", file, env=env)["keys"]}
    assert set(rows) == {first["id"], second["id"]}
    assert 0 < rows[first["id"]]["expires_at_ms"] / 1000 - time.time() <= 86_400
    assert rows[second["id"]]["caller"] == "team"
    assert second["key"] not in call("keys", "list", "--config", file, env=env).output
    shown = call("keys", "new", "--caller", "team", "--config", file, env=env).stdout
    assert "The key, shown once:" in shown
    assert "holds until it is revoked." in shown
    for stored in tmp_path.glob("control.db*"):
        assert first["key"].encode() not in stored.read_bytes()
