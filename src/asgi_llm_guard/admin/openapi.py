"""The API's OpenAPI 3.1 document, made of the table of verbs and the types that they take and give."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from starlette.responses import Response

from asgi_llm_guard.admin.asked import MAX_BODY_BYTES, Asked, json_answer
from asgi_llm_guard.admin.bodies import Problem
from asgi_llm_guard.admin.kinds import KINDS
from asgi_llm_guard.admin.verbs import Verb

__all__ = ["Asked", "Response", "answer", "document"]

_PARAMETER: Final = re.compile(r"{([a-z_]+)(?::path)?}")
_REF: Final = "#/components/schemas/{name}"


def answer(asked: Asked, verbs: Sequence[Verb]) -> Response:
    return json_answer(document(verbs, server=asked.root or "/", title=asked.desk.options.title))


def document(verbs: Sequence[Verb], *, server: str, title: str) -> dict[str, Any]:
    """Every verb of the API."""
    offered = [verb for verb in verbs if verb.kind == "api"]
    types = [Problem, *(kind.body for kind in KINDS)]
    types += [kind for verb in offered for kind in (verb.takes, verb.gives) if kind is not None]
    unique = list({id(kind) if not isinstance(kind, type) else kind: kind for kind in types}.values())
    schemas, components = msgspec.json.schema_components(unique, ref_template=_REF)
    by_type = list(zip(unique, schemas, strict=True))

    def schema(kind: Any) -> dict[str, Any]:
        return next(made for known, made in by_type if known is kind)

    paths: dict[str, dict[str, Any]] = {}
    for verb in offered:
        path = _PARAMETER.sub(r"{\1}", verb.path)
        paths.setdefault(path, {})[verb.method.lower()] = _operation(verb, schema)
    return {
        "openapi": "3.1.0",
        "info": {"title": f"{title}: administration", "version": "1"},
        "servers": [{"url": server}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(verb: Verb, schema: Any) -> dict[str, Any]:
    told: dict[str, Any] = {
        "summary": verb.told,
        "description": f"Needs the role {verb.role}.",
        "operationId": re.sub(r"[^a-z0-9]+", "_", f"{verb.method} {verb.path}".lower()).strip("_"),
        "responses": _responses(verb, schema),
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1, "maxLength": 256}}
        for name in _PARAMETER.findall(verb.path)
    ]
    parameters += [
        {
            "name": param.name,
            "in": "query",
            "required": param.required,
            "description": param.told,
            "schema": dict(param.schema),
        }
        for param in verb.params
    ]
    if parameters:
        told["parameters"] = parameters
    if verb.takes is not None:
        body = schema(verb.takes)
        fields = next((kind.body for kind in KINDS if verb.method == "PUT" and f"/{kind.slug}/" in verb.path), None)
        if fields is not None:
            body = {"allOf": [body, {"type": "object", "properties": {"value": schema(fields)}}]}
        told["requestBody"] = {
            "required": True,
            "description": f"At most {MAX_BODY_BYTES} bytes.",
            "content": {"application/json": {"schema": body}},
        }
    return told


def _responses(verb: Verb, schema: Any) -> dict[str, Any]:
    problem = {"content": {"application/problem+json": {"schema": schema(Problem)}}}
    good: dict[str, Any] = {"description": "Done."}
    if verb.gives is not None:
        given = schema(verb.gives)
        given = {"type": "array", "items": given} if verb.gives_list else given
        good["content"] = {"application/json": {"schema": given}}
    responses = {str(verb.status): good}
    for status, why, told in (
        ("400", verb.takes is not None, "The body is no JSON."),
        ("401", True, "No token was sent."),
        ("403", True, "The token does not hold, or its role is not enough."),
        ("404", verb.finds, "It is not there."),
        ("409", verb.conflicts, "It was changed meanwhile, or this service keeps nothing of the kind."),
        ("413", verb.takes is not None, "The body is too long."),
        ("415", verb.takes is not None, "The body is of another type."),
        ("422", True, "A value cannot be; `field` names it."),
        ("429", True, "Too many wrong tokens came from this address."),
        ("503", True, "The store does not answer."),
    ):
        if why:
            responses[status] = {"description": told, **problem}
    return responses
