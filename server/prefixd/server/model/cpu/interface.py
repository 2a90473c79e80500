"""The native library's C interface in ctypes: the structures and functions of prefixd_cpu.h.

Field and argument names, their meaning and units are those of the header.
"""

import ctypes
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_uint32, c_void_p

ABI = 4
F32, BF16 = 0, 1
"""Values of ``pfx_shape.dtype``."""

KERNELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
"""The kernel sets by their number in enum pfx_isa, the later the faster."""


class Shape(ctypes.Structure):
    """``pfx_shape``: the sizes of a decoder."""

    _fields_ = [
        ("dtype", c_int32),
        ("num_layers", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("width", c_int32),
        ("vocab", c_int32),
        ("embeddings", c_int32),
        ("rotary_dim", c_int32),
        ("max_positions", c_int32),
        ("block_size", c_int32),
        ("norm_eps", c_float),
        ("attention_scale", c_float),
    ]


class Linear(ctypes.Structure):
    """``pfx_linear``: a weight [out, in], its bias or null, and the scales of int8 or null."""

    _fields_ = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("scales", c_void_p),
    ]


class Layer(ctypes.Structure):
    """``pfx_layer``: the weights of one layer."""

    _fields_ = [
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("q", Linear),
        ("k", Linear),
        ("v", Linear),
        ("o", Linear),
        ("gate", Linear),
        ("up", Linear),
        ("down", Linear),
        ("inner", c_int32),
        ("experts", c_int32),
        ("experts_per_token", c_int32),
        ("expert_inner", c_int32),
        ("normalize_weights", c_int32),
        ("router", c_void_p),
        ("expert_gate_up", c_void_p),
        ("expert_down", c_void_p),
        ("expert_gate_up_scales", c_void_p),
        ("expert_down_scales", c_void_p),
        ("shared_gate", c_void_p),
    ]


class Step(ctypes.Structure):
    """``pfx_step``: one forward pass over a ragged batch."""

    _fields_ = [
        ("num_tokens", c_int32),
        ("token_ids", c_void_p),
        ("inputs", c_void_p),
        ("num_rows", c_int32),
        ("offsets", c_void_p),
        ("lengths", c_void_p),
        ("starts", c_void_p),
        ("tables", c_void_p),
        ("table_width", c_int32),
        ("num_outputs", c_int32),
        ("outputs", c_void_p),
        ("logits", c_void_p),
        ("best", c_void_p),
        ("best_value", c_void_p),
        ("candidates", c_int32),
        ("gated_counts", c_void_p),
        ("gated_layers", c_void_p),
        ("gated_tables", c_void_p),
        ("gated_width", c_int32),
    ]


class Counters(ctypes.Structure):
    """``pfx_counters``: counts and times since the decoder was made."""

    _fields_ = [
        ("steps", c_int64),
        ("step_ns", c_int64),
        ("wait_ns", c_int64),
        ("late_steps", c_int64),
        ("threads", c_int64),
        ("thread_changes", c_int64),
    ]


_DECODER = c_void_p
_POINTER = ctypes.POINTER

FUNCTIONS = {
    "pfx_abi": (c_int32, ()),
    "pfx_error": (c_char_p, ()),
    "pfx_available": (c_uint32, ()),
    "pfx_isa_name": (c_char_p, (c_int32,)),
    "pfx_new": (_DECODER, (_POINTER(Shape), c_int32)),
    "pfx_free": (None, (_DECODER,)),
    "pfx_set_rotary": (c_int, (_DECODER, c_void_p, c_void_p)),
    "pfx_set_layer": (c_int, (_DECODER, c_int32, _POINTER(Layer))),
    "pfx_set_ends": (c_int, (_DECODER, c_void_p, _POINTER(Linear), c_void_p)),
    "pfx_set_threads": (c_int, (_DECODER, c_int32, c_int32)),
    "pfx_run": (c_int, (_DECODER, _POINTER(Step))),
    "pfx_project": (c_int, (_DECODER, c_int32, c_void_p, c_int32, c_void_p, c_void_p)),
    "pfx_read_counters": (None, (_DECODER, _POINTER(Counters))),
    "pfx_num_bytes": (c_int64, (_DECODER,)),
    "pfx_set_pool": (c_int, (_DECODER, c_int32)),
    "pfx_zero_blocks": (c_int, (_DECODER, c_void_p, c_int32)),
    "pfx_copy_blocks": (c_int, (_DECODER, c_void_p, c_void_p, c_int32)),
    "pfx_write_kv": (c_int, (_DECODER, c_void_p, c_int32, c_int32, c_void_p)),
    "pfx_read_kv": (c_int, (_DECODER, c_void_p, c_int32, c_int32, c_void_p)),
    "pfx_read_embeddings": (c_int, (_DECODER, c_void_p, c_int32, c_void_p)),
}
"""Result and arguments of each function. Arrays are addresses (``c_void_p``)."""


def declare(library: ctypes.CDLL) -> None:
    """Set the result and argument types of every function. Raises AttributeError for one that the
    library lacks."""
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
