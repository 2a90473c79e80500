"""Recipes of versions, applied: what a request does not say, and how its prompt becomes tokens.

::

    prompt_template            a chat                                  a completion
    markers                    the conversation, or with takes text    the prompt is inserted
                               the user's message, is inserted
    plain, with {prompt}       the same                                with apply_recipe: inserted
    Jinja                      renders the conversation                with apply_recipe: renders it
                                                                       as a user's message
    none                       the model's chat template               the prompt alone
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from prefixd.server.api.admitted import ResolvedPrefix
from prefixd.server.api.generate.embeds import Given
from prefixd.server.api.generate.fields import GenerationFields
from prefixd.server.api.generate.messages import PrefixPart
from prefixd.server.api.generate.prompts import (
    PromptEncoder,
    PromptTokens,
    chat_layout,
    writable,
)
from prefixd.server.api.generate.requests import ChatRequest
from prefixd.server.api.generate.system_texts import SystemTexts, split, with_system
from prefixd.server.api.generate.tool_plan import ToolPlan
from prefixd.server.api.placement import Layout, lay_out, layout_of
from prefixd.server.api.rendering.renderer import TemplateRenderer
from prefixd.server.api.rendering.tenant_template import TenantTemplate
from prefixd.server.api.served import ChatTraits, ServedModel
from prefixd.server.errors import BadRequest
from prefixd.store.artifact.kinds import TextRole
from prefixd.store.artifact.recipe import Input, Recipe
from prefixd.store.artifact.template import TemplateKind, template_pieces
from prefixd.store.store import Manifest

Body = TypeVar("Body", bound=GenerationFields)

Prompt = str | list[int] | Given


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a request, where virtual tokens of its prefix stand, and what its caller
    should know. Without ``has_front`` the prefix is among the tokens. ``end`` is the text that a
    rendered conversation ends with."""

    tokens: list[PromptTokens]
    layout: Layout | None = None
    warnings: tuple[str, ...] = ()
    has_front: bool = True
    end: str = ""


def filled(body: Body, recipe: Recipe | None, defaults: Mapping[str, float]) -> Body:
    """``body`` with what it does not say, other than ``max_tokens``: as the recipe says, else as
    the ``defaults`` of the model do. A recipe's ``stop`` is for texts: it would cut JSON or a call
    in the middle."""
    said: dict[str, Any] = dict(defaults)
    if recipe is not None:
        of_recipe = {
            "temperature": recipe.temperature,
            "top_p": recipe.top_p,
            "stop": None if recipe.stop is None or _has_form(body) else list(recipe.stop),
        }
        said |= {name: value for name, value in of_recipe.items() if value is not None}
    missing = {name: value for name, value in said.items() if getattr(body, name) is None}
    return body.model_copy(update=missing) if missing else body


def _has_form(body: GenerationFields) -> bool:
    """Whether answers are in a grammar, or may be calls."""
    return body.grammar is not None or (isinstance(body, ChatRequest) and bool(body.called_tools))


@dataclass(frozen=True, slots=True)
class PromptBuilder:
    """Builds the prompts of all tenants' requests. Blocking where a template of a tenant renders
    them."""

    served: ServedModel
    renderer: TemplateRenderer
    texts: SystemTexts

    def completion(
        self, prompts: Sequence[Prompt], prefix: ResolvedPrefix | None, *, apply_recipe: bool
    ) -> Prompts:
        """The prompts of a completion. Raises BadRequest, Conflict, Unavailable."""
        encoder = PromptEncoder(self.served)
        manifest = None if prefix is None else prefix.manifest
        if manifest is not None and manifest.role is TextRole.SYSTEM:
            raise BadRequest(
                f"expected a chat completion: the text of {manifest.reference} is the system turn "
                "of a conversation (its role is system); received a completion",
                code="chat_prefix",
                param="model",
            )
        continues = manifest is not None and manifest.has_text
        layout = None if manifest is None else layout_of(manifest)
        if manifest is not None and apply_recipe:
            kind = manifest.recipe.template_kind
            if kind is TemplateKind.JINJA:
                template = self._template(manifest)
                rendered = [_user_turn(template, prompt) for prompt in prompts]
                tokens = [encoder.chat([text], None, continues=continues) for text in rendered]
                return Prompts(tokens)
            layout = layout or _plain_layout(manifest)
        tokens = [encoder.completion(prompt, layout, continues=continues) for prompt in prompts]
        warnings = _unapplied(manifest) if manifest and apply_recipe else ()
        return Prompts(tokens, layout, warnings)

    def traits(self, prefix: ResolvedPrefix | None) -> ChatTraits:
        """What the template of a chat can do: the model's, or the one of the version."""
        traits = self.served.chat
        if prefix is None or prefix.manifest.recipe.template_kind is not TemplateKind.JINJA:
            return traits
        return replace(traits, renders_tools="tools" in (prefix.manifest.prompt_template or ""))

    def chat(self, body: ChatRequest, prefix: ResolvedPrefix | None, tools: ToolPlan) -> Prompts:
        """The prompt of a chat. Raises as ``completion``."""
        if prefix is None:
            encoder = PromptEncoder(self.served)
            rendered = encoder.render(body, tools)
            layout = chat_layout(rendered, None, None)
            tokens = encoder.chat(rendered, layout, continues=False)
            return Prompts([tokens], layout, end=_end(rendered))
        manifest = prefix.manifest
        recipe, continues = manifest.recipe, manifest.has_text
        placed = layout_of(manifest) or _plain_layout(manifest)
        if placed is not None and recipe.takes is Input.TEXT:
            encoder = PromptEncoder(self.served)
            text = _only_text(body, manifest)
            return Prompts([encoder.completion(text, placed, continues=continues)], placed)
        is_jinja = recipe.template_kind is TemplateKind.JINJA
        template = self._template(manifest).render_chat if is_jinja else None
        encoder = PromptEncoder(self.served, template)
        if manifest.role is TextRole.SYSTEM:
            return self._under_system(body, manifest, encoder, tools)
        rendered = encoder.render(body, tools)
        layout = chat_layout(rendered, manifest, placed)
        tokens = encoder.chat(rendered, layout, continues=continues)
        warnings = _unapplied(manifest) or _untemplated(manifest)
        return Prompts([tokens], layout, warnings, end=_end(rendered))

    def _under_system(
        self,
        body: ChatRequest,
        manifest: Manifest,
        encoder: PromptEncoder,
        tools: ToolPlan | None,
    ) -> Prompts:
        try:
            text, head = self.texts.of(manifest)
        except ValueError as error:
            raise BadRequest(str(error), code="chat_template", param="model") from error
        if body.truncate_prompt_tokens is not None:
            raise BadRequest(
                "'truncate_prompt_tokens': expected it where it cannot cut a prefix; the text of "
                f"{manifest.reference} is the system turn of the conversation",
                param="truncate_prompt_tokens",
            )
        messages = with_system(body.messages, text)
        rendered = encoder.render(body.model_copy(update={"messages": messages}), tools)
        chat_layout(rendered, manifest, None)  # refuses prefix parts
        whole = encoder.chat(rendered, None, continues=False)
        prompt = split(whole, head)
        warnings = _unapplied(manifest)
        if prompt is None:
            return Prompts([whole], warnings=warnings, has_front=False, end=_end(rendered))
        return Prompts([prompt], warnings=warnings, end=_end(rendered))

    def _template(self, manifest: Manifest) -> TenantTemplate:
        assert manifest.prompt_template is not None
        return TenantTemplate(self.renderer, self.served, manifest.tenant, manifest.prompt_template)


def _end(rendered: Sequence[object]) -> str:
    return str(rendered[-1]) if rendered else ""


def _user_turn(template: TenantTemplate, prompt: Prompt) -> str:
    """A prompt, rendered as the only message. Raises BadRequest."""
    if not isinstance(prompt, str):
        raise BadRequest(
            "expected texts with 'apply_recipe': the version's prompt_template is a chat template; "
            "received token ids or embeddings",
            param="prompt",
        )
    try:
        return writable(template.render_chat([{"role": "user", "content": prompt}]))
    except ValueError as error:
        raise BadRequest(str(error), code="chat_template", param="prompt") from error


def _plain_layout(manifest: Manifest) -> Layout | None:
    """The layout of a template without markers: all virtual tokens in front, then its text."""
    if manifest.recipe.template_kind is not TemplateKind.PLAIN:
        return None
    assert manifest.prompt_template is not None
    return lay_out(template_pieces(manifest.prompt_template), manifest.num_virtual_tokens)


def _only_text(body: ChatRequest, manifest: Manifest) -> str:
    """The text of the one message of a chat, for a version that takes texts. Raises BadRequest."""
    if body.called_tools:
        raise BadRequest(
            f"expected no tools: {manifest.reference} takes a text, around which its "
            "prompt_template stands, and has no place for them; received some",
            code="text_recipe",
            param="tools",
        )
    roles = [message.role for message in body.messages]
    content = body.messages[0].content
    if roles != ["user"] or content is None:
        raise BadRequest(
            f"expected one user message: {manifest.reference} takes a text, around which its "
            f"prompt_template stands; received {len(roles)} messages ({', '.join(roles[:8])})",
            code="text_recipe",
            param="messages",
        )
    if isinstance(content, str):
        return content
    if any(isinstance(part, PrefixPart) for part in content):
        raise BadRequest(
            "content parts of type prefix: expected none for a version that takes a text; received "
            "some",
            code="misplaced_prefix",
            param="messages",
        )
    return "\n".join(part.text for part in content if not isinstance(part, PrefixPart))


def _unapplied(manifest: Manifest) -> tuple[str, ...]:
    recipe = manifest.recipe
    if recipe.prompt_template is None or recipe.template_kind is not None:
        return ()
    has = "has a prompt_template with neither one {prompt} nor Jinja: it is not applied"
    return (f"{manifest.reference} {has}",)


def _untemplated(manifest: Manifest) -> tuple[str, ...]:
    if manifest.recipe.takes is not Input.TEXT:
        return ()
    warning = (
        f"{manifest.reference} was trained on plain texts and has no prompt_template: the "
        "conversation was rendered by the model's chat template; use /v1/completions, or set the "
        "prompt_template that it was trained with"
    )
    return (warning,)
