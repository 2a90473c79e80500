"""Run by ``test_canary``: a server with its logging, and every path that could leak a canary.

Prints one JSON object: the error bodies, the metrics page, and whether it has imported torch. The
log goes to standard error.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from fastapi.testclient import TestClient
from safetensors.numpy import save
from sqlalchemy import text

from prefixd.server.serve.logging import configure
from tests.api.api_world import World, make_world

PROMPT, TEXT, USER, SECRET = "canary-prompt", "canary-text", "canary-user", "canary-secret"
TENSOR = 54321.9876  # beyond the bounds of the fake base
CONFIG = {
    "peft_type": "PROMPT_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 4,
    "token_dim": 8,
    "num_transformer_submodules": 1,
    "base_model_name_or_path": "tiny",
}


def upload(client: TestClient, value: float) -> Any:
    values = np.full((4, 8), 0.5, np.float32)
    values[1, 2] = value
    parts = {
        "config": ("c.json", json.dumps(CONFIG)),
        "weights": ("w", save({"prompt_embeddings": values})),
        "metadata": ("m", json.dumps({"description": TEXT, "prompt_template": "{prompt}" + TEXT})),
    }
    return client.put("/v1/prefixes/tensor", files=parts)


def broken(client: TestClient, world: World) -> Any:
    """An unexpected exception, with the prompt in the frames of its traceback."""
    tokenizer = world.served.tokenizer

    def encode(text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise RuntimeError("this should not happen")

    tokenizer.encode = encode  # type: ignore[method-assign]
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT})
    del tokenizer.encode
    return answer


def generate(client: TestClient, world: World) -> list[Any]:
    chat = {"messages": [{"role": "user", "content": PROMPT}]}
    bodies: list[dict[str, Any]] = [
        {"prompt": PROMPT},
        {"prompt": PROMPT, "user": USER},
        {"prompt": PROMPT, "stream": True},
        {"prompt": [PROMPT, 1]},
        {"prompt": {PROMPT: PROMPT}},
        {"prompt": PROMPT * 100},
        {"prompt": PROMPT, "stop": [PROMPT] * 17},
        {"prompt": PROMPT, "temperature": PROMPT},
        {"prompt": PROMPT, "logit_bias": {PROMPT: 1}},
        {"prompt": PROMPT, "metadata": PROMPT},
    ]
    base = {"model": "tiny", "max_tokens": 3}
    answers = [client.post("/v1/completions", json={**base, **body}) for body in bodies]
    answers.append(client.post("/v1/completions", content=f'{{"prompt": "{PROMPT}'.encode()))
    answers += [client.post("/v1/chat/completions", json={**base, **chat, "n": n}) for n in (1, 99)]
    answers.append(broken(client, world))
    for stream in (True, False):
        world.runner.fail = True
        failing = {**base, "prompt": PROMPT, "stream": stream}
        answers.append(client.post("/v1/completions", json=failing))
        world.runner.fail = False
    return answers


def manage(client: TestClient, world: World) -> list[Any]:
    answers = [
        client.put("/v1/prefixes/voice", json={"kind": "text", "text": TEXT}),
        client.put("/v1/prefixes/voice", json={"kind": "text", "text": TEXT * 100}),
        client.put("/v1/prefixes/voice", json={"kind": "text", "text": [TEXT]}),
        *(upload(client, value) for value in (0.25, TENSOR, float("nan"))),
        client.put(f"/v1/users/{USER}/prefix", json={"prefix": "voice"}),
        client.put(f"/v1/users/{USER}%7F/prefix", json={"prefix": "voice"}),
    ]
    for key in (SECRET, world.keys["acme"][:-1] + "!", f"pfx_{'A' * 12}_{SECRET}"):
        headers = {"authorization": f"Bearer {key}"}
        answers.append(client.get("/v1/models", headers=headers))
    with world.database.begin() as connection:
        connection.execute(text("DROP TABLE bindings"))
    answers.append(client.get(f"/v1/users/{USER}/prefix"))
    answers.append(client.put(f"/v1/users/{USER}/prefix", json={"prefix": "voice"}))
    answers.append(
        client.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT, "user": USER})
    )
    return answers


def main() -> None:
    # The client logs its URLs, which is allowed: it is the sender.
    logging.getLogger("httpx2").disabled = True
    configure("debug", "json" if sys.argv[1] == "json" else "console")
    with tempfile.TemporaryDirectory() as folder, make_world(Path(folder)) as world:
        with TestClient(world.app, headers=world.headers(), raise_server_exceptions=False) as one:
            answers = [*generate(one, world), *manage(one, world)]
            metrics = one.get("/metrics").text
        errors = [a.text for a in answers if a.status_code >= 400 or '"error"' in a.text]
        counts = sorted({answer.status_code for answer in answers})
        keys = [key.split("_")[2] for key in world.keys.values()]
    output = {"errors": errors, "metrics": metrics, "statuses": counts, "keys": keys}
    json.dump({**output, "torch": "torch" in sys.modules}, sys.stdout)


if __name__ == "__main__":
    main()
