"""The steps that bring a database to the tables of this version, for alembic.

They cover every table of ``database.metadata``, those of tenants too. A test compares the steps
with the tables and prints what a new step has to do. There is no way down: an older version is
run on a back-up.
"""
