"""The steps that bring a database to the tables of this version, for alembic.

They cover every table of ``prefix_store.database.metadata``, those of tenants too. A test holds the
steps and the tables to each other, and prints what a new step has to do. There is no way down: an
older version is run on a back-up.
"""
