#define PFX_ISA avx512_bf16
#define PFX_VECTOR_BYTES 64
#include "kernels.inc"

namespace pfx {
namespace avx512_bf16 {

extern const Kernels bfloat16_kernels = table<bf16, bf16>();

}  // namespace avx512_bf16
}  // namespace pfx
