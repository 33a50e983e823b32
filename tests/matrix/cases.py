"""What every client keeps in every mode, whatever its provider does: the ledger has what the provider's bill has."""

from __future__ import annotations

import asyncio

import pytest
from tests.matrix.kit import BILL, CONTEXT, ECHO, MODEL, TEXT, TOOL, Client, Mode, staged

from asgi_llm_guard import Budget, Iterations
from asgi_llm_guard.testing import Behaviour

AT_ONCE = (("retry-after-ms", "1"),)


class Cases:
    """The tests of the matrix, for a class that says which clients."""

    async def test_plain(self, kind: type[Client], mode: Mode) -> None:
        """B9: an answer is settled as billed, to the nano-dollar."""
        async with staged(kind, mode) as stage:
            async with stage.guard.open(CONTEXT):
                assert await stage.client.plain(TEXT) == ECHO
            (record,) = await stage.check_bill()
            assert (record.outcome, record.model) == ("measured", MODEL)
            assert record.cost_nanousd

    async def test_stream(self, kind: type[Client], mode: Mode) -> None:
        """B9: a stream is settled at its end, as billed; a client that did not ask for usage sees none."""
        async with staged(kind, mode) as stage:
            async with stage.guard.open(CONTEXT):
                assert await stage.client.stream(TEXT) == ECHO
            (record,) = await stage.check_bill()
            assert record.outcome == "measured"

    async def test_refused(self, kind: type[Client], mode: Mode) -> None:
        """402: a budget's refusal is one request in every client, reaches no provider, and is the client's own error."""
        async with staged(kind, mode, retries=2) as stage:
            stage.policies(Budget("$0/1d", per="global"))
            async with stage.guard.open(CONTEXT):
                with pytest.raises(Exception, match=r"(?i)budget|402"):
                    await stage.client.plain(TEXT)
            assert stage.provider.calls == 0
            assert len(stage.refusals) == 1
            assert stage.refusals[0].denied.status == 402

    @pytest.mark.slow
    async def test_refused_stream(self, kind: type[Client], mode: Mode) -> None:
        """402: as an answer, so a stream: one request, and the client's own error."""
        async with staged(kind, mode, retries=2) as stage:
            stage.policies(Budget("$0/1d", per="global"))
            async with stage.guard.open(CONTEXT):
                with pytest.raises(Exception, match=r"(?i)budget|402"):
                    await stage.client.stream(TEXT)
            assert stage.provider.calls == 0
            assert len(stage.refusals) == 1

    @pytest.mark.slow
    async def test_limited(self, kind: type[Client], mode: Mode) -> None:
        """429: exactly one request in the clients that read `x-should-retry`, and none that reaches the provider."""
        async with staged(kind, mode, retries=2 if kind.reads_should_retry else 0) as stage:
            stage.policies(Iterations(1))
            async with stage.guard.open(CONTEXT):
                await stage.client.plain(TEXT)
                with pytest.raises(Exception, match=r"(?i)iteration|429"):
                    await stage.client.plain(TEXT)
            assert stage.provider.calls == 1
            assert [refusal.denied.status for refusal in stage.refusals] == [429]

    @pytest.mark.slow
    async def test_tool_call(self, kind: type[Client], mode: Mode) -> None:
        """The call of a tool is an answer like any other, and is settled as billed."""
        async with staged(kind, mode) as stage:
            stage.provider.script(Behaviour.call_tool(TOOL, query="llamas"))
            async with stage.guard.open(CONTEXT):
                assert await stage.client.plain(TEXT, tools=True) == TOOL
            for record in await stage.check_bill():
                assert record.outcome == "measured"

    @pytest.mark.slow
    @pytest.mark.parametrize("status", [429, 500])
    async def test_error_then_answer(self, kind: type[Client], mode: Mode, status: int) -> None:
        """An error of the provider, and the client's own retry: one iteration, each attempt settled by itself."""
        if not kind.retries:
            return
        async with staged(kind, mode, retries=2) as stage:
            stage.policies(Budget("$1/1d", per="global"), Iterations(1))
            stage.provider.script(Behaviour(status=status, headers=AT_ONCE))
            async with stage.guard.open(CONTEXT):
                assert await stage.client.plain(TEXT) == ECHO
            assert stage.provider.calls == 2
            failed, answered = await stage.check_bill()
            assert (failed.outcome, failed.cost_nanousd) == ("provider_error", 0)
            assert (answered.attempt, answered.attempt_of) == (2, failed.call_id)

    @pytest.mark.slow
    async def test_cut_stream(self, kind: type[Client], mode: Mode) -> None:
        """A stream that breaks off is charged by what has come, never 0, never above what was held."""
        async with staged(kind, mode) as stage:
            stage.provider.script(Behaviour.cut(after_chunks=2))
            async with stage.guard.open(CONTEXT):
                with pytest.raises(Exception):  # noqa: B017 - each client has its own, and some pass the library's on
                    await stage.client.stream(TEXT)
            (record,) = await stage.check_bound()
            assert record.outcome in ("estimated", "measured", "unknown")

    @pytest.mark.slow
    async def test_left_stream(self, kind: type[Client], mode: Mode) -> None:
        """A stream that its reader leaves is charged by what has come, and the provider sees the reader go."""
        async with staged(kind, mode) as stage:
            stage.provider.script(Behaviour.slow())
            stage.provider.release(2)
            async with stage.guard.open(CONTEXT):
                await stage.client.stream(TEXT, most=1)
            await stage.check_bound(unread=BILL[MODEL].output)
            assert stage.provider.disconnects == 1

    @pytest.mark.slow
    async def test_cancelled(self, kind: type[Client], mode: Mode) -> None:
        """A call that is cancelled while it waits may have been billed: it is charged what it holds."""
        if mode == "sync":
            return  # a thread is not cancelled
        async with staged(kind, mode) as stage:
            stage.provider.script(Behaviour.hang())
            async with stage.guard.open(CONTEXT):
                asking = asyncio.create_task(stage.client.plain(TEXT))
                await stage.provider.until(lambda: stage.provider.open == 1)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
            (record,) = await stage.check_bound()
            assert record.outcome == "unknown"

    @pytest.mark.slow
    @pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
    async def test_no_usage(self, kind: type[Client], mode: Mode, *, streamed: bool) -> None:
        """An answer that does not say what it used is never free."""
        async with staged(kind, mode) as stage:
            stage.provider.script(Behaviour.no_usage())
            async with stage.guard.open(CONTEXT):
                try:
                    await (stage.client.stream(TEXT) if streamed else stage.client.plain(TEXT))
                except Exception:  # noqa: BLE001 - it insists on usage; its provider has billed all the same
                    assert not kind.says_without_usage
            (record,) = await stage.check_bound()
            assert record.outcome in ("unmetered", "estimated") or kind.counts
