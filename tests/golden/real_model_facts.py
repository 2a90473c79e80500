"""What clients of OpenAI's endpoints rely on that only a real model can show, as rows."""

from collections.abc import Callable
from typing import Any

Api = Any
KNOWN = frozenset(
    {
        *("model", "prompt", "max_tokens", "temperature", "n", "seed", "logprobs", "stream"),
        *("logit_bias", "stop", "presence_penalty", "frequency_penalty", "top_p", "echo"),
    }
)
"""Arguments of the client's method that are used here."""

PROMPT = [5, 6, 7, 8, 9]


def create(api: Api, **fields: Any) -> Any:
    own = {"max_tokens": 8, "prompt": PROMPT, "model": api.base_name, **fields}
    extra = {name: own.pop(name) for name in list(own) if name not in KNOWN}
    return api.completions.create(**own, extra_body={"return_token_ids": True, **extra})


def ids(api: Api, **fields: Any) -> list[int]:
    tokens: list[int] = create(api, **fields).choices[0].token_ids
    return tokens


def bias_forces_a_token(api: Api) -> bool:
    forced = ids(api, temperature=0, logit_bias={"11": 100}, ignore_eos=True)
    return forced == [11] * 8


def bias_forbids_a_token(api: Api) -> bool:
    first = ids(api, temperature=0, ignore_eos=True)
    bias = {str(token): -100 for token in set(first)}
    return not set(first) & set(ids(api, temperature=0, logit_bias=bias, ignore_eos=True))


def a_seed_repeats(api: Api) -> bool:
    fields = {"temperature": 1.0, "ignore_eos": True}
    seeded = [ids(api, seed=seed, **fields) for seed in (7, 7, 8)]
    return seeded[0] == seeded[1] != seeded[2]


def outputs_of_n_differ(api: Api) -> bool:
    answer = create(api, n=3, temperature=1.0, seed=42, max_tokens=20)
    return len({tuple(choice.token_ids) for choice in answer.choices}) == 3


def the_prompt_of_n_is_computed_once(api: Api) -> bool:
    """Its tokens are counted once, and all blocks but the last are shared afterwards."""
    prompt = [4 + i % 30 for i in range(100)]
    first = create(api, prompt=prompt, n=4, temperature=1.0, seed=1, max_tokens=2)
    again = create(api, prompt=prompt, n=4, temperature=1.0, seed=1, max_tokens=2)
    cached = again.usage.prompt_tokens_details.cached_tokens
    return bool(first.usage.prompt_tokens == 100 and 80 <= cached < 100)


def a_small_top_p_is_greedy(api: Api) -> bool:
    fields = {"ignore_eos": True}
    return ids(api, top_p=1e-9, seed=3, **fields) == ids(api, temperature=0, **fields)


def top_k_of_one_is_greedy(api: Api) -> bool:
    fields = {"ignore_eos": True}
    return ids(api, top_k=1, seed=3, **fields) == ids(api, temperature=0, **fields)


def greedy_takes_the_likeliest(api: Api) -> bool:
    logprobs = create(api, temperature=0, logprobs=5).choices[0].logprobs
    tables = zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    return all(value == max(table.values()) for value, table in tables)


def top_tokens_are_sorted(api: Api) -> bool:
    logprobs = create(api, temperature=0, logprobs=5).choices[0].logprobs
    tables = [list(table.values()) for table in logprobs.top_logprobs]
    return all(table == sorted(table, reverse=True) and len(table) == 5 for table in tables)


def logprobs_do_not_depend_on_the_number(api: Api) -> bool:
    few, many = (
        create(api, temperature=0, logprobs=k).choices[0].logprobs.token_logprobs for k in (0, 5)
    )
    return bool(few == many)


def a_stop_token_ends_the_text(api: Api) -> bool:
    first = ids(api, temperature=0, ignore_eos=True)
    choice = create(api, temperature=0, ignore_eos=True, stop_token_ids=[first[2]]).choices[0]
    expected = first[: first.index(first[2]) + 1]
    return bool((choice.token_ids, choice.stop_reason) == (expected, first[2]))


def min_tokens_keeps_it_off(api: Api) -> bool:
    first = ids(api, temperature=0, ignore_eos=True)
    fields = {"stop_token_ids": [first[0]], "min_tokens": 5, "ignore_eos": True}
    return len(ids(api, temperature=0, **fields)) >= 5


def penalties_change_the_text(api: Api) -> bool:
    fields = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    return ids(api, **fields) != ids(api, repetition_penalty=2.0, **fields)


def a_stream_has_the_same_tokens(api: Api) -> bool:
    fields = {"temperature": 0, "ignore_eos": True}
    chunks = list(create(api, stream=True, **fields))
    return [token for c in chunks for token in c.choices[0].token_ids] == ids(api, **fields)


def an_echoed_prompt_has_scores(api: Api) -> bool:
    logprobs = create(api, temperature=0, echo=True, logprobs=1).choices[0].logprobs
    values = logprobs.token_logprobs
    return values[0] is None and len(values) == len(PROMPT) + 8 and all(v <= 0 for v in values[1:])


FACTS: list[Callable[[Api], bool]] = [
    bias_forces_a_token,
    bias_forbids_a_token,
    a_seed_repeats,
    outputs_of_n_differ,
    the_prompt_of_n_is_computed_once,
    a_small_top_p_is_greedy,
    top_k_of_one_is_greedy,
    greedy_takes_the_likeliest,
    top_tokens_are_sorted,
    logprobs_do_not_depend_on_the_number,
    a_stop_token_ends_the_text,
    min_tokens_keeps_it_off,
    penalties_change_the_text,
    a_stream_has_the_same_tokens,
    an_echoed_prompt_has_scores,
]
