"""A past period by other prices, beside what was charged."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from tests.ledger_flow.conftest import MakeLedger
from tests.ledger_flow.kit import kept, record

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.ledger import Ledger, UsageQuery
from asgi_llm_guard.ledger.reprice import forget_version, reprice, repriced_costs, versions
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.usage import Usage, UsageRecord

pytestmark = pytest.mark.anyio

OLD = PriceBook.snapshot(overrides={"acme/large": {"input": 2, "output": 8}, "acme/small": {"input": 1, "output": 4}})
NEW = PriceBook.snapshot(overrides={"acme/large": {"input": 3, "output": 8}, "acme/small": {"input": 1, "output": 2}})


def charged(number: int, model: str, prices: PriceBook = OLD, **changes: object) -> UsageRecord:
    """A record as it is when its call has ended, by these prices."""
    made = msgspec.structs.replace(record(number), provider="acme", model=model)
    cost = prices.cost("acme", model, made.usage or Usage(), made.at_ms)
    made = msgspec.structs.replace(
        made, cost_nanousd=cost.nanousd, price_source=cost.source, billed_model=cost.billed_model
    )
    return msgspec.structs.replace(made, **changes)


def records() -> list[UsageRecord]:
    """Ten of each model, and one of each sort that no prices can say anything of."""
    return [
        *(charged(n, "large") for n in range(10)),
        *(charged(n, "small") for n in range(10, 20)),
        charged(20, "large", usage=None, outcome="expired", cost_nanousd=10**9),
        charged(21, "of nobody", cost_nanousd=None),
        charged(22, "large", outcome="cached", cost_nanousd=0),
        charged(23, "large", usage=None, outcome="provider_error", cost_nanousd=0),
        charged(24, "large", price_source="override; clamped", cost_nanousd=77),
        charged(25, "deployed", billed_model="large", cost_nanousd=5),
    ]


@pytest.fixture
async def filled(make_ledger: object) -> Ledger:
    ledger: Ledger = make_ledger()  # type: ignore[operator]
    await ledger.append(records())
    return ledger


async def test_a_dry_run_says_what_would_differ_and_writes_nothing(filled: Ledger) -> None:
    """W6: differences by model, the largest first; what has no usage or no price is unknown and in no sum."""
    told: list[int] = []
    result = await reprice(
        filled, NEW, since_ms=0, until_ms=2**52, version="november", dry_run=True, progress=told.append
    )
    by_model = {one.model: one for one in result.models}

    def sums(model: str, numbers: range) -> tuple[int, int]:
        made = [charged(n, model) for n in numbers]
        return (
            sum(one.cost_nanousd or 0 for one in made),
            sum(NEW.cost("acme", model, one.usage or Usage(), one.at_ms).nanousd or 0 for one in made),
        )

    large, small = by_model["large"], by_model["small"]
    assert (large.records, large.unknown) == (14, 2)
    assert (large.charged_nanousd, large.repriced_nanousd) == sums("large", range(10))
    assert (small.charged_nanousd, small.repriced_nanousd) == sums("small", range(10, 20))
    assert large.difference_nanousd > 0 > small.difference_nanousd
    assert (by_model["of nobody"].unknown, by_model["of nobody"].charged_nanousd) == (1, 0)
    assert by_model["deployed"].repriced_nanousd == NEW.cost("acme", "large", records()[25].usage or Usage(), 0).nanousd
    assert result.total.difference_nanousd == sum(one.difference_nanousd for one in result.models)
    assert (result.total.records, result.total.unknown, told[-1]) == (26, 3, 26)
    differences = [abs(one.difference_nanousd) for one in result.models]
    assert differences == sorted(differences, reverse=True)
    assert await versions(filled) == []


async def test_both_costs_are_kept_beside_each_other(filled: Ledger) -> None:
    """W6, S4: the charged cost stays what it was, in records and sums; the other one is kept with the prices it came from."""
    before, total = await kept(filled), (await filled.usage(UsageQuery(since_ms=0, until_ms=2**52))).total
    result = await reprice(filled, NEW, since_ms=0, until_ms=2**52, version="november")
    other = await reprice(filled, OLD, since_ms=0, until_ms=2**52, version="as charged")

    costs = {one.call_id: one for one in await repriced_costs(filled, "november", list(before))}
    assert await kept(filled) == before
    assert (await filled.usage(UsageQuery(since_ms=0, until_ms=2**52))).total == total
    assert len(costs) == 26
    assert sum(one.cost_nanousd or 0 for one in costs.values()) == result.total.repriced_nanousd
    assert costs["call-1"].cost_nanousd == NEW.cost("acme", "large", record(1).usage or Usage(), 0).nanousd
    assert costs["call-1"].price_source == "override of acme/large"
    assert [costs[f"call-{n}"].cost_nanousd for n in (20, 21, 22, 23, 24)] == [None, None, 0, 0, None]
    assert other.total.difference_nanousd == NEW_TO_DEPLOYED
    assert [(one.version, one.finished) for one in await versions(filled)] == [("as charged", True), ("november", True)]


NEW_TO_DEPLOYED = (OLD.cost("acme", "large", records()[25].usage or Usage(), 0).nanousd or 0) - 5
"""By the same prices nothing differs but the one whose charge is made up here."""


async def test_what_costs_nothing_where_it_is_unpriced_stays_unknown(filled: Ledger) -> None:
    """A book that lets unpriced models pass says nothing of what they cost."""
    free = PriceBook.snapshot(unknown="allow")
    result = await reprice(filled, free, since_ms=0, until_ms=2**52, version="free", dry_run=True)

    assert result.total.unknown == result.total.records - 2  # cached, and the provider's error
    assert result.total.repriced_nanousd == 0


async def test_a_repricing_that_was_broken_off_is_done_again(filled: Ledger) -> None:
    """Run again under its name it gives the same; once it is finished, its name is taken until it is forgotten."""

    def stop(_done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await reprice(filled, OLD, since_ms=0, until_ms=2**52, version="november", progress=stop)
    assert [one.finished for one in await versions(filled)] == [False]
    again = await reprice(filled, NEW, since_ms=0, until_ms=2**52, version="november")

    with pytest.raises(ConfigurationError, match="'november' was repriced before"):
        await reprice(filled, OLD, since_ms=0, until_ms=2**52, version="november")
    assert (await repriced_costs(filled, "november", ["call-1"]))[0].cost_nanousd != record(1).cost_nanousd
    assert await forget_version(filled, "november") == 26
    assert await reprice(filled, NEW, since_ms=0, until_ms=2**52, version="november") == again


async def test_models_that_callers_make_up_are_bounded() -> None:
    """T25: beyond 10,000 models the rest is told together; none is missing in the sum."""
    ledger = Ledger.open("sqlite://:memory:")
    await ledger.append([charged(n, f"made-up-{n}") for n in range(10_300)])
    result = await reprice(ledger, NEW, since_ms=0, until_ms=2**52, version="x", dry_run=True)
    await ledger.aclose()

    assert (len(result.models), result.total.records) == (10_001, 10_300)
    assert {one.model: one.records for one in result.models}["other"] == 300


async def test_only_the_period_is_repriced(filled: Ledger) -> None:
    """From its first instant until before its last; a name is needed."""
    start = record(0).at_ms
    result = await reprice(filled, NEW, since_ms=start + 5, until_ms=start + 8, version="x", dry_run=True)

    assert result.total.records == 3
    with pytest.raises(ConfigurationError, match="expected a name"):
        await reprice(filled, NEW, since_ms=0, until_ms=2**52, version="", dry_run=True)


async def test_processes_that_look_first_at_the_same_time(make_ledger: MakeLedger) -> None:
    """Where no repricing was ever kept, several that ask at once are all told so."""
    ledgers = [make_ledger() for _ in range(6)]
    await asyncio.gather(*(ledger.prepare() for ledger in ledgers))
    assert await asyncio.gather(*map(versions, ledgers)) == [[]] * 6
