"""Train the example prefixes with PEFT: `python -m examples.train [name ...]` (default: all).

Each takes a few minutes on one core. The layout is the same as in serving: the virtual
tokens first, then the full templated chat, or a plain template; only the answer and its <|im_end|>
are learned.
"""

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from examples.runtime import EXAMPLES, Base, load_base, read_rows
from examples.tasks import TRAINED, Task
from prefixd.server.model.demo import MODEL_ID

WARM_UP_STEPS = 5
SOFT_PROMPTS = {"PROMPT_TUNING", "P_TUNING"}
IGNORED = -100  # the label that cross entropy skips

Example = tuple[list[int], list[int]]  # token ids, labels


def main() -> None:
    """Train the named prefixes and write them into their folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="prefixes to train (default: all)")
    parser.add_argument("--out", type=Path, default=EXAMPLES, help="folder to write into")
    parser.add_argument("--steps", type=int, help="override the table's steps (for a quick test)")
    parser.add_argument("--seed", type=int, help="override the table's seed")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - {task.name for task in TRAINED}:
        parser.error(f"unknown prefixes: {', '.join(sorted(unknown))}")
    for task in TRAINED:
        if not arguments.names or task.name in arguments.names:
            seed = task.seed if arguments.seed is None else arguments.seed
            seeded = replace(task, seed=seed)
            # Loaded again for each prefix: PEFT changes the model it wraps.
            model = train(load_base(), seeded, steps=arguments.steps or task.steps)
            save(model, seeded, arguments.out / task.name)


def train(base: Base, task: Task, *, steps: int) -> Any:
    """Return a PEFT model whose virtual tokens are fitted to the task's training rows."""
    torch.manual_seed(task.seed)
    order = random.Random(task.seed)
    examples = [encode(base, task, row) for row in read_rows(task.rows or task.name, "train")]
    model = wrap(base, task)
    # bfloat16 takes half the time where the processor has it; only the virtual tokens, which stay
    # float32, are updated.
    model.base_model.to(getattr(torch, task.trained_in))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=task.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP_STEPS, 1 - step / steps)
    )
    started = time.perf_counter()
    queue: list[Example] = []
    for step in range(steps):
        if len(queue) < task.batch_size:  # a new epoch; the rest of the previous one comes first
            queue += order.sample(examples, len(examples))
        batch, queue = queue[: task.batch_size], queue[task.batch_size :]
        loss = answer_loss(model, task, collate(batch, pad=base.tokenizer.pad_token_id))
        loss.backward()
        clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            seconds = time.perf_counter() - started
            print(
                f"{task.name}: step {step + 1}/{steps} loss {loss:.4f} {seconds:.0f} s", flush=True
            )
    return model


def wrap(base: Base, task: Task) -> Any:
    """Wrap the frozen base with newly initialized virtual tokens."""
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": task.num_virtual_tokens,
    }
    match task.peft_type:
        case "PROMPT_TUNING":
            config = peft.PromptTuningConfig(
                **common,
                prompt_tuning_init="TEXT",
                prompt_tuning_init_text=task.init_text,
                tokenizer_name_or_path=str(base.folder),
            )
            return get_peft_model(base.model, config)
        case "P_TUNING":
            config = peft.PromptEncoderConfig(**common, encoder_hidden_size=576)
            return get_peft_model(base.model, config)
        case "PREFIX_TUNING":
            config = peft.PrefixTuningConfig(**common, prefix_projection=False)
        case "CARTRIDGE":
            config = peft.CartridgeConfig(**common, num_frozen_tokens=1)
        case other:
            raise ValueError(f"no recipe for {other}")
    model = get_peft_model(base.model, config)
    # Start from the keys and values of real text: PEFT's random initialization breaks the output.
    peft.initialize_kv_prefix_from_text(model, base.tokenizer, text=task.init_text)
    return model


def encode(base: Base, task: Task, row: dict[str, Any]) -> Example:
    """Return the templated prompt with its answer, and labels that cover only the answer."""
    if task.template:
        prompt, space = base.text_ids(task.template, row["prompt"]), " "
    else:
        prompt, space = base.chat_ids([{"role": "user", "content": row["prompt"]}]), ""
    said = f"{space}{row['answer']}<|im_end|>"
    answer = base.tokenizer(said, add_special_tokens=False)["input_ids"]
    return prompt + answer, [IGNORED] * len(prompt) + answer


def answer_loss(model: Any, task: Task, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross entropy of the answers' tokens.

    The same number as PEFT's own loss. Logits are computed only where a row has an answer: for
    the full prompt they would take a third of the step.
    """
    labels = batch.pop("labels")  # [batch, width]
    columns = (labels != IGNORED).any(dim=0).nonzero().flatten()
    # A soft prompt is part of the model's input and shifts it; a KV prefix is in the cache.
    shift = task.num_virtual_tokens if task.peft_type in SOFT_PROMPTS else 0
    logits = model(**batch, logits_to_keep=columns - 1 + shift).logits
    return cross_entropy(
        logits.float().flatten(0, 1), labels[:, columns].flatten(), ignore_index=IGNORED
    )


def collate(batch: list[Example], *, pad: int) -> dict[str, torch.Tensor]:
    """Pad on the right, so that PEFT keeps the positions of all real tokens."""

    def stack(rows: list[list[int]], value: int) -> torch.Tensor:  # [batch, width]
        tensors = [torch.tensor(row) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value)

    return {
        "input_ids": stack([ids for ids, _ in batch], pad),
        "labels": stack([labels for _, labels in batch], IGNORED),
        "attention_mask": stack([[1] * len(ids) for ids, _ in batch], 0),
    }


def save(model: Any, task: Task, folder: Path) -> None:
    """Write PEFT's two files, in the task's dtype and without a path of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    dtype = getattr(torch, task.dtype)
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, weights)
    weights.chmod(0o644)  # safetensors makes its files private

    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = MODEL_ID
    if "tokenizer_name_or_path" in config:
        config["tokenizer_name_or_path"] = MODEL_ID
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(
        missing_ok=True
    )  # PEFT's template; the folder's own is written by hand
    print(f"{task.name}: saved in {folder}")


if __name__ == "__main__":
    main()
