"""Admission: from a parsed body to a request that fits the model and the KV pool, or an error.

Names are resolved here, once. The engine knows digests only, so an alias or a binding that moves
later changes nothing about an admitted request.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from prefixd.server.api.admitted import Admitted, ResolvedPrefix
from prefixd.server.api.generate.embeds import EmbedsReader
from prefixd.server.api.generate.encoder_inputs import EncoderInputs
from prefixd.server.api.generate.ensembles import check_asked, members_of, refuse_ensemble, together
from prefixd.server.api.generate.fields import GenerationFields
from prefixd.server.api.generate.prompt_scores import texts_of
from prefixd.server.api.generate.prompts import PromptTokens, check_token_ids, counted
from prefixd.server.api.generate.recipes import PromptBuilder, Prompts, filled
from prefixd.server.api.generate.requests import ChatRequest, CompletionRequest
from prefixd.server.api.generate.resolver import PrefixResolver
from prefixd.server.api.generate.tool_plan import plan_tools
from prefixd.server.api.generate.vllm_fields import truncated
from prefixd.server.api.placement import front_of, whole_of, without_last
from prefixd.server.api.served import ServedModel
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.request import (
    AdmittedRequest,
    PrefixHandle,
    PrefixKey,
    SamplingParams,
    Scoring,
    StopParams,
)
from prefixd.server.errors import BadRequest, DoesNotFit, QuotaExceeded
from prefixd.server.tenants.principal import Principal
from prefixd.store.store import Manifest

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for a completion without ``max_tokens``."""

_EXPECTED_CHAT_TOKENS = 512
"""Output the queue assumes for a chat without ``max_tokens``: it may run to the end of the context,
but few do."""

# Fields with the same name and meaning in a request and in SamplingParams.
_SAMPLING_FIELDS = {
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
}


@dataclass(frozen=True, slots=True)
class Admission:
    """Admits requests of all tenants. ``config`` has the sizes of the engine; ``max_seconds``
    limits the time of a request."""

    served: ServedModel
    resolver: PrefixResolver
    config: SchedulerConfig
    max_choices: int
    embeds: EmbedsReader
    prompts: PromptBuilder
    kv_reuse: bool = True
    max_seconds: float | None = None

    def completion(self, principal: Principal, body: CompletionRequest) -> Admitted:
        """Admit a completion. Raises BadRequest, DoesNotFit, NotFound, Conflict, EngineFailure,
        QuotaExceeded. Blocking."""
        self._check_choices(len(body.embeds) + len(body.prompts), 1)  # before any is tokenized
        prefix = self._resolved(principal, body)
        prompts = [*self.embeds.read(body.embeds), *body.prompts]
        is_applied = bool(body.apply_recipe)
        recipe = prefix.manifest.recipe if prefix and is_applied else None
        body = filled(body, recipe, self.served.sampling_defaults)

        def admit(prefix: ResolvedPrefix | None) -> Admitted:
            return self._admit(
                "cmpl-",
                principal,
                body,
                prefix=prefix,
                prompts=self.prompts.completion(prompts, prefix, apply_recipe=is_applied),
                sampling=self._sampling(body, top_logprobs=body.logprobs),
                max_tokens=body.max_tokens,
                default_max_tokens=(recipe and recipe.max_tokens) or DEFAULT_COMPLETION_TOKENS,
            )

        return self._of_each(prefix, admit, body, num_prompts=len(prompts), limit=body.max_tokens)

    def chat(
        self, principal: Principal, body: ChatRequest, *, id_head: str = "chatcmpl-"
    ) -> Admitted:
        """Admit a chat, whose id begins with ``id_head``. Raises as ``completion`` does.
        Blocking."""
        prefix = self._resolved(principal, body)
        recipe = prefix.manifest.recipe if prefix else None
        body = filled(body, recipe, self.served.sampling_defaults)
        tools, max_tokens = (
            plan_tools(body, self.prompts.traits(prefix)),
            body.max_completion_tokens or body.max_tokens,
        )

        def admit(prefix: ResolvedPrefix | None) -> Admitted:
            prompts = self.prompts.chat(body, prefix, tools)
            admitted = self._admit(
                id_head,
                principal,
                body,
                prefix=prefix,
                prompts=prompts,
                sampling=self._sampling(body, top_logprobs=body.num_top_logprobs),
                max_tokens=max_tokens,
                default_max_tokens=recipe.max_tokens if recipe else None,
            )
            return tools.complete(admitted, body, prompts.end)

        return self._of_each(prefix, admit, body, num_prompts=1, limit=max_tokens)

    def _of_each(
        self,
        prefix: ResolvedPrefix | None,
        admit: Callable[[ResolvedPrefix | None], Admitted],
        body: CompletionRequest | ChatRequest,
        *,
        num_prompts: int,
        limit: int | None,
    ) -> Admitted:
        """What ``admit`` admits under a prefix, and for an ensemble under each of its members."""
        if prefix is None or not prefix.ensemble:
            return admit(prefix)
        if body.shown_prompt.any:
            refuse_ensemble(prefix, what="of a request that shows its prompt, or scores of it")
        num_choices = num_prompts * (body.n or 1)
        check_asked(prefix, num_choices=num_choices, most=self.max_choices, max_tokens=limit)
        admitted = [admit(member) for member in members_of(prefix)]
        return together(prefix, admitted, self.config, has_limit=limit is not None)

    def _admit(
        self,
        id_head: str,
        principal: Principal,
        body: CompletionRequest | ChatRequest,
        *,
        prefix: ResolvedPrefix | None,
        prompts: Prompts,
        sampling: SamplingParams,
        max_tokens: int | None,
        default_max_tokens: int | None,
    ) -> Admitted:
        n, layout, tokens = body.n or 1, prompts.layout, truncated(prompts.tokens, body)
        self._check_choices(len(tokens), n)
        own_id = f"{id_head}{uuid.uuid4().hex}"  # no caller's: it must be the only one
        manifest = prefix.manifest if prefix else None
        max_resident_tokens = principal.quota.max_resident_tokens
        front = None
        if manifest is not None and prompts.has_front:
            front = front_of(whole_of(manifest), layout)
        if manifest is not None:
            check_resident(manifest, front, max_resident_tokens)
        scored_top = body.shown_prompt.scored_top
        if scored_top is not None and manifest is not None and front is not None:
            front, last = without_last(front, manifest.kind)
            tokens = [prompt.behind(last) for prompt in tokens] if last else tokens
        timeouts = [limit for limit in (body.timeout, self.max_seconds) if limit is not None]
        encoder = self.served.encoder
        inputs = encoder and EncoderInputs(
            self.served, encoder, manifest, self.config.max_tokens_for
        )
        if inputs:
            inputs.refuse_layout(layout)
            inputs.refuse_scores(body.shown_prompt)
        lengths = [
            inputs.output_tokens(prompt.num_tokens, max_tokens, default_max_tokens)
            if inputs
            else self._output_tokens(prompt, front, max_tokens, default_max_tokens)
            for prompt in tokens
        ]
        open_ended = max_tokens is None and default_max_tokens is None
        has_rows = any(prompt.rows for prompt in tokens)
        stop_strings = self._stop_strings(body)  # once: spellings tokenizes each
        requests = tuple(
            AdmittedRequest(
                request_id=f"{own_id}-{position}",
                tenant=principal.tenant,
                prompt=prompt.token_ids,
                prefix=front,
                sampling=sampling,
                stop=self._stop(body, length, strings=stop_strings),
                n=n,
                expected_tokens=min(length, _EXPECTED_CHAT_TOKENS) if open_ended else None,
                max_resident_tokens=max_resident_tokens,
                weight=principal.weight,
                priority=body.priority or 0,
                timeout_s=min(timeouts, default=None),
                kv_reuse=self.kv_reuse and principal.kv_reuse and body.kv_reuse is not False,
                speculate=body.speculate is not False,
                inputs=prompt.given,
                scoring=None if scored_top is None else Scoring(1, scored_top),
            )
            for position, (prompt, length) in enumerate(zip(tokens, lengths, strict=True))
        )
        return Admitted(
            id=own_id if body.request_id is None else f"{id_head}{body.request_id}",
            model=body.model,
            prefix=prefix,
            requests=tuple(map(inputs.admit, requests)) if inputs else requests,
            num_choices=len(tokens) * n,
            prompt_lengths=tuple(prompt.num_tokens for prompt in tokens),
            texts=texts_of(tokens, self.served.tokenizer) if body.shown_prompt.any else (),
            unloaded=tuple(keys_of(prompt, manifest) for prompt in tokens) if has_rows else (),
            warnings=(*(prefix.warnings if prefix else ()), *prompts.warnings),
            grammar=body.grammar,
        )

    def _resolved(self, principal: Principal, body: GenerationFields) -> ResolvedPrefix | None:
        prefix = self.resolver.resolve(principal.tenant, body.model, body.user, body.prefix)
        if prefix is not None and not prefix.manifest.version and not prefix.ensemble:
            self._check_length(prefix.manifest, principal)
        return prefix

    def _check_length(self, manifest: Manifest, principal: Principal) -> None:
        """Raise BadRequest for a composition that could not be saved: it is too long."""
        limits = principal.quota.max_virtual_tokens, self.served.base.max_virtual_tokens
        limit = min(each for each in limits if each is not None)
        if manifest.num_virtual_tokens > limit:
            raise BadRequest(
                f"expected at most {limit} virtual tokens; {manifest.reference} has "
                f"{manifest.num_virtual_tokens}",
                code="too_many_virtual_tokens",
                param="prefix",
            )

    def _check_choices(self, num_prompts: int, n: int) -> None:
        if num_prompts * n > self.max_choices:
            raise BadRequest(
                f"expected at most {self.max_choices} answers in one request; "
                f"received {num_prompts} prompts times n = {n}",
                param="n",
            )

    def check_fits(self, prompt: PromptTokens, front: PrefixHandle | None) -> None:
        """Raise DoesNotFit for a prompt that can never run, without output."""
        self._output_tokens(prompt, front, 0, None)

    def _output_tokens(
        self,
        prompt: PromptTokens,
        front: PrefixHandle | None,
        max_tokens: int | None,
        default_max_tokens: int | None,
    ) -> int:
        """Limit of the output for this prompt. Raises DoesNotFit for one that can never run."""
        virtual, length = front.num_tokens if front else 0, len(prompt.token_ids)
        before = front.num_positions if front else 0
        positions = self.served.max_positions - before
        pool = self.config.max_tokens_for(virtual, gated=front is not None and front.gated)
        pool -= max_tokens == 0  # there is no last token whose KV is never written
        room = min(positions, pool)
        output = max_tokens
        if output is None:
            output = min(default_max_tokens or 1, max(1, room - length))
        if length + output > room:
            held = f" next to the prefix's {virtual} virtual tokens" if virtual else ""
            in_front = (0 if pool < positions else before, "virtual tokens in front of the prompt")
            limit = (
                f"the KV pool has room for {max(0, pool)} tokens{held}"
                if pool < positions
                else f"the model has {self.served.max_positions} positions"
            )
            needed = counted(
                in_front,
                (length - prompt.num_tokens, "virtual tokens inside the prompt"),
                (prompt.num_tokens, "tokens of the prompt"),
                (output, "tokens of output"),
            )
            raise DoesNotFit(
                f"{needed} can never fit: {limit}",
                param="prompt" if length >= room else "max_tokens",
            )
        open_ended = max_tokens is None and default_max_tokens is None
        return room - length if open_ended else output

    def _sampling(self, body: GenerationFields, *, top_logprobs: int | None) -> SamplingParams:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        check_token_ids(bias, self.served.logits_size, param="logit_bias")
        return SamplingParams(
            **body.model_dump(include=_SAMPLING_FIELDS, exclude_none=True),
            top_k=max(0, body.top_k or 0),
            logit_bias=bias,
            top_logprobs=top_logprobs,
        )

    def _stop_strings(self, body: GenerationFields) -> tuple[str, ...]:
        texts = [body.stop] if isinstance(body.stop, str) else body.stop or ()
        spellings = self.served.tokenizer.spellings
        return tuple(spelling for text in texts for spelling in spellings(text))

    def _stop(
        self, body: GenerationFields, max_tokens: int, *, strings: tuple[str, ...]
    ) -> StopParams:
        token_ids = frozenset(body.stop_token_ids or ())
        check_token_ids(token_ids, self.served.logits_size, param="stop_token_ids")
        min_tokens = body.min_tokens or 0
        if min_tokens > max_tokens:
            raise BadRequest(
                f"expected min_tokens of at most max_tokens ({max_tokens}); received {min_tokens}",
                param="min_tokens",
            )
        if not body.ignore_eos:
            token_ids |= self.served.eos_token_ids
        return StopParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            token_ids=token_ids,
            strings=strings,
            include_stop_string=bool(body.include_stop_str_in_output),
        )


def keys_of(prompt: PromptTokens, manifest: Manifest | None) -> tuple[tuple[int, PrefixKey], ...]:
    """Place and key of each run of virtual tokens inside a prompt."""
    assert manifest is not None
    whole = whole_of(manifest).key
    return tuple((place, whole._replace(rows=(rows,))) for place, rows in prompt.rows)


def check_resident(manifest: Manifest, front: PrefixHandle | None, cap: int | None) -> None:
    """Raise QuotaExceeded for a version that keeps more virtual tokens in the pool than ``cap``,
    its tenant's."""
    if front is not None and cap is not None and front.num_tokens > cap:
        raise QuotaExceeded(
            f"the tenant may keep {cap} virtual tokens resident; "
            f"{manifest.reference} has {front.num_tokens}",
            param="max_resident_tokens",
        )
