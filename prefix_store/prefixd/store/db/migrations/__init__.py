"""alembic's steps that create and change every table of ``database.metadata``, tenants' too.

A test compares the steps with the tables and prints what a new step has to do. There are no
downgrades: to go back to an older version, restore a backup made with it.
"""
