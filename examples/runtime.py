"""Shared by training and evaluation: the frozen base, the prompt layout, greedy generation."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Set before the libraries read it: no network access.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefixd.server.model.demo import default_cache_dir, demo_model

EXAMPLES = Path(__file__).parent


@dataclass(frozen=True)
class Base:
    """The frozen float32 demo model, its tokenizer, and the folder both came from."""

    model: Any
    tokenizer: Any
    folder: Path

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Render `messages` as the server does; the template adds its own system message."""
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text_ids(self, template: str, prompt: str) -> list[int]:
        """Tokenize `prompt` in a plain template."""
        return list(self.tokenizer(template.replace("{prompt}", prompt))["input_ids"])


def load_base() -> Base:
    """Load the demo model, converting it first if no cached copy exists."""
    cache = os.environ.get("PREFIXD_TEST_CACHE")
    folder = demo_model(Path(cache) if cache else default_cache_dir(), progress=print)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Base(model, AutoTokenizer.from_pretrained(folder), folder)


def read_rows(name: str, split: str) -> list[dict[str, Any]]:
    """Read `data/<name>.<split>.jsonl`."""
    lines = (EXAMPLES / "data" / f"{name}.{split}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@torch.inference_mode()
def generate(model: Any, base: Base, prompts: list[list[int]], *, max_new_tokens: int) -> list[str]:
    """Return the greedy continuation of each prompt, without special tokens.

    Prompts of different lengths are padded on the left. This is correct for the bare model, but
    PEFT misplaces the real tokens of a soft prompt then: under a prefix pass one prompt at a time.
    """
    width = max(len(ids) for ids in prompts)
    gaps = [width - len(ids) for ids in prompts]
    pad = [base.tokenizer.pad_token_id]
    output = model.generate(
        input_ids=torch.tensor([pad * gap + ids for gap, ids in zip(gaps, prompts, strict=True)]),
        attention_mask=torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps]),
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )
    return list(base.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True))
