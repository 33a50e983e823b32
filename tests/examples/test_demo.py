"""`make demo`."""

from __future__ import annotations

import re
import subprocess
import sys

import httpx2
import pytest
from examples.demo import Requests, Scenes

from asgi_llm_guard.testing import FakeProvider


def test_demo_shows_what_it_promises() -> None:
    """The demo ends well within its time, with the literal refusals, and a ledger that is the bill."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "examples.demo"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": ""},
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "429 - iterations: session 'crawl-17' has used up its calls (limit 3 calls, used 3," in done.stdout
    assert "403 - " in done.stdout
    assert "402 - user_budget: user 'trial' has used up its daily budget (limit $0.01, used" in done.stdout
    assert done.stdout.count("after 1 HTTP request:") == 4
    assert re.search(r"to the nano-dollar: (\$0\.\d{9}) = \1\n", done.stdout)
    assert "calls that still hold money: 0\n" in done.stdout
    assert done.stdout.endswith("Everything is as it should be.\n")
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_demo_stays_for_those_who_want_to_look() -> None:
    """With `--stay` it goes on, with calls, and its pages open with the token and the key that it prints."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "examples.demo", "--stay"],
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": ""},
    ) as process:
        assert process.stdout is not None
        try:
            printed = ""
            for line in process.stdout:
                printed += line
                if line.startswith("Calls go on"):
                    break
            found = re.search(r"Its pages: (http://\S+)/admin/ with the token (\S+)", printed)
            assert found is not None, printed
            url, token = found.groups()
            admin = httpx2.get(f"{url}/admin/api/v1/usage", headers={"authorization": f"Bearer {token}"})
            assert (admin.status_code, admin.json()["total"]["calls"] > 0) == (200, True)
            usage = httpx2.get(f"{url}/usage/", headers={"authorization": "Bearer demo-key-for-alice"})
            assert usage.json()["caller"] == "alice"
        finally:
            process.terminate()


@pytest.mark.anyio
async def test_demo_notices_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """What is not as it should be is shown where it happened, and kept for the exit status."""
    scenes = Scenes("http://127.0.0.1:1", Requests(None), FakeProvider())
    async with scenes.http:
        scenes.check(holds=True, what="all is well")
        scenes.check(holds=False, what="the ledger is not the bill")

    assert scenes.problems == ["the ledger is not the bill"]
    assert "NOT AS IT SHOULD BE: the ledger is not the bill" in capsys.readouterr().out
