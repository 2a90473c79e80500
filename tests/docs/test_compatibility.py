"""docs/compatibility.md has the results of the clients."""

import json

from tests.compat.clients import BEGIN, CLIENTS, END, PAGE, RESULTS, table


def test_table_is_that_of_the_results() -> None:
    results = json.loads(RESULTS.read_text())
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == table(results)
    assert {client.title for client in CLIENTS.values()} <= set(results)
    assert not [row for rows in results.values() for row in rows if not row["ok"]]
