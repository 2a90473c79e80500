#define PFX_ISA avx512
#define PFX_VECTOR_BYTES 64
#include "kernels.inc"

namespace pfx {
namespace avx512 {

extern const Kernels float32_kernels = table<float, float>();
extern const Kernels bfloat16_kernels = table<bf16, float>();

}  // namespace avx512
}  // namespace pfx
