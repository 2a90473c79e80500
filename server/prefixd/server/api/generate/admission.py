"""From a parsed body to a request that fits, or a refusal: all that is decided at the door.

The model name becomes a digest here, once. Nothing below this file knows names, and an alias that
moves later changes nothing about a request that was admitted.
"""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefixd.server.api.generate.requests import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationFields,
)
from prefixd.server.api.generate.resolver import PrefixResolver, ResolvedPrefix
from prefixd.server.api.prefixes.manifests import handle_of
from prefixd.server.api.served import ServedModel
from prefixd.server.engine.request import AdmittedRequest, SamplingParams, StopParams
from prefixd.server.errors import BadRequest, DoesNotFit, QuotaExceeded
from prefixd.server.tenants.principal import Principal
from prefixd.store.store import Manifest

DEFAULT_COMPLETION_TOKENS = 16
"""What OpenAI generates when a completion names no ``max_tokens``."""

_EXPECTED_CHAT_TOKENS = 512
"""What a chat counts in the queue that names no limit: it may run to the end of the context, and
hardly any does."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that fits: one ``AdmittedRequest`` for each prompt, all under one prefix.

    ``model`` is what the caller called it. Choice ``i * n + j`` of the answer is sequence ``j`` of
    request ``i``.
    """

    id: str
    model: str
    choice: ResolvedPrefix
    requests: tuple[AdmittedRequest, ...]

    @property
    def prefix(self) -> Manifest | None:
        """The version all of it runs under; None for the bare base."""
        return self.choice.manifest

    @property
    def num_choices(self) -> int:
        """Sequences in all."""
        return sum(request.n for request in self.requests)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once; virtual tokens are not among them."""
        return sum(len(request.prompt) for request in self.requests)


@dataclass(frozen=True, slots=True)
class Admission:
    """Admits requests, for all tenants. ``pool_tokens(prefix_tokens)`` is the most tokens one
    sequence can ever have in the pool; ``max_seconds`` is the longest that a request may take."""

    served: ServedModel
    resolver: PrefixResolver
    pool_tokens: Callable[[int], int]
    max_choices: int
    kv_reuse: bool = True
    max_seconds: float | None = None

    def completion(self, principal: Principal, body: CompletionRequest) -> Admitted:
        """Admit a completion. Raises BadRequest, DoesNotFit, NotFound, Conflict, QuotaExceeded.
        Blocking."""
        if isinstance(body.prompt, list) and not isinstance(next(iter(body.prompt), None), int):
            self._check_choices(len(body.prompt), 1)  # before the work of tokenizing them
        choice = self.resolver.choose(principal.tenant, body.model, body.user)
        prefix = choice.manifest
        prompts = self._prompts(body.prompt, opens=prefix is None or prefix.kind != "hard_prompt")
        sampling = self._sampling(body, top_logprobs=body.logprobs)
        return self._admit(
            "cmpl",
            principal,
            body,
            choice=choice,
            prompts=prompts,
            sampling=sampling,
            asked=body.max_tokens,
            default=DEFAULT_COMPLETION_TOKENS,
        )

    def chat(self, principal: Principal, body: ChatRequest) -> Admitted:
        """Admit a chat. Raises as ``completion`` does. Blocking."""
        choice = self.resolver.choose(principal.tenant, body.model, body.user)
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        sampling = self._sampling(body, top_logprobs=top_logprobs)
        return self._admit(
            "chatcmpl",
            principal,
            body,
            choice=choice,
            prompts=[self._render(body.messages)],
            sampling=sampling,
            asked=body.max_completion_tokens or body.max_tokens,
            default=None,
        )

    def _admit(
        self,
        kind: str,
        principal: Principal,
        body: GenerationFields,
        *,
        choice: ResolvedPrefix,
        prompts: list[tuple[int, ...]],
        sampling: SamplingParams,
        asked: int | None,
        default: int | None,
    ) -> Admitted:
        n = body.n or 1
        self._check_choices(len(prompts), n)
        answer_id = f"{kind}-{uuid.uuid4().hex}"
        prefix = choice.manifest
        resident_cap = principal.quota.max_resident_tokens
        check_resident(prefix, resident_cap)
        handle = None if prefix is None else handle_of(prefix)
        lengths = [self._output_tokens(len(one), prefix, asked, default) for one in prompts]
        kv_reuse = self.kv_reuse and principal.kv_reuse and body.kv_reuse is not False
        open_ended = asked is None and default is None
        requests = tuple(
            AdmittedRequest(
                request_id=f"{answer_id}-{position}",
                tenant=principal.tenant,
                prompt=prompt,
                prefix=handle,
                sampling=sampling,
                stop=self._stop(body, length),
                n=n,
                expected_tokens=min(length, _EXPECTED_CHAT_TOKENS) if open_ended else None,
                max_resident_tokens=resident_cap,
                weight=principal.weight,
                priority=body.priority or 0,
                timeout_s=self._timeout(body.timeout),
                kv_reuse=kv_reuse,
            )
            for position, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        )
        return Admitted(id=answer_id, model=body.model, choice=choice, requests=requests)

    def _timeout(self, asked: float | None) -> float | None:
        limits = [limit for limit in (asked, self.max_seconds) if limit is not None]
        return min(limits, default=None)

    def _check_choices(self, prompts: int, n: int) -> None:
        if prompts * n > self.max_choices:
            raise BadRequest(
                f"expected at most {self.max_choices} answers in one request; "
                f"received {prompts} prompts times n = {n}",
                param="n",
            )

    def _prompts(
        self, prompt: str | list[str] | list[int] | list[list[int]], *, opens: bool
    ) -> list[tuple[int, ...]]:
        """Token ids of the prompts. ``opens``: a text starts the sequence and gets the tokenizer's
        opening token; under a text prefix it goes on from there, and the prefix has that token."""
        if isinstance(prompt, str):
            return [self._encode(prompt, opens=opens)]
        texts = [part for part in prompt if isinstance(part, str)]
        if texts:
            return [self._encode(text, opens=opens) for text in texts]
        lists = [part for part in prompt if isinstance(part, list)]
        ids = [part for part in prompt if isinstance(part, int)]
        return [self._checked(part) for part in (lists or [ids])]

    def _encode(self, text: str, *, opens: bool) -> tuple[int, ...]:
        return self._checked(self.served.tokenizer.encode(text, add_special_tokens=opens))

    def _checked(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        if not token_ids:
            raise BadRequest(
                "expected a prompt of at least one token; received an empty one", param="prompt"
            )
        self._check_vocabulary(token_ids, param="prompt")
        return tuple(token_ids)

    def _check_vocabulary(self, token_ids: Sequence[int], *, param: str) -> None:
        lowest, highest = min(token_ids, default=0), max(token_ids, default=0)
        if lowest < 0 or highest >= self.served.vocab_size:
            raise BadRequest(
                f"expected token ids from 0 to {self.served.vocab_size - 1}; "
                f"received {lowest if lowest < 0 else highest}",
                param=param,
            )

    def _render(self, messages: list[ChatMessage]) -> tuple[int, ...]:
        turns = [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.text,
                **({"name": message.name} if message.name is not None else {}),
            }
            for message in messages
        ]
        try:
            text = self.served.tokenizer.render_chat(turns)
        except ValueError as error:
            raise BadRequest(str(error), code="chat_template", param="messages") from error
        # The template wrote the opening tokens already.
        token_ids = self.served.tokenizer.encode(text, add_special_tokens=False)
        if not token_ids:
            raise BadRequest("the messages render to an empty prompt", param="messages")
        return tuple(token_ids)

    def _output_tokens(
        self, prompt_tokens: int, prefix: Manifest | None, asked: int | None, default: int | None
    ) -> int:
        """``max_tokens`` for this prompt. Raises DoesNotFit for what can never be run."""
        virtual = 0 if prefix is None else prefix.num_virtual_tokens
        positions = self.served.max_positions - virtual
        pool = self.pool_tokens(virtual)
        room = min(positions, pool)
        if asked is None:
            wanted = 1 if default is None else min(default, max(1, room - prompt_tokens))
        else:
            wanted = asked
        if prompt_tokens + wanted > room:
            limit = (
                f"the KV pool has room for {max(0, pool)} tokens beside them"
                if pool < positions
                else f"the model has {self.served.max_positions} positions"
            )
            raise DoesNotFit(
                f"the prefix's {virtual} virtual tokens, the prompt's {prompt_tokens} tokens and "
                f"{wanted} tokens of output can never fit: {limit}",
                param="prompt" if prompt_tokens >= room else "max_tokens",
            )
        return room - prompt_tokens if asked is None and default is None else wanted

    def _sampling(self, body: GenerationFields, *, top_logprobs: int | None) -> SamplingParams:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        self._check_vocabulary(tuple(bias), param="logit_bias")
        return SamplingParams(
            temperature=_or(body.temperature, 1.0),
            top_k=max(0, body.top_k or 0),
            top_p=_or(body.top_p, 1.0),
            min_p=_or(body.min_p, 0.0),
            repetition_penalty=_or(body.repetition_penalty, 1.0),
            presence_penalty=_or(body.presence_penalty, 0.0),
            frequency_penalty=_or(body.frequency_penalty, 0.0),
            logit_bias=bias,
            seed=body.seed,
            top_logprobs=top_logprobs,
        )

    def _stop(self, body: GenerationFields, max_tokens: int) -> StopParams:
        named = body.stop_token_ids or []
        self._check_vocabulary(named, param="stop_token_ids")
        min_tokens = body.min_tokens or 0
        if min_tokens > max_tokens:
            raise BadRequest(
                f"expected min_tokens of at most max_tokens ({max_tokens}); received {min_tokens}",
                param="min_tokens",
            )
        own = frozenset[int]() if body.ignore_eos else self.served.eos_token_ids
        return StopParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            token_ids=own | frozenset(named),
            strings=body.stop_strings,
            include_stop_string=bool(body.include_stop_str_in_output),
        )


def check_resident(prefix: Manifest | None, cap: int | None) -> None:
    """Raise QuotaExceeded for a prefix longer than all that its tenant may keep resident."""
    if prefix is not None and cap is not None and prefix.num_virtual_tokens > cap:
        raise QuotaExceeded(
            f"the tenant may keep {cap} virtual tokens resident; "
            f"{prefix.name}@{prefix.version} has {prefix.num_virtual_tokens}",
            param="max_resident_tokens",
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
