// What the processor and the build have.
#pragma once
#include "kernels.h"

namespace pfx {

// Bit i: the build and the processor have pfx_isa i. Asks the system for the use of AMX tiles, once.
uint32_t available_isas();

}  // namespace pfx
