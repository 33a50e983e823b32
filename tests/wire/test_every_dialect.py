"""What every dialect keeps, over the fixtures of all; see `harness.py`."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.harness import (
    FIXTURES,
    Fixture,
    check_answer,
    check_cut,
    check_every_split,
    check_garbage,
    check_strip,
    every_fixture,
    fixtures,
    garbage,
    mutate,
    pieces,
    read,
)

from asgi_llm_guard.wire import dialect_for
from asgi_llm_guard.wire.registry import DIALECTS
from asgi_llm_guard.wire.sse import MAX_EVENT_BYTES

LONG_INPUTS = 250_000  # of each dialect; millions in all

every_stream = pytest.mark.parametrize("case", fixtures("stream"), ids=str)
every_answer = pytest.mark.parametrize("case", fixtures("response", "error", "stream"), ids=str)
every_dialect = pytest.mark.parametrize("name", sorted({each.dialect for each in every_fixture()}))


def answers_of(name: str) -> list[Fixture]:
    return [case for case in fixtures("response", "error", "stream") if case.dialect == name]


def test_every_dialect_has_fixtures() -> None:
    """A dialect without a request, an answer and an error to show is not tested here."""
    kinds = {(each.dialect, each.kind) for each in every_fixture()}
    missing = [
        (dialect.name, kind)
        for dialect in DIALECTS
        for kind in ("request", "response", "error")
        if (dialect.name, kind) not in kinds
    ]
    assert missing == []
    assert {path.name for path in FIXTURES.iterdir()} == {dialect.name for dialect in DIALECTS}


@pytest.mark.parametrize("case", every_fixture(), ids=str)
def test_dialect_is_known_by_its_path(case: Fixture) -> None:
    """Where a fixture was sent, its dialect is found."""
    assert dialect_for(case.head.path, case.host) is case.spoken


@every_answer
def test_every_split(case: Fixture) -> None:
    """C10: wherever a chunk ends the answer is the same, and every chunk is forwarded at once and untouched."""
    check_every_split(case)


@every_stream
def test_stripping(case: Fixture) -> None:
    """Stripping takes whole events only, the same wherever chunks end, and changes nothing about the answer."""
    check_strip(case)


@pytest.mark.parametrize(
    "case", [case for case in fixtures("stream") if case.container.breaks_off or case.is_whole], ids=str
)
def test_cutting(case: Fixture) -> None:
    """A stream that is cut anywhere can be read to its end, which is the ending; the rest of it is still metered."""
    check_cut(case)


@given(data=st.data())
@every_dialect
def test_any_chunks(name: str, data: st.DataObject) -> None:
    """However a body is cut into chunks, what is said of it is the same."""
    case = data.draw(st.sampled_from(answers_of(name)))
    ends = data.draw(st.lists(st.integers(0, len(case.data)), max_size=12))
    assert read(case.meter(), pieces(case.data, ends)) == (case.data, read(case.meter(), [case.data])[1])


@given(data=st.data())
@every_dialect
def test_garbage(name: str, data: st.DataObject) -> None:
    """No bytes make a dialect raise, change what is forwarded, or report what cannot be."""
    case = data.draw(st.sampled_from(answers_of(name)))
    body = data.draw(garbage([each.data for each in answers_of(name)]))
    check_garbage(case, body, random.Random(data.draw(st.integers(0, 2**32))))


@pytest.mark.slow
@every_dialect
def test_garbage_at_length(name: str) -> None:
    """As above, a quarter of a million damaged bodies for each dialect, other ones on every run."""
    seed = random.SystemRandom().getrandbits(64)
    rng = random.Random(seed)
    cases = answers_of(name)
    for number in range(LONG_INPUTS):
        case = rng.choice(cases)
        body = mutate(rng, case.data if rng.random() < 0.9 else rng.choice(cases).data)
        try:
            check_garbage(case, body, rng)
        except Exception as error:
            raise AssertionError(f"{case} with seed {seed}, input {number}: {body!r}") from error


# Mistral's answers are chat completions; what it adds to them is read there too.
SAME_SHAPE = {("mistral", "openai")}


@every_answer
def test_no_dialect_claims_anothers(case: Fixture) -> None:
    """An object or a streamed item of one dialect says nothing to any other, so their order decides nothing."""
    objects = objects_of(case)
    for dialect in DIALECTS:
        if dialect is case.spoken or (case.dialect, dialect.name) in SAME_SHAPE:
            continue
        meter = dialect.item_meter()
        for obj in objects:
            if dialect.name == "openai" and isinstance(obj, dict) and "error" in obj:
                continue  # many APIs write errors alike, and what kind they are is said alike
            meter.add(obj)
            if case.kind == "response":
                assert dialect.read_object(obj) is None, dialect.name
        assert meter.answer() is None or case.kind == "error", dialect.name


def objects_of(case: Fixture) -> list[object]:
    """What a library makes of a fixture, as dicts."""
    if case.kind == "stream":
        return case.items if case.is_whole else []
    return [json.loads(case.data)] if Path(case.name).suffix == ".json" else []


@pytest.mark.parametrize(
    "case", {(case.dialect, Path(case.name).suffix): case for case in fixtures("stream")}.values(), ids=str
)
def test_memory_is_flat(case: Fixture) -> None:
    """Neither a stream that goes on for long nor an event without an end takes more memory than one long event."""
    events = case.data * max(1, 65_536 // len(case.data))
    endless = b"x" * 65_536
    for chunk in (events, endless):
        meter = case.meter()
        meter.feed(case.data)
        tracemalloc.start()
        try:
            for _ in range(80):
                assert meter.feed(chunk) is chunk
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 4 * MAX_EVENT_BYTES
        check_answer(meter.answer())
