"""A chat template of a tenant, in place of the model's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from prefixd.server.api.rendering.renderer import TemplateFailed, TemplateRenderer
from prefixd.server.api.served import ServedModel
from prefixd.store.artifact.template import TemplateKind, template_kind
from prefixd.store.errors import ArtifactRefused

MAX_TOKEN_CHARACTERS = 128
"""Of the longest tokens of vocabularies, which are spaces: what renders to more than so many for
each position can never fit."""

SAMPLE = ({"role": "user", "content": "Hello"},)
"""What each new template must render."""

log = structlog.get_logger("prefixd")


@dataclass(frozen=True, slots=True)
class TenantTemplate:
    """Renders as the tokenizer does."""

    renderer: TemplateRenderer
    served: ServedModel
    tenant: str
    template: str

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """As of ``Tokenizer``."""
        variables = {
            **self.served.tokenizer.special_tokens,
            **(template_kwargs or {}),
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        limit = MAX_TOKEN_CHARACTERS * self.served.max_positions
        try:
            text = self.renderer.render(
                self.template, variables, tenant=self.tenant, max_characters=limit
            )
        except TemplateFailed as failure:
            log.warning(
                "a chat template of a tenant failed", tenant=self.tenant, cause=failure.cause
            )
            raise ValueError(f"the version's prompt_template failed: {failure}") from failure
        if not continue_final_message:
            return text
        final = messages[-1]["content"].strip()
        before, found, _ = text.rpartition(final)
        if not found:
            raise ValueError("the version's prompt_template does not write the last message")
        return before + found


def check_renders(
    template: object, *, renderer: TemplateRenderer, served: ServedModel, tenant: str
) -> None:
    """Raise ArtifactRefused for a new template in Jinja that does not render ``SAMPLE``. Blocking.
    Raises Unavailable."""
    if not isinstance(template, str) or template_kind(template) is not TemplateKind.JINJA:
        return
    try:
        text = TenantTemplate(renderer, served, tenant, template).render_chat([*SAMPLE])
        problem = "" if text.strip() else "it renders no text"
    except ValueError as error:
        problem = str(error.__cause__)
    if problem:
        raise ArtifactRefused(
            "malformed_template",
            "expected prompt_template to render a conversation of one user message; it failed: "
            f"{problem}",
            param="metadata.prompt_template",
        )
