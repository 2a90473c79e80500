"""The one frozen configuration, read in the composition root and nowhere else.

Every field is a flag of ``prefixd serve`` and an environment variable ``PREFIXD_<FIELD>``; a flag
wins over the environment. A room receives its own few values, never this object.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from prefixd.server.serve.connection_limits import parse_networks
from prefixd.server.serve.header_names import check_header_name
from prefixd.server.tenants.quotas import parse_quota
from prefixd.store.db.timeouts import Timeouts

ENV_PREFIX = "PREFIXD_"

MIB = 1024 * 1024

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["console", "json"]


SERVER_CONNECTIONS = 20
"""The most connections of one server to the database."""


class Settings(BaseSettings):
    """What an operator may choose. Values are checked once, at start."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="ignore", validate_default=True
    )

    data_dir: Path = Field(
        default=Path("~/.prefixd"),
        description="Folder for everything the embedded default writes: catalog, prefixes, "
        "converted models, uploads in flight.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks one.")
    model: str = Field(
        default="demo",
        description="The frozen base model: a Hugging Face id, a local folder, or `demo` for the "
        "bundled SmolLM2-135M-Instruct.",
    )
    fingerprint_of: str | None = Field(
        default=None,
        min_length=1,
        description="The original of a quantized `model`, named like it: the server then takes "
        "prefixes that were made for the original.",
    )
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        description="Name clients use for the base model.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Number format of weights and KV."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the model runs; `auto` takes a GPU if there is one."
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of the model. Native kernels leave a thread out while another "
        "process needs its core; torch does so only where no number is set here.",
    )
    cpu_kernels: Literal[
        "auto", "module", "torch", "portable", "avx2", "avx512", "avx512_bf16", "amx"
    ] = Field(
        default="auto",
        description="What computes the model on a CPU: native kernels by the instructions that "
        "they need, lean layers in `torch`, or the unmodified `module` of transformers; `auto` "
        "takes the fastest that fits.",
    )
    quantize: Literal["none", "int8"] = Field(
        default="none",
        description="Round the weights and the inputs of each layer to `int8`: faster on a CPU, "
        "with slightly other answers. Needs native kernels.",
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        description="Processes that share the layers of a model too large for one GPU, each on a "
        "GPU of its own; started and ended by the server.",
    )
    database_url: SecretStr | None = Field(
        default=None,
        description="URL of the catalog's database: postgresql://user@host/name.",
    )
    catalog_timeout: float = Field(
        default=4.0,
        gt=0,
        description="Seconds a request may wait for the catalog before it gets 503.",
    )
    database_connect_timeout: float = Field(
        default=2.0, ge=2, description="Seconds to open a connection to PostgreSQL."
    )
    database_statement_timeout: float = Field(
        default=3.0, gt=0, description="Seconds a statement on PostgreSQL may take."
    )
    database_lock_timeout: float = Field(
        default=3.0, gt=0, description="Seconds a change may wait for another writer's lock."
    )
    database_pool_timeout: float = Field(
        default=2.0, gt=0, description="Seconds to wait for a free connection to the database."
    )
    blobs_url: str | None = Field(
        default=None,
        description="Where uploaded prefixes are kept: s3://bucket/prefix, with the usual AWS_* "
        "variables for endpoint and credentials.",
    )
    audit_days: float | None = Field(
        default=None,
        gt=0,
        le=36_500,
        description="Days for which entries of the audit log are kept.",
    )
    blobs_timeout: float = Field(
        default=3.0,
        gt=0,
        description="Seconds after which a bucket that makes no progress counts as unavailable: to "
        "connect, to respond to a request, to continue a download.",
    )
    gc_grace: float = Field(
        default=86400.0,
        ge=0,
        description="Seconds for which the bytes of a deleted prefix are kept.",
    )
    gc_interval: float = Field(
        default=3600.0, gt=0, description="Seconds between two background collections."
    )
    min_free_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Bytes to keep free on the disk of the data folder: with less, uploads and "
        "imports are refused, and everything else works. 0 is no limit.",
    )
    block_size: int = Field(
        default=16, ge=1, le=1024, description="Token positions in one KV block."
    )
    kv_tokens: int = Field(
        default=16384,
        ge=16,
        description="Size of the KV pool in token positions, shared by all prefixes and requests.",
    )
    max_tokens_per_step: int = Field(
        default=2048, ge=1, description="Most tokens one forward pass may run."
    )
    max_prefill_chunk: int = Field(
        default=2048, ge=1, description="Most prompt tokens one request may run in one pass."
    )
    max_token_gap: float = Field(
        default=0.25,
        ge=0,
        description="Seconds that running streams may wait for their next token because prompts "
        "and prefixes are computed in the same pass: these then run in smaller parts; 0 is no "
        "limit.",
    )
    max_running: int = Field(
        default=64, ge=1, description="Most sequences that run at the same time."
    )
    max_choices: int = Field(
        default=128, ge=1, description="Most sequences of one request (prompts times n)."
    )
    max_waiting_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens, prompt and output, that may wait to run; then requests get 503. "
        "A chat that names no max_tokens counts 512 of output.",
    )
    max_queue_wait: float = Field(
        default=60.0,
        ge=0,
        description="Seconds a request may wait to run before it gets 503; 0 is no limit.",
    )
    max_resident_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most virtual tokens that all prefixes together may have in the KV pool.",
    )
    host_kv_tokens: int = Field(
        default=0,
        ge=0,
        description="Virtual tokens of evicted prefixes kept in host memory, to be copied back to "
        "the pool; 0 keeps none.",
    )
    max_prefix_wait: float = Field(
        default=0.5,
        ge=0,
        description="Seconds after which a request that waits for its prefix evicts another one "
        "from the pool.",
    )
    max_pinned_tokens: int | None = Field(
        default=None,
        ge=0,
        description="Most positions of the KV pool that the pinned prefixes of all tenants may "
        "take.",
    )
    kv_reuse: bool = Field(
        default=True,
        description="Whether requests of a tenant share the KV of equal prompt beginnings.",
    )
    generation_config: Literal["none", "model"] = Field(
        default="none",
        description="With `model`, temperature, top_p, top_k, min_p and repetition_penalty of the "
        "model's generation_config.json hold where neither the request nor a recipe says others.",
    )
    speculate: Literal["off", "ngram"] = Field(
        default="off",
        description="Verify several tokens of a sequence in one pass where they probably follow: "
        "`ngram` takes what followed the last tokens earlier in the sequence. Answers are the "
        "same.",
    )
    tool_call_format: Literal["auto", "hermes", "llama3", "mistral", "json", "none"] = Field(
        default="auto",
        description="How the model writes calls of tools: `auto` goes by its chat template, `json` "
        "is a list of objects and works without one that shows tools, `none` reads no calls.",
    )
    watchdog: float = Field(
        default=60.0,
        gt=0,
        description="Seconds after which a forward pass that has not ended makes the server not "
        "ready.",
    )
    max_request_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Longest a request for generation may take, in seconds, waiting included; a "
        "lower `timeout` of the request counts.",
    )
    max_virtual_tokens: int = Field(
        default=2048, ge=1, description="Most virtual tokens a prefix may have."
    )
    max_prefix_bytes: int = Field(
        default=256 * MIB, ge=1, description="Largest weights file of an uploaded prefix, in bytes."
    )
    max_body_bytes: int = Field(
        default=8 * MIB, ge=1024, description="Largest JSON request body, in bytes."
    )
    max_tenant_requests: int | None = Field(
        default=None,
        ge=1,
        description="Most requests of one tenant in progress on this server; more get 429.",
    )
    max_tenant_uploads: int = Field(
        default=8,
        ge=1,
        description="Most uploads and imports of one tenant that this server receives at a time; "
        "more wait.",
    )
    max_tenant_body_bytes: int = Field(
        default=64 * MIB,
        ge=1024,
        description="Most bytes of one tenant's JSON bodies that this server receives at a time; "
        "more wait.",
    )
    body_timeout: float = Field(
        default=30.0, gt=0, description="Seconds a client may pause while sending a body."
    )
    min_body_rate: int = Field(
        default=1024,
        ge=1,
        description="Slowest a client may send a body, in bytes per second, once body_timeout "
        "has passed.",
    )
    max_connections: int | None = Field(
        default=None,
        ge=1,
        description="Most connections at the same time; at this limit idle ones are closed for new "
        "ones. The limit of descriptors is raised as far as the process may.",
    )
    max_connections_per_address: int | None = Field(
        default=None,
        ge=1,
        description="Most connections at the same time from one address, or one IPv6 /64.",
    )
    trusted_proxies: str | None = Field(
        default=None,
        description="Addresses and networks, separated by commas, to which "
        "max_connections_per_address does not apply, such as 10.0.0.0/8.",
    )
    write_timeout: float = Field(
        default=30.0,
        gt=0,
        description="Seconds after which a client that takes nothing of its response is "
        "disconnected, and its request ended.",
    )
    max_import_bytes: int = Field(
        default=256 * MIB, ge=1024, description="Largest import of bindings, in bytes."
    )
    max_input_bytes: int = Field(
        default=256 * MIB,
        ge=1024,
        description="Largest file uploaded as the input of a batch, in bytes.",
    )
    max_running_lines: int = Field(
        default=32,
        ge=0,
        description="Lines of batches that this server runs at a time; with 0 it runs no batches, "
        "and other servers of the same catalog do.",
    )
    file_days: float | None = Field(
        default=30.0,
        gt=0,
        le=36_500,
        description="Days for which files, and batches that have ended, are kept, unless a request "
        "says otherwise.",
    )
    user_header: str | None = Field(
        default=None,
        description="Header whose value is the end user of a request for generation that has no "
        "`user`, such as X-OpenWebUI-User-Id. Set it where only your own frontend holds the keys.",
    )
    default_quota: str | None = Field(
        default=None,
        description="Limits of tenants created from now on, in place of the built-in ones: "
        "max_users=1000,max_keys=none; `none` alone is no limit at all.",
    )
    shutdown_timeout: float = Field(
        default=30.0, ge=0, description="Seconds that running requests get to finish at shutdown."
    )
    log_level: LogLevel = Field(default="info", description="Least severe level that is logged.")
    log_format: LogFormat = Field(
        default="console", description="Log lines for people (`console`) or machines (`json`)."
    )

    @field_validator("port", mode="before")
    @classmethod
    def _ignore_service_links(cls, value: object) -> object:
        # Kubernetes sets PREFIXD_PORT=tcp://10.0.0.1:8000 where a Service is named prefixd.
        if isinstance(value, str) and value.startswith(("tcp://", "udp://", "sctp://")):
            return cls.model_fields["port"].default
        return value

    @field_validator("default_quota")
    @classmethod
    def _check_default_quota(cls, value: str | None) -> str | None:
        if value is not None:
            parse_quota(value)
        return value

    @field_validator("user_header")
    @classmethod
    def _check_user_header(cls, value: str | None) -> str | None:
        return value and check_header_name(value)

    @field_validator("trusted_proxies")
    @classmethod
    def _check_networks(cls, value: str | None) -> str | None:
        parse_networks(value or "")
        return value

    @property
    def root(self) -> Path:
        """``data_dir`` as an absolute path."""
        return self.data_dir.expanduser().absolute()

    @property
    def timeouts(self) -> Timeouts:
        """The database's timeouts while a server runs."""
        return Timeouts(
            connect_s=self.database_connect_timeout,
            statement_s=self.database_statement_timeout,
            lock_s=self.database_lock_timeout,
            pool_s=self.database_pool_timeout,
            max_connections=SERVER_CONNECTIONS,
        )

    @property
    def catalog_url(self) -> str:
        """URL of the catalog; may hold a password, so never log it."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.root / 'catalog.sqlite3'}"
