// The tile registers of AMX: eight, each of up to 16 rows of 64 bytes.
//
// With PFX_EMULATED_TILES, which only tests set, the same functions work on arrays and abort where the
// processor would raise an exception, so that kernels over tiles run everywhere. Products of bfloat16
// are summed as the manual of the instruction says: inputs of even and odd places each by themselves,
// then both added to the tile. Those of int8 are integers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace pfx {
namespace PFX_ISA {

struct __attribute__((packed)) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int count, int bytes) {
        rows[tile] = count;
        row_bytes[tile] = bytes;
    }
};

#if defined(PFX_EMULATED_TILES)

struct TileRegisters {
    TileShapes shapes;
    alignas(64) uint8_t data[8][16][64];
};

static inline TileRegisters& tile_registers() {
    static thread_local TileRegisters registers;
    return registers;
}

static inline void tile_check(bool holds) {
    if (!holds) abort();
}

static inline void tile_configure(const TileShapes& shapes) {
    for (int i = 0; i < 16; i++) tile_check(shapes.rows[i] <= (i < 8 ? 16 : 0) && shapes.row_bytes[i] <= (i < 8 ? 64 : 0));
    tile_registers().shapes = shapes;
    memset(tile_registers().data, 0, sizeof tile_registers().data);
}

static inline void tile_release() { tile_registers().shapes = TileShapes(); }

static inline const TileShapes& tile_shapes(int tile) {
    const TileShapes& shapes = tile_registers().shapes;
    tile_check(shapes.rows[tile] > 0 && shapes.row_bytes[tile] > 0);
    return shapes;
}

template <int tile>
static inline void tile_zero() {
    tile_shapes(tile);
    memset(tile_registers().data[tile], 0, sizeof tile_registers().data[tile]);
}

template <int tile>
static inline void tile_load(const void* from, size_t stride) {
    const TileShapes& shapes = tile_shapes(tile);
    tile_zero<tile>();
    for (int row = 0; row < shapes.rows[tile]; row++)
        memcpy(tile_registers().data[tile][row], (const char*)from + row * stride, shapes.row_bytes[tile]);
}

template <int tile>
static inline void tile_store(void* to, size_t stride) {
    const TileShapes& shapes = tile_shapes(tile);
    for (int row = 0; row < shapes.rows[tile]; row++)
        memcpy((char*)to + row * stride, tile_registers().data[tile][row], shapes.row_bytes[tile]);
}

static inline float tile_bf16(const uint8_t* row, int index) {
    uint32_t bits = (uint32_t)(row[2 * index] | row[2 * index + 1] << 8) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <int sums, int a, int b>
static inline void tile_check_dot() {
    const TileShapes& shapes = tile_shapes(sums);
    tile_check(tile_shapes(a).rows[a] == shapes.rows[sums] && shapes.row_bytes[a] % 4 == 0);
    tile_check(tile_shapes(b).row_bytes[b] == shapes.row_bytes[sums] && shapes.row_bytes[b] % 4 == 0);
    tile_check(shapes.row_bytes[a] / 4 == shapes.rows[b]);
}

template <int sums, int a, int b>
static inline void tile_dot() {
    tile_check_dot<sums, a, b>();
    const TileShapes& shapes = tile_shapes(sums);
    auto& data = tile_registers().data;
    for (int m = 0; m < shapes.rows[sums]; m++)
        for (int n = 0; n < shapes.row_bytes[sums] / 4; n++) {
            float even = 0, odd = 0, sum;
            for (int k = 0; k < shapes.rows[b]; k++) {
                even = __builtin_fmaf(tile_bf16(data[a][m], 2 * k), tile_bf16(data[b][k], 2 * n), even);
                odd = __builtin_fmaf(tile_bf16(data[a][m], 2 * k + 1), tile_bf16(data[b][k], 2 * n + 1), odd);
            }
            memcpy(&sum, &data[sums][m][4 * n], sizeof sum);
            sum += even + odd;
            memcpy(&data[sums][m][4 * n], &sum, sizeof sum);
        }
}

template <int sums, int a, int b>
static inline void tile_dot_int8() {
    tile_check_dot<sums, a, b>();
    const TileShapes& shapes = tile_shapes(sums);
    auto& data = tile_registers().data;
    for (int m = 0; m < shapes.rows[sums]; m++)
        for (int n = 0; n < shapes.row_bytes[sums] / 4; n++) {
            int32_t sum;
            memcpy(&sum, &data[sums][m][4 * n], sizeof sum);
            for (int k = 0; k < 4 * shapes.rows[b]; k++)
                sum += (int8_t)data[a][m][k] * (int8_t)data[b][k / 4][4 * n + k % 4];
            memcpy(&data[sums][m][4 * n], &sum, sizeof sum);
        }
}

#else

static inline void tile_configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }

static inline void tile_release() { asm volatile("tilerelease"); }

template <int tile>
static inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

template <int tile>
static inline void tile_load(const void* from, size_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
static inline void tile_store(void* to, size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}

template <int sums, int a, int b>
static inline void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
}

template <int sums, int a, int b>
static inline void tile_dot_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
}

#endif

}  // namespace PFX_ISA
}  // namespace pfx
