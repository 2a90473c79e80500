"""What a script of a client prints: one line of JSON for each call. For any Python environment."""

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from importlib import metadata

WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Oslo", "Rome", "Lima"]},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
TOOL = {"type": "function", "function": WEATHER}
QUESTION = "What is the weather in Oslo, in celsius?"
# Users of the tenant, each bound to a prefix.
USERS = {
    "0b6f2c4e-6c0f-4d9a-9a63-5f8f0a4f7c11": "brief",
    "7f0c3a52-1f0e-4c59-8a3e-2a4d0c1be902": "kind",
}


def is_weather(arguments: dict[str, object]) -> bool:
    """Whether arguments match the schema of the tool."""
    properties = WEATHER["parameters"]["properties"]  # type: ignore[index]
    return set(arguments) == set(properties) and all(
        value in properties[name]["enum"] for name, value in arguments.items()
    )


class Report:
    """Runs the calls of a client of the distribution ``package``, or of ``version``."""

    def __init__(self, package: str = "", *, version: str = "") -> None:
        parser = argparse.ArgumentParser()
        for name in ("url", "key", "model"):
            parser.add_argument(f"--{name}", required=True)
        self.arguments = parser.parse_args()
        self.url = f"{self.arguments.url}/v1"
        self.key, self.model = self.arguments.key, self.arguments.model
        self.version = version or metadata.version(package)
        self._failed = False

    def call(self, name: str, check: Callable[[], object]) -> None:
        """Run one call, which raises or is false where it fails."""
        reason = ""
        try:
            result = check()
            if not result:
                reason = f"unexpected: {result!r}"
        except Exception as error:  # noqa: BLE001 - it is printed
            reason = f"{type(error).__name__}: {error}"[:400]
            traceback.print_exc()
        self._failed |= bool(reason)
        row = {"call": name, "ok": not reason, "version": self.version, "reason": reason}
        print(json.dumps(row), flush=True)

    def end(self) -> None:
        """Exit with 1 where a call failed."""
        sys.exit(self._failed)
