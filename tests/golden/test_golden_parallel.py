"""Two processes that share a model give the tokens of one, under every kind of prefix."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixd.server.engine.request import PrefixHandle, PrefixKey, SamplingParams
from prefixd.server.engine.runner import OutOfMemory
from prefixd.server.engine.step import Chunk, CompileChunk, Save, Step
from prefixd.server.model.load import load_base
from prefixd.server.model.parallel.followers import Followers
from prefixd.server.model.parallel.outcome import RankFailed
from prefixd.server.model.parallel.plan import Job
from prefixd.server.model.parallel.rank import RankModel
from prefixd.server.model.parallel.runner import ParallelRunner
from prefixd.server.model.prefix import KVPrefix, SoftPrompt
from tests.golden import scores
from tests.golden.golden_harness import Served, prompts, tiny_model
from tests.golden.placed import Piece, place, reference, soft_prompt
from tests.golden.test_golden_constrained import Thirds
from tests.golden.test_golden_mixed import many_prefixes, preempt_often
from tests.golden.test_golden_server import folder_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

KEY = PrefixKey("t", "digest")
POOL = {"num_blocks": 800, "block_size": 4}
SETTINGS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.9, top_p=0.95, seed=7),
    SamplingParams(temperature=1.3, top_k=40, seed=8, presence_penalty=0.5),
    SamplingParams(temperature=0, frequency_penalty=1.0, logit_bias={5: 3.0}, top_logprobs=2),
]


@dataclass
class Ranks:
    """A model on two processes; this one is rank 0."""

    job: Job
    followers: Followers
    model: RankModel
    runner: ParallelRunner

    @contextmanager
    def serving(self, *, num_blocks: int = POOL["num_blocks"], **config: Any) -> Iterator[Served]:
        """An engine over both of them, which may use ``num_blocks`` of the pool."""
        served = Served(self.model.base, self.runner, pool=POOL)
        served.restart(num_blocks=num_blocks, **config)
        try:
            yield served
        finally:
            served.close()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    scratch = tmp_path_factory.mktemp("ranks")
    job = Job(
        model=str(folder_of("llama", scratch)),
        dtype="float32",
        device="cpu",
        cache_dir=scratch,
        prefill_chunk=64,
        threads=1,
        ranks=2,
        **POOL,
    )
    followers = Followers(job, hung_s=60.0, on_lost=lambda _reason: None)
    model = followers.load()
    yield Ranks(job, followers, model, ParallelRunner(model.runner, followers))
    followers.close()
    assert [each.process.returncode for each in followers._followers] == [0]


Request = tuple[list[int], PrefixHandle | None, SamplingParams]


def requests_under(prefixes: list[PrefixHandle | None]) -> list[Request]:
    return [
        (prompt, prefixes[index % len(prefixes)], SETTINGS[index % len(SETTINGS)])
        for index, prompt in enumerate(prompts(30, seed=3))
    ]


def answers(served: Served, requests: list[Request]) -> list[list[int]]:
    with served.held():
        waits = [
            served.start(prompt, prefix, count=24, sampling=sampling)
            for prompt, prefix, sampling in requests
        ]
    return [wait() for wait in waits]


def test_tokens_under_all_kinds_of_prefix_equal_those_of_one_process(
    ranks: Ranks, serving: Callable[..., Served], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    single = serving(model, kernels="module", **POOL)
    requests = requests_under(many_prefixes(single, model, tmp_path))
    expected = answers(single, requests)
    assert len({tuple(tokens) for tokens in expected}) == len(requests)

    with ranks.serving() as served:
        served.prefixes = single.prefixes
        assert answers(served, requests) == expected
    with ranks.serving(
        num_blocks=110, max_resident_tokens=120, host_tokens=1000, max_prefill_chunk=7
    ) as served:
        served.prefixes = single.prefixes
        preempt_often(served)
        for _ in range(2):  # the second time, evicted prefixes are in host memory
            assert answers(served, requests) == expected
        stats = served.stats()
        assert stats.preemptions >= 10
        assert stats.prefix_loads["host"] > 0
        assert stats.step_failures == 0


def test_virtual_tokens_inside_a_prompt_reach_all_ranks(ranks: Ranks) -> None:
    model = tiny_model("llama")
    with ranks.serving(max_prefill_chunk=7) as served:
        rows = soft_prompt(served, 20, seed=1)
        key = served.put(SoftPrompt(rows)).key
        first, second = prompts(2, seed=2)
        pieces: list[Piece] = [(0, 7), first, (7, 20), second]
        expected = reference(model, rows, pieces, 12)
        assert place(served, key, pieces).start(served, count=12)() == expected


def test_scores_of_prompt_tokens_equal_those_of_one_process(ranks: Ranks) -> None:
    model = tiny_model("llama")
    with ranks.serving(max_prefill_chunk=7, max_scored=4) as served:
        text = prompts(30, seed=5)[0]
        expected = scores.reference(model, text)
        scores.check(scores.start(served, text, count=1)(), text, expected)


def test_rows_under_a_constraint_equal_those_of_one_process(
    ranks: Ranks, serving: Callable[..., Served]
) -> None:
    single = serving(tiny_model("llama"), kernels="module", **POOL)

    def tokens(served: Served) -> list[list[int]]:
        with served.held():
            waits = [
                served.start(
                    prompt,
                    count=12,
                    sampling=SETTINGS[index % len(SETTINGS)],
                    constraint=None if index % 3 else Thirds(),
                )
                for index, prompt in enumerate(prompts(9, seed=6))
            ]
        return [wait() for wait in waits]

    expected = tokens(single)
    with ranks.serving() as served:
        assert tokens(served) == expected
        assert served.stats().masks >= 3 * 12


def test_the_kv_of_all_heads_is_saved(ranks: Ranks, serving: Callable[..., Served]) -> None:
    single = serving(tiny_model("llama"), kernels="module", **POOL)
    shape = ranks.model.base.shape
    assert shape.num_kv_heads == single.base.shape.num_kv_heads == 2
    width = shape.num_kv_heads * shape.head_dim
    kv = torch.randn(2 * shape.num_layers, 6, width)
    compiled = CompileChunk(KEY, KVPrefix(kv), 0, 6, (1, 2))
    ranks.runner.run(Step(compiles=[compiled], fresh=[1, 2]))
    output = ranks.runner.run(Step(saves=[Save(KEY, 6, (1, 2))]))
    saved = output.saved[KEY]
    assert isinstance(saved, KVPrefix)
    assert torch.equal(saved.kv, kv)


def test_the_fingerprint_is_that_of_the_whole_checkpoint(ranks: Ranks) -> None:
    whole = load_base(ranks.job.model, dtype="float32", device="cpu", cache_dir=Path())
    assert ranks.model.base.fingerprint == whole.fingerprint


def test_a_step_that_fails_on_one_rank_alone_fails_on_all(ranks: Ranks) -> None:
    shape = ranks.model.base.shape
    width = shape.num_kv_heads * shape.head_dim
    kv = torch.zeros(2 * shape.num_layers, 6, width)
    for payload, error in ((LittleMemory, OutOfMemory), (Broken, RankFailed)):
        compiled = CompileChunk(KEY, payload(kv), 0, 6, (1, 2))
        with pytest.raises(error, match=r"rank 1: .*only on a follower"):
            ranks.runner.run(Step(compiles=[compiled]))
    chunk = Chunk(0, (3, 4, 5), 0, (1,), sampling=SamplingParams(temperature=0))
    assert ranks.runner.run(Step(chunks=[chunk], fresh=[1])).sampled[0][0].finite


class LittleMemory(KVPrefix):
    """A prefix for which a follower has no memory."""

    def __getattribute__(self, name: str) -> object:
        if name == "kv" and "RANK" in os.environ:
            raise MemoryError("only on a follower")
        return super().__getattribute__(name)


class Broken(KVPrefix):
    """A prefix that a follower cannot read."""

    def __getattribute__(self, name: str) -> object:
        if name == "kv" and "RANK" in os.environ:
            raise ValueError("only on a follower")
        return super().__getattribute__(name)
