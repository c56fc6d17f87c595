#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "casters.hpp"

#define DFAD_ISA baseline
#include "kernels.hpp"
#undef DFAD_ISA
#ifdef DFAD_X86_LEVELS
#define DFAD_ISA x86_64_v3
#include "kernels.hpp"
#undef DFAD_ISA
#define DFAD_ISA x86_64_v4
#include "kernels.hpp"
#undef DFAD_ISA
#define DFAD_ISA x86_64_v4_bf16
#include "kernels.hpp"
#undef DFAD_ISA
#endif

namespace {

template <class Function>
void bind(nb::module_& module, const char* name, Function function) {
    module.def(name, function, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace

#define BIND_BOTH(module, isa, name)                         \
    bind(module, #name "_forward", dfad::isa::name##_forward); \
    bind(module, #name "_backward", dfad::isa::name##_backward);

#define BIND_OPERATORS(isa)                               \
    auto isa##_module = module.def_submodule(#isa);       \
    isa_names.emplace_back(#isa);                         \
    BIND_BOTH(isa##_module, isa, activation_boundary_loss) \
    BIND_BOTH(isa##_module, isa, interpolated_kl_div)     \
    BIND_BOTH(isa##_module, isa, normalized_squared_error) \
    BIND_BOTH(isa##_module, isa, batch_norm)              \
    BIND_BOTH(isa##_module, isa, frozen_batch_norm)       \
    BIND_BOTH(isa##_module, isa, batchnorm_distance)      \
    BIND_BOTH(isa##_module, isa, subsampling)

NB_MODULE(_cpu, module) {
    module.doc() =
        "The C++ kernels: a submodule for each instruction set that this processor runs; `isa` lists them, best last.";
    std::vector<std::string> isa_names;
    BIND_OPERATORS(baseline)
#ifdef DFAD_X86_LEVELS
    if (__builtin_cpu_supports("x86-64-v3")) {
        BIND_OPERATORS(x86_64_v3)
    }
    if (__builtin_cpu_supports("x86-64-v4")) {
        BIND_OPERATORS(x86_64_v4)
        if (__builtin_cpu_supports("avx512bf16")) {
            BIND_OPERATORS(x86_64_v4_bf16)
        }
    }
#endif
    module.attr("isa") = isa_names;
}
