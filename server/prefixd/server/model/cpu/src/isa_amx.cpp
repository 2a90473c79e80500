#define PFX_ISA amx
#define PFX_VECTOR_BYTES 64
#include "attention_tiles.inc"
#include "kernels.inc"
#include "multiply_tiles.inc"

namespace pfx {
namespace amx {

static constexpr Kernels with_tiles() {
    Kernels k = table<bf16, bf16>();
    k.multiply = multiply_by_tiles<Dot<bf16, bf16>>;
    k.int8 = {sizeof(int8_t), pack_int8<Int8Tiles>, round_rows<Int8Tiles, bf16>, multiply_by_tiles<Int8Tiles>};
    k.attend = attend_by_tiles;
    return k;
}

extern const Kernels bfloat16_kernels = with_tiles();

}  // namespace amx
}  // namespace pfx
