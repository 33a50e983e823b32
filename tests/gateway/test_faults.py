"""Every fault, at every place: who is asked next, after which wait, who rests, and what is paid for.

The providers are servers on the loopback; time is the test's, and only the sockets' own deadlines are real ones.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import pytest
from tests.gateway.kit import Fleet, fleet
from tests.ports import HOST, free_port

from asgi_llm_guard import Budget, Iterations
from asgi_llm_guard.gateway import ContextOverflow, CooldownRules, ProviderFailed, RetryRules, Timeouts
from asgi_llm_guard.testing import Behaviour, FrozenClock, Gate

pytestmark = pytest.mark.anyio

EXACT: Final = RetryRules(jitter=0)
ENOUGH: Final = "$1/1d"
GOOD: Final = Behaviour.answer()
NOWHERE: Final = object()
"""`Fault.base`: a port where nobody listens."""
NO_TLS: Final = object()
"""`Fault.base`: the provider's own port, by HTTPS, which it does not speak."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens once, and what is expected then. Of `streamed`: only where it differs."""

    kind: str
    """The error class."""
    behaviour: Behaviour = GOOD
    base: object = None
    hangs: int | None = None
    """So many chunks come, and then none."""
    outcome: str = "provider_error"
    """Of the failed attempt. `provider_error` and `not_dispatched` cost nothing; `measured` costs what is billed;
    `estimated` and `unknown` at least that, and at most what was held."""
    streamed: str | None = None
    """Its outcome where the answer is streamed."""
    rests_s: int | None = None
    """So long is the deployment left alone, where there is another one."""
    alone_s: float | None = 5.0
    """So long is waited before the only deployment is asked again; `None`: it is not."""
    begun: bool = False
    """Streamed, the client has its first words already."""

    refused: bool = False
    """Streamed, its first event is an error: a refusal as any other, and free, though the fake bills the input."""

    def outcome_of(self, streamed: bool) -> str:
        return self.streamed or self.outcome if streamed else self.outcome


FAULTS: Final[Mapping[str, Fault]] = {
    "connect-refused": Fault(kind="connection", base=NOWHERE, outcome="not_dispatched"),
    "tls": Fault(kind="connection", base=NO_TLS, outcome="not_dispatched"),
    "timeout-before": Fault(kind="timeout", hangs=0, outcome="unknown"),
    "timeout-after": Fault(kind="timeout", hangs=4, outcome="unknown", streamed="estimated", begun=True),
    "401": Fault(kind="auth", behaviour=Behaviour.error(401), rests_s=60, alone_s=None),
    "403": Fault(kind="auth", behaviour=Behaviour.error(403), rests_s=60, alone_s=None),
    "404": Fault(kind="not_found", behaviour=Behaviour.error(404), rests_s=60, alone_s=None),
    "404-model": Fault(kind="not_found", behaviour=Behaviour.refuse("unknown_model"), rests_s=60, alone_s=None),
    "408": Fault(kind="timeout", behaviour=Behaviour.error(408)),
    "429": Fault(kind="rate_limit", behaviour=Behaviour.refuse("rate_limit"), rests_s=60),
    "429-after": Fault(
        kind="rate_limit", behaviour=Behaviour.refuse("rate_limit", retry_after=7), rests_s=7, alone_s=7.0
    ),
    "429-long": Fault(
        kind="rate_limit", behaviour=Behaviour.refuse("rate_limit", retry_after=900), rests_s=900, alone_s=None
    ),
    "quota": Fault(kind="quota", behaviour=Behaviour.refuse("quota"), rests_s=60, alone_s=None),
    "500": Fault(kind="other", behaviour=Behaviour.error(500)),
    "502": Fault(kind="overload", behaviour=Behaviour.error(502)),
    "503": Fault(kind="overload", behaviour=Behaviour.error(503)),
    "503-after": Fault(kind="overload", behaviour=Behaviour.error(503, retry_after=9), rests_s=9, alone_s=9.0),
    "504": Fault(kind="timeout", behaviour=Behaviour.error(504)),
    "529": Fault(kind="overload", behaviour=Behaviour.error(529)),
    "no-body": Fault(kind="empty", behaviour=Behaviour.empty(), outcome="unmetered"),
    "no-text": Fault(kind="empty", behaviour=Behaviour.answer(""), outcome="measured"),
    "malformed": Fault(kind="empty", behaviour=Behaviour.malformed(), outcome="unmetered", streamed="unknown"),
    "cut-0": Fault(kind="connection", behaviour=Behaviour.cut(), outcome="unknown"),
    "cut-1": Fault(
        kind="connection", behaviour=Behaviour.cut(after_chunks=1), outcome="unknown", streamed="estimated", begun=True
    ),
    "cut-3": Fault(
        kind="connection", behaviour=Behaviour.cut(after_chunks=3), outcome="unknown", streamed="estimated", begun=True
    ),
    "error-0": Fault(kind="other", behaviour=Behaviour.stream_error(), refused=True),
    "error-1": Fault(
        kind="other", behaviour=Behaviour.stream_error(after_chunks=1), streamed="estimated", begun=True
    ),
    "error-3": Fault(
        kind="other", behaviour=Behaviour.stream_error(after_chunks=3), streamed="estimated", begun=True
    ),
}  # fmt: skip

QUICK: Final = ("connect-refused", "tls", "timeout-before", "timeout-after", "429-after", "529", "malformed", "error-3")
"""Those that `tests/gateway/test_router.py` does not have, or only in part."""

EVERY: Final = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAULTS]
STREAMED: Final = pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(1_800_000_000_000)


@asynccontextmanager
async def faulty(
    clock: FrozenClock, fault: Fault, *names: str, streamed: bool = False, times: int = 1, **options: Any
) -> AsyncIterator[Fleet]:
    """Deployments in the order of their names, of which the first one has the fault `times` times."""
    limits: dict[str, dict[str, Any]] = {name: {"weight": 10.0**-place} for place, name in enumerate(names)}
    for name, more in options.pop("limits", {}).items():
        limits[name] |= more
    first = names[0]
    behaviour, gate = fault.behaviour, Gate()
    if fault.hangs is not None:
        behaviour = Behaviour.slow(gate=gate) if fault.hangs else Behaviour.hang(gate=gate)
        gate.release(fault.hangs if streamed else 0)
        limits[first]["timeouts"] = Timeouts(read_s=0.6)
    if fault.base is NOWHERE:
        limits[first]["api_base"] = f"http://{HOST}:{free_port()}/v1"
    options = {"strategy": "weighted", "retry": EXACT, "policies": [Budget(ENOUGH), Iterations(99)], **options}
    async with fleet(clock, *names, limits=limits, **options) as made:
        if fault.base is NO_TLS:
            plain = made.deployments[first]
            made.gateway.remove(first)
            made.deployments[first] = replace(plain, api_base=(plain.api_base or "").replace("http:", "https:"))
            made.gateway.add(made.deployments[first])
        if fault.base is None:
            made[first].script(*[behaviour] * times)
        yield made


async def ask(made: Fleet, streamed: bool, model: str = "auto") -> str:
    """The text of the answer. An error in the middle of a stream is `…`."""
    if not streamed:
        return (await made.chat(model)).text
    chunks = await made.stream(model)
    return "".join("…" if chunk.error is not None else chunk.text for chunk in chunks)


async def paid(made: Fleet, outcomes: Mapping[str, Iterable[str]], *, refused: str | None = None) -> None:
    """Each attempt has its one record, and costs what its outcome says; nothing is held any more.

    `refused`: the deployment whose bill has the input of streams that began with an error.
    """
    for provider in made.providers.values():
        provider.release()
        await provider.idle()
    assert await made.guard.storage.open_holds() == 0
    records = sorted(await made.records(), key=lambda record: record.attempt)
    for name, expected in outcomes.items():
        own = [record for record in records if record.deployment == name]
        assert [record.outcome for record in own] == [each for each in expected if each != "not_dispatched"]
        spent = sum(record.cost_nanousd or 0 for record in own)
        billed = sum(line.cost_nanousd for line in made[name].bill if name != refused or line.usage.output_tokens)
        assert all(not record.cost_nanousd for record in own if record.outcome == "provider_error")
        if all(record.outcome in ("measured", "provider_error") for record in own):
            assert spent == billed
        else:
            assert billed <= spent <= sum(max(record.estimate_nanousd or 0, record.cost_nanousd or 0) for record in own)
            # The upper bound of one that reports nothing is what was held for it, and no more.
            for record in own:
                if record.outcome in ("unknown", "unmetered"):
                    assert record.cost_nanousd == record.estimate_nanousd
                elif record.outcome == "estimated":
                    assert (record.cost_nanousd or 0) <= (record.estimate_nanousd or 0)


# --------------------------------------------------------------------------- there is another one


@STREAMED
@pytest.mark.parametrize("name", EVERY)
async def test_another_one_of_the_group(clock: FrozenClock, name: str, streamed: bool) -> None:
    """C2, C3, C4, D3, conformance 75, 80: the next deployment is asked at once, the failed one rests where it is to, and
    each is paid as billed."""
    fault = FAULTS[name]
    async with faulty(clock, fault, "a", "b", streamed=streamed) as made:
        text = await ask(made, streamed)

        if streamed and fault.begun:
            assert text.startswith("Echo")
            assert text.endswith("…")
            assert made.asked == ["a"]
            answered: list[str] = []
        else:
            assert text == "Echo: say it again please"
            assert made.asked == ["a", "b"]
            answered = ["measured"]
        failed = made.ended[0]
        assert (failed.failure, failed.outcome) == (fault.kind, fault.outcome_of(streamed))
        assert made.slept == []
        left = {place: cooldown.left_s(clock.now_ms()) for place, cooldown in made.gateway.cooldowns.known().items()}
        assert left == ({} if fault.rests_s is None else {"a": fault.rests_s})
        await paid(made, {"a": [fault.outcome_of(streamed)], "b": answered}, refused="a" if fault.refused else None)


# -------------------------------------------------------------------------------- there is no other


@STREAMED
@pytest.mark.parametrize("name", EVERY)
async def test_the_only_one(clock: FrozenClock, name: str, streamed: bool) -> None:
    """D3, conformance 75, 80: the only deployment is asked again after the pause or after what it asks for, or not at all
    where no time would mend it."""
    fault = FAULTS[name]
    outcome = fault.outcome_of(streamed)
    async with faulty(clock, fault, "a", streamed=streamed) as made:
        if streamed and fault.begun:
            assert (await ask(made, streamed)).endswith("…")
            expected = [outcome]
        elif fault.base is not None:  # every time
            with pytest.raises(ProviderFailed) as failed:
                await ask(made, streamed)
            assert [each.kind for each in failed.value.failures] == [fault.kind] * 4
            expected = [outcome] * 4
        elif fault.alone_s is None:
            with pytest.raises(ProviderFailed):
                await ask(made, streamed)
            expected = [outcome]
        else:
            assert await ask(made, streamed) == "Echo: say it again please"
            expected = [outcome, "measured"]

        assert made.slept == [fault.alone_s] * (len(expected) - 1)
        assert made.asked == ["a"] * len(expected)
        await paid(made, {"a": expected}, refused="a" if fault.refused else None)


@pytest.mark.slow
@STREAMED
@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.base is None])
async def test_every_time(clock: FrozenClock, name: str, streamed: bool) -> None:
    """D3: what fails every time is asked four times at most, and each time is paid for; every failure is told of."""
    fault = FAULTS[name]
    times = 1 if fault.alone_s is None or (streamed and fault.begun) else 4
    tolerant = CooldownRules(allowed_fails=None, failure_rate=None)
    async with faulty(clock, fault, "a", streamed=streamed, times=9, cooldowns=tolerant) as made:
        if streamed and fault.begun:
            assert (await ask(made, streamed)).endswith("…")
        else:
            with pytest.raises(ProviderFailed) as failed:
                await ask(made, streamed)
            assert [each.kind for each in failed.value.failures] == [fault.kind] * times
        assert made.slept == [fault.alone_s] * (times - 1)
        await paid(made, {"a": [fault.outcome_of(streamed)] * times}, refused="a" if fault.refused else None)


# -------------------------------------------------------------------------------- another model


@STREAMED
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in FAULTS if name != "529"] + ["529"]
)
async def test_another_model(clock: FrozenClock, name: str, streamed: bool) -> None:
    """C2, C4, conformance 81: the models of the list are asked in its order, each at its own price, whatever the fault."""
    fault = FAULTS[name]
    chain = {"openai/model-a": ["mistral/model-e", "anthropic/model-d"]}
    no_retry = RetryRules(retries=0)
    async with faulty(clock, fault, "a", "d", "e", streamed=streamed, fallbacks=chain, retry=no_retry) as made:
        made["e"].script(Behaviour.refuse("overloaded"))
        text = await ask(made, streamed, "openai/model-a")

        outcome = fault.outcome_of(streamed)
        if streamed and fault.begun:
            assert text.endswith("…")
            assert made.asked == ["a"]
            await paid(made, {"a": [outcome], "e": [], "d": []})
        else:
            assert text == "Echo: say it again please"
            assert made.asked == ["a", "e", "d"]
            await paid(
                made,
                {"a": [outcome], "e": ["provider_error"], "d": ["measured"]},
                refused="a" if fault.refused else None,
            )
        assert made.slept == []


# ------------------------------------------------------------------------------------- overflow


@dataclass(frozen=True, kw_only=True)
class Overflow:
    """How somebody says that the input is too large."""

    message: str
    code: str | None = None
    status: int = 400
    at: str = "a"
    limits: dict[str, Any] = field(default_factory=dict)


OVERFLOWS: Final[Mapping[str, Overflow]] = {
    "openai-code": Overflow(message="Too much.", code="context_length_exceeded"),
    "openai-text": Overflow(message="This model's maximum context length is 1000 tokens; you sent 1200."),
    "openai-window": Overflow(message="Your input exceeds the context window of this model."),
    "azure": Overflow(message="The input tokens exceed the configured limit of 1000 tokens."),
    "anthropic": Overflow(message="prompt is too long: 1200 tokens > 1000 maximum", at="d"),
    "anthropic-sum": Overflow(message="input length and `max_tokens` exceed context limit: 900 + 200 > 1000", at="d"),
    "gemini": Overflow(message="The input token count (1200) exceeds the maximum number of tokens allowed (1000)."),
    "bedrock": Overflow(message="Input is too long for requested model."),
    "cohere": Overflow(message="too many tokens: the total is 1200, and the model takes 1000"),
    "mistral": Overflow(message="Prompt is too large for model with 1000 maximum context length", at="e"),
    "ollama": Overflow(message="the prompt is longer than the context length currently available"),
    "openrouter": Overflow(message="This endpoint's maximum context length is 1000 tokens. However, you asked for 1200."),
    "vllm": Overflow(message="This model's maximum context length is 1000 tokens.", status=422),
    "llama.cpp": Overflow(message="the request (1200 tokens) exceeds the available context size (1000 tokens)"),
    "tgi": Overflow(message="`inputs` tokens + `max_new_tokens` must be <= 1000.", status=422),
}  # fmt: skip


@STREAMED
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("azure", "anthropic", "tgi") else pytest.mark.slow) for name in OVERFLOWS],
)
async def test_overflow_by_any_words(clock: FrozenClock, name: str, streamed: bool) -> None:
    """D4, D5, conformance 80: whatever words say it, an input that is too long goes to a larger window at once, rests
    nobody and costs nothing; with no larger one the caller learns what it is."""
    overflow = OVERFLOWS[name]
    said = Fault(
        kind="context_overflow",
        behaviour=Behaviour.error(overflow.status, code=overflow.code, message=overflow.message),
    )
    windows = {each: {"context_window": 1_000} for each in (overflow.at, "b")} | {"c": {"context_window": 9_000}}
    async with faulty(clock, said, overflow.at, "b", "c", limits=windows, times=2) as made:
        assert await ask(made, streamed) == "Echo: say it again please"
        assert made.asked == [overflow.at, "c"]

        with pytest.raises(ContextOverflow):
            await ask(made, streamed, made.deployments[overflow.at].full_model)
        assert made.asked == [overflow.at, "c", overflow.at]
        assert made.slept == []
        assert made.gateway.cooldowns.known() == {}
        await paid(made, {overflow.at: ["provider_error"] * 2, "b": [], "c": ["measured"]})


@pytest.mark.parametrize(
    "message", ["Invalid 'user': string too long. Expected a string with maximum length 64.", "temperature is too high"]
)
async def test_no_overflow_by_words_that_sound_like_it(clock: FrozenClock, message: str) -> None:
    """D4: a field that is too long is the request's fault, and no larger window is asked."""
    said = Fault(kind="invalid", behaviour=Behaviour.error(400, message=message))
    async with faulty(clock, said, "a", "c", limits={"a": {"context_window": 1_000}}) as made:
        with pytest.raises(ProviderFailed, match=message.split(".", maxsplit=1)[0]):
            await made.chat()
        assert made.asked == ["a"]
        await paid(made, {"a": ["provider_error"], "c": []})
