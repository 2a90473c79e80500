"""Votes: of the answers of an ensemble's members the most frequent one.

The exact text decides, and among equally frequent ones that of the first member. Its tokens and
log-probabilities are those of the first member that gave it.
"""

from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterable

from prefixd.server.api.admitted import Admitted
from prefixd.server.api.generate.generation import Batch
from prefixd.server.api.request_record import RequestRecord
from prefixd.server.engine.request import Event, TokenEvent


async def voted(
    events: AsyncIterable[Batch], admitted: Admitted, record: RequestRecord
) -> AsyncGenerator[Batch]:
    """The events of the answers that win, once all members have ended. Which members agree with
    them goes to ``record``."""
    answers: defaultdict[int, list[Event]] = defaultdict(list)
    async for batch in events:
        for choice, event in batch:
            answers[choice].append(event)
    num_members, n = admitted.num_members, admitted.requests[0].n
    for choice in range(admitted.num_choices):
        prompt, index = divmod(choice, n)
        first = prompt * num_members
        of_members = [answers[(first + member) * n + index] for member in range(num_members)]
        texts = [_text(each) for each in of_members]
        counts = Counter(texts)  # in the order of first appearance, as most_common is among equals
        winner, _ = counts.most_common(1)[0]
        record.members_agreed([text == winner for text in texts], compared=1)
        yield [(choice, event) for event in of_members[texts.index(winner)]]


def _text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TokenEvent))
