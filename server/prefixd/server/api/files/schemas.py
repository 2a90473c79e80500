"""Response bodies of /v1/files, and the body of an upload."""

from typing import Any, Literal

from pydantic import BaseModel

from prefixd.store.file_store import FileRecord, Purpose

LEAST_KEPT_S = 3600
MOST_KEPT_S = 30 * 24 * 3600
"""Bounds of ``expires_after``, as OpenAI's."""


class FileShown(BaseModel):
    """A file. ``expires_at`` is when it is deleted, null for never; times in seconds since 1970."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None

    @classmethod
    def of(cls, record: FileRecord) -> "FileShown":
        """From the catalog."""
        expires_at = record.expires_at
        return cls(
            id=record.id,
            bytes=record.size_bytes,
            created_at=int(record.created_at.timestamp()),
            expires_at=None if expires_at is None else int(expires_at.timestamp()),
            filename=record.filename,
            purpose=record.purpose,
        )


class FileList(BaseModel):
    """Some files; pass ``last_id`` as ``after`` for more, while ``has_more``."""

    object: Literal["list"] = "list"
    data: list[FileShown]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """A file that was deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "JSONL: one request in each line.",
                        },
                        "purpose": {"type": "string", "enum": [Purpose.BATCH.value]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": LEAST_KEPT_S,
                            "maximum": MOST_KEPT_S,
                            "description": "When it is deleted. Default: the server's.",
                        },
                    },
                }
            }
        },
    }
}
