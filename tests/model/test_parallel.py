"""Tensor parallel without a model: what is refused, outcomes, and followers that die or hang."""

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from prefixd.server.engine.runner import OutOfMemory
from prefixd.server.engine.step import Sampled, StepOutput
from prefixd.server.model import load
from prefixd.server.model.architecture import UnsupportedModel, shape_of
from prefixd.server.model.fingerprint import fingerprint_of
from prefixd.server.model.float32 import float32_arithmetic
from prefixd.server.model.heads import local_shape, refuse_indivisible
from prefixd.server.model.parallel import followers as module
from prefixd.server.model.parallel.followers import PING, Followers, RankLost, _Follower
from prefixd.server.model.parallel.outcome import Outcome, RankFailed, raise_failures
from prefixd.server.model.parallel.plan import Job, ParallelRefused, refuse_setup
from tests.model.broken_models import GATED, random_model, right_models

ROOT = Path(__file__).parents[2]


def test_heads_that_the_ranks_cannot_share_are_refused_by_name() -> None:
    config = transformers.LlamaConfig(
        **{**GATED, "num_attention_heads": 24, "num_key_value_heads": 6, "hidden_size": 96}
    )
    for ranks in (2, 3, 6):
        refuse_indivisible(config, ranks=ranks)
        shape = local_shape(shape_of(config, embedding_width=96, context=512), ranks=ranks)
        assert (shape.num_heads, shape.num_kv_heads) == (24 // ranks, 6 // ranks)
    expected = (
        "llama has 6 KV heads, which 4 ranks cannot share evenly; expected a tensor_parallel of "
        "2 or 3 or 6"
    )
    with pytest.raises(UnsupportedModel, match=f"^{expected}$"):
        refuse_indivisible(config, ranks=4)
    config.num_key_value_heads = 1
    with pytest.raises(UnsupportedModel, match=r"1 KV heads, .*expected a tensor_parallel of 1"):
        refuse_indivisible(config, ranks=2)


def test_a_family_without_a_plan_for_its_heads_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="gpt2: transformers has no plan that cuts"):
        refuse_indivisible(right_models()["gpt2"], ranks=2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"quantize": "int8"}, "quantize is int8; expected none"),
        ({"kernels": "torch"}, "cpu_kernels is torch; expected auto or module"),
        ({"kernels": "avx2"}, "cpu_kernels is avx2; expected auto or module"),
        ({"device": "cuda"}, "expected at most the number of GPUs here, 1"),
        ({"device": "cpu"}, "the device cpu on a machine with a GPU"),
    ],
)
def test_settings_that_do_not_go_with_ranks_are_refused_by_name(
    options: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings: dict[str, Any] = {"kernels": "auto", "quantize": "none", "device": "cuda", **options}
    device = torch.device(settings.pop("device"))
    with pytest.raises(ParallelRefused, match=f"tensor_parallel is 2.*{expected}"):
        refuse_setup(2, device=device, **settings)


def test_one_outcome_is_made_of_those_of_all_ranks() -> None:
    fine = Outcome.of(StepOutput({3: [Sampled(7)]}))
    raise_failures({0: fine, 1: Outcome.of(StepOutput({3: [Sampled(7)]}))})
    no_memory, broken = Outcome.of(OutOfMemory("none left")), Outcome.of(ValueError("no"))
    with pytest.raises(OutOfMemory, match="rank 2: OutOfMemory: none left"):
        raise_failures({0: fine, 1: broken, 2: no_memory})
    with pytest.raises(RankFailed, match="rank 1: ValueError: no"):
        raise_failures({0: fine, 1: broken})
    for other in (StepOutput({3: [Sampled(8)]}), StepOutput({3: [Sampled(7, finite=False)]})):
        with pytest.raises(RankFailed, match="sampled different tokens"):
            raise_failures({0: fine, 1: Outcome.of(other)})


@pytest.fixture
def group() -> Iterator[Any]:
    """A process group of this process alone."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # defined in C++
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_weights_change_their_dtype(group: Any) -> None:
    model = random_model(right_models()["llama"])
    fingerprint = fingerprint_of(model, None)
    attention = model.model.layers[0].self_attn
    weight = attention.q_proj.weight.detach()
    parallelize_module(attention.q_proj, group, ColwiseParallel())
    assert fingerprint_of(model, None) == fingerprint
    base = load.prepare_base(model, None, name="m", dtype="bfloat16", device="cpu")
    assert base.fingerprint == fingerprint
    assert isinstance(attention.q_proj.weight, DTensor)
    assert attention.q_proj.weight.dtype is torch.bfloat16
    with float32_arithmetic(model, scratch_bytes=0):
        wide = attention.q_proj.weight
        assert torch.equal(wide.full_tensor(), weight.bfloat16().float())
    assert attention.q_proj.weight.dtype is torch.bfloat16


# -- followers ----


def job(folder: Path) -> Job:
    """A job whose model is never loaded."""
    return Job(
        model="none",
        dtype="float32",
        device="cpu",
        cache_dir=folder,
        num_blocks=8,
        block_size=4,
        prefill_chunk=8,
        threads=1,
        ranks=2,
    )


class FakeProcess:
    """The process of a follower that a test plays."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.returncode: int | None = None

    def kill(self) -> None:
        if self.returncode is None:
            self.returncode = -signal.SIGKILL
            self.pipe.close()

    def wait(self, timeout: float | None = None) -> None:
        del timeout

    def report(self, number: int, outcome: Outcome) -> None:
        self.pipe.send((number, outcome))


@dataclass
class Played:
    """Followers whose only process a test plays, and why it was lost."""

    process: FakeProcess
    lost: "queue.Queue[str]"
    followers: Followers


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[float], Played]]:
    """``play(hung_s)`` starts to watch."""
    started: list[Played] = []

    def start(hung_s: float) -> Played:
        own, its = Pipe()
        process: Any = FakeProcess(its)
        monkeypatch.setattr(
            Followers, "_start", lambda *_: _Follower(1, process, own, time.monotonic() + 3600)
        )
        lost: queue.Queue[str] = queue.Queue()
        followers = Followers(job(tmp_path), hung_s=hung_s, on_lost=lost.put)
        started.append(Played(process, lost, followers))
        return started[-1]

    monkeypatch.setattr(module, "_CHECK_EVERY_S", 0.02)
    monkeypatch.setattr(module, "_FAILED_GRACE_S", 0.05)
    yield start
    for each in started:
        each.process.kill()
        each.followers.close()


def test_a_follower_that_does_not_respond_is_lost(play: Callable[[float], Played]) -> None:
    played = play(0.05)
    played.process.pipe.send(PING)
    assert played.lost.get(timeout=30).startswith("rank 1 has not responded for ")
    with pytest.raises(RankLost, match="rank 1 has not responded"):
        played.followers.run("run")
    assert played.process.returncode == -signal.SIGKILL


def test_a_pass_that_does_not_end_on_every_rank_is_lost(play: Callable[[float], Played]) -> None:
    played = play(3600)
    followers = played.followers
    number = followers.begin("run", limit_s=3600)
    call = followers._calls[number]
    played.process.report(number, Outcome())
    with followers._changed:
        assert followers._changed.wait_for(lambda: 1 in call.outcomes, timeout=30)
        call.limit_s = 0.0
    assert played.lost.get(timeout=30).endswith(" s on rank 0")
    with pytest.raises(RankLost, match="a pass has not ended"):
        followers.end(number, Outcome())


def test_a_rank_that_fails_while_others_wait_for_it_is_lost(
    play: Callable[[float], Played],
) -> None:
    played = play(3600)
    number = played.followers.run("run")
    played.process.pipe.send((number, Outcome("memory", "none left")))
    assert played.lost.get(timeout=30) == "rank 1 failed while others wait for it: none left"


def test_a_later_watch_receives_the_loss(play: Callable[[float], Played]) -> None:
    played = play(3600)
    played.process.kill()
    reason = played.lost.get(timeout=30)
    reasons: list[str] = []
    played.followers.watch(reasons.append)
    assert reasons == [reason] == ["rank 1 was killed by signal 9"]


@pytest.mark.slow
def test_no_follower_outlives_a_killed_rank_0(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.model.test_parallel import *;"
        "f = Followers(job(Path(sys.argv[1])), hung_s=60, on_lost=print);"
        "f.end(f.run('missing'), Outcome()); print('started', flush=True); f.run('missing');"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    # The follower has the pipes of its parent: they end with the last of both processes.
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=False,
        timeout=120,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert process.returncode == -signal.SIGKILL
    assert "started" in process.stdout
