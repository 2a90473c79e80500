"""Answers of OpenAI's older shape: choices, whole or as chunks."""

from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterable
from dataclasses import dataclass, replace
from typing import Any

from fastapi.concurrency import run_in_threadpool

from prefixd.server.api.error_responses import error_body
from prefixd.server.api.generate.event_encoder import EventEncoder, sse_event
from prefixd.server.api.generate.event_stream import DONE
from prefixd.server.api.generate.fields import GenerationFields
from prefixd.server.api.generate.formatter import ResponseFormatter
from prefixd.server.api.generate.generation import Batch
from prefixd.server.api.generate.parsed_formatter import parsing
from prefixd.server.api.generate.prompt_scores import PromptScores
from prefixd.server.api.generate.requests import ChatRequest, CompletionRequest
from prefixd.server.api.generate.service import GenerationService, Running, envelope
from prefixd.server.api.request_record import RequestRecord
from prefixd.server.engine.request import FinishEvent, TokenEvent
from prefixd.server.errors import PrefixdError


@dataclass(frozen=True, slots=True)
class ChoicesAnswer:
    """An ``Answer`` of completions and of chat completions."""

    events: AsyncIterable[Batch]
    record: RequestRecord
    formatter: ResponseFormatter
    envelope: dict[str, Any]
    body: GenerationFields

    async def whole(self) -> dict[str, Any]:
        """As of Answer."""
        tokens: defaultdict[int, list[TokenEvent]] = defaultdict(list)
        ends: dict[int, FinishEvent] = {}
        async for batch in self.events:
            for choice, event in batch:
                if isinstance(event, FinishEvent):
                    ends[choice] = event
                elif isinstance(event, TokenEvent):
                    tokens[choice].append(event)
        formatter, record = self.formatter, self.record

        def answer() -> dict[str, Any]:
            choices = [formatter.whole(each, tokens[each], ends[each]) for each in sorted(ends)]
            assert record.admitted is not None
            head = {**record.admitted.head, **formatter.whole_nulls, **formatter.head()}
            return {**self.envelope, "choices": choices, "usage": record.usage(), **head}

        # The scores of a long prompt take long to write.
        return answer() if formatter.prompt_scores is None else await run_in_threadpool(answer)

    async def chunks(self) -> AsyncGenerator[bytes]:
        """As of Answer."""
        admitted, body, formatter = self.record.admitted, self.body, self.formatter
        assert admitted is not None
        encoder = EventEncoder(
            formatter,
            self.envelope,
            head=admitted.head,
            wants_usage=body.wants_usage,
            prompt_tokens=admitted.choice_lengths if body.wants_each_usage else (),
            num_rows=admitted.num_rows,
        )
        openings = encoder.openings(admitted.num_choices)
        async for batch in self.events:
            if formatter.prompt_scores is None:
                encoded = openings + encoder.batch(batch)
            else:
                encoded = openings + await run_in_threadpool(encoder.batch, batch)
            openings = b""
            if encoded:
                yield encoded
        if body.wants_usage:
            yield encoder.usage(self.record.usage())

    def ending(self, error: PrefixdError | None) -> bytes:
        """As of Answer."""
        if error is None:
            return DONE
        return sse_event(error_body(error, self.record.request_id)) + DONE


def choices_answer(
    service: GenerationService,
    body: CompletionRequest | ChatRequest,
    formatter: ResponseFormatter,
    running: Running,
) -> ChoicesAnswer:
    """The answer to ``body``, formatted by ``formatter``."""
    admitted = running.admitted
    events: AsyncIterable[Batch] = running.events
    if formatter.options.token_ids:
        formatter = replace(formatter, prompts=admitted.prompts)
    if body.shown_prompt.any:
        scores = PromptScores(service.served.tokenizer, body.shown_prompt, admitted)
        events = scores.events(events)
        formatter = replace(formatter, prompt_scores=scores)
    formatter = parsing(formatter, admitted.syntax)
    kind = formatter.chunk_object if body.stream else formatter.object
    return ChoicesAnswer(events, running.record, formatter, envelope(admitted, kind), body)
