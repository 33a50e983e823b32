"""A request to the gateway, as it was asked, and what it would be at each deployment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from asgi_llm_guard.context import Call, Target
from asgi_llm_guard.describe import Describer
from asgi_llm_guard.gateway.deployment import Deployment
from asgi_llm_guard.gateway.fields import refuse_connection_fields
from asgi_llm_guard.gateway.providers.base import ModelRequest, Provider
from asgi_llm_guard.gateway.translate import Translation, translate
from asgi_llm_guard.streams import NEAR_BYTES, SURE_BYTES
from asgi_llm_guard.wire import dialect_named
from asgi_llm_guard.wire.base import Ask, Headers
from asgi_llm_guard.wire.peek import BodyError, BodyView, read_body
from asgi_llm_guard.wire.shape import decode

__all__ = ["DIALECTS", "Place", "Question", "target_of"]

DIALECTS: Final = frozenset({"openai", "anthropic", "openai_responses", "openai_embeddings", "openai_completions"})
"""What a gateway can be asked in."""

_LIMITS: Final = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_STATEFUL: Final = ("previous_response_id", "conversation")
_MOST_TOKENS: Final = 4096
"""The bound of an answer where neither the request nor the data of the model have one, and the provider must have one."""


class Place(msgspec.Struct, frozen=True):
    """One deployment that a request may be sent to."""

    deployment: Deployment
    provider: Provider
    dialect: str
    """In which it is sent."""
    call: Call
    window: int | None
    """The most tokens that it takes; `None`: not known."""

    @property
    def name(self) -> str:
        """Of the deployment."""
        return self.deployment.name

    @property
    def key(self) -> tuple[str, str]:
        """What is asked, and where: a deployment may serve many models."""
        return self.deployment.name, self.deployment.model


def target_of(deployment: Deployment) -> Target:
    """What a call is that goes to a deployment."""
    priced_as = deployment.base_model if deployment.base_model not in (None, deployment.model) else None
    return Target(deployment.provider, deployment.model, priced_as, deployment.name)


class Question:
    """One request, read once.

    Raises:
        BodyError: it is malformed.
        FieldNotAllowed: it says where it is to be sent, or with whose key.
    """

    __slots__ = ("_bodies", "_calls", "_describer", "_translations", "ask", "body", "dialect", "headers", "raw", "view")

    def __init__(
        self, describer: Describer, dialect: str, body: Mapping[str, Any] | bytes, *, headers: Headers = ()
    ) -> None:
        self.dialect = dialect
        self.headers = headers
        self.raw = body if isinstance(body, bytes) else _encoded(body)
        self.view = read_body(self.raw)
        value = decode(self.raw)
        self.body: Mapping[str, Any] = value if isinstance(value, dict) else {}
        refuse_connection_fields(self.body)
        self.ask = dialect_named(dialect).read_request(self.view)
        self._describer = describer
        self._calls: dict[tuple[object, ...], Call] = {}
        self._bodies: dict[str, tuple[Ask, BodyView]] = {}
        self._translations: dict[str, Translation] = {}

    @property
    def model(self) -> str:
        """The name that is asked for."""
        return self.ask.model

    @property
    def stream(self) -> bool:
        return self.ask.stream

    def place(self, deployment: Deployment, provider: Provider) -> Place | None:
        """What it is at a deployment; `None`: it cannot be asked for there."""
        spoken = provider.dialect(deployment, self.dialect)
        if spoken is None:
            return None
        target = target_of(deployment)
        window = deployment.context_window or self._describer.window(target.provider, target.priced_as or target.model)
        return Place(deployment, provider, spoken, self._call(deployment, target), window)

    def _call(self, deployment: Deployment, target: Target) -> Call:
        key = (target.provider, target.model, target.priced_as, deployment.name if deployment.params else None)
        call = self._calls.get(key)
        if call is None:  # reading a long body takes longer than all the rest
            ask, view = self._with_params(deployment)
            call = self._describer.describe_target(ask, view, target, dialect=self.dialect)
            self._calls[key] = call
        if call.deployment == target.deployment:
            return call
        return msgspec.structs.replace(call, deployment=target.deployment)

    def _with_params(self, deployment: Deployment) -> tuple[Ask, BodyView]:
        """What is asked for with the parameters of the deployment, which a request need not say."""
        params = {name: value for name, value in deployment.params.items() if name not in self.body}
        if self.ask.max_output_tokens is not None:
            for name in _LIMITS:
                params.pop(name, None)
        if not params:
            return self.ask, self.view
        found = self._bodies.get(deployment.name)
        if found is None:
            view = read_body(_encoded({**params, **self.body}))
            found = self._bodies[deployment.name] = (dialect_named(self.dialect).read_request(view), view)
        return found

    def is_too_long(self, place: Place, *, surely: bool) -> bool:
        """Whether the input is larger than the window of a deployment: surely, or most likely."""
        if place.window is None or any(name in self.view for name in _STATEFUL):
            return False
        tokens = place.call.input_tokens
        if not self._describer.counts:
            tokens //= SURE_BYTES if surely else NEAR_BYTES
        return tokens > place.window

    def translation(self, place: Place) -> Translation | None:
        """How it is said in the dialect of a deployment; `None`: it is sent as it is.

        Raises:
            BodyError: that has no words for something in the request; names it.
        """
        if place.dialect == self.dialect:
            return None
        found = self._translations.get(place.name)
        if found is None:
            call, deployment = place.call, place.deployment
            most = self._describer.longest(call)
            found = self._translations[place.name] = translate(
                self.dialect,
                place.dialect,
                {**self.body, "model": deployment.priced_model},
                most_tokens=_MOST_TOKENS if most is None else most // max(1, call.choices),
            )
        return found

    def request(self, place: Place) -> ModelRequest:
        """What is sent to a deployment.

        Raises:
            BodyError: as `translation`.
        """
        translation = self.translation(place)
        return ModelRequest(
            dialect=place.dialect,
            body=self.body if translation is None else translation.body,
            model=place.deployment.model,
            stream=self.stream,
            headers=self.headers,
        )


def _encoded(body: Mapping[str, Any]) -> bytes:
    if not isinstance(body, Mapping):
        raise BodyError("invalid_request", 400, "expected a mapping with the fields of a request")
    try:
        return msgspec.json.encode(body)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        message = f"cannot be written as JSON ({type(error).__name__}): plain dicts, lists, texts and numbers can"
        raise BodyError("invalid_request", 400, message) from None
