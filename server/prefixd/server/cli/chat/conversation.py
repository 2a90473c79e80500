"""A conversation: what is sent with a question, and what has come back of each answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefixd.client.aio import AsyncClient
from prefixd.client.errors import BadRequestError, ClientError, NotFoundError
from prefixd.client.protocol import Message, Sampling
from prefixd.client.types import CompletionChunk, PrefixUsed, Recipe

DEFAULTS = {"max_tokens": 256, "temperature": 0.0}
"""What neither the options nor the recipe say."""

Question = str | list[dict[str, Any]]
"""A text, or content parts."""


@dataclass
class Answer:
    """What a model has answered so far. ``error`` is what ended it early; ``prefix`` None is the
    bare base."""

    model: str
    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    prefix: PrefixUsed | None = None
    warnings: tuple[str, ...] = ()
    error: ClientError | None = None


def _ignore(_chunk: CompletionChunk) -> None:
    """What happens at a chunk by default."""


@dataclass
class Conversation:
    """The turns so far, and the model they go to. ``sampling`` goes before the recipe of the model,
    which goes before DEFAULTS. ``user`` chooses the prefix where the model is the base."""

    model: str
    sampling: Sampling
    system: str | None = None
    user: str | None = None
    turns: list[Message] = field(default_factory=list)

    def keep(self, question: Question, answer: Answer) -> None:
        """Send both with later questions, unless the answer failed or none of it came."""
        if answer.error is None and answer.text:
            self.turns.append({"role": "user", "content": question})
            self.turns.append({"role": "assistant", "content": answer.text})

    def messages(self, question: Question, *, with_turns: bool = True) -> list[Message]:
        """What is sent."""
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        turns = self.turns if with_turns else []
        return [*system, *turns, {"role": "user", "content": question}]

    async def ask(
        self,
        client: AsyncClient,
        question: Question,
        answer: Answer,
        on_chunk: Callable[[CompletionChunk], None] = _ignore,
    ) -> None:
        """Stream the answer of ``answer.model`` into ``answer``; one that members of an ensemble
        vote on comes whole. A cancellation closes the connection, and so ends the generation.

        A model that takes a text gets each question by itself, without the earlier turns.
        """
        try:
            recipe = await _recipe(client, answer.model, self.user)
            unsaid = {name: value for name, value in DEFAULTS.items() if _says_not(recipe, name)}
            sampling = Sampling(**{**unsaid, **self.sampling})  # type: ignore[typeddict-item]
            if self.user is not None:
                sampling["user"] = self.user
            sent = self.messages(question, with_turns=recipe.takes != "text")
            try:
                await _stream(client, sent, answer, sampling, on_chunk)
            except BadRequestError as error:
                if not _has_no_stream(error):
                    raise
                await _wait(client, sent, answer, sampling, on_chunk)
        except ClientError as error:
            answer.error = error


async def _stream(
    client: AsyncClient,
    sent: list[Message],
    answer: Answer,
    sampling: Sampling,
    on_chunk: Callable[[CompletionChunk], None],
) -> None:
    stream = client.stream_chat(sent, model=answer.model, **sampling)
    async with stream:
        answer.prefix = stream.prefix
        async for chunk in stream:
            answer.text += chunk.text
            answer.reasoning += chunk.reasoning_content or ""
            answer.finish_reason = chunk.finish_reason or answer.finish_reason
            on_chunk(chunk)
    answer.warnings = stream.warnings


def _has_no_stream(error: BadRequestError) -> bool:
    """Whether the answer comes only whole: members of an ensemble vote on it."""
    return (error.code, error.param) == ("unsupported_ensemble", "stream")


async def _wait(
    client: AsyncClient,
    sent: list[Message],
    answer: Answer,
    sampling: Sampling,
    on_chunk: Callable[[CompletionChunk], None],
) -> None:
    """The whole answer, as one chunk."""
    whole = await client.chat(sent, model=answer.model, **sampling)
    choice = whole.choices[0]
    answer.prefix, answer.warnings = whole.prefix, whole.warnings
    answer.text, answer.reasoning = choice.text, choice.reasoning_content or ""
    answer.finish_reason = choice.finish_reason
    on_chunk(
        CompletionChunk(
            index=0,
            text=choice.text,
            finish_reason=choice.finish_reason,
            reasoning_content=choice.reasoning_content,
        )
    )


def _says_not(recipe: Recipe, name: str) -> bool:
    return getattr(recipe, name) is None


async def _recipe(client: AsyncClient, model: str, user: str | None) -> Recipe:
    """How to call what ``model`` and ``user`` choose, as it is now."""
    shown = await client.show_model(model)
    if shown.parent is None and user is not None:
        bound = await _bound_prefix(client, user)
        if bound is not None:
            shown = await client.show_model(bound)
    return shown.recipe or Recipe()


async def _bound_prefix(client: AsyncClient, user: str) -> str | None:
    """The prefix reference of ``user``: the user's own, or the tenant's default."""
    try:
        return (await client.show_binding(user)).prefix
    except NotFoundError:
        pass
    try:
        return await client.show_default()
    except NotFoundError:
        return None


async def base_and_prefixes(client: AsyncClient) -> tuple[str, Sequence[str]]:
    """The names that the ``model`` field takes: the base's, and the tenant's prefixes."""
    models = await client.list_models()
    base = next(model.id for model in models if model.parent is None)
    return base, [model.id for model in models if model.parent is not None]
