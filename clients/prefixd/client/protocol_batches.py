"""The part of the protocol for files and batches: many requests at once."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from prefixd.client.types import Batch, BatchPage, File, FilePage
from prefixd.client.wire import (
    Call,
    Part,
    Progress,
    Response,
    accepted,
    creating,
    no_content,
    parser,
    reporting,
    request_of,
)


def upload_file(
    content: bytes | Path,
    *,
    filename: str | None = None,
    expires_after: int | None = None,
    progress: Progress | None = None,
) -> Call[File]:
    """Upload the input of a batch: JSONL, with a request in each line. ``expires_after`` is in
    seconds from now; by default the server says when it is deleted. ``progress`` is called with the
    bytes sent and their total."""
    name = filename or (content.name if isinstance(content, Path) else "input.jsonl")
    texts = {"purpose": "batch"}
    if expires_after is not None:
        texts |= {
            "expires_after[anchor]": "created_at",
            "expires_after[seconds]": str(expires_after),
        }
    small = (Part(part, part, text.encode(), "text/plain") for part, text in texts.items())
    parts = (*small, Part("file", name, content, "application/jsonl"))
    request = request_of("POST", "v1", "files", parts=parts)
    return reporting(creating(Call(request, parser(File))), progress)


def list_files(
    *, limit: int | None = None, after: str | None = None, purpose: str | None = None
) -> Call[FilePage]:
    """The tenant's files, newest first, a page at a time; ``purpose`` is ``batch`` or
    ``batch_output``."""
    params = {"limit": limit, "after": after, "purpose": purpose}
    return Call(request_of("GET", "v1", "files", params=params), parser(FilePage))


def show_file(file_id: str) -> Call[File]:
    """One file, without its bytes."""
    return Call(request_of("GET", "v1", "files", file_id), parser(File))


def read_file(file_id: str, *, start: int = 0, stop: int | None = None) -> Call[bytes]:
    """The bytes of a file, or those from ``start`` to before ``stop``; it must have one of them."""
    request = request_of("GET", "v1", "files", file_id, "content")
    if start or stop is not None:
        last = "" if stop is None else str(stop - 1)
        request = replace(request, headers={"range": f"bytes={start}-{last}"})
    return Call(request, _body)


def delete_file(file_id: str) -> Call[None]:
    """Delete a file that no batch needs."""
    return Call(request_of("DELETE", "v1", "files", file_id), no_content)


def create_batch(
    input_file_id: str,
    *,
    endpoint: str,
    completion_window: str = "24h",
    metadata: Mapping[str, str] | None = None,
) -> Call[Batch]:
    """Run the lines of a file, which name ``endpoint`` as their ``url``; the batch expires after
    ``completion_window``, such as ``24h`` or ``30m``."""
    body: dict[str, object] = {
        "input_file_id": input_file_id,
        "endpoint": endpoint,
        "completion_window": completion_window,
    }
    if metadata is not None:
        body["metadata"] = dict(metadata)
    return creating(Call(request_of("POST", "v1", "batches", json=body), parser(Batch)))


def show_batch(batch_id: str) -> Call[Batch]:
    """One batch, as of now."""
    return Call(request_of("GET", "v1", "batches", batch_id), parser(Batch))


def list_batches(*, limit: int | None = None, after: str | None = None) -> Call[BatchPage]:
    """The tenant's batches, newest first, a page at a time."""
    params = {"limit": limit, "after": after}
    return Call(request_of("GET", "v1", "batches", params=params), parser(BatchPage))


def cancel_batch(batch_id: str) -> Call[Batch]:
    """Have no more lines run; what was answered is in the batch's files when it is cancelled."""
    return Call(request_of("POST", "v1", "batches", batch_id, "cancel"), parser(Batch))


def _body(response: Response) -> bytes:
    return accepted(response).body
