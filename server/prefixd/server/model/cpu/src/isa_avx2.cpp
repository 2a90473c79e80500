#define PFX_ISA avx2
#define PFX_VECTOR_BYTES 32
#include "kernels.inc"

namespace pfx {
namespace avx2 {

extern const Kernels float32_kernels = table<float, float>();
extern const Kernels bfloat16_kernels = table<bf16, float>();

}  // namespace avx2
}  // namespace pfx
