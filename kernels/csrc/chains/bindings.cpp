#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "casters.hpp"

#define DFAD_ISA baseline
#include "chains/chains.hpp"
#undef DFAD_ISA
#ifdef DFAD_AMX
#define DFAD_ISA x86_64_amx
#include "chains/chains.hpp"
#undef DFAD_ISA
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef DFAD_AMX
// Linux saves a thread's tiles only where a process has asked for them; the numbers are those of its asm/prctl.h.
bool has_tiles() {
    constexpr int request_permission = 0x1023, tile_data = 18;
    return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

}  // namespace

#define BIND(isa, name) isa##_module.def(#name, dfad::isa::name, nb::call_guard<nb::gil_scoped_release>());
#define BIND_LINKS(isa)                             \
    auto isa##_module = module.def_submodule(#isa); \
    isa_names.emplace_back(#isa);                   \
    BIND(isa, frozen_convolution_forward)           \
    BIND(isa, frozen_convolution_backward)          \
    BIND(isa, convolution_batch_norm_forward)       \
    BIND(isa, convolution_batch_norm_backward)

NB_MODULE(_chains, module) {
    module.doc() =
        "The C++ kernels of chains: a submodule for each instruction set that this processor runs; `isa` lists them, "
        "best last. `Link` and `LinkGradients` name what they work on: tensors by their addresses.";
    using dfad::Link;
    using dfad::LinkGradients;
    nb::class_<Link>(module, "Link")
        .def(nb::init<>())
        .def_rw("x", &Link::x)
        .def_rw("kernel", &Link::kernel)
        .def_rw("weight", &Link::weight)
        .def_rw("bias", &Link::bias)
        .def_rw("residual", &Link::residual)
        .def_rw("pre", &Link::pre)
        .def_rw("post", &Link::post)
        .def_rw("y", &Link::y)
        .def_rw("statistics", &Link::statistics)
        .def_rw("running_mean", &Link::running_mean)
        .def_rw("running_variance", &Link::running_variance)
        .def_rw("source_statistics", &Link::source_statistics)
        .def_rw("source_weight", &Link::source_weight)
        .def_rw("source_bias", &Link::source_bias)
        .def_rw("images", &Link::images)
        .def_rw("height", &Link::height)
        .def_rw("width", &Link::width)
        .def_rw("in_channels", &Link::in)
        .def_rw("out_channels", &Link::out)
        .def_rw("stride", &Link::stride)
        .def_rw("negative_slope", &Link::negative_slope)
        .def_rw("epsilon", &Link::epsilon)
        .def_rw("momentum", &Link::momentum)
        .def_rw("source_slope", &Link::source_slope)
        .def_rw("source_epsilon", &Link::source_epsilon);
    nb::class_<LinkGradients>(module, "LinkGradients")
        .def(nb::init<>())
        .def_rw("pre", &LinkGradients::pre)
        .def_rw("post", &LinkGradients::post)
        .def_rw("second_post", &LinkGradients::second_post)
        .def_rw("total_pre", &LinkGradients::total_pre)
        .def_rw("x", &LinkGradients::x)
        .def_rw("kernel", &LinkGradients::kernel)
        .def_rw("weight", &LinkGradients::weight)
        .def_rw("bias", &LinkGradients::bias)
        .def_rw("source_weight", &LinkGradients::source_weight)
        .def_rw("source_bias", &LinkGradients::source_bias)
        .def_rw("summed", &LinkGradients::summed);
    std::vector<std::string> isa_names;
    BIND_LINKS(baseline)
#ifdef DFAD_AMX
    if (has_tiles()) {
        BIND_LINKS(x86_64_amx)
    }
#endif
    module.attr("isa") = isa_names;
}
