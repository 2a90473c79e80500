"""Tenants and their API keys. No HTTP."""
