"""Shared by the benchmarks under load: a server process with flags, tenants, timed streams."""

import argparse
import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import torch
from safetensors.torch import save

from prefixd.server.cli.demo.child import ServerProcess, admin
from prefixd.server.model.demo import default_cache_dir, demo_model

MODEL = "SmolLM2-135M-Instruct"
HIDDEN, VOCABULARY, NUM_LAYERS = 576, 49152, 30
HANG_S = 300.0


class BenchServer(ServerProcess):
    """A ``prefixd serve`` of the demo model with more flags."""

    def __init__(self, data: Path, flags: Sequence[str]) -> None:
        super().__init__(data_dir=data, port=0)
        self._command += flags

    @property
    def pid(self) -> int:
        """The process, which is also its session."""
        return self._process.pid

    @property
    def resident_mib(self) -> float:
        """Memory of the process."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def serving(
    data: Path, *flags: str, tenants: Sequence[str] = ("bench",), **weights: float
) -> Iterator[tuple[BenchServer, dict[str, str]]]:
    """A running server and a key for each tenant; the default weight of a tenant is 1."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    demo_model(default_cache_dir())
    if not data.exists():
        data.mkdir()
        for name in tenants:
            weight = ("--weight", str(weights[name])) if name in weights else ()
            admin(data, "tenant", "create", name, *weight)
    keys = {}
    for name in tenants:
        issued = admin(data, "key", "create", "--tenant", name)
        assert isinstance(issued, dict)
        keys[name] = str(issued["key"])
    with BenchServer(data, flags) as server:
        server.wait_until_ready(timeout=600, on_event=lambda _: None)
        yield server, keys


@asynccontextmanager
async def client(url: str, key: str) -> AsyncIterator[httpx2.AsyncClient]:
    """An HTTP client of one key, without a limit on connections."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=100)
    headers = {"authorization": f"Bearer {key}"}
    timeout = httpx2.Timeout(HANG_S, connect=HANG_S)
    async with httpx2.AsyncClient(
        base_url=url, headers=headers, timeout=timeout, limits=limits
    ) as http:
        yield http


@dataclass
class Timed:
    """The times at which a request was sent and its tokens arrived, in seconds of one clock."""

    sent: float
    status: int = 0
    tokens: list[float] = field(default_factory=list)
    ended: float = 0.0
    text: str = ""
    error: dict[str, Any] | None = None
    retry_after: str | None = None

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.error is None

    @property
    def latency(self) -> float:
        return self.ended - self.sent

    @property
    def first(self) -> float:
        return self.tokens[0] - self.sent

    def gaps(self, *, since: float = 0.0) -> list[float]:
        """Seconds between successive tokens."""
        pairs = zip(self.tokens, self.tokens[1:], strict=False)
        return [b - a for a, b in pairs if b >= since]


def body(prompt: list[int], count: int, *, model: str = MODEL, **more: Any) -> dict[str, Any]:
    """A greedy completion of exactly ``count`` tokens, without KV reuse: where two requests of a
    benchmark have the same prompt, both compute it. It requests log-probabilities, because
    then every token has an event of its own, even inside a multi-token character."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "kv_reuse": False,
        "stream": True,
        **more,
    }


async def timed(
    http: httpx2.AsyncClient, request: dict[str, Any], *, seen: list[Timed] | None = None
) -> Timed:
    """Stream one completion and record the times; the result is appended to ``seen`` at start."""
    result = Timed(sent=time.perf_counter())
    if seen is not None:
        seen.append(result)
    async with http.stream("POST", "/v1/completions", json=request) as response:
        result.status = response.status_code
        result.retry_after = response.headers.get("retry-after")
        if response.status_code != 200:
            result.error = json.loads(await response.aread())["error"]
        else:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    _take(json.loads(line.removeprefix("data: ")), result)
    result.ended = time.perf_counter()
    return result


def _take(event: dict[str, Any], result: Timed) -> None:
    if "error" in event:
        result.error = event["error"]
        return
    for choice in event["choices"]:
        num_tokens = len((choice["logprobs"] or {}).get("tokens", ()))
        result.tokens += [time.perf_counter()] * num_tokens
        result.text += choice["text"]


def prompts(count: int, length: int, *, seed: int = 0) -> list[list[int]]:
    """Random token ids: no two prompts share a beginning."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1000, 40000, (count, length), generator=generator).tolist()


def soft_prompt(length: int, *, seed: int) -> dict[str, Any]:
    """A random soft prompt for the demo model, as keyword arguments of a ``put``."""
    generator = torch.Generator().manual_seed(seed)
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": length,
        "token_dim": HIDDEN,
        "num_transformer_submodules": 1,
    }
    values = 0.1 * torch.randn(length, HIDDEN, generator=generator)
    weights = save({"prompt_embeddings": values})
    return {
        "files": {
            "config": ("adapter_config.json", json.dumps(config).encode()),
            "weights": ("adapter_model.safetensors", weights),
        }
    }


def adaption_prompt(length: int, *, layers: int, seed: int) -> dict[str, Any]:
    """A random adaption prompt in the last layers of the demo model, as of ``soft_prompt``."""
    config = {
        "peft_type": "ADAPTION_PROMPT",
        "task_type": "CAUSAL_LM",
        "adapter_len": length,
        "adapter_layers": layers,
        "target_modules": "self_attn",
    }
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(NUM_LAYERS - layers, NUM_LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.adaption_"
        prompt = torch.randn(1, length, HIDDEN, generator=generator)
        tensors |= {f"{name}prompt": prompt, f"{name}gate": torch.full((1,), 0.1)}
    return {
        "files": {
            "config": ("adapter_config.json", json.dumps(config).encode()),
            "weights": ("adapter_model.safetensors", save(tensors)),
        }
    }


async def upload(http: httpx2.AsyncClient, name: str, content: dict[str, Any]) -> None:
    """Publish a prefix."""
    response = await http.put(f"/v1/prefixes/{name}", **content)
    response.raise_for_status()


async def figures(http: httpx2.AsyncClient) -> dict[str, float]:
    """Values of the metrics without labels."""
    page = (await http.get("/metrics")).text
    lines = (line.split() for line in page.splitlines() if not line.startswith("#"))
    return {parts[0]: float(parts[1]) for parts in lines if "{" not in parts[0]}


async def closed_loop(
    http: httpx2.AsyncClient, bodies: Sequence[dict[str, Any]], *, clients: int
) -> tuple[float, list[Timed]]:
    """Send all of ``bodies`` with ``clients`` concurrent clients; returns seconds and results."""
    remaining = iter(bodies)

    async def one() -> list[Timed]:
        return [await timed(http, each) for each in remaining]

    started = time.perf_counter()
    results_by_client = await asyncio.gather(*(one() for _ in range(clients)))
    return time.perf_counter() - started, [
        result for results in results_by_client for result in results
    ]


def machine() -> dict[str, Any]:
    """What the figures depend on: the number of cores and their load before the run."""
    return {"cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}


def stated(options: argparse.Namespace) -> dict[str, str]:
    """The options as a report has them, without paths: those are of one machine."""
    given = vars(options).items()
    return {name: str(value) for name, value in given if not isinstance(value, Path)}


def write(path: Path | None, report: dict[str, Any]) -> None:
    """The report as JSON, to ``path``, if given."""
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")
