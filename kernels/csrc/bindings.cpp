#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

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
#endif
#ifdef DFAD_AMX_LEVEL
#define DFAD_ISA x86_64_amx
#include "kernels.hpp"
#undef DFAD_ISA
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nb = nanobind;
using dfad::Address;
using dfad::Array;
using dfad::Indices;

namespace nanobind::detail {

// they accept None: what a caller does not need, or leaves to the default
template <>
struct has_arg_defaults<Array> : std::true_type {};
template <>
struct has_arg_defaults<Address> : std::true_type {};
template <>
struct has_arg_defaults<Indices> : std::true_type {};

// Tensors are taken as they are, never converted: a gradient written into a converted copy would be lost.
template <>
struct type_caster<Array> {
    NB_TYPE_CASTER(Array, const_name("torch.Tensor"))

    bool from_python(handle source, uint8_t, cleanup_list* cleanup) noexcept {
        if (source.is_none()) return true;
        if (!tensor_.from_python(source, 0, cleanup)) return false;
        const auto& t = tensor_.value;
        if (t.ndim() > 3) return false;
        if (t.dtype() == nb::dtype<float>()) value.dtype = dfad::Dtype::float32;
        else if (t.dtype() == nb::dtype<double>()) value.dtype = dfad::Dtype::float64;
        else if (t.dtype().bits == 16 &&
                 t.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat))
            value.dtype = dfad::Dtype::bfloat16;
        else if (t.dtype().bits == 16 &&
                 t.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float))
            value.dtype = dfad::Dtype::float16;
        else return false;
        value.data = t.data();
        value.dimensions = static_cast<int>(t.ndim());
        for (int i = 0; i < value.dimensions; ++i) {
            value.shape[i] = static_cast<int64_t>(t.shape(i));
            value.stride[i] = t.stride(i);
        }
        return true;
    }

private:
    make_caster<nb::ndarray<nb::device::cpu>> tensor_;
};

template <>
struct type_caster<Indices> {
    NB_TYPE_CASTER(Indices, const_name("torch.Tensor"))

    bool from_python(handle source, uint8_t, cleanup_list* cleanup) noexcept {
        if (source.is_none()) return true;
        if (!tensor_.from_python(source, 0, cleanup)) return false;
        value = {tensor_.value.data(), static_cast<int64_t>(tensor_.value.size())};
        return true;
    }

private:
    make_caster<nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>> tensor_;
};

template <>
struct type_caster<Address> {
    NB_TYPE_CASTER(Address, const_name("int"))

    bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
        if (source.is_none()) return true;
        if (!PyLong_Check(source.ptr())) return false;
        value.data = PyLong_AsVoidPtr(source.ptr());
        return true;
    }
};

}  // namespace nanobind::detail

namespace {

template <class Function>
void bind(nb::module_& module, const char* name, Function function) {
    module.def(name, function, nb::call_guard<nb::gil_scoped_release>());
}

#ifdef DFAD_AMX_LEVEL
// Linux saves a thread's tiles only where a process has asked for them; the numbers are those of its asm/prctl.h.
bool has_tiles() {
    constexpr int request_permission = 0x1023, tile_data = 18;
    return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

}  // namespace

#define BIND_OPERATORS(module, isa)                                                                  \
    bind(module, "activation_boundary_loss_forward", dfad::isa::activation_boundary_loss_forward);   \
    bind(module, "activation_boundary_loss_backward", dfad::isa::activation_boundary_loss_backward); \
    bind(module, "interpolated_kl_div_forward", dfad::isa::interpolated_kl_div_forward);             \
    bind(module, "interpolated_kl_div_backward", dfad::isa::interpolated_kl_div_backward);           \
    bind(module, "batch_norm_forward", dfad::isa::batch_norm_forward);                               \
    bind(module, "batch_norm_backward", dfad::isa::batch_norm_backward);                             \
    bind(module, "frozen_convolution_forward", dfad::isa::frozen_convolution_forward);               \
    bind(module, "frozen_convolution_backward", dfad::isa::frozen_convolution_backward);             \
    bind(module, "convolution_batch_norm_forward", dfad::isa::convolution_batch_norm_forward);       \
    bind(module, "convolution_batch_norm_backward", dfad::isa::convolution_batch_norm_backward);     \
    bind(module, "subsampling_forward", dfad::isa::subsampling_forward);                             \
    bind(module, "subsampling_backward", dfad::isa::subsampling_backward);

NB_MODULE(_cpu, module) {
    module.doc() =
        "The C++ kernels: a submodule for each instruction set that this processor runs; `isa` lists them, "
        "best last.";
    std::vector<std::string> isa{"baseline"};
    auto baseline = module.def_submodule("baseline");
    BIND_OPERATORS(baseline, baseline)
#ifdef DFAD_X86_LEVELS
    if (__builtin_cpu_supports("x86-64-v3")) {
        isa.emplace_back("x86_64_v3");
        auto level = module.def_submodule("x86_64_v3");
        BIND_OPERATORS(level, x86_64_v3)
    }
    if (__builtin_cpu_supports("x86-64-v4")) {
        isa.emplace_back("x86_64_v4");
        auto level = module.def_submodule("x86_64_v4");
        BIND_OPERATORS(level, x86_64_v4)
    }
#endif
#ifdef DFAD_AMX_LEVEL
    if (has_tiles()) {
        isa.emplace_back("x86_64_amx");
        auto level = module.def_submodule("x86_64_amx");
        BIND_OPERATORS(level, x86_64_amx)
    }
#endif
    module.attr("isa") = isa;
}
