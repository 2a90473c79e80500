"""One row of the sweep: a family is served in every way, or refused with a reason."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from prefixd.server.engine.step import Step
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.cpu.interface import KERNELS
from prefixd.server.model.decoder_check import DecoderRefused, Evidence, check_decoder
from prefixd.server.model.decoders import DecoderUnavailable, make_decoder
from prefixd.server.model.load import prepare_base
from tests.golden.golden_harness import Served, serve
from tests.golden.test_golden_mixed import preempt_often
from tests.model.cpu.native_library import COMPILED
from tests.sweep.sweep_kinds import Case, Kind, make_kinds, random_tokens
from tests.sweep.sweep_models import WINDOW, has_window, sweep_model
from tests.sweep.sweep_references import of_base

LEAST_ROWS = 12
BLOCK_SIZE, NUM_BLOCKS = 16, 640
FEW_BLOCKS, FEW_STATES = 36, 8
"""A pool in which not all requests find room: blocks of KV, and sequences and prefixes whose states
do."""

RUNS: dict[str, dict[str, int]] = {
    "chunks of 1": {"max_prefill_chunk": 1},
    "chunks of 7": {"max_prefill_chunk": 7},
    "chunks of 64": {"max_prefill_chunk": 64},
    "preempted": {"max_prefill_chunk": 64},
}
"""Each starts an engine over the same decoder: blocks hold what the run before left there."""

DECODERS = {"native": "auto", "lean": "torch", "module": "module"}
GPU_DECODERS = {"lean": "paged", "module": "paged_module"}


@dataclass(frozen=True)
class Row:
    """One line of the page: decoders that can serve the model, how its layers attend, and the
    result of each kind in ``cells``, with the reason where that is not plainly ``equal``. All are
    empty where the model is refused."""

    name: str
    refused: str = ""
    on_cpu: str = ""
    on_gpu: str = ""
    attention: str = ""
    cells: dict[str, str] = field(default_factory=dict)


def examine(name: str, folder: Path, *, served_model: Any = None) -> Row:
    """Serve a row and compare all kinds with PEFT and transformers. ``served_model`` is
    another model than the reference, for tests of this comparison (None: the same)."""
    model = sweep_model(name)
    try:
        served = serve(served_model or model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    except UnsupportedModel as error:
        # Without the place and the size of a difference, which rounding changes a little.
        return Row(name, refused=str(error).partition(": at position")[0])
    try:
        assert served.evidence is not None
        kinds = make_kinds(model, served, folder)
        batch = _batch(kinds)
        require_that_context_matters(name, model, batch)
        failed = compare(served, batch)
        require_that_blocks_matter(served, batch)
        return Row(
            name,
            on_cpu=_decoders(model, served.evidence, DECODERS),
            on_gpu=_decoders(model, served.evidence, GPU_DECODERS),
            attention=attention_of(served),
            cells={kind.name: _cell(kind, failed) for kind in kinds},
        )
    finally:
        served.close()


def _batch(kinds: Sequence[Kind]) -> list[Case]:
    """All requests of all kinds, short prompts first, some again so that there are enough."""
    cases = [kind.cases[turn] for turn in (0, 1) for kind in kinds if kind.cases]
    return list(islice(cycle(cases), max(LEAST_ROWS, len(cases))))


def compare(served: Served, batch: Sequence[Case]) -> dict[str, list[str]]:
    """The runs in which a kind's tokens differ from the reference."""
    failed: dict[str, list[str]] = {}
    expected = [case.expected for case in batch]
    few = FEW_BLOCKS + FEW_STATES * served.pool["state_blocks"]
    for run, config in RUNS.items():
        if run == "preempted":
            served.restart(**config, num_blocks=few)
            preempt_often(served)
        else:
            served.restart(**config)
        first = together(served, batch, warm=run != "preempted")
        again = together(served, batch, warm=run != "preempted")  # with KV of the first time
        for label, tokens in ((run, first), (f"{run}, reused", again)):
            for case, output, right in zip(batch, tokens, expected, strict=True):
                if output != right and label not in failed.setdefault(case.kind, []):
                    failed[case.kind].append(label)
        stats = served.stats()
        if run == "preempted":
            assert stats.preemptions >= 8, f"{stats.preemptions} preemptions"
    return {kind: runs for kind, runs in failed.items() if runs}


def together(served: Served, batch: Sequence[Case], *, warm: bool = True) -> list[list[int]]:
    """The tokens of requests that run in one pass. With ``warm`` their prefixes compile first,
    in passes that also decode; without, when they can."""
    if warm:
        handles = dict.fromkeys(case.handle for case in batch)
        ready = [served.start([3], handle, count=2) for handle in handles]
        for wait in ready:
            wait()
    rows: list[int] = []
    submit = served.runner.submit

    def watch(step: Step) -> None:
        rows.append(len(step.chunks))
        submit(step)

    served.runner.submit = watch
    try:
        with served.held():
            waits = [case.start(served) for case in batch]
        tokens = [wait() for wait in waits]
    finally:
        served.runner.submit = submit
    if warm:
        assert max(rows) == len(batch), f"at most {max(rows)} of {len(batch)} rows ran in one pass"
    return tokens


def require_that_context_matters(name: str, model: Any, batch: Sequence[Case]) -> None:
    """Fail where tokens do not depend on what a wrong model would lose: each prefix, the first
    tokens of a long prompt, the exact length of a window."""
    plain = of_base(model, [])
    changed_by: set[str] = set()
    for case in batch:
        if case.kind not in changed_by and plain(case.text).tokens != case.expected:
            changed_by.add(case.kind)
    unchanged = {case.kind for case in batch if case.handle} - changed_by
    assert not unchanged, f"no tokens change by {unchanged}"
    bare = [case for case in batch if case.kind == "base"]
    _, long = bare[0], bare[1]
    changed = [*random_tokens(8, seed=77), *long.prompt[8:]]
    assert plain(changed).tokens != long.expected, "the first tokens of a prompt change nothing"
    if has_window(name):
        wider = of_base(sweep_model(name, window=WINDOW + 1), [])
        assert any(wider(case.prompt).tokens != case.expected for case in bare[:2]), (
            "one more position in the window changes nothing"
        )


def require_that_blocks_matter(served: Served, batch: Sequence[Case]) -> None:
    """Fail where tokens are right although every block was zeroed before each pass: then they do
    not depend on what the pool holds, and the comparison proves nothing."""
    served.restart(**RUNS["chunks of 64"])
    submit = served.runner.submit
    blocks = list(range(1, NUM_BLOCKS))

    def blind(step: Step) -> None:
        with torch.inference_mode():
            served.runner.decoder.zero(blocks)
        submit(step)

    served.runner.submit = blind
    try:
        tokens = together(served, batch)
    finally:
        served.runner.submit = submit
    same = [
        case.kind for case, output in zip(batch, tokens, strict=True) if output == case.expected
    ]
    assert not same, f"equal tokens from zeroed blocks: {same}"


def _cell(kind: Kind, failed: dict[str, list[str]]) -> str:
    if not kind.cases:
        return kind.note
    if kind.name in failed:
        return f"differs: {'; '.join(failed[kind.name])}"
    return f"equal: {kind.note}" if kind.note else "equal"


def attention_of(served: Served) -> str:
    """What the layers of the model have beyond plain attention."""
    layers = served.base.layers
    options = [option for layer in layers.attention.values() for option in layer.options()]
    states = [f"a state ({state.kind})" for state in layers.states]
    return "; ".join(dict.fromkeys([*options, *states]))


def _decoders(model: Any, evidence: Evidence, choices: dict[str, str]) -> str:
    """The decoders that can serve a model: each made, and checked against the model's logits."""
    able = []
    for label, choice in choices.items():
        base = prepare_base(copy.deepcopy(model), None, name="m", dtype="float32", device="cpu")
        try:
            decoder = make_decoder(
                base,
                choice,
                num_blocks=NUM_BLOCKS,
                block_size=BLOCK_SIZE,
                data_folder=COMPILED,
            )
            check_decoder(decoder, evidence, num_blocks=NUM_BLOCKS)
        except (DecoderUnavailable, DecoderRefused):
            continue
        if decoder.name == choice or (choice == "auto" and decoder.name in KERNELS):
            able.append(label)
    return ", ".join(able)
