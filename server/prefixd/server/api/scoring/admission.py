"""Admission of choices to be scored: each becomes the end of a prompt without output."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from prefixd.server.api.admitted import Admitted, ResolvedPrefix
from prefixd.server.api.generate.admission import Admission, check_resident, keys_of
from prefixd.server.api.generate.ensembles import refuse_ensemble
from prefixd.server.api.generate.prompts import PromptEncoder, PromptTokens, check_token_ids
from prefixd.server.api.generate.recipes import Prompts
from prefixd.server.api.generate.requests import ChatRequest
from prefixd.server.api.generate.tool_plan import plan_tools
from prefixd.server.api.placement import front_of, whole_of
from prefixd.server.api.scoring.requests import LoglikelihoodRequest
from prefixd.server.engine.request import AdmittedRequest, SamplingParams, Scoring, StopParams
from prefixd.server.errors import BadRequest
from prefixd.server.tenants.principal import Principal


@dataclass(frozen=True, slots=True)
class ScoringAdmission:
    """Admits what ``admission`` would, without output."""

    admission: Admission

    def loglikelihood(self, principal: Principal, body: LoglikelihoodRequest) -> Admitted:
        """Admit one request for each choice, whose prompts begin alike. Raises as
        ``Admission.completion``. Blocking."""
        common = self.admission
        self._refuse(body)
        prefix = common.resolver.resolve(principal.tenant, body.model, body.user)
        refuse_ensemble(prefix, what="to score choices under")
        manifest = prefix.manifest if prefix else None
        prompts, lead = self._prompt(body, prefix)
        (context,) = prompts.tokens
        encode = self._joint(context, continues=manifest is not None and manifest.has_text)
        choices = [
            self._choice(choice, context, lead, encode, place=place)
            for place, choice in enumerate(body.choices)
        ]
        front = None
        if manifest is not None:
            front = front_of(whole_of(manifest), prompts.layout) if prompts.has_front else None
            check_resident(manifest, front, principal.quota.max_resident_tokens)
        timeouts = [limit for limit in (body.timeout, common.max_seconds) if limit is not None]
        response_id = f"loglikelihood-{uuid.uuid4().hex}"
        requests = tuple(
            AdmittedRequest(
                request_id=f"{response_id}-{place}",
                tenant=principal.tenant,
                prompt=(*context.token_ids, *choice),
                prefix=front,
                sampling=SamplingParams(temperature=0),
                stop=StopParams(max_tokens=0),
                max_resident_tokens=principal.quota.max_resident_tokens,
                weight=principal.weight,
                priority=body.priority or 0,
                timeout_s=min(timeouts, default=None),
                kv_reuse=common.kv_reuse and principal.kv_reuse,
                speculate=False,
                scoring=Scoring(len(context.token_ids)),
            )
            for place, choice in enumerate(choices)
        )
        for request in requests:
            common.check_fits(PromptTokens(request.prompt, context.rows), front)
        return Admitted(
            id=response_id,
            model=body.model,
            prefix=prefix,
            requests=requests,
            num_choices=len(choices),
            prompt_lengths=(context.num_tokens + len(choices[0]), *map(len, choices[1:])),
            shared_tokens=len(context.token_ids),
            unloaded=(keys_of(context, manifest),) * len(choices) if context.rows else (),
            warnings=prompts.warnings,
        )

    def _refuse(self, body: LoglikelihoodRequest) -> None:
        common = self.admission
        if common.served.encoder is not None:
            raise BadRequest(
                "expected a decoder: the encoder of an encoder-decoder reads a prompt all together",
                code="prompt_not_scored",
                param="model",
            )
        if len(body.choices) > common.max_choices:
            raise BadRequest(
                f"expected at most {common.max_choices} choices; received {len(body.choices)}",
                param="choices",
            )

    def _prompt(
        self, body: LoglikelihoodRequest, prefix: ResolvedPrefix | None
    ) -> tuple[Prompts, str]:
        """What comes before each choice, and whitespace that each choice begins with: that at the
        end of a text belongs to what follows it, as its tokens do."""
        builder = self.admission.prompts
        if body.messages is not None:
            chat = ChatRequest(model=body.model, messages=body.messages)
            return builder.chat(chat, prefix, plan_tools(chat, builder.traits(prefix))), ""
        prompt, lead = body.prompt, ""
        assert prompt is not None
        is_placed = prefix is not None and prefix.manifest.prompt_template is not None
        if isinstance(prompt, str) and not is_placed:
            stripped = prompt.rstrip()
            prompt, lead = stripped, prompt[len(stripped) :]
        recipe = bool(body.apply_recipe)
        return builder.completion([prompt], prefix, apply_recipe=recipe), lead

    def _joint(
        self, context: PromptTokens, *, continues: bool
    ) -> Callable[[str], PromptTokens] | None:
        """Tokenizes a text as that of ``context`` was; None where it is not one text."""
        encoder = PromptEncoder(self.admission.served)

        def completion(text: str) -> PromptTokens:
            return encoder.completion(text, None, continues=continues)

        def chat(text: str) -> PromptTokens:
            return encoder.chat([text], None, continues=continues)

        if context.text is None:
            return None
        ways = (completion, chat)
        return next((way for way in ways if way(context.text) == context), None)

    def _choice(
        self,
        choice: str | list[int],
        context: PromptTokens,
        lead: str,
        encode: Callable[[str], PromptTokens] | None,
        *,
        place: int,
    ) -> tuple[int, ...]:
        """The tokens of a choice: those behind the prompt's own where both are tokenized together,
        as lm-evaluation-harness does; by itself where the prompt's tokens would be others then."""
        served, param = self.admission.served, f"choices[{place}]"
        if not isinstance(choice, str):
            check_token_ids(choice, served.vocab_size, param=param)
            return tuple(choice)
        ids: tuple[int, ...] = ()
        if encode is not None and context.text is not None:
            whole, size = encode(context.text + lead + choice).token_ids, len(context.token_ids)
            ids = whole[size:] if whole[:size] == context.token_ids else ()
        ids = ids or tuple(served.tokenizer.encode(lead + choice, add_special_tokens=False))
        check_token_ids(ids, served.vocab_size, param=param)
        if not ids:
            raise BadRequest("expected a choice of at least one token", param=param)
        return ids
