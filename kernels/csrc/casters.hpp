// How tensors and addresses come from Python.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "array.hpp"

namespace nb = nanobind;
using dfad::Address;
using dfad::Array;
using dfad::Indices;

namespace nanobind::detail {

// they accept None, for what a caller does not need or leaves at its default
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
    static handle from_cpp(Address address, rv_policy, cleanup_list*) noexcept {
        return PyLong_FromVoidPtr(address.data);
    }
};

}  // namespace nanobind::detail
