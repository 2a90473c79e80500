"""The prefixes part of the protocol: uploads, versions, aliases, residency."""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Literal, Unpack

from prefixd.client.errors import ProtocolError
from prefixd.client.types import (
    RECIPE_FIELDS,
    Prefix,
    PrefixPage,
    Uploaded,
    UploadWarnings,
    VersionPage,
    Warmed,
)
from prefixd.client.wire import (
    Call,
    Part,
    Preconditions,
    Progress,
    Repeat,
    Response,
    accepted,
    creating,
    dump,
    guarded,
    no_content,
    parse_body,
    parser,
    reporting,
    request_of,
)

Bases = Literal["served", "all"]


def upload(
    name: str,
    *,
    config: bytes | Path,
    weights: bytes | Path,
    metadata: Mapping[str, object] | None = None,
    warm: bool = False,
    progress: Progress | None = None,
    **conditions: Unpack[Preconditions],
) -> Call[Uploaded]:
    """Upload a PEFT prefix as a new version of ``name``: its config (JSON) and safetensors.

    With ``warm``, the server that receives it starts to make it resident. ``progress`` is called
    with the bytes sent and their total.
    """
    parts = [
        Part("config", "adapter_config.json", config, "application/json"),
        Part("weights", "adapter_model.safetensors", weights, "application/octet-stream"),
    ]
    if metadata is not None:
        encoded = dump(metadata)
        parts.append(Part("metadata", "metadata.json", encoded, "application/json"))
    params = {"warm": "true" if warm else None}
    request = request_of("PUT", "v1", "prefixes", name, params=params, parts=tuple(parts))
    return reporting(creating(Call(request, _uploaded), conditions), progress)


def _uploaded(response: Response) -> Uploaded:
    return Uploaded(
        prefix=parse_body(Prefix, response),
        created=response.status == 201,
        warnings=parse_body(UploadWarnings, response).warnings,
    )


def upload_text(
    name: str,
    text: str,
    *,
    role: str | None = None,
    metadata: Mapping[str, object] | None = None,
    warm: bool = False,
    **conditions: Unpack[Preconditions],
) -> Call[Uploaded]:
    """Upload a text as a new version of ``name``: a hard prompt, in front of the prompt or, with
    the ``role`` ``system``, the system turn of each chat."""
    body: dict[str, object] = {"kind": "text", "text": text}
    if role is not None:
        body["role"] = role
    if metadata is not None:
        body["metadata"] = metadata
    params = {"warm": "true" if warm else None}
    return creating(
        Call(request_of("PUT", "v1", "prefixes", name, params=params, json=body), _uploaded),
        conditions,
    )


def upload_composition(
    name: str,
    composition: Mapping[str, object],
    *,
    metadata: Mapping[str, object] | None = None,
    warm: bool = False,
    **conditions: Unpack[Preconditions],
) -> Call[Uploaded]:
    """Save ``{"stack": […]}``, ``{"blend": {…}}`` or ``{"ensemble": […], "combine": …}`` as a new
    version of ``name``; the references are resolved now."""
    more = {} if metadata is None else {"metadata": metadata}
    params = {"warm": "true" if warm else None}
    body = {**composition, **more}
    return creating(
        Call(request_of("PUT", "v1", "prefixes", name, params=params, json=body), _uploaded),
        conditions,
    )


def upload_artifact(
    name: str,
    artifact: bytes | Path,
    *,
    warm: bool = False,
    progress: Progress | None = None,
    **conditions: Unpack[Preconditions],
) -> Call[Uploaded]:
    """Upload the stored file of a version, as ``download_artifact`` returns it, as a new version of
    ``name``: the digest stays. A file has no metadata; that of an existing version stays."""
    params = {"warm": "true" if warm else None}
    request = request_of("PUT", "v1", "prefixes", name, params=params, octets=artifact)
    return reporting(creating(Call(request, _uploaded), conditions), progress)


def download_artifact(name: str, *, version: int | str = "latest") -> Call[bytes]:
    """The stored file of a version, given by its number or an alias. Its SHA-256 is the digest."""
    request = request_of("GET", "v1", "prefixes", name, "versions", str(version), "content")
    return Call(request, _artifact)


def _artifact(response: Response) -> bytes:
    """The body, if it has the digest that the server names."""
    body = accepted(response).body
    expected, received = response.headers.get("x-prefixd-prefix-digest"), sha256(body).hexdigest()
    if expected != received:
        raise ProtocolError(
            f"expected a file with the digest {expected}, the server sent one with {received}"
        )
    return body


def list_prefixes(
    *,
    limit: int | None = None,
    after: str | None = None,
    base: Bases | None = None,
    labels: Mapping[str, str] | None = None,
) -> Call[PrefixPage]:
    """The tenant's prefixes by name, the latest version of each for the served base, a page at a
    time; with ``base="all"`` for each of its bases (``limit`` then counts names), with ``labels``
    only those that have all of these."""
    pairs = tuple(f"{name}:{value}" for name, value in (labels or {}).items())
    params = {"limit": limit, "after": after, "base": base, "label": pairs or None}
    return Call(request_of("GET", "v1", "prefixes", params=params), parser(PrefixPage))


def show_prefix(name: str) -> Call[Prefix]:
    """The manifest of a prefix reference (``name``, ``name@3`` or ``name@alias``)."""
    return Call(request_of("GET", "v1", "prefixes", name), parser(Prefix))


def list_versions(
    name: str,
    *,
    limit: int | None = None,
    before: int | None = None,
    base: Bases | None = None,
) -> Call[VersionPage]:
    """Versions of a prefix for the served base, or with ``base="all"`` for any, newest first, a
    page at a time."""
    params = {"limit": limit, "before": before, "base": base}
    request = request_of("GET", "v1", "prefixes", name, "versions", params=params)
    return Call(request, parser(VersionPage))


def patch_metadata(
    name: str,
    patch: Mapping[str, object],
    *,
    version: int | str = "latest",
    **conditions: Unpack[Preconditions],
) -> Call[Prefix]:
    """Merge ``patch`` into the metadata of a version, given by its number or an alias: None removes
    a field."""
    request = request_of("PATCH", "v1", "prefixes", name, "versions", str(version), json=patch)
    return guarded(Call(request, parser(Prefix)), conditions)


def patch_recipe(
    name: str,
    patch: Mapping[str, object],
    *,
    version: int | str = "latest",
    **conditions: Unpack[Preconditions],
) -> Call[Prefix]:
    """Change fields of the recipe of a version, given by its number or an alias; None removes one.
    The digest stays, and what is resident too."""
    return patch_metadata(name, {"recipe": dict(patch)}, version=version, **conditions)


def set_recipe(
    name: str,
    recipe: Mapping[str, object],
    *,
    version: int | str = "latest",
    **conditions: Unpack[Preconditions],
) -> Call[Prefix]:
    """As ``patch_recipe``, and remove the fields that ``recipe`` does not have."""
    fields = dict.fromkeys(RECIPE_FIELDS) | dict(recipe)
    return patch_recipe(name, fields, version=version, **conditions)


def set_alias(
    name: str, alias: str, *, version: int | str, **conditions: Unpack[Preconditions]
) -> Call[Prefix]:
    """Make ``name@alias`` refer to a version: its number, or another alias, such as ``latest``, for
    the version that it means now."""
    request = request_of("PUT", "v1", "prefixes", name, "aliases", alias, json={"version": version})
    return creating(Call(request, parser(Prefix)), conditions)


def rollback(name: str, *, version: int, **conditions: Unpack[Preconditions]) -> Call[Prefix]:
    """Set ``latest``, and with it the bare name, to a version of the served base; the next upload
    moves it again."""
    return set_alias(name, "latest", version=version, **conditions)


def remove_alias(name: str, alias: str, **conditions: Unpack[Preconditions]) -> Call[None]:
    """Remove an alias; the version stays."""
    return guarded(
        Call(request_of("DELETE", "v1", "prefixes", name, "aliases", alias), no_content), conditions
    )


def warm(reference: str) -> Call[Warmed]:
    """Start to make a version (``name``, ``name@3`` or ``name@alias``) resident; returns at
    once."""
    request = request_of("POST", "v1", "prefixes", reference, "warm", repeat=Repeat.LOST)
    return Call(request, parser(Warmed))


def pin(reference: str, **conditions: Unpack[Preconditions]) -> Call[Prefix]:
    """Keep the version that a reference now means resident, instead of any other version of its
    prefix."""
    return creating(
        Call(request_of("PUT", "v1", "prefixes", reference, "pin"), parser(Prefix)), conditions
    )


def unpin(name: str, **conditions: Unpack[Preconditions]) -> Call[None]:
    """Allow the eviction of a pinned prefix again."""
    return guarded(
        Call(request_of("DELETE", "v1", "prefixes", name, "pin"), no_content), conditions
    )


def delete_version(name: str, version: int, **conditions: Unpack[Preconditions]) -> Call[None]:
    """Delete one version, unless an alias, a pin, a binding or the default prefix refers to it. A
    ``latest`` that was this version becomes the highest one left of its base."""
    request = request_of("DELETE", "v1", "prefixes", name, "versions", str(version))
    return guarded(Call(request, no_content), conditions)


def delete_prefix(name: str, **conditions: Unpack[Preconditions]) -> Call[None]:
    """Delete a prefix with all its versions and aliases."""
    return guarded(Call(request_of("DELETE", "v1", "prefixes", name), no_content), conditions)
