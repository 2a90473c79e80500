"""What LoRA would cost a decode step in which each row has an adapter of its own (decision 0023).

    python -m benchmarks.lora_rows FOLDER [--rows 32] [--rank 16] [--rounds 7] [--peft]

Times one decode step of the unmodified transformers model over 64 cached tokens, float32: plain,
with gathered low-rank products of each row's adapter on the query and value projections, the same
on all linear layers, and with PEFT's `adapter_names`. Rounds alternate; medians of CPU seconds.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache

CACHED = 64
SOME = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    """Print the median CPU milliseconds of a step for each way, and the ratio to plain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peft", action="store_true", help="measure PEFT too, with q and v")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(chosen.folder, dtype=torch.float32).eval()
    tokens = torch.arange(chosen.rows)[:, None] + 100
    with torch.inference_mode():
        full = model(tokens.expand(-1, CACHED).contiguous(), use_cache=True).past_key_values
    adapters = {
        names: Adapters(model, names, rows=chosen.rows, rank=chosen.rank) for names in (SOME, ALL)
    }

    def step(runs: Any = model, **more: Any) -> None:
        cache: DynamicCache = copy.deepcopy(full)
        begin = time.process_time()
        with torch.inference_mode():
            runs(input_ids=tokens, past_key_values=cache, use_cache=True, **more)
        seconds.append(time.process_time() - begin)

    seconds: list[float] = []
    ways: dict[str, Callable[[], None]] = {"plain": step}
    for names, held in adapters.items():
        ways["q, v" if names == SOME else "all linear layers"] = partial(held.run, step)
    times = {way: measured(ways, way, seconds) for way in ways}
    for _ in range(chosen.rounds - 1):
        for way in ways:
            times[way] += measured(ways, way, seconds)
    if chosen.peft:
        mixed = with_peft(model, rows=chosen.rows, rank=chosen.rank)
        each_row = [str(row) for row in range(chosen.rows)]
        ways["PEFT, q, v"] = partial(step, mixed, adapter_names=each_row)
        times["PEFT, q, v"] = [
            each for _ in range(3) for each in measured(ways, "PEFT, q, v", seconds)
        ]
    for way, taken in times.items():
        ratio = median(taken) / median(times["plain"])
        print(f"{way:20} {1000 * median(taken):8.1f} ms  {ratio:5.2f}")
    for names, held in adapters.items():
        print(f"{'q, v' if names == SOME else 'all':20} {held.bytes_each / 2**20:8.2f} MiB each")


def measured(ways: dict[str, Callable[[], None]], way: str, seconds: list[float]) -> list[float]:
    """The CPU seconds of one step."""
    seconds.clear()
    ways[way]()
    return list(seconds)


class Adapters:
    """An adapter of its own for each row: A [rows, rank, in] and B [rows, out, rank] a layer."""

    def __init__(self, model: Any, names: tuple[str, ...], *, rows: int, rank: int) -> None:
        self.pairs = {
            part: (
                torch.randn(rows, rank, part.in_features) * 0.01,
                torch.randn(rows, part.out_features, rank) * 0.01,
            )
            for name, part in model.named_modules()
            if name.endswith(names)
        }
        self.bytes_each = sum(4 * (a[0].numel() + b[0].numel()) for a, b in self.pairs.values())

    def run(self, step: Callable[[], None]) -> None:
        """One step with the adapters of all rows."""
        with ExitStack() as stack:
            for part, (a, b) in self.pairs.items():
                stack.enter_context(hooked(part, a, b))
            step()


@contextmanager
def hooked(part: Any, a: torch.Tensor, b: torch.Tensor) -> Iterator[None]:
    """Add each row's low-rank product to a layer's output."""

    def add(_part: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        low = torch.bmm(a, inputs[0].transpose(1, 2))  # [rows, rank, 1]
        return output + torch.bmm(b, low).transpose(1, 2)

    handle = part.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def with_peft(model: Any, *, rows: int, rank: int) -> Any:
    """The model with as many adapters as rows in PEFT."""
    config = LoraConfig(r=rank, target_modules=list(SOME), init_lora_weights=False)
    mixed = get_peft_model(model, config, adapter_name="0").eval()
    for row in range(1, rows):
        mixed.add_adapter(str(row), config)
    return mixed.eval()


if __name__ == "__main__":
    main()
