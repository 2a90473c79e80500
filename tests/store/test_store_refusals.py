"""Crafted artifacts, one for each mistake: rejected by code, with the expected and the received
value."""

import gzip
import io
import json
import pickle
import re
import tarfile
import time
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prefixd.store.artifact.artifact import inspect_peft, inspect_text
from prefixd.store.artifact.config import MAX_CONFIG_BYTES
from prefixd.store.artifact.kinds import Kind
from prefixd.store.errors import ArtifactRefused
from tests.store.store_artifacts import (
    BASE,
    HIDDEN,
    KV_WIDTH,
    P,
    config_bytes,
    header_entry,
    kv,
    multitask,
    ramp,
    soft,
    spool,
    tensors,
    with_header,
)

ENTRY = header_entry("F32", [P, HIDDEN], 0)
DATA = ramp(P, HIDDEN).tobytes()
NAME = "prompt_embeddings"
MULTITASK = config_bytes("MULTITASK_PROMPT_TUNING")


def entry_text(**changes: object) -> str:
    return json.dumps(ENTRY | changes)


def zipped() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        file.writestr("archive/data.pkl", b"x" * 100)
    return target.getvalue()


def tarred() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as file:
        file.addfile(tarfile.TarInfo("weights"), None)
    return target.getvalue()


def poisoned(value: float, shape: tuple[int, int] = (P, HIDDEN)) -> np.ndarray:
    values = ramp(*shape)
    values[2, 3] = value
    return values


WEIGHTS = {
    # the container
    "empty": (b"", "malformed_header", "0 bytes"),
    "seven bytes": (b"\0" * 7, "malformed_header", "7 bytes"),
    "no header": (b"\0" * 16, "malformed_header", "'{'"),
    "pickle 2": (pickle.dumps({"a": list(range(99))}, protocol=2), "pickle", "safe_serialization"),
    "pickle 4": (pickle.dumps({"a": list(range(99))}, protocol=4), "pickle", "never opened"),
    "short pickle": (pickle.dumps(1, protocol=4)[:8], "pickle", "pickle"),
    "torch zip": (zipped(), "archive", "ZIP"),
    "gzip": (gzip.compress(soft()), "archive", "gzip"),
    "tar": (tarred(), "archive", "tar"),
    "gguf": (b"GGUF" + b"\3\0\0\0" * 8, "malformed_header", "GGUF"),
    "npy": (b"\x93NUMPY\1\0" + b" " * 100, "malformed_header", "NumPy"),
    "header of 2**63": (b"\xff" * 8 + b"{}", "header_too_large", "65536"),
    "header of 64 KiB and one": (
        with_header(b"{" + b" " * 65534 + b"}}", b""),
        "header_too_large",
        "65537",
    ),
    "header beyond the end": (soft()[:60], "truncated", "52"),
    "truncated data": (soft()[:-1], "truncated", "256 bytes of tensors, got 255"),
    "trailing byte": (soft() + b"x", "trailing_bytes", "256 bytes of tensors, got 257"),
    "appended zip": (soft() + zipped(), "trailing_bytes", "256 bytes of tensors"),
    # the header
    "leading space": (
        with_header(b" " + json.dumps({NAME: ENTRY}).encode(), DATA),
        "malformed_header",
        "'{'",
    ),
    "trailing newline": (
        with_header(json.dumps({NAME: ENTRY}).encode() + b"\n{}", DATA),
        "malformed_header",
        "Extra data",
    ),
    "not JSON": (with_header(b"{nonsense}", DATA), "malformed_header", "character"),
    "not UTF-8": (with_header(b'{"\xff":1}', DATA), "malformed_header", "UTF-8"),
    "deep header": (with_header(b'{"a":' + b"[" * 60000 + b"}", b""), "malformed_header", "deep"),
    "huge number": (with_header(b'{"a":' + b"9" * 5000 + b"}", b""), "malformed_header", "digits"),
    "NaN in header": (with_header(b'{"a":NaN}', b""), "malformed_header", "NaN"),
    "duplicate tensor": (
        with_header(f'{{"{NAME}":{entry_text()},"{NAME}":{entry_text()}}}'.encode(), DATA),
        "malformed_header",
        "duplicate key 'prompt_embeddings'",
    ),
    "duplicate field": (
        with_header(f'{{"{NAME}":{{"dtype":"F32","dtype":"F32"}}}}'.encode(), DATA),
        "malformed_header",
        "duplicate key 'dtype'",
    ),
    "unknown inner field": (
        with_header({NAME: ENTRY | {"extra": 1}}, DATA),
        "malformed_header",
        "exactly",
    ),
    "entry is a list": (with_header({NAME: [1]}, DATA), "malformed_header", "exactly"),
    "metadata of numbers": (
        with_header({"__metadata__": {"a": 1}, NAME: ENTRY}, DATA),
        "malformed_header",
        "__metadata__",
    ),
    # names
    "no tensors": (with_header({}, b""), "missing_tensor", NAME),
    "lm_head": (
        tensors({NAME: ramp(P, HIDDEN), "base_model.lm_head.weight": ramp(2, 2)}),
        "unknown_tensor",
        "'base_model.lm_head.weight'",
    ),
    "many extra": (
        tensors({NAME: ramp(P, HIDDEN)} | {f"x{i}": ramp(1) for i in range(9)}),
        "unknown_tensor",
        "and 6 more",
    ),
    "path as name": (tensors({"../../etc/x": ramp(1)}), "unknown_tensor", "'../../etc/x'"),
    "NUL in name": (tensors({"a\0b": ramp(1)}), "unknown_tensor", "'a\\x00b'"),
    "flooding name": (
        tensors({"\N{BELL}\r\n" * 3000: ramp(1)}),
        "unknown_tensor",
        "(9000 characters)",
    ),
    "LoRA weights": (
        tensors({"base_model.model.q_proj.lora_A.weight": ramp(2, 2)}),
        "unknown_tensor",
        "lora_A",
    ),
    # dtypes and shapes
    "F64": (
        with_header({NAME: header_entry("F64", [P, HIDDEN], 0)}, DATA * 2),
        "wrong_dtype",
        "'F64'",
    ),
    "BOOL": (
        with_header({NAME: header_entry("BOOL", [P, HIDDEN], 0)}, DATA[:64]),
        "wrong_dtype",
        "'BOOL'",
    ),
    "F8": (
        with_header({NAME: header_entry("F8_E4M3", [P, HIDDEN], 0)}, DATA[:64]),
        "wrong_dtype",
        "F16, F32",
    ),
    "dtype is a list": (with_header({NAME: ENTRY | {"dtype": []}}, DATA), "wrong_dtype", "array"),
    "wrong width": (soft(ramp(P, 24)), "wrong_shape", "expected [4, 16]"),
    "wrong width, received": (soft(ramp(P, 24)), "wrong_shape", "got [4, 24]"),
    "two submodules' rows": (soft(ramp(2 * P, HIDDEN)), "wrong_shape", "got [8, 16]"),
    "transposed": (soft(ramp(HIDDEN, P)), "wrong_shape", "got [16, 4]"),
    "rank 1": (soft(ramp(P * HIDDEN)), "wrong_shape", "got [64]"),
    "rank 3": (soft(ramp(1, P, HIDDEN)), "wrong_shape", "got [1, 4, 16]"),
    "rank 20000": (
        with_header({NAME: ENTRY | {"shape": [1] * 20000}}, DATA),
        "wrong_shape",
        "20000 items",
    ),
    "2**62 rows": (
        with_header({NAME: ENTRY | {"shape": [0, 2**62], "data_offsets": [0, 0]}}, b""),
        "wrong_shape",
        "4611686018427387904",
    ),
    "negative extent": (
        with_header({NAME: ENTRY | {"shape": [-4, -16]}}, DATA),
        "wrong_shape",
        "from 0",
    ),
    "boolean extent": (
        with_header({NAME: ENTRY | {"shape": [True, 64]}}, DATA),
        "wrong_shape",
        "whole numbers",
    ),
    "float extent": (
        with_header({NAME: ENTRY | {"shape": [4.0, 16]}}, DATA),
        "wrong_shape",
        "whole numbers",
    ),
    # offsets
    "offsets of three": (
        with_header({NAME: ENTRY | {"data_offsets": [0, 1, 2]}}, DATA),
        "malformed_header",
        "two whole numbers",
    ),
    "hole before": (
        with_header({NAME: ENTRY | {"data_offsets": [8, 264]}}, b"\0" * 8 + DATA),
        "wrong_offsets",
        "got 8 to 264",
    ),
    "end before begin": (
        with_header({NAME: ENTRY | {"data_offsets": [256, 0]}}, DATA),
        "wrong_offsets",
        "expected bytes 0 to 256",
    ),
    "too short for its shape": (
        with_header({NAME: ENTRY | {"data_offsets": [0, 128]}}, DATA[:128]),
        "wrong_offsets",
        "got 0 to 128",
    ),
    # values
    "NaN": (soft(poisoned(float("nan"))), "non_finite", "[2, 3]"),
    "infinity": (soft(poisoned(float("inf"))), "non_finite", "[2, 3]"),
    "-infinity in bfloat16": (soft(poisoned(float("-inf")), "BF16"), "non_finite", "[2, 3]"),
    "NaN in float16": (soft(poisoned(float("nan")), "F16"), "non_finite", "[2, 3]"),
    "over the bound": (soft(poisoned(3e38)), "out_of_range", "row 2, column 3"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_malformed_weights_are_rejected(tmp_path: Path, case: str) -> None:
    weights, code, words = WEIGHTS[case]
    with pytest.raises(ArtifactRefused) as refusal:
        inspect_peft(config_bytes(), spool(tmp_path, weights), base=BASE)
    assert (refusal.value.code, words in refusal.value.message) == (code, True), refusal.value
    assert len(refusal.value.message) < 700
    assert refusal.value.message.isprintable()
    assert refusal.value.param


CONFIGS = {
    "empty": (b"", "malformed_config", "character 0"),
    "pickle": (pickle.dumps({}), "malformed_config", "UTF-8"),
    "a list": (b"[]", "malformed_config", "got an array"),
    "too large": (b" " * (MAX_CONFIG_BYTES + 1), "malformed_config", "262145"),
    "byte order mark": (b"\xef\xbb\xbf" + config_bytes(), "malformed_config", "BOM"),
    "duplicate key": (b'{"a":1,"a":2}', "malformed_config", "duplicate key 'a'"),
    "NaN": (config_bytes(extra=float("nan")), "malformed_config", "NaN"),
    "infinity by overflow": (b'{"a":1e999}', "malformed_config", "too large"),
    "deep": (b'{"a":' + b"[" * 17 + b"]" * 17 + b"}", "malformed_config", "deep"),
    "very deep": (b'{"a":' + b"[" * 99999 + b"]" * 99999 + b"}", "malformed_config", "deep"),
    "lone surrogate": (config_bytes(x="\ud800"), "malformed_config", "surrogate"),
    "no type": (b'{"num_virtual_tokens":4}', "unsupported_peft_type", "got null"),
    "LoRA": (
        config_bytes("LORA"),
        "unsupported_peft_type",
        "got 'LORA', which changes the layers of the base; here all requests run through the same",
    ),
    "lower case": (config_bytes("prompt_tuning"), "unsupported_peft_type", "prompt_tuning"),
    "type is a list": (config_bytes(peft_type=["LORA"]), "unsupported_peft_type", "an array"),
    "seq2seq": (config_bytes(task_type="SEQ_2_SEQ_LM"), "unsupported_task_type", "SEQ_2_SEQ_LM"),
    "classifier": (config_bytes(task_type="TOKEN_CLS"), "unsupported_task_type", "TOKEN_CLS"),
    "no tokens": (config_bytes(num_virtual_tokens=0), "malformed_config", "got 0"),
    "-4 tokens": (config_bytes(num_virtual_tokens=-4), "malformed_config", "got -4"),
    "true tokens": (config_bytes(num_virtual_tokens=True), "malformed_config", "got true"),
    "4.0 tokens": (config_bytes(num_virtual_tokens=4.0), "malformed_config", "a number"),
    "tokens as text": (config_bytes(num_virtual_tokens="4"), "malformed_config", "got '4'"),
    "tokens missing": (b'{"peft_type":"CPT"}', "malformed_config", "got null"),
    "too many tokens": (
        config_bytes(num_virtual_tokens=65),
        "too_many_virtual_tokens",
        "at most 64 virtual tokens, got 65",
    ),
    "10**12 tokens": (
        config_bytes(num_virtual_tokens=10**12),
        "too_many_virtual_tokens",
        "got 1000000000000",
    ),
    "tokens of 4000 digits": (
        config_bytes(num_virtual_tokens=10**4000),
        "too_many_virtual_tokens",
        "a number",
    ),
    "fewer tokens than rows": (config_bytes(num_virtual_tokens=3), "wrong_shape", "got [4, 16]"),
    "other depth": (config_bytes(num_layers=12), "base_mismatch", "num_layers 12"),
    "other width": (config_bytes(token_dim=768), "base_mismatch", "768"),
    "encoder-decoder": (
        config_bytes(num_transformer_submodules=2),
        "encoder_decoder",
        "1 of PROMPT_TUNING for the base tiny, which is a decoder; got 2, which stores 8 rows",
    ),
    "base is a number": (config_bytes(base_model_name_or_path=7), "malformed_config", "got 7"),
    "base with newlines": (
        config_bytes(base_model_name_or_path="a\nb"),
        "malformed_config",
        "printable",
    ),
    "endless base": (
        config_bytes(base_model_name_or_path="a" * 600),
        "malformed_config",
        "(600 characters)",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_malformed_configs_are_rejected(tmp_path: Path, case: str) -> None:
    config, code, words = CONFIGS[case]
    with pytest.raises(ArtifactRefused) as refusal:
        inspect_peft(config, spool(tmp_path, soft()), base=BASE)
    assert (refusal.value.code, words in refusal.value.message) == (code, True), refusal.value
    assert len(refusal.value.message) < 700
    assert refusal.value.message.isprintable()
    assert refusal.value.param


def test_the_refusal_of_an_adapter_of_layers_names_a_page_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(ArtifactRefused) as refusal:
        inspect_peft(config_bytes("LORA"), spool(tmp_path, soft()), base=BASE)
    (page,) = re.findall(r"\((docs/.+\.md)\)", refusal.value.message)
    assert "LoRA" in (Path(__file__).parents[2] / page).read_text().partition("\n")[0]


TASKS = {
    "none chosen": (None, MULTITASK, multitask(), "task_id_required", "0 to 2"),
    "one too high": (3, MULTITASK, multitask(), "task_id_out_of_range", "got 3"),
    "negative": (-1, MULTITASK, multitask(), "task_id_out_of_range", "-1"),
    "not multitask": (0, config_bytes(), soft(), "unexpected_task_id", "PROMPT_TUNING"),
    "no task tensors": (0, MULTITASK, soft(), "missing_tensor", "prefix_task_cols"),
    "rank over width": (0, MULTITASK, multitask(rank=HIDDEN + 1), "wrong_shape", "1 to 16"),
    "rank 0": (0, MULTITASK, multitask(rank=0), "wrong_shape", "rank"),
    "no tasks": (0, MULTITASK, multitask(tasks=0), "wrong_shape", "[0, 4"),
}


@pytest.mark.parametrize("case", TASKS)
def test_invalid_tasks_are_rejected(tmp_path: Path, case: str) -> None:
    task_id, config, weights, code, words = TASKS[case]
    with pytest.raises(ArtifactRefused) as refusal:
        inspect_peft(config, spool(tmp_path, weights), base=BASE, task_id=task_id)
    assert (refusal.value.code, words in refusal.value.message) == (code, True), refusal.value


def test_unused_tasks_with_non_finite_values_are_rejected(tmp_path: Path) -> None:
    rows = ramp(3, 2, HIDDEN)
    rows[2, 0, 0] = np.nan
    weights = tensors(
        {
            "prefix_task_cols": ramp(3, P, 2),
            "prefix_task_rows": rows,
            "prompt_embeddings": ramp(P, HIDDEN),
        }
    )
    with pytest.raises(ArtifactRefused, match="prefix_task_rows") as refusal:
        inspect_peft(MULTITASK, spool(tmp_path, weights), base=BASE, task_id=0)
    assert refusal.value.code == "non_finite"


def test_a_multitask_product_that_overflows_is_rejected(tmp_path: Path) -> None:
    big = np.full((1, P, 1), 1e30, dtype=np.float32)
    rows = np.full((1, 1, HIDDEN), 1e30, dtype=np.float32)
    weights = tensors(
        {
            "prefix_task_cols": big,
            "prefix_task_rows": rows,
            "prompt_embeddings": np.zeros((P, HIDDEN), dtype=np.float32),
        }
    )
    with pytest.raises(ArtifactRefused) as refusal:
        inspect_peft(MULTITASK, spool(tmp_path, weights), base=BASE, task_id=0)
    assert refusal.value.code == "out_of_range"


@pytest.mark.parametrize(
    ("field", "value"), [("num_layers", 4), ("num_attention_heads", 4), ("token_dim", 16)]
)
def test_a_kv_prefix_with_equal_width_but_another_layout_is_rejected(
    tmp_path: Path, field: str, value: int
) -> None:
    fields: dict[str, int | str] = {field: value, "base_model_name_or_path": "org/other"}
    config = config_bytes("PREFIX_TUNING", **fields)
    with pytest.raises(
        ArtifactRefused, match=r"base tiny .* another model, 'org/other'$"
    ) as refusal:
        inspect_peft(config, spool(tmp_path, kv()), base=BASE)
    assert (refusal.value.code, refusal.value.param) == ("base_mismatch", field)


def test_the_peft_type_decides_the_kind_when_both_widths_are_equal(tmp_path: Path) -> None:
    base = replace(BASE, embedding_width=KV_WIDTH, max_abs_embedding=0.5)
    path = spool(tmp_path, kv())
    assert inspect_peft(config_bytes("PREFIX_TUNING"), path, base=base).kind == "kv_prefix"
    with pytest.raises(ArtifactRefused, match=r"\|x\| <= 0.5"):
        inspect_peft(config_bytes("PROMPT_TUNING"), path, base=base)


@pytest.mark.parametrize(
    ("dtype", "value", "refused"),
    [
        ("float32", 65520.0, False),
        ("float16", 65519.0, False),
        ("float16", 65520.0, True),
        ("bfloat16", 3.3895e38, False),
        ("bfloat16", 3.4e38, True),
    ],
)
def test_values_are_validated_after_the_cast(
    tmp_path: Path, dtype: str, value: float, refused: bool
) -> None:
    base = replace(BASE, dtype=dtype, max_abs_embedding=3.4e38)
    path = spool(tmp_path, soft(poisoned(value)))
    if not refused:
        inspect_peft(config_bytes(), path, base=base)
        return
    with pytest.raises(ArtifactRefused, match=f"finite in {dtype}") as refusal:
        inspect_peft(config_bytes(), path, base=base)
    assert refusal.value.code == "out_of_range"


def test_kv_values_have_their_own_bound(tmp_path: Path) -> None:
    path = spool(tmp_path, kv(poisoned(101.0, (P, KV_WIDTH))))
    with pytest.raises(ArtifactRefused, match=r"\|x\| <= 100 .*about 1e\+02"):
        inspect_peft(config_bytes("CARTRIDGE"), path, base=BASE)


def test_a_rejected_value_is_shown_with_one_digit(tmp_path: Path) -> None:
    path = spool(tmp_path, soft(poisoned(1234567.0)))
    with pytest.raises(ArtifactRefused) as refusal:
        inspect_peft(config_bytes(), path, base=BASE)
    assert "1234567" not in refusal.value.message


@pytest.mark.parametrize(
    ("text", "code"),
    [("", "empty_text"), ("x" * 65, "too_many_virtual_tokens"), ("\ud800", "malformed_text")],
)
def test_malformed_texts_are_rejected(text: str, code: str) -> None:
    with pytest.raises(ArtifactRefused) as refusal:
        inspect_text(text, base=BASE, count_tokens=len)
    assert refusal.value.code == code


def test_a_large_text_never_reaches_the_tokenizer() -> None:
    def count(text: str) -> int:
        raise AssertionError(f"counted {len(text)} characters")

    with pytest.raises(ArtifactRefused) as refusal:
        inspect_text("x" * 2**21, base=BASE, count_tokens=count)
    assert refusal.value.code == "text_too_large"


def test_a_header_with_a_million_tensors_is_rejected_cheaply(tmp_path: Path) -> None:
    """A million empty tensors cost the safetensors library 11 s and 854 MB."""
    empty = '"t%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(empty % i for i in range(200_000)) + "}").encode()
    path = spool(tmp_path, with_header(header, b""))
    capped = ("{" + ",".join(empty % i for i in range(1_050)) + "}").encode()
    second = tmp_path / "capped"
    second.write_bytes(with_header(capped, b""))
    for bomb, code in ((path, "header_too_large"), (second, "unknown_tensor")):
        began = time.thread_time()  # of this thread, independent of other load
        with pytest.raises(ArtifactRefused) as refusal:
            inspect_peft(config_bytes(), bomb, base=BASE)
        seconds = time.thread_time() - began
        tracemalloc.start()  # which makes it several times slower
        with pytest.raises(ArtifactRefused):
            inspect_peft(config_bytes(), bomb, base=BASE)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert refusal.value.code == code
        assert peak < 5e6
        assert seconds < 0.5  # 10 ms


def test_validation_uses_bounded_memory(tmp_path: Path) -> None:
    base = replace(BASE, embedding_width=4096, max_virtual_tokens=4096)
    path = spool(tmp_path, soft(np.zeros((2048, 4096), dtype=np.float32)))  # 32 MB
    tracemalloc.start()
    inspect_peft(config_bytes(num_virtual_tokens=2048), path, base=base)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6


SEQ2SEQ = replace(BASE, encoder_layers=3)


def test_prefixes_of_encoder_decoders_have_other_sizes(tmp_path: Path) -> None:
    """Twice the rows of a soft prompt, of which the first half is used; the encoder's layers."""
    task = {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2, "num_layers": 3}
    both = spool(tmp_path, soft(ramp(2 * P, HIDDEN)))
    assert inspect_peft(config_bytes(**task), both, base=SEQ2SEQ).num_virtual_tokens == P
    values = ramp(P, 3 * 2 * 2 * 4)
    config = config_bytes("PREFIX_TUNING", **task)
    assert inspect_peft(config, spool(tmp_path, kv(values)), base=SEQ2SEQ).num_virtual_tokens == P


@pytest.mark.parametrize(
    ("peft_type", "changes", "code"),
    [
        ("PROMPT_TUNING", {"task_type": "CAUSAL_LM"}, "unsupported_task_type"),
        ("CPT", {"task_type": "SEQ_2_SEQ_LM"}, "unsupported_peft_type"),
        ("PREFIX_TUNING", {"num_transformer_submodules": 1}, "encoder_decoder"),
        ("PROMPT_TUNING", {"num_transformer_submodules": 3}, "encoder_decoder"),
    ],
)
def test_what_an_encoder_decoder_does_not_take_is_refused(
    tmp_path: Path, peft_type: str, changes: dict[str, object], code: str
) -> None:
    config = config_bytes(peft_type, **{"task_type": "SEQ_2_SEQ_LM"} | changes)
    with pytest.raises(ArtifactRefused) as refusal:
        inspect_peft(config, spool(tmp_path, soft()), base=SEQ2SEQ)
    assert refusal.value.code == code


def test_unused_rows_of_a_soft_prompt_are_validated(tmp_path: Path) -> None:
    values = ramp(2 * P, HIDDEN)
    values[-1, -1] = np.nan
    config = config_bytes(task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ArtifactRefused, match="NaN or infinity at"):
        inspect_peft(config, spool(tmp_path, soft(values)), base=SEQ2SEQ)


def test_a_kind_that_the_base_cannot_take_is_refused_with_the_reason(tmp_path: Path) -> None:
    base = replace(
        BASE, refused_kinds={Kind.KV_PREFIX: "expected no KV", Kind.HARD_PROMPT: "expected no text"}
    )
    inspect_peft(config_bytes(), spool(tmp_path, soft()), base=base)
    with pytest.raises(ArtifactRefused, match="kv_prefix on the base tiny: expected no KV") as one:
        inspect_peft(config_bytes("PREFIX_TUNING"), spool(tmp_path, kv()), base=base)
    with pytest.raises(ArtifactRefused, match="expected no text") as two:
        inspect_text("a", base=base, count_tokens=len)
    assert one.value.code == two.value.code == "unsupported_kind"
