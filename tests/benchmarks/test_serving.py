"""Requests of the benchmarks under load."""

from collections import Counter

from benchmarks.serving import body, prompts


def test_no_request_shares_kv_with_another_of_the_same_prompt():
    # The same seed gives the same prompts, also as the beginning of a larger draw.
    assert prompts(2, 64, seed=1) == prompts(8, 64, seed=1)[:2]
    request = body(prompts(1, 64, seed=1)[0], 8)
    assert request["kv_reuse"] is False
    assert body([1], 8, kv_reuse=True)["kv_reuse"] is True


def test_no_two_prompts_of_the_footprint_begin_alike():
    from benchmarks.footprint import complete

    sent: Counter[str] = Counter()

    class Client:
        def post(self, _path: str, *, json: dict) -> object:
            sent[json["prompt"][:4]] += 1
            return type("Answer", (), {"status_code": 200})

    for _ in range(20):
        complete(Client(), 1, stream=False)  # type: ignore[arg-type]
    assert set(sent.values()) == {1}
