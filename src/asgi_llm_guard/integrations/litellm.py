"""LiteLLM: a callback that guards its asynchronous functions, and those of its Router.

    litellm.callbacks.append(GuardCallback(guard))

A call is admitted after LiteLLM has chosen a deployment and before anything is sent; each retry and fallback is an
attempt of it, at its own price. Before the Router chooses, deployments whose provider is over its `ProviderBudget` are
taken out. LiteLLM does not let callbacks stop its synchronous functions: guard these by
`with guard.call_sync(model=...) as call: call.record(litellm.completion(...))`.

Source: litellm 1.106 (`utils.wrapper_async`, `integrations.custom_logger.CustomLogger`) (2026-11).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import litellm
from litellm.integrations.custom_logger import CustomLogger
from litellm.litellm_core_utils.logging_worker import GLOBAL_LOGGING_WORKER
from litellm.types.utils import CallTypes

from asgi_llm_guard.claims import Claim, Reading
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.errors import LimitExceeded, StorageError
from asgi_llm_guard.guard import Guard
from asgi_llm_guard.integrations.calls import BegunCalls
from asgi_llm_guard.policies.base import DeploymentFilter, Policy

__all__ = ["GuardCallback", "Refused"]

_log = logging.getLogger("asgi_llm_guard")

_BILLED: Final = frozenset(
    {
        "acompletion",
        "aembedding",
        "agenerate_content",
        "aimage_edit",
        "aimage_generation",
        "anthropic_messages",
        "arerank",
        "aresponses",
        "aspeech",
        "atext_completion",
        "atranscription",
    }
)
_INPUTS: Final = (
    "messages",
    "input",
    "prompt",
    "contents",
    "query",
    "documents",
    "instructions",
    "system",
    "tools",
    "functions",
)
_LIMITS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_NEVER_SENT: Final = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "ClientConnectorError"})
"""No connection was made."""
_NOT_ANSWERED: Final = frozenset({"APIConnectionError", "ClientError", "Timeout", "TimeoutError", "TransportError"})
"""Names of openai's, aiohttp's, LiteLLM's, Python's and httpx's errors that are no provider's answer."""
_CAUSES: Final = 8
_ANYONE: Final = Context()
"""Budgets of providers do not ask who calls."""


class Refused(LimitExceeded):
    """A call was refused, told in LiteLLM's terms.

    The status is one that its Router neither repeats nor cools a deployment down for; the one that a client should
    be answered is in `denied.status`.
    """

    status_code = 422


class GuardCallback(CustomLogger):  # type: ignore[misc]  # LiteLLM is not in the environment of the checks
    """Guards `litellm.acompletion` and its siblings. Put it into `litellm.callbacks`."""

    def __init__(
        self,
        guard: Guard,
        *,
        context: Context | Callable[[], Context] | None = None,
        include_usage: bool = True,
    ) -> None:
        """`guard`: decides, and settles.

        `context`: who asks where no admission of the guard is open; `None`: such calls raise `ContextError`.
        `include_usage`: have streams tell what they used, in one more chunk at their end. Without it LiteLLM asks
        OpenAI alone; for others it counts tokens itself, and what it has counted is taken for measured.

        Raises:
            ConfigurationError: an argument is wrong.
        """
        super().__init__()
        self._calls = BegunCalls(guard, context, told_late=GLOBAL_LOGGING_WORKER.flush)
        self._include_usage = include_usage
        self._told = False

    # ------------------------------------------------------------------------------- routing

    async def async_filter_deployments(
        self,
        model: str,  # noqa: ARG002 - see CustomLogger
        healthy_deployments: list[Any],
        messages: list[Any] | None,
        request_kwargs: dict[str, Any] | None = None,
        parent_otel_span: Any = None,  # noqa: ARG002 - see CustomLogger
    ) -> list[Any]:
        """Leave the Router those deployments whose provider is under budget, whatever its strategy.

        Where the rest of a budget is less than the call may cost, the others go before it; if it is so for all of them,
        all stay, and the attempt is refused.

        Raises:
            Refused: none is left; `denied.details` has what each provider has spent and may spend, and the soonest
                reset.
            StorageError: the storage does not answer, and a budget says `on_outage="deny"`.
        """
        guard = self._calls.guard
        try:
            left = await guard.filter(healthy_deployments)
        except LimitExceeded as error:
            raise Refused(error.denied) from error
        budgets = [policy for policy in guard.policies if isinstance(policy, DeploymentFilter)]
        if not budgets or len(left) < 2:
            return left
        asked = {**(request_kwargs or {}), "messages": messages}
        claims = [self._claims(budgets, each, asked) for each in left]
        meters = {claim.meter.key: claim.meter for each in claims for claim in each}
        try:
            readings = dict(zip(meters, await guard.storage.read(list(meters.values())), strict=True))
        except StorageError:
            return left  # each call is decided on when it is made
        fitting = [
            deployment
            for deployment, each in zip(left, claims, strict=True)
            if all(_fits(claim, readings[claim.meter.key]) for claim in each)
        ]
        return fitting or left

    def _claims(
        self, budgets: Sequence[Policy], deployment: Mapping[str, Any], asked: Mapping[str, Any]
    ) -> list[Claim]:
        """What the call would take of the budgets at a deployment."""
        guard = self._calls.guard
        call = self._described({**asked, **(deployment.get("litellm_params") or {})})
        now_ms = guard.clock.now_ms()
        return [claim for policy in budgets for claim in policy.plan(_ANYONE, call, now_ms).claims]

    # ------------------------------------------------------------------------------ attempts

    async def async_pre_call_deployment_hook(
        self, kwargs: dict[str, Any], call_type: CallTypes | None
    ) -> dict[str, Any] | None:
        """Claim an attempt.

        Raises:
            Refused: by a policy; nothing is sent.
            ContextError: no admission is open, and there is no context.
        """
        if call_type is None or call_type.value not in _BILLED:
            return None
        call_id = kwargs.get("litellm_call_id")
        trace = kwargs.get("litellm_trace_id") or call_id
        try:
            await self._calls.begin(call_id, self._described(kwargs), repeats=f"litellm:{trace}".encode())
        except LimitExceeded as error:
            raise Refused(error.denied) from error
        if (
            not kwargs.get("stream")
            or not self._include_usage
            or call_type.value not in ("acompletion", "atext_completion")
        ):
            return None
        options = kwargs.get("stream_options")
        if isinstance(options, Mapping) and "include_usage" in options:
            return None
        return {**kwargs, "stream_options": {**(options or {}), "include_usage": True}}

    async def async_post_call_success_deployment_hook(
        self,
        request_data: dict[str, Any],
        response: Any,
        call_type: CallTypes | None,  # noqa: ARG002 - see CustomLogger
    ) -> None:
        """Settle an attempt by its answer."""
        self._answered(request_data.get("litellm_call_id"), response)

    async def async_post_call_failure_deployment_hook(
        self,
        request_data: Mapping[str, object],
        exception: Exception,
        call_type: CallTypes | None,  # noqa: ARG002 - see CustomLogger
        fallback_depth: int | None = None,  # noqa: ARG002 - see CustomLogger
    ) -> None:
        """Settle an attempt by its error."""
        self._failed(request_data.get("litellm_call_id"), exception)

    # ------------------------------------------------------------------- streams, and what is left

    async def async_log_success_event(
        self,
        kwargs: dict[str, Any],
        response_obj: Any,
        start_time: Any,  # noqa: ARG002 - see CustomLogger
        end_time: Any,  # noqa: ARG002 - see CustomLogger
    ) -> None:
        """Settle a stream that has come to its end; give back what LiteLLM's own cache has answered."""
        call_id = kwargs.get("litellm_call_id")
        begun = self._calls.find(call_id)
        if begun is None:
            return
        if kwargs.get("cache_hit"):
            begun.call.release()
            self._calls.end(call_id)
            return
        self._answered(call_id, kwargs.get("async_complete_streaming_response") or response_obj)

    async def async_log_failure_event(
        self,
        kwargs: dict[str, Any],
        response_obj: Any,  # noqa: ARG002 - see CustomLogger
        start_time: Any,  # noqa: ARG002 - see CustomLogger
        end_time: Any,  # noqa: ARG002 - see CustomLogger
    ) -> None:
        """Settle a stream that broke off."""
        error = kwargs.get("exception")
        self._failed(
            kwargs.get("litellm_call_id"), error if isinstance(error, BaseException) else RuntimeError("failed")
        )

    def log_pre_api_call(self, model: Any, messages: Any, kwargs: dict[str, Any]) -> None:  # noqa: ARG002 - see CustomLogger
        """Say so, once, if a call passes that LiteLLM does not let be stopped."""
        if self._told or self._calls.find(kwargs.get("litellm_call_id")) is not None:
            return
        if kwargs.get("call_type") in ("completion", "text_completion", "embedding", "responses"):
            self._told = True
            _log.error(
                "litellm.%s is not guarded: LiteLLM lets no callback stop its synchronous functions. Use "
                "`with guard.call_sync(model=...) as call: call.record(litellm.completion(...))`",
                kwargs.get("call_type"),
            )

    # -------------------------------------------------------------------------------- inside

    def _described(self, kwargs: Mapping[str, Any]) -> Call:
        name = str(kwargs.get("model") or "unknown")
        try:
            model, provider, _, _ = litellm.get_llm_provider(
                name, custom_llm_provider=kwargs.get("custom_llm_provider"), api_base=kwargs.get("api_base")
            )
        except litellm.exceptions.BadRequestError:  # a name that LiteLLM does not know either: it is about to say so
            model, provider = name, None
        limits = [limit for key in _LIMITS if type(limit := kwargs.get(key)) is int and limit > 0]
        choices = kwargs.get("n")
        return self._calls.guard.describe(
            model,
            provider=provider or None,
            input={key: value for key in _INPUTS if (value := kwargs.get(key)) is not None},
            max_output_tokens=max(limits, default=None),
            choices=choices if type(choices) is int and choices > 0 else 1,
            stream=bool(kwargs.get("stream")),
        )

    def _answered(self, call_id: object, response: object) -> None:
        begun = self._calls.find(call_id)
        if begun is not None:
            begun.call.record_if_known(response)
            self._calls.end(call_id)

    def _failed(self, call_id: object, error: BaseException) -> None:
        begun = self._calls.find(call_id)
        if begun is None:
            return
        names = _names(error)
        if not names.isdisjoint(_NOT_ANSWERED):
            # LiteLLM gives it a status all the same, which no provider has answered with.
            if not names.isdisjoint(_NEVER_SENT):
                begun.call.release()
            error = TimeoutError(str(error))
        self._calls.end(call_id, error, complete=False)


def _fits(claim: Claim, reading: Reading) -> bool:
    limit = claim.meter.limit
    return limit is None or not claim.meter.enforce or reading.used + reading.held + claim.amount <= limit


def _names(error: BaseException) -> set[str]:
    """The names of the classes of an error and of what it was raised from."""
    names: set[str] = set()
    seen: BaseException | None = error
    for _ in range(_CAUSES):  # causes may form a ring
        if seen is None:
            break
        names.update(kind.__name__ for kind in type(seen).__mro__)
        seen = seen.__cause__ or seen.__context__
    return names
