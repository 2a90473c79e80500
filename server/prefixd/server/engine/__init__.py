"""Scheduling, residency and KV blocks as plain data. No torch, no HTTP, no SQL."""
