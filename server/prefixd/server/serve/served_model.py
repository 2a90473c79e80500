"""What the API needs to know of the model that serves."""

import sys
import time
from typing import Any

from pydantic import ValidationError

from prefixd.server.api.answers.formats import CallFormat
from prefixd.server.api.generate.fields import GenerationFields
from prefixd.server.api.served import ChatTraits, DecoderInfo, EncoderInfo, ServedModel
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.model import chat_template
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.gated_places import attention_name, refuse_gated
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.prefix import offered, refused_kinds
from prefixd.server.model.selfcheck import Limits
from prefixd.server.model.tokenizer import Tokenizer
from prefixd.server.serve.settings import Settings
from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.kinds import Kind


def served_model(
    settings: Settings,
    config: SchedulerConfig,
    base: LoadedBase,
    limits: Limits,
    decoder: DecoderInfo,
) -> ServedModel:
    """The model of ``base`` under the settings; ``limits`` bound the values of prefixes."""
    name = settings.served_model_name or base.name
    pair = base.pair
    return ServedModel(
        name=name,
        base=BaseSpec(
            name=name,
            fingerprint=base.fingerprint,
            num_layers=base.shape.num_layers,
            num_kv_heads=base.shape.num_kv_heads,
            head_dim=base.shape.head_dim,
            embedding_width=base.shape.embedding_width,
            max_virtual_tokens=min(settings.max_virtual_tokens, base.shape.max_positions - 1),
            dtype=settings.dtype,
            max_abs_embedding=limits.max_abs_embedding,
            max_abs_kv=limits.max_abs_kv,
            refused_kinds=_refused_kinds(settings, base),
            attention_module=attention_name(base.module),
            encoder_layers=None if pair is None else pair.encoder_layers,
        ),
        decoder=decoder,
        max_positions=base.shape.max_positions,
        vocab_size=base.num_embeddings,
        logits_size=base.num_logits,
        eos_token_ids=frozenset(i for i in base.eos_token_ids if 0 <= i < base.num_logits),
        created=int(time.time()),
        tokenizer=Tokenizer(base.tokenizer),
        chat=chat_traits(base.tokenizer, settings.tool_call_format),
        prefix_warnings=base.layers.sight_warnings,
        sampling_defaults=(
            sampling_defaults(base.module.generation_config, name=name)
            if settings.generation_config == "model"
            else {}
        ),
        encoder=None
        if pair is None
        else EncoderInfo(
            start=pair.start,
            max_tokens=min(config.max_tokens_per_step, pair.max_source or sys.maxsize),
            block_size=config.block_size,
        ),
    )


SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What of a generation_config.json is applied."""


def sampling_defaults(generation_config: Any, *, name: str) -> dict[str, float]:
    """The sampling that a model's generation_config.json states. Raises UnsupportedModel for a
    value that a request may not have."""
    stated = {field: getattr(generation_config, field, None) for field in SAMPLING_DEFAULTS}
    defaults = {field: value for field, value in stated.items() if value is not None}
    try:
        GenerationFields.model_validate({"model": name, **defaults})
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        raise UnsupportedModel(
            f"{name}: generation_config.json: expected {field} in the range of a request's field, "
            f"got {defaults[field]!r}; serve it with --generation-config none"
        ) from None
    return defaults


def _refused_kinds(settings: Settings, base: LoadedBase) -> dict[Kind, str]:
    """Kinds of prefixes that the base cannot take, with the reason."""
    if base.pair is not None:
        return refused_kinds(base)
    refused, reason = refused_kinds(base), refuse_gated(base.module, base.shape)
    if settings.tensor_parallel > 1:
        reason = "tensor parallel does not compile adaption prompts"
    if reason is None:
        return refused
    return refused | {Kind.ADAPTION_PROMPT: f"expected {offered(refused)}, since {reason}"}


def chat_traits(tokenizer: Any, call_format: str) -> ChatTraits:
    """What the chat template can do; ``call_format`` is the setting."""
    match call_format:
        case "auto":
            name = chat_template.call_format(tokenizer)
        case "none":
            name = None
        case _:
            name = call_format
    return ChatTraits(
        renders_tools=chat_template.renders_tools(tokenizer),
        call_format=None if name is None else CallFormat(name),
        names_first=chat_template.names_first(tokenizer),
        reasons=chat_template.reasons(tokenizer),
        special=chat_template.special_tokens(tokenizer),
        atomic=chat_template.atomic_ids(tokenizer),
    )
