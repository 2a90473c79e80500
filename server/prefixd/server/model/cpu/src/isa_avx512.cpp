#define PFX_ISA avx512
#define PFX_VECTOR_BYTES 64
#include "kernels.inc"

namespace pfx {
namespace avx512 {

static constexpr Kernels with_vnni(Kernels kernels) {
    kernels.int8 = int8_kernels<Int8Vnni, float>();
    return kernels;
}

extern const Kernels float32_kernels = table<float, float>();
extern const Kernels bfloat16_kernels = table<bf16, float>();
extern const Kernels float32_vnni_kernels = with_vnni(table<float, float>());
extern const Kernels bfloat16_vnni_kernels = with_vnni(table<bf16, float>());

}  // namespace avx512
}  // namespace pfx
