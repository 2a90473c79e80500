"""Read a base model's files with transformers, or refuse them in one sentence.

transformers initializes missing weights at random, runs a repository's own code after a prompt, and
raises the exceptions of its libraries. Here each of these is an UnsupportedModel with its cause.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import ModuleList
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers.distributed import DistributedConfig

from prefixd.server.model import quantized
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.checkpoint_files import (
    COMPUTED,
    damaged_file,
    lacks_tokenizer_file,
    named,
    names_python_tokenizer,
    refuse_unreadable_files,
    snapshot,
)

_ADVICE = re.compile(r"trust_remote_code|pip install|weights_only|You (can|may|should)|[Pp]lease ")
"""Marks the sentences of transformers that advise what cannot be done here."""

_CPU = torch.device("cpu")

_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the class names of models that predict tokens end."""


def read_config(source: str) -> Any:
    """The Hugging Face config of ``source``, a folder or an id. Raises UnsupportedModel."""
    folder = Path(source)
    if (folder / "adapter_config.json").exists():
        raise UnsupportedModel(
            f"{source} holds a PEFT adapter (adapter_config.json); expected the folder of its base "
            "model alone"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UnsupportedModel(f"{source} holds no config.json; expected a model's folder")
    with _reported(source, "config"):
        fields, _ = PretrainedConfig.get_config_dict(source)
        _refuse_unknown_type(source, fields)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{source} is a model of the type {config.model_type}, which predicts no text; "
            "expected a decoder-only language model"
        )
    _refuse_own_code(source, config)
    return config


def read_weights(source: str, config: Any, *, ranks: int = 1, device: torch.device = _CPU) -> Any:
    """The language model of ``source`` with its own weights, in the dtype of its files: on
    one of several ``ranks``, the part of this process, sharded by transformers' own plan.
    ``device`` is where the model will run, for packages that prepare quantized weights there.

    Raises UnsupportedModel when a weight is missing, has another shape or would be left out.
    """
    scheme = quantized.scheme_of(config)
    quantized.restore_at_load(config)
    refuse_unreadable_files(source, quantized=scheme is not None)
    sharded = {"distributed_config": DistributedConfig(tp_size=ranks)} if ranks > 1 else {}
    what = f"weights, quantized with {scheme}," if scheme else "weights"
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with _load_report() as lines, _reported(source, what, lines):
        module, info = kind.from_pretrained(
            source,
            config=config,
            dtype="auto",
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **sharded,
            **quantized.placement(config, device),
        )
    if not Path(source).is_dir():  # downloaded meanwhile
        with _reported(source, "weights"):
            refuse_unreadable_files(snapshot(source), source=source, quantized=scheme is not None)
    _refuse_incomplete(source, module, info)
    return module


def read_tokenizer(source: str) -> Any:
    """The tokenizer of ``source``. Raises UnsupportedModel unless it is a fast one."""
    with _reported(source, "tokenizer"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:
            if name := names_python_tokenizer(source):
                raise UnsupportedModel(_in_python(source, name)) from error
            if lacks_tokenizer_file(source) and "trust_remote_code" not in str(error):
                raise UnsupportedModel(f"{source} holds no tokenizer.json; expected one") from error
            raise
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UnsupportedModel(_in_python(source, type(tokenizer).__name__))
    # Some classes without their files are a tokenizer of no words.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UnsupportedModel(f"{source} holds no tokenizer; expected a tokenizer.json")
    return tokenizer


def _in_python(source: str, name: str) -> str:
    return (
        f"{source} has the tokenizer {name}, which runs in Python only; expected a tokenizer.json, "
        "which the tokenizers package reads"
    )


def _refuse_unknown_type(source: str, fields: Any) -> None:
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if not isinstance(kind, str):
        raise UnsupportedModel(f"{source}: expected a model_type in config.json, got {kind!r}")
    classes = fields.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UnsupportedModel(
            f"{source}: expected a list of class names as architectures in config.json, got "
            f"{classes!r}"
        )
    for field in quantized.FIELDS:
        if not isinstance(fields.get(field, {}), dict | None):
            raise UnsupportedModel(
                f"{source}: expected an object as {field} in config.json, got {fields[field]!r}"
            )
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModel(
            _own_code(source)
            if "auto_map" in fields
            else f"{source} is of the type {kind}, which transformers {transformers.__version__} "
            "does not implement"
        )


def _refuse_own_code(source: str, config: Any) -> None:
    """Refuse a model whose class only its repository has: transformers would run its own class of
    the same model type instead."""
    classes = config.architectures or []
    auto_map = getattr(config, "auto_map", None)
    if not auto_map:
        return
    own = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    if isinstance(own, str):
        classes = [*classes, own.rpartition(".")[2]]
    if not all(hasattr(transformers, name) for name in classes):
        raise UnsupportedModel(_own_code(source))


def _own_code(source: str) -> str:
    return (
        f"{source} needs code of its own (auto_map), which prefixd does not run; expected a model "
        "that transformers implements"
    )


def _refuse_incomplete(source: str, module: Any, info: dict[str, Any]) -> None:
    model = type(module).__name__
    saved_as = ", ".join(module.config.architectures or [])
    if saved_as not in {"", model}:
        model += f" (the folder was saved by {saved_as})"
    if missing := sorted(info["missing_keys"]):
        raise UnsupportedModel(
            f"{source} lacks weights of {model}, which would be initialized at random: "
            f"{named(missing)}"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        shapes = [f"{name} {list(want)}, got {list(got)}" for name, got, want in mismatched]
        raise UnsupportedModel(f"{source} has weights of other shapes: expected {named(shapes)}")
    if unused := _unused(module, info["unexpected_keys"]):
        raise UnsupportedModel(
            f"{source} has weights that {model} would leave out: {named(unused)}"
        )


def _unused(module: Any, unexpected: set[str]) -> list[str]:
    """Tensors without which the model differs from the one that was saved: the bias of a weight
    that is used, a tensor in a layer or beyond the last layer, or of another task's head."""
    classes = module.config.architectures or [type(module).__name__]
    other_task = not any(name.endswith(_LANGUAGE_MODELS) for name in classes)
    owners = {name.rpartition(".")[0] for name, _ in module.named_parameters()}
    lists = {name for name, part in module.named_modules() if isinstance(part, ModuleList)}

    def is_used(name: str) -> bool:
        in_layer = any(name[: at.start()] in lists for at in re.finditer(r"\.\d+\.", name))
        return other_task or in_layer or name.rpartition(".")[0] in owners

    return sorted(name for name in unexpected if not COMPUTED.search(name) and is_used(name))


@contextmanager
def _reported(source: str, what: str, report: Sequence[str] = ()) -> Iterator[None]:
    """Raise UnsupportedModel for any error of transformers on files that it cannot use."""
    try:
        yield
    except UnsupportedModel:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModel(_own_code(source)) from error
        reason = _unmerged(report) or damaged_file(source, error) or _first_sentence(error)
        raise UnsupportedModel(f"{source}: its {what} cannot be loaded: {reason}") from error


@contextmanager
def _load_report() -> Iterator[list[str]]:
    """Collect transformers' table of what a checkpoint lacks, instead of printing it."""
    logger = logging.getLogger("transformers.modeling_utils")
    lines: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        lines.extend(record.getMessage().splitlines())
        return False

    logger.addFilter(collect)
    try:
        yield lines
    finally:
        logger.removeFilter(collect)


def _unmerged(report: Sequence[str]) -> str:
    """The weights that transformers could not put together from a checkpoint's parts."""
    names = [line.partition("|")[0].strip() for line in report if "| CONVERSION" in line]
    return f"the parts of {named(names)} are incomplete or differ in shape" if names else ""


def _first_sentence(error: Exception) -> str:
    """What an error says first, without advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    line = lines[-1 if type(error).__name__.startswith("StrictDataclass") else 0]
    sentences = [part for part in line.split(". ") if not _ADVICE.search(part)]
    text = ". ".join(sentences).rstrip(". :")[:300]
    return (
        text
        if isinstance(error, ValueError | OSError) and text
        else f"{type(error).__name__}: {text}"
    )
