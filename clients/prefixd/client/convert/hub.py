"""An adapter from the Hugging Face Hub, or from a server with its routes (``HF_ENDPOINT``)."""

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from prefixd.client.convert.search import PICKLED_WEIGHTS_FILE
from prefixd.client.errors import DownloadError
from prefixd.client.folders import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE

HUB_ID = re.compile(
    r"(?P<repository>[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95})(?:@(?P<revision>[\w.-][\w./-]{0,127}))?",
    re.ASCII,
)
"""``org/name`` or ``org/name@revision``; a revision is a branch, a tag or a commit."""

DEFAULT_ENDPOINT = "https://huggingface.co"
TIMEOUT = 30.0
"""Seconds without an answer or without data."""

MAX_WEIGHTS_BYTES = 1024**3


def download(source: str, folder: Path) -> None:
    """Write ``adapter_config.json`` and the weights of a repository into a folder; no other file is
    requested.

    ``HF_TOKEN`` is sent to ``HF_ENDPOINT`` alone, not to a host that it redirects to. With
    ``HF_HUB_OFFLINE`` only this machine is asked. Raises DownloadError.
    """
    match = HUB_ID.fullmatch(source)
    assert match is not None
    endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    repository, revision = match["repository"], match["revision"] or "main"
    token = os.environ.get("HF_TOKEN", "").strip()
    headers = {"accept-encoding": "identity"}
    if token:
        headers["authorization"] = f"Bearer {token}"
    url = f"{endpoint}/{repository}/resolve/{revision.replace('/', '%2F')}"

    def check_offline(request: httpx2.Request) -> None:
        if _is_offline() and not _is_loopback(request.url.host):
            raise DownloadError(
                f"there is no path {source}, and HF_HUB_OFFLINE forbids a download from "
                f"{request.url.host}"
            )

    options: dict[str, Any] = {"event_hooks": {"request": [check_offline]}}
    options |= {"headers": headers, "timeout": TIMEOUT, "follow_redirects": True}
    try:
        with httpx2.Client(**options) as client:
            _fetch_adapter(_Repository(client, url, source), folder)
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise DownloadError(
            f"there is no path {source}, and the repository of that name cannot be downloaded from "
            f"{endpoint}: {reason}"
        ) from None


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine: a server for tests, or a mirror behind a tunnel."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _fetch_adapter(repository: "_Repository", folder: Path) -> None:
    if not repository.fetch(CONFIG_FILE, folder, limit=MAX_CONFIG_BYTES):
        raise DownloadError(f"expected {CONFIG_FILE} in {repository.name} on the Hub, found none")
    weights = (WEIGHTS_FILE, PICKLED_WEIGHTS_FILE)
    if not any(repository.fetch(name, folder, limit=MAX_WEIGHTS_BYTES) for name in weights):
        raise DownloadError(
            f"expected {' or '.join(weights)} in {repository.name} on the Hub, found none"
        )


@dataclass(frozen=True, slots=True)
class _Repository:
    """One revision of a repository; ``name`` is for messages."""

    client: httpx2.Client
    url: str
    name: str

    def fetch(self, filename: str, folder: Path, *, limit: int) -> bool:
        """Write one file into a folder. False when the repository has no such file."""
        with self.client.stream("GET", f"{self.url}/{filename}") as response:
            code = response.headers.get("x-error-code", "")
            if response.status_code == 404 and code in ("", "EntryNotFound"):
                return False
            if response.status_code != 200:
                raise self._error(response.status_code, code)
            size = 0
            with (folder / filename).open("wb") as file:
                for piece in response.iter_bytes():
                    size += len(piece)
                    if size > limit:
                        raise DownloadError(
                            f"{self.name}: expected {filename} of at most {limit} bytes, got more"
                        )
                    file.write(piece)
        return True

    def _error(self, status: int, code: str) -> DownloadError:
        if code == "RevisionNotFound":
            return DownloadError(f"there is no such revision on the Hub: {self.name}")
        if status in (401, 403, 404):
            return DownloadError(
                f"there is no path {self.name}, and the Hub refuses the repository of that name "
                f"({status}): it does not exist, or it is private or gated and HF_TOKEN is not a "
                "token that may read it"
            )
        return DownloadError(f"cannot download {self.name}: the Hub responded {status}")
