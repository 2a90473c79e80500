"""The engines that can be compared: where each is installed, and what it can run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EVERYTHING = frozenset({"W1", "W2", "W3", "W4", "one", "long"})
SOFT_PROMPTS = frozenset({"W2", "W3"})
PREFIXES = frozenset({"W2", "W3", "W4"})
TOKENS = EVERYTHING - SOFT_PROMPTS


@dataclass(frozen=True)
class Engine:
    """One engine. ``environment`` names its folder of the peers' environments, or is empty for the
    one of this process. ``model`` is the form of the weights. ``at_most`` is the number of requests
    of a workload that one round runs, where the engine's rate does not depend on it.

    ``variables`` are of its process, ``preload`` libraries that it should find loaded, as patterns
    in its environment or in /usr/lib. ``revision`` is a commit of ours to run, in place of this
    checkout.
    """

    name: str
    module: str
    environment: str = ""
    model: str = "float32"
    workloads: frozenset[str] = EVERYTHING
    at_most: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    preload: tuple[str, ...] = ()
    revision: str = ""


OURS = Engine("prefixd", "prefixd_engine", variables={"PREFIXD_KV_REUSE": "false"})

# As vLLM's documentation asks for; without them it starts with a warning.
_VLLM_PRELOAD = ("lib/libiomp5.so", "*-linux-gnu/libtcmalloc_minimal.so.4")


def _vllm(name: str, workloads: frozenset[str], **options: bool) -> Engine:
    return Engine(
        name, "vllm_cpu", "vllm", "bfloat16", workloads, options=options, preload=_VLLM_PRELOAD
    )


PEERS = {
    each.name: each
    for each in (
        Engine("peft", "peft_sequential", workloads=EVERYTHING, at_most=4),
        Engine("transformers", "transformers_static", model="bfloat16"),
        Engine(
            "transformers-continuous",
            "transformers_continuous",
            model="bfloat16",
            workloads=TOKENS,
        ),
        _vllm("vllm", EVERYTHING - PREFIXES),
        _vllm("vllm-embeds", EVERYTHING, embeds=True),
        _vllm("vllm-caching", EVERYTHING, embeds=True, caching=True),
        Engine("openvino", "openvino_genai", "openvino", "openvino", TOKENS),
        Engine("llamacpp", "llamacpp_batch", "llamacpp", "gguf"),
    )
}


def variant(text: str) -> Engine:
    """Our engine with other settings or of another commit: ``NAME=VARIABLE=VALUE,...``, where
    VARIABLE is a setting of the server without ``PREFIXD_``, or ``revision``. Without a value a
    setting has its default: ``free=threads=`` leaves the number of threads to the server.

    Raises ValueError for any other text.
    """
    name, _, rest = text.partition("=")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    if not name or not all(key and sign for key, sign, _ in pairs):
        raise ValueError(f"expected NAME or NAME=VARIABLE=VALUE,..., got {text!r}")
    values = {key: value for key, _, value in pairs}
    revision = values.pop("revision", "")
    chosen = {f"PREFIXD_{key.upper()}": value for key, value in values.items()}
    return Engine(name, OURS.module, variables={**OURS.variables, **chosen}, revision=revision)
