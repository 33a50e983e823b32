"""Ways out of synchronous code: blocks, generators, and Ctrl-C while the guard decides."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from tests.exits.kit import CONTEXT, MAX_TOKENS, MODEL, PRICES, ApplicationError

from asgi_llm_guard import Concurrency, Guard, Iterations, Usage, background, guarded
from asgi_llm_guard.claims import Ended, Granted, Plan, Refused
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import Gate


class Thoughtful(MemoryStorage):
    """Decides, and then waits for a gate before it says so."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.decided = threading.Semaphore(0)
        self.interrupted = threading.Event()

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        answer = await super().reserve(owner, plans)
        self.decided.release()
        try:
            await self.gate.step()
        finally:
            self.interrupted.set()
        return answer


_NUDGE = signal.SIGUSR1


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, also in a process that was started in the background of a shell, where it is ignored.

    `_NUDGE` only wakes the main thread: an interrupt that comes just before it falls asleep does not.
    """
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        _NUDGE: signal.signal(_NUDGE, lambda _number, _frame: None),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asleep(thread: int) -> bool:
    """Whether this thread waits for an answer, where an interrupt is an interrupt: before, inside `Condition.wait`, the
    interpreter makes "cannot release un-acquired lock" of it."""
    frame = sys._current_frames()[thread]
    return frame.f_code.co_name == "wait" and "gotit" in frame.f_locals


def guard_over(storage: MemoryStorage) -> Guard:
    return Guard((Iterations(100), Concurrency(1, per="global")), storage=storage, prices=PRICES)


def left(storage: MemoryStorage) -> tuple[int, int]:
    """Open holds and records."""
    return asyncio.run(storage.open_holds()), len(asyncio.run(storage.records()))


def open_block(guard: Guard) -> None:
    with guard.open_sync(CONTEXT):
        raise AssertionError


def call_block(guard: Guard) -> None:
    with guard.open_sync(CONTEXT), guard.call_sync(model=MODEL, max_output_tokens=MAX_TOKENS):
        raise AssertionError


def function(guard: Guard) -> None:
    @guarded(model=MODEL, max_output_tokens=MAX_TOKENS, guard=guard)
    def work() -> None:
        raise AssertionError

    work()


@pytest.mark.parametrize("work, steps", [(open_block, 0), (call_block, 1), (function, 0)])
def test_interrupt_while_the_guard_decides(work: Callable[[Guard], None], steps: int) -> None:
    """Ctrl-C while the guard decides gives back what it had just taken."""
    storage = Thoughtful()
    guard = guard_over(storage)
    storage.gate.release(steps)
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        for _ in range(steps + 1):
            assert storage.decided.acquire(timeout=10)
        while not asleep(main):
            time.sleep(0)
        signal.pthread_kill(main, signal.SIGINT)  # once: a second one could end the process of the tests
        for _ in range(100):
            if storage.interrupted.wait(0.1):
                return
            signal.pthread_kill(main, _NUDGE)

    thread = threading.Thread(target=interrupt)
    with interruptible():
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            work(guard)
        thread.join()
    assert storage.interrupted.wait(60)
    asyncio.run(_until(lambda: storage.size()["holds"] == 0))
    assert left(storage) == (0, 0)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the storage offers no event
            await asyncio.sleep(0)


@pytest.mark.parametrize("error", [ApplicationError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_errors_in_blocks(error: type[BaseException]) -> None:
    """Whatever leaves a block, its call and its slot are settled once."""
    storage = MemoryStorage()
    guard = guard_over(storage)
    for _ in range(3):
        with pytest.raises(error), guard.open_sync(CONTEXT), guard.call_sync(model=MODEL, max_output_tokens=5):
            raise error
    assert left(storage) == (0, 3)


@pytest.mark.parametrize("taken", range(3))
def test_generator_that_is_left(taken: int) -> None:
    """A `@guarded` generator that is closed after any number of items is settled once; one never begun, not at all."""
    storage = MemoryStorage()
    guard = guard_over(storage)

    @guarded(model=MODEL, max_output_tokens=MAX_TOKENS, guard=guard, context=CONTEXT)
    def items() -> Iterator[Any]:
        yield "one"
        yield Usage(input_tokens=1, output_tokens=1)

    stream = items()
    for _ in range(taken):
        next(stream)
    del stream
    assert left(storage) == (0, min(taken, 1))


def test_interrupt_when_the_work_is_done() -> None:
    """Ctrl-C that comes when the work is done, before its answer is taken, has it undone."""
    main = threading.main_thread().ident
    assert main is not None
    undone = threading.Event()

    async def work() -> None:
        while not asleep(main):
            pass  # nothing else has to run in this loop
        signal.pthread_kill(main, signal.SIGINT)

    with interruptible(), pytest.raises(KeyboardInterrupt):
        background.run(work(), undo=undone.set)
    assert undone.wait(60)


@contextmanager
def interrupted_before_it_sleeps(until: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Ctrl-C between the steps of `Condition.wait`, which makes "cannot release un-acquired lock" of it; after `until`."""

    def interrupt(frame: FrameType, _event: str, _argument: object) -> Any:
        if frame.f_code.co_name == "wait" and "saved_state" in frame.f_locals and "gotit" not in frame.f_locals:
            until()
            raise KeyboardInterrupt
        return interrupt

    background.run(asyncio.sleep(0))  # its thread is there: starting one waits, too
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        with pytest.raises((RuntimeError, KeyboardInterrupt)) as caught:
            yield
    finally:
        sys.settrace(before)
    assert isinstance(caught.value, KeyboardInterrupt) or isinstance(caught.value.__context__, KeyboardInterrupt)


def test_interrupt_between_the_steps_of_waiting() -> None:
    """Ctrl-C that the interpreter's own `wait` turns into a RuntimeError has the work cancelled and undone as well."""
    cancelled, undone = threading.Event(), threading.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with interrupted_before_it_sleeps():
        background.run(work(), undo=undone.set)
    assert undone.wait(60)
    assert cancelled.wait(60)


def test_interrupt_between_the_steps_of_waiting_when_the_work_is_done() -> None:
    """So is work undone that has come to its end meanwhile: nobody takes its answer."""
    waited_for, done, undone = threading.Event(), threading.Event(), threading.Event()

    async def work() -> str:
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: done.set())  # called after the one that hands the answer over
        assert waited_for.wait(60)
        return "granted"

    def end() -> None:
        waited_for.set()
        assert done.wait(60)

    with interrupted_before_it_sleeps(end):
        background.run(work(), undo=undone.set)
    assert undone.wait(60)


def test_an_error_of_the_work_undoes_nothing() -> None:
    """What fails by itself has undone what it did, and its error is passed on as it is."""
    undone: list[bool] = []
    error = RuntimeError("of the work")

    async def work() -> None:
        raise error

    with pytest.raises(RuntimeError) as caught:
        background.run(work(), undo=lambda: undone.append(True))
    background.run(asyncio.sleep(0))
    assert caught.value is error
    assert undone == []
