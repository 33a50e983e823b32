"""The page in a real browser, over a service of two processes that share their SQLite files."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import httpx2
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from tests.admin.kit import CALLER_KEY, HOSTILE, TOKENS

from asgi_llm_guard.admin.options import Role
from asgi_llm_guard.admin.table import VERBS
from asgi_llm_guard.testing import Behaviour, FakeProvider

_FLAGS: Final = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage")
_PAGES: Final = [verb.path for verb in VERBS.verbs if verb.kind == "page"]
_QUERY: Final = "?name=research&scope=department&subject=research"
_SHORT_S: Final = 2.0
_TURN_S: Final = 0.05
_PATIENT_S: Final = 60.0
"""A timeout that only something that is broken reaches."""

expect.set_options(timeout=_PATIENT_S * 1_000)

# The lowest contrast of every text with what is behind it, by WCAG 2.2, 1.4.3.
_CONTRAST: Final = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const part = (c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const found = channels(getComputedStyle(each).backgroundColor);
      if (found.length < 4 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || element.closest("svg, script, .hidden, .skip")) continue;
    const style = getComputedStyle(element);
    if (style.visibility !== "visible" || element.getClientRects().length === 0) continue;
    const [one, two] = [luminance(channels(style.color)), luminance(behind(element))].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (two + 0.05);
    if (ratio < 4.5) found.push([ratio.toFixed(2), style.color, walker.currentNode.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


@dataclass(slots=True, kw_only=True)
class Service:
    """Two processes of one service, and the provider behind them."""

    urls: Sequence[str]
    provider: FakeProvider

    def ask(self, process: int = 0, *, session: str = "s1", stream: bool = False) -> httpx2.Response:
        return httpx2.post(
            f"{self.urls[process]}/llm/v1/chat/completions",
            json=_body(stream=stream),
            headers=_headers(session),
            timeout=_PATIENT_S,
        )

    def until(self, status: int, process: int, *, session: str = "s1") -> float:
        """Ask until this status comes; how long it took, in seconds.

        No question counts for more than `_TURN_S`, several times of what one takes: that a machine is busy is no delay
        of ours.
        """
        took_s, gives_up_at = 0.0, time.monotonic() + _PATIENT_S
        while True:
            began = time.monotonic()
            answer = self.ask(process, session=session)
            if answer.status_code == status:
                return took_s
            assert began < gives_up_at, answer.text
            took_s += min(time.monotonic() - began, _TURN_S)


def _body(*, stream: bool) -> dict[str, Any]:
    return {
        "model": "model",
        "max_tokens": 20,
        "stream": stream,
        "messages": [{"role": "user", "content": "one two three"}],
    }


def _headers(session: str) -> dict[str, str]:
    return {"x-api-key": CALLER_KEY, "x-session-id": session}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    provider = FakeProvider()
    with contextlib.ExitStack() as ends:
        base_url = ends.enter_context(provider.serve())
        urls = []
        for _ in range(2):
            listener = socket.create_server(("127.0.0.1", 0))
            process = subprocess.Popen(
                [
                    sys.executable, "-m", "tests.admin.service", "--folder", str(folder),
                    "--base-url", base_url, "--fd", str(listener.fileno()),
                ],
                pass_fds=[listener.fileno()],
                cwd=Path(__file__).parents[2],
            )  # fmt: skip
            ends.callback(process.wait)
            ends.callback(process.terminate)
            urls.append(f"http://127.0.0.1:{listener.getsockname()[1]}")
            listener.close()  # it is the process's now, and ends with it
        made = Service(urls=urls, provider=provider)
        for number in range(2):  # what they listen on is open from the start: the first answer says that they are there
            assert made.ask(number).status_code == 200
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found is not None, "there is no Chromium: run scripts/install-servers"
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=found, args=_FLAGS)
        yield opened
        opened.close()


@contextlib.contextmanager
def shown(
    browser: Browser, service: Service, role: Role | None = "admin", **how: Any
) -> Iterator[tuple[Page, list[str]]]:
    """A page, logged in by the form; and what the browser complained about."""
    context: BrowserContext = browser.new_context(base_url=f"{service.urls[0]}/admin/", **how)
    context.set_default_timeout(30_000)
    complaints: list[str] = []
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    if role is not None:
        page.goto("./login")
        page.get_by_label("Token").fill(TOKENS[role])
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url("**/admin/")
    try:
        yield page, complaints
    finally:
        context.close()


def test_a_quota_is_edited_and_enforced(browser: Browser, service: Service) -> None:
    """C16, S5: log in, see, set a quota: both processes enforce it within two seconds; taking it away lets calls pass again."""
    with shown(browser, service) as (page, complaints):
        expect(page.get_by_role("heading", name="Overview")).to_be_visible()
        page.get_by_role("link", name="Departments", exact=True).first.click()
        page.get_by_role("link", name="Add a department").click()
        page.get_by_label("Department").fill("research")
        page.get_by_label("Cost a day", exact=True).fill("0")
        for name in ("Cost a month", "Tokens a day", "Tokens a month"):
            page.get_by_label(f"No limit: {name}").check()
        page.get_by_label("All models").check()
        page.get_by_label("Reason").fill("Nothing today")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("status")).to_contain_text("Saved")
        assert service.until(402, 0) < _SHORT_S
        assert service.until(402, 1) < _SHORT_S

        page.get_by_role("link", name="Edit").click()
        page.get_by_label("Cost a day", exact=True).fill("NaN")
        page.get_by_label("Reason").first.fill("Back")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("alert")).to_contain_text("daily_cost")
        assert page.get_by_label("Cost a day", exact=True).get_attribute("aria-invalid") == "true"
        page.get_by_label("Cost a day", exact=True).fill("25")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("status")).to_contain_text("Saved")
        assert service.until(200, 1) < _SHORT_S
        page.get_by_role("link", name="Audit").click()
        expect(page.get_by_text("Nothing today")).to_be_visible()
        assert [each for each in complaints if "422" not in each] == []


def test_conflicts_show_both_values(browser: Browser, service: Service) -> None:
    """Of two people who edit at the same time, the second sees what the first has made of it beside its own, and decides."""
    with shown(browser, service) as (page, _), shown(browser, service) as (other, _):
        for each in (page, other):
            each.goto("./agents/edit?name=conflicted") if each is other else each.goto("./agents/edit")
        page.get_by_label("Agent").fill("conflicted")
        page.get_by_label("Calls a session", exact=True).fill("5")
        page.get_by_label("Reason").fill("first")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("status")).to_contain_text("Saved")
        other.get_by_label("Agent").fill("conflicted")
        other.get_by_label("Calls a session", exact=True).fill("9")
        other.get_by_label("Reason").fill("second")
        other.get_by_role("button", name="Save").click()
        table = other.locator(".conflict")
        expect(table.get_by_role("row", name="Calls a session")).to_contain_text("5")
        expect(table.get_by_role("row", name="Calls a session")).to_contain_text("9")
        other.get_by_role("button", name="Keep mine").click()
        expect(other.get_by_role("row", name="conflicted")).to_contain_text("9")


def test_a_session_is_stopped_in_the_middle_of_a_stream(browser: Browser, service: Service) -> None:
    """S8: the button on the page of live sessions ends a stream of the other process within two seconds, and a new call of
    that session is refused; another session goes on."""
    service.provider.when(lambda request: bool(request.body.get("stream")), Behaviour.slow())
    got: list[bytes] = []
    began, ended = threading.Event(), threading.Event()

    def read() -> None:
        url = f"{service.urls[1]}/llm/v1/chat/completions"
        with (
            contextlib.suppress(httpx2.HTTPError),
            httpx2.stream(
                "POST", url, json=_body(stream=True), headers=_headers("looping"), timeout=_PATIENT_S
            ) as answer,
        ):
            for part in answer.iter_raw():
                got.append(part)
                began.set()
        ended.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    service.provider.release(2)
    assert began.wait(_PATIENT_S)
    with shown(browser, service, "operator") as (page, complaints):
        page.goto("./sessions")
        row = page.get_by_role("row", name="looping")
        expect(row).to_contain_text("held")
        page.once("dialog", lambda dialog: dialog.accept())
        row.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("status")).to_contain_text("Stopped")
        assert service.until(403, 1, session="looping") < _SHORT_S
        assert ended.wait(_PATIENT_S)
        assert b"stopped" in b"".join(got)
        refused = service.ask(1, session="looping")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "stopped")
        assert service.ask(1, session="other").status_code == 200
        page.goto("./raises")
        page.once("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Release session looping").click()
        expect(page.get_by_role("status")).to_contain_text("Released")
        assert complaints == []
    reader.join(_PATIENT_S)


def test_a_dialog_that_is_declined_sends_nothing(browser: Browser, service: Service) -> None:
    """What cannot be taken back asks first, and does nothing if the answer is no."""
    with shown(browser, service, "operator") as (page, _):
        page.goto("./raises")
        page.locator("form[action$='/stops']").get_by_label("Which one").fill("nobody")
        page.locator("form[action$='/stops']").get_by_label("Reason").fill("try")
        page.once("dialog", lambda dialog: dialog.dismiss())
        page.locator("form[action$='/stops']").get_by_role("button", name="Stop").click()
        assert page.url.endswith("/raises")
        page.reload()
        expect(page.get_by_role("heading", name="Stopped")).to_be_visible()
        expect(page.get_by_role("button", name="Release agent nobody")).to_have_count(0)


def test_everything_works_without_scripts(browser: Browser, service: Service) -> None:
    """Without JavaScript a key is made and shown once, and used by the pages' own forms."""
    with shown(browser, service, java_script_enabled=False) as (page, _):
        page.goto("./keys")
        form = page.locator("form[action$='/keys']")
        form.get_by_label("Caller").fill("no-script")
        form.get_by_label("Reason").fill("try")
        form.get_by_role("button", name="Make the key").click()
        assert page.locator("#secret").inner_text().startswith("lg-")
        expect(page.get_by_role("button", name="Copy")).to_be_hidden()
        page.goto("./keys")
        row = page.get_by_role("row", name="no-script")
        row.locator("summary").click()
        revoke = row.locator("form[action$='/revoke']")
        revoke.get_by_label("Reason").fill("try")
        revoke.get_by_role("button", name="Revoke").click()
        expect(page.get_by_role("row", name="no-script")).to_contain_text("revoked")


def test_live_parts_refresh_themselves(browser: Browser, service: Service) -> None:
    """A page that is looked at shows a new session by itself; one that is being used is left alone."""
    with shown(browser, service, "viewer") as (page, complaints):
        page.clock.install()
        page.goto("./sessions")
        assert service.ask(0, session="newcomer").status_code == 200
        expect(page.get_by_text("newcomer")).to_have_count(0)
        page.clock.fast_forward(6_000)
        expect(page.get_by_text("newcomer")).to_be_visible()
        assert complaints == []


def test_the_keyboard_is_enough(browser: Browser, service: Service) -> None:
    """Log in, jump past the navigation, and save a form by keyboard alone: everything that is reached shows that it is, in
    the order in which it stands."""
    with shown(browser, service, None) as (page, _):
        page.goto("./login")
        expect(page.get_by_label("Token")).to_be_focused()
        page.keyboard.type(TOKENS["admin"])
        page.keyboard.press("Enter")
        page.wait_for_url("**/admin/")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        assert page.locator(".skip").bounding_box()["y"] >= 0  # type: ignore[index]
        page.keyboard.press("Enter")
        assert page.url.endswith("#main")
        for path in ("", "raises", "agents/edit"):
            page.goto(f"./{path}")
            places = []
            for _ in range(60):
                page.keyboard.press("Tab")
                place = page.evaluate(
                    """() => {
                      const at = document.activeElement, all = [...document.querySelectorAll("*")], style = getComputedStyle(at);
                      const box = at.getBoundingClientRect();
                      return at === document.body ? null
                        : [all.indexOf(at), style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2, box.width > 0];
                    }"""
                )
                if place is None:
                    break
                places.append(place)
            assert len(places) > 15
            assert places == sorted(places), path
            assert all(visible and wide for _, visible, wide in places), path
        page.goto("./agents/edit")
        page.get_by_label("Agent").focus()
        page.keyboard.type("by-keyboard")
        page.keyboard.press("Tab")
        page.keyboard.type("7")
        for _ in range(3):
            page.keyboard.press("Tab")
        page.keyboard.type("by hand")
        page.keyboard.press("Enter")
        expect(page.get_by_role("row", name="by-keyboard")).to_contain_text("7")


def stop_for_long(page: Page) -> None:
    """Stop something whose name and whose reason have no end, and are hostile."""
    answer = page.request.post(
        "./api/v1/stops",
        headers={"authorization": f"Bearer {TOKENS['admin']}"},
        data={
            "scope": "agent",
            "subject": HOSTILE.replace("\u202e", "") + "y" * 200,
            "reason": "z" * 300,
            "lasts": "1m",
        },
    )
    assert answer.status in {201, 403}


# Cards that something reaches out of.
_REACHING_OUT: Final = """() => [...document.querySelectorAll(".card, .tile")]
  .filter((card) => card.scrollWidth > card.clientWidth + 1).map((card) => card.innerText.slice(0, 60))"""


def test_nothing_reaches_out_of_its_place(browser: Browser, service: Service) -> None:
    """On no width between a telephone and a wide screen does a table reach out of its card, or the page have to be
    scrolled sideways."""
    assert service.ask(0, session="w" * 200).status_code == 200
    with shown(browser, service) as (page, _):
        stop_for_long(page)
        for path in _PAGES:
            page.goto(f".{path}{_QUERY if path != '/login' else ''}")
            page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
            for width in (360, 480, 640, 800, 840, 900, 1024, 1090, 1180, 1300, 1600):
                page.set_viewport_size({"width": width, "height": 800})
                assert page.evaluate("document.documentElement.scrollWidth") <= width, (path, width)
                assert page.evaluate(_REACHING_OUT) == [], (path, width)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_readable(scheme: Literal["light", "dark"], browser: Browser, service: Service) -> None:
    """On 360 pixels nothing has to be scrolled sideways, and every text has a contrast of at least 4.5 in both schemes."""
    assert service.ask(0, session="x" * 200).status_code == 200
    with shown(browser, service, color_scheme=scheme, viewport={"width": 360, "height": 740}) as (page, complaints):
        stop_for_long(page)
        for path in _PAGES:
            page.goto(f".{path}{_QUERY if path != '/login' else ''}")
            page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
            assert page.evaluate(_CONTRAST) == [], path
        assert complaints == []
