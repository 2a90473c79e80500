// Vectors of float32 of the width of this instruction set, through the compiler's vector extensions.
//
// Included by each isa_<name>.cpp, which defines PFX_ISA (its namespace) and PFX_VECTOR_BYTES.
// Everything is in that namespace, and nothing of the C++ library is used here or in the kernels:
// an inline function of a shared name would exist once for all instruction sets in the linked library,
// compiled for any of them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pfx {
namespace PFX_ISA {

constexpr int kLanes = PFX_VECTOR_BYTES / 4;

typedef float Floats __attribute__((vector_size(PFX_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(PFX_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(PFX_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(PFX_VECTOR_BYTES / 2)));

static inline int smaller(int a, int b) { return a < b ? a : b; }
static inline int larger(int a, int b) { return a > b ? a : b; }

static inline Floats splat(float x) { return x - Floats{}; }
static inline Floats as_floats(Words x) { return (Floats)x; }
static inline Words as_words(Floats x) { return (Words)x; }

static inline Floats load(const float* p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

// kLanes bfloat16 as float32.
static inline Floats load(const bf16* p) {
    Halves v;
    memcpy(&v, p, sizeof v);
    return as_floats(__builtin_convertvector(v, Words) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN.
static inline void store(bf16* p, Floats v) {
#if defined(__AVX512BF16__)
    __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &half, sizeof half);
#else
    Words bits = as_words(v);
    Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    Words nan = (bits >> 16) | 0x40u;
    Halves half = __builtin_convertvector((v == v) ? rounded : nan, Halves);
    memcpy(p, &half, sizeof half);
#endif
}

// The first `count` lanes, 0 <= count <= kLanes; the rest are zero and their memory is not touched.
template <typename T>
static inline Floats load_first(const T* p, int count) {
    T lanes[kLanes] = {};
    memcpy(lanes, p, count * sizeof(T));
    return load(lanes);
}

template <typename T>
static inline void store_first(T* p, Floats v, int count) {
    T lanes[kLanes];
    store(lanes, v);
    memcpy(p, lanes, count * sizeof(T));
}

static inline float to_float(float x) { return x; }

static inline float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

// mask: comparison of two Floats. Lanes of b, also NaN, are dropped where mask is set.
static inline Floats select(Ints mask, Floats a, Floats b) { return mask ? a : b; }

// NaN in either operand is not kept reliably, as in the processor's own instructions.
static inline Floats larger(Floats a, Floats b) { return (a > b) ? a : b; }

// Always in the same order: halves are folded onto each other.
static inline float sum(Floats v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

static inline float largest_lane(Floats v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

// e to the power of x, within 2 units in the last place; NaN for NaN, infinity above 88.7, zero below
// -104. After Cephes' expf: x = n ln 2 + r, a polynomial of r, and 2^n in two factors, so that n may
// be 128 or the result subnormal.
static inline Floats exp(Floats x) {
    x = (x > 89.0f) ? splat(89.0f) : x;
    x = (x < -105.0f) ? splat(-105.0f) : x;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    Floats shifted = x * 1.44269504088896341f + kRound;
    Floats n = shifted - kRound;
    Floats r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Floats p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    Ints whole = (Ints)(as_words(shifted) - 0x4b400000u);
    Ints half = whole >> 1;
    Words low = (Words)(half + 127) << 23;
    Words high = (Words)(whole - half + 127) << 23;
    return p * as_floats(low) * as_floats(high);
}

// 2 to the power of x <= 0, within 2 units in the last place; NaN for NaN, at most 2^-126 below -126.
static inline Floats exp2_of_negative(Floats x) {
#if defined(__AVX512F__)
    // Zeroing forms of the intrinsics: GCC 12 warns of an uninitialized value inside the plain ones.
    Floats n = (Floats)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, 0);
#else
    constexpr float kRound = 12582912.0f;
    x = (x < -126.0f) ? splat(-126.0f) : x;
    Floats shifted = x + kRound, n = shifted - kRound;
#endif
    Floats f = x - n, p = splat(1.535336188319500e-4f);
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
    return p * as_floats((as_words(shifted) - 0x4b400000u + 127u) << 23);
#endif
}

// x * sigmoid(x)
static inline Floats silu(Floats x) { return x / (1.0f + exp(-x)); }

}  // namespace PFX_ISA
}  // namespace pfx
