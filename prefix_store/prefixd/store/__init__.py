"""Bytes and names of prefixes: strict artifacts, digests, blobs, catalog. No torch, no HTTP."""
