"""D7: LangChain's own standard tests of chat models, over a gateway and a fake provider."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from tests.langchain.kit import Stage

from asgi_llm_guard.gateway import Gateway
from asgi_llm_guard.integrations.langchain import GatewayChatModel
from asgi_llm_guard.testing import Behaviour

Detail = Literal["audio_input", "audio_output", "reasoning_output", "cache_read_input", "cache_creation_input"]
DETAILS: list[Detail] = ["audio_input", "audio_output", "reasoning_output", "cache_read_input", "cache_creation_input"]


class _Gateway:
    """The stage of the tests, where properties reach it."""

    stage: Stage

    @pytest.fixture(autouse=True)
    def _staged(self, stage: Stage) -> None:
        self.stage = stage

    @property
    def gateway(self) -> Gateway:
        return self.stage.gateway

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return GatewayChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"gateway": self.gateway, "model": "openai/small"}


class TestUnit(_Gateway, ChatModelUnitTests):
    """D7: the unit part. Its tests of keys from the environment and of serialisation are for models that have these."""


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:OpenAI may require a filename")  # the suite sends files without a name
@pytest.mark.usefixtures("files")
class TestIntegration(_Gateway, ChatModelIntegrationTests):
    """D7: the integration part."""

    supports_json_mode = True
    supports_image_inputs = True
    supports_image_urls = True
    supports_pdf_inputs = True
    supports_audio_inputs = True
    supports_image_tool_message = True
    supports_pdf_tool_message = True
    supports_anthropic_inputs = True
    enable_vcr_tests = True
    model_override_value = "large"
    supported_usage_metadata_details = {"invoke": DETAILS, "stream": DETAILS}  # noqa: RUF012 - a property of the suite

    def _used(self, behaviour: Behaviour, *, stream: bool) -> AIMessage:
        self.stage.provider.script(behaviour)
        model = GatewayChatModel(**self.chat_model_params)
        if not stream:
            return model.invoke("hello")
        full: AIMessageChunk | None = None
        for chunk in model.stream("hello"):
            full = chunk if full is None else full + chunk
        assert full is not None
        return full

    def invoke_with_audio_input(self, *, stream: bool = False) -> AIMessage:
        reports = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"audio_tokens": 4}}
        return self._used(Behaviour.lie(reports), stream=stream)

    def invoke_with_audio_output(self, *, stream: bool = False) -> AIMessage:
        reports = {"prompt_tokens": 9, "completion_tokens": 2, "completion_tokens_details": {"audio_tokens": 1}}
        return self._used(Behaviour.lie(reports), stream=stream)

    def invoke_with_reasoning_output(self, *, stream: bool = False) -> AIMessage:
        return self._used(Behaviour.answer(reasoning_tokens=7), stream=stream)

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        return self._used(Behaviour.answer(input_tokens=20, cache_read_tokens=7), stream=stream)

    def invoke_with_cache_creation_input(self, *, stream: bool = False) -> AIMessage:
        return self._used(Behaviour.answer(input_tokens=20, cache_write_tokens=7), stream=stream)


class TestAnthropic(TestIntegration):
    """D7: the integration part, where the gateway translates for another provider, which knows neither sound nor JSON
    without a schema."""

    supports_json_mode = False
    supports_audio_inputs = False
    supported_usage_metadata_details = {"invoke": DETAILS[2:], "stream": DETAILS[2:]}  # noqa: RUF012 - as above
    model_override_value = "claude-small"

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"gateway": self.gateway, "model": "anthropic/claude-small"}
