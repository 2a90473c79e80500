#define PFX_ISA portable
#define PFX_VECTOR_BYTES 16
#include "kernels.inc"

namespace pfx {
namespace portable {

extern const Kernels float32_kernels = table<float, float>();
extern const Kernels bfloat16_kernels = table<bf16, float>();

}  // namespace portable
}  // namespace pfx
