"""What OpenAI makes besides text: embeddings, images, speech, transcriptions."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Mapping, Sequence
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any, Final

from asgi_llm_guard.testing.behaviour import Behaviour
from asgi_llm_guard.testing.sale import FakeRequest, Filler, Sale
from asgi_llm_guard.testing.speech.base import CREATED, Call, UnreadableError, counted
from asgi_llm_guard.testing.speech.openai_chat import OpenAI, model_in, number_in
from asgi_llm_guard.testing.speech.openai_completions import prompt_texts, prompt_tokens
from asgi_llm_guard.usage import Usage

__all__ = ["OpenAIEmbeddings", "OpenAIImages", "OpenAISpeech", "OpenAITranscriptions", "vector"]

_PIXEL: Final = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
_IMAGE_TOKENS: Final = 272
"""Of one image, unless the behaviour says otherwise."""
_DIMENSIONS: Final = 8
_AUDIO_TOKENS_PER_S: Final = 10


def vector(text: str, dimensions: int) -> list[float]:
    """Some numbers that depend on the text."""
    seed = sum(text.encode())
    return [((seed + place) % 16) / 16 for place in range(dimensions)]


class OpenAIEmbeddings(OpenAI):
    dialect = "openai_embeddings"
    path = re.compile(r"(?:/openai)?(?:/v1)?/embeddings|/openai/deployments/(?P<model>[^/]+)/embeddings")
    id_prefix = "emb-"

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        return FakeRequest(
            headers=call.headers,
            body=body,
            raw=call.raw,
            dialect=self.dialect,
            path=call.path,
            model=call.named.get("model") or model_in(body),
            stream=False,
            texts=prompt_texts(body.get("input")),
            counted_tokens=prompt_tokens(body["input"]),
        )

    def words(self, request: FakeRequest, behaviour: Behaviour) -> tuple[Sequence[str], str]:  # noqa: ARG002
        return (), "stop"

    def consumed(self, sale: Sale) -> Usage:
        return Usage(input_tokens=sale.input_tokens, output_tokens=0, model=sale.model)

    def usage(self, used: Usage) -> Mapping[str, Any]:
        return {"prompt_tokens": used.input_tokens, "total_tokens": used.input_tokens}

    def body(self, sale: Sale) -> Mapping[str, Any]:
        asked = sale.request.body
        dimensions = number_in(asked, "dimensions") or _DIMENSIONS
        data: list[dict[str, Any]] = []
        for index, text in enumerate(sale.request.texts):
            numbers: list[float] | str = vector(text, dimensions)
            if asked.get("encoding_format") == "base64":
                numbers = base64.b64encode(struct.pack(f"<{dimensions}f", *numbers)).decode()
            data.append({"object": "embedding", "index": index, "embedding": numbers})
        body = {"object": "list", "model": sale.model, "data": data}
        return {**body, "usage": self.report(sale)} if self.tells(sale) else body


class OpenAIImages(OpenAI):
    """Images are billed by the token, those of DALL-E each at a price that no answer tells."""

    dialect = "openai_images"
    path = re.compile(
        r"(?:/openai)?(?:/v1)?/images/generations|/openai/deployments/(?P<model>[^/]+)/images/generations"
    )
    id_prefix = "img-"

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            raise UnreadableError("prompt: expected a string")
        return FakeRequest(
            headers=call.headers,
            body=body,
            raw=call.raw,
            dialect=self.dialect,
            path=call.path,
            model=call.named.get("model") or model_in(body),
            stream=False,
            texts=(prompt,),
            counted_tokens=prompt_tokens(prompt),
            choices=number_in(body, "n") or 1,
        )

    def words(self, request: FakeRequest, behaviour: Behaviour) -> tuple[Sequence[str], str]:  # noqa: ARG002
        return Filler(_IMAGE_TOKENS if behaviour.output_tokens is None else behaviour.output_tokens), "stop"

    def consumed(self, sale: Sale) -> Usage:
        if self._by_the_piece(sale):
            return Usage(images=sale.request.choices, model=sale.model)
        return Usage(
            input_tokens=sale.input_tokens,
            output_tokens=sale.produced,
            input_image_tokens=0,
            output_image_tokens=sale.produced,
            model=sale.model,
        )

    def tells(self, sale: Sale) -> bool:
        return sale.tells and not self._by_the_piece(sale)

    def usage(self, used: Usage) -> Mapping[str, Any]:
        images = used.input_image_tokens or 0
        return {
            "input_tokens": used.input_tokens,
            "input_tokens_details": {"image_tokens": images, "text_tokens": (used.input_tokens or 0) - images},
            "output_tokens": used.output_tokens,
            "output_tokens_details": {
                "image_tokens": used.output_image_tokens or 0,
                "text_tokens": (used.output_tokens or 0) - (used.output_image_tokens or 0),
            },
            "total_tokens": used.total_tokens,
        }

    def body(self, sale: Sale) -> Mapping[str, Any]:
        body = {"created": CREATED, "data": [{"b64_json": _PIXEL} for _ in range(sale.request.choices)]}
        return {**body, "usage": self.report(sale)} if self.tells(sale) else body

    @staticmethod
    def _by_the_piece(sale: Sale) -> bool:
        return sale.model.startswith("dall-e")


class OpenAISpeech(OpenAI):
    """A text is spoken, and billed by its characters. The answer is sound, and says nothing about usage."""

    dialect = "openai_speech"
    path = re.compile(r"(?:/openai)?(?:/v1)?/audio/speech|/openai/deployments/(?P<model>[^/]+)/audio/speech")
    id_prefix = "speech-"

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        text = body.get("input")
        if not isinstance(text, str):
            raise UnreadableError("input: expected a string")
        return FakeRequest(
            headers=call.headers,
            body=body,
            raw=call.raw,
            dialect=self.dialect,
            path=call.path,
            model=call.named.get("model") or model_in(body),
            stream=False,
            texts=(text,),
            counted_tokens=0,
        )

    def words(self, request: FakeRequest, behaviour: Behaviour) -> tuple[Sequence[str], str]:  # noqa: ARG002
        return (), "stop"

    def consumed(self, sale: Sale) -> Usage:
        return Usage(characters=len(sale.request.texts[0]), model=sale.model)

    def tells(self, sale: Sale) -> bool:  # noqa: ARG002
        return False

    def whole(self, sale: Sale) -> tuple[bytes, str]:
        return b"\xff\xfb" + sale.request.texts[0].encode() * 10, "audio/mpeg"

    def body(self, sale: Sale) -> Mapping[str, Any]:
        raise NotImplementedError  # pragma: no cover - sound is no JSON, see `whole`


class OpenAITranscriptions(OpenAI):
    """What was said, from a form with a file. Whisper is billed by the length of the sound, others by the token."""

    dialect = "openai_transcriptions"
    path = re.compile(
        r"(?:/openai)?(?:/v1)?/audio/transcriptions|/openai/deployments/(?P<model>[^/]+)/audio/transcriptions"
    )
    id_prefix = "heard-"

    def read(self, call: Call) -> FakeRequest:
        form = _form(call)
        if "file" not in form:
            raise UnreadableError("file: expected a file in the form")
        prompt = form.get("prompt", "")
        return FakeRequest(
            headers=call.headers,
            body=form,
            raw=call.raw,
            dialect=self.dialect,
            path=call.path,
            model=call.named.get("model") or model_in(form),
            stream=False,
            texts=(prompt or "a sound",),
            counted_tokens=counted([prompt]) if prompt else 0,
        )

    def consumed(self, sale: Sale) -> Usage:
        if self._by_length(sale):
            return Usage(audio_ms=sale.behaviour.audio_ms, model=sale.model)
        heard = sale.behaviour.audio_ms * _AUDIO_TOKENS_PER_S // 1000
        whole = sale.behaviour.input_tokens
        return Usage(
            input_tokens=sale.request.counted_tokens + heard if whole is None else whole,
            input_audio_tokens=heard,
            output_tokens=sale.produced,
            model=sale.model,
        )

    def usage(self, used: Usage) -> Mapping[str, Any]:
        if used.audio_ms is not None:
            return {"type": "duration", "seconds": used.audio_ms / 1000}
        heard = used.input_audio_tokens or 0
        return {
            "type": "tokens",
            "input_tokens": used.input_tokens,
            "input_token_details": {"audio_tokens": heard, "text_tokens": (used.input_tokens or 0) - heard},
            "output_tokens": used.output_tokens,
            "total_tokens": used.total_tokens,
        }

    def body(self, sale: Sale) -> Mapping[str, Any]:
        body = {"text": sale.text}
        return {**body, "usage": self.report(sale)} if self.tells(sale) else body

    @staticmethod
    def _by_length(sale: Sale) -> bool:
        return sale.model.startswith("whisper")


def _form(call: Call) -> dict[str, str]:
    """The fields of a form, and the names of its files. Raises `UnreadableError` if it is no form."""
    kind = call.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise UnreadableError("expected a form (multipart/form-data)")
    message = BytesParser(policy=HTTP).parsebytes(b"content-type: " + kind.encode() + b"\r\n\r\n" + call.raw)
    form: dict[str, str] = {}
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition")
        value = part.get_filename() or bytes(part.get_payload(decode=True) or b"").decode()
        form[str(name)] = value
    return form
