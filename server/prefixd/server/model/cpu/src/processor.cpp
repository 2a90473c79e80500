#include "processor.h"

#include <sys/syscall.h>
#include <unistd.h>

#include "prefixd_cpu.h"

namespace pfx {

#if defined(__x86_64__)
static bool has_vnni() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vnni");
}
#endif

// Tables of the instruction sets in this build (isa_<name>.cpp).
namespace portable {
extern const Kernels float32_kernels, bfloat16_kernels;
}
#ifdef PFX_HAS_AVX2
namespace avx2 {
extern const Kernels float32_kernels, bfloat16_kernels;
}
#endif
#ifdef PFX_HAS_AVX512
namespace avx512 {
extern const Kernels float32_kernels, bfloat16_kernels, float32_vnni_kernels, bfloat16_vnni_kernels;
}
#endif
#ifdef PFX_HAS_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels bfloat16_kernels;
}
#endif
#ifdef PFX_HAS_AMX
namespace amx {
extern const Kernels bfloat16_kernels;
}
#endif

#if defined(PFX_HAS_AVX512)
// AVX512-VNNI came later than the rest of the set, and is for int8 alone.
static const Kernels* avx512_kernels(bool wide) {
    static const bool vnni = has_vnni();
    if (vnni) return wide ? &avx512::float32_vnni_kernels : &avx512::bfloat16_vnni_kernels;
    return wide ? &avx512::float32_kernels : &avx512::bfloat16_kernels;
}
#endif

// Of float32 for the sets that add bfloat16 only.
[[maybe_unused]] static const Kernels* wide_kernels() {
#ifdef PFX_HAS_AVX512
    return avx512_kernels(true);
#else
    return &portable::float32_kernels;
#endif
}

const Kernels* kernels_for(int dtype, int isa) {
    const bool wide = dtype == PFX_F32;
    switch (isa) {
        case PFX_PORTABLE: return wide ? &portable::float32_kernels : &portable::bfloat16_kernels;
#ifdef PFX_HAS_AVX2
        case PFX_AVX2: return wide ? &avx2::float32_kernels : &avx2::bfloat16_kernels;
#endif
#ifdef PFX_HAS_AVX512
        case PFX_AVX512: return avx512_kernels(wide);
#endif
#ifdef PFX_HAS_AVX512_BF16
        case PFX_AVX512_BF16: return wide ? wide_kernels() : &avx512_bf16::bfloat16_kernels;
#endif
#ifdef PFX_HAS_AMX
        case PFX_AMX: return wide ? wide_kernels() : &amx::bfloat16_kernels;
#endif
        default: return nullptr;
    }
}

#if defined(__x86_64__)
// The system gives a process the tiles when it asks. Emulated ones are there in any case (tiles.h).
static bool have_tiles() {
#if defined(PFX_EMULATED_TILES)
    return true;
#else
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("amx-int8") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}

// __builtin_cpu_supports checks the system's support of the registers (XCR0) as well. The kernels of
// AVX512-BF16 multiply int8 by AVX512-VNNI, those of AMX by AMX-INT8: every processor with the first has
// the second, but a virtual machine may hide it.
static uint32_t processor_isas() {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && has_vnni();
    const bool amx = avx512_bf16 && have_tiles();
    return 1u << PFX_PORTABLE | avx2 << PFX_AVX2 | avx512 << PFX_AVX512 | avx512_bf16 << PFX_AVX512_BF16 |
           amx << PFX_AMX;
}
#else
static uint32_t processor_isas() { return 1u << PFX_PORTABLE; }
#endif

uint32_t available_isas() {
    static const uint32_t isas = [] {
        uint32_t built = 0;
        for (int isa = PFX_PORTABLE; isa <= PFX_AMX; isa++)
            if (kernels_for(PFX_BF16, isa)) built |= 1u << isa;
        return built & processor_isas();
    }();
    return isas;
}

}  // namespace pfx
