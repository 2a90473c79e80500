"""A tenant that creates as much as it may, in its own process.

``python -m tests.faults.greedy_child URL KEY CLIENTS``. Prints a line when each thing was refused
once, runs until standard input ends, and prints the number of each response as JSON.
"""

import asyncio
import itertools
import json
import sys
from collections import Counter
from typing import Any

import httpx2

Request = tuple[str, str, dict[str, Any]]


def requests(number: int) -> dict[str, Request]:
    """A request that creates one of each thing, by the quota that limits it."""
    text = {"json": {"kind": "text", "text": f"text {number}"}}
    keyed = {
        "json": {"kind": "text", "text": "one"},
        "headers": {"idempotency-key": f"k{number}"},
    }
    return {
        "max_users": ("PUT", f"/v1/users/u{number}/prefix", {"json": {"prefix": "same"}}),
        "max_aliases": ("PUT", f"/v1/prefixes/same/aliases/a{number}", {"json": {"version": 1}}),
        "max_keys": ("POST", "/v1/admin/keys", {"json": {}}),
        "max_versions": ("PUT", f"/v1/prefixes/p{number % 7}", text),
        "max_idempotency_keys": ("PUT", "/v1/prefixes/same", keyed),
    }


async def main() -> None:
    url, key, clients = sys.argv[1], sys.argv[2], int(sys.argv[3])
    numbers, responses = itertools.count(1), Counter[str]()
    refused: set[str] = set()

    async def create(http: httpx2.AsyncClient) -> None:
        for number in numbers:
            for quota, (method, path, content) in requests(number).items():
                response = await http.request(method, path, **content)
                error = response.json().get("error") or {}
                responses[f"{quota} {response.status_code} {error.get('code', '')}".strip()] += 1
                if error.get("param") == quota and quota not in refused:
                    refused.add(quota)
                    print(json.dumps({"refused": error["message"]}), flush=True)

    limits = httpx2.Limits(max_connections=None)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(base_url=url, timeout=60, limits=limits, headers=headers) as http:
        tasks = [asyncio.create_task(create(http)) for _ in range(clients)]
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended
    print(json.dumps(responses), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
