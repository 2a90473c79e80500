"""POST /tokenize and POST /detokenize, in vLLM's shapes: the tokens that a request would have."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ValidationError

from prefixd.server.api.admitted import ResolvedPrefix
from prefixd.server.api.body import json_body, json_request
from prefixd.server.api.catalog_calls import CatalogRoute
from prefixd.server.api.dependencies import Generator, ServedDep
from prefixd.server.api.generate.ensembles import refuse_ensemble
from prefixd.server.api.generate.prompts import PromptTokens, check_token_ids
from prefixd.server.api.generate.requests import ChatRequest
from prefixd.server.api.generate.service import GenerationService, service_of
from prefixd.server.api.generate.tool_plan import plan_tools
from prefixd.server.api.generate.user_header import with_user
from prefixd.server.api.scoring.requests import DetokenizeRequest, TokenizeRequest
from prefixd.server.api.validation_words import from_validation
from prefixd.server.engine.inputs import PLACEHOLDER
from prefixd.server.tenants.principal import Principal

router = APIRouter(tags=["tokens"], route_class=CatalogRoute)


class Tokens(BaseModel):
    """Response of POST /tokenize. ``num_virtual_tokens`` are those of the prefix, which are not
    among the ``tokens``; ``max_model_len`` is the number of positions that it leaves."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    num_virtual_tokens: int


class DetokenizedText(BaseModel):
    """Response of POST /detokenize."""

    prompt: str


@router.post("/tokenize", response_model=Tokens, openapi_extra=json_request(TokenizeRequest))
def tokenize(
    request: Request,
    principal: Generator,
    served: ServedDep,
    body: Annotated[TokenizeRequest, Depends(json_body(TokenizeRequest))],
) -> Tokens:
    """The tokens of a prompt or a conversation, as a request under the same model would have."""
    service = service_of(request)
    body = with_user(body, request, service.user_header)
    prefix = _resolve(service, principal, body)
    shown = _prompt_tokens(service, body, prefix)
    tokens = [token for token in shown if token != PLACEHOLDER]
    manifest = None if prefix is None else prefix.manifest
    return Tokens(
        count=len(tokens),
        max_model_len=served.max_positions - (manifest.num_positions if manifest else 0),
        tokens=tokens,
        token_strs=served.tokenizer.names(tokens) if body.return_token_strs else None,
        num_virtual_tokens=manifest.num_virtual_tokens if manifest else 0,
    )


@router.post(
    "/detokenize", response_model=DetokenizedText, openapi_extra=json_request(DetokenizeRequest)
)
def detokenize(
    request: Request,
    principal: Generator,
    served: ServedDep,
    body: Annotated[DetokenizeRequest, Depends(json_body(DetokenizeRequest))],
) -> DetokenizedText:
    """The text of tokens, special ones written out."""
    service = service_of(request)
    _resolve(service, principal, with_user(body, request, service.user_header))
    check_token_ids(body.tokens, served.vocab_size, param="tokens")
    return DetokenizedText(prompt=served.tokenizer.written(body.tokens))


def _resolve(
    service: GenerationService, principal: Principal, body: TokenizeRequest | DetokenizeRequest
) -> ResolvedPrefix | None:
    model = body.model or service.served.name
    prefix = service.admission.resolver.resolve(principal.tenant, model, body.user)
    refuse_ensemble(prefix, what="to tokenize under, since each member has a prompt of its own")
    return prefix


def _prompt_tokens(
    service: GenerationService, body: TokenizeRequest, prefix: ResolvedPrefix | None
) -> tuple[int, ...]:
    tokenizer, builder = service.served.tokenizer, service.admission.prompts
    prompts: list[PromptTokens]
    if body.prompt is None:
        chat = _chat(body, service.served.name)
        prompts = builder.chat(chat, prefix, plan_tools(chat, builder.traits(prefix))).tokens
    elif not body.prompt or body.add_special_tokens is False:
        return tuple(tokenizer.encode(body.prompt, add_special_tokens=bool(not body.prompt)))
    else:
        prompts = builder.completion([body.prompt], prefix, apply_recipe=False).tokens
    return prompts[0].token_ids


def _chat(body: TokenizeRequest, base: str) -> ChatRequest:
    """Raises BadRequest."""
    given = {
        "messages": body.messages,
        "tools": body.tools,
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    try:
        return ChatRequest.model_validate({"model": body.model or base, **given})
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False)) from None
