// Vectors of one register of the instruction set that the including file is compiled for, and what is
// computed with them. Wider ones would be lowered to several registers, but GCC 12 takes their comparisons
// apart into scalars.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "array.hpp"

namespace dfad::DFAD_ISA {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif

template <class T, int bytes = register_bytes>
struct vector_of {
    typedef T type __attribute__((vector_size(bytes)));
};

using floats = vector_of<float>::type;
using doubles = vector_of<double>::type;
using ints = vector_of<int32_t>::type;
using longs = vector_of<int64_t>::type;
using words = vector_of<uint32_t>::type;
using halfwords = vector_of<uint16_t, register_bytes / 2>::type;

// What a storage type is computed in.
template <class Storage>
struct compute {
    using scalar = float;
    using vector = floats;
    using mask = ints;
};
template <>
struct compute<double> {
    using scalar = double;
    using vector = doubles;
    using mask = longs;
};

template <class Storage>
using scalar_t = typename compute<Storage>::scalar;
template <class Storage>
using vector_t = typename compute<Storage>::vector;
template <class V>
constexpr int lanes = sizeof(V) / sizeof(V{}[0]);

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class V>
inline V broadcast(double value) {
    return V{} + static_cast<decltype(V{}[0] + 0)>(value);
}

inline floats load(const float* p) {
    floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline doubles load(const double* p) {
    doubles v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline words load_halfwords(const void* p) {
    halfwords h;
    std::memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, words);
}

inline floats load(const bfloat16* p) { return bit_cast<floats>(load_halfwords(p) << 16); }

inline floats load(const float16* p) {
    const words h = load_halfwords(p);
    const words magnitude = (h & 0x7fff) << 13;
    const words rebiased = magnitude + (112u << 23);
    const floats subnormal = bit_cast<floats>(magnitude + (113u << 23)) - 0x1p-14f;
    words bits = magnitude < (0x0400u << 13) ? bit_cast<words>(subnormal) : rebiased;
    bits = magnitude >= (0x7c00u << 13) ? rebiased + (112u << 23) : bits;
    return bit_cast<floats>(bits | (h & 0x8000) << 16);
}

inline void store(float* p, floats v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, doubles v) { std::memcpy(p, &v, sizeof v); }

inline void store_halfwords(void* p, words w) {
    const halfwords h = __builtin_convertvector(w, halfwords);
    std::memcpy(p, &h, sizeof h);
}

// Both roundings are to nearest, ties to even.
inline void store(bfloat16* p, floats v) {
    const words bits = bit_cast<words>(v);
    const words rounded = bits + 0x7fff + (bits >> 16 & 1);
    store_halfwords(p, (v == v ? rounded : bits | 0x400000) >> 16);
}

inline void store(float16* p, floats v) {
    const words bits = bit_cast<words>(v);
    const words magnitude = bits & 0x7fffffff;
    const words normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // one unit in the last place of [0.5, 1) is float16's smallest subnormal: the addition rounds
    const words subnormal = bit_cast<words>(bit_cast<floats>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
    words h = magnitude < (113u << 23) ? subnormal : normal;
    h = magnitude >= 0x477ff000 ? words{} + 0x7c00 : h;
    h = magnitude > 0x7f800000 ? words{} + 0x7e00 : h;
    store_halfwords(p, h | (bits >> 16 & 0x8000));
}

template <class V>
inline V lane_numbers() {
    V v;
    for (int i = 0; i < lanes<V>; ++i) v[i] = i;
    return v;
}

// The first `count` elements from p on; the lanes after them hold `fill`.
template <class Storage>
inline vector_t<Storage> load(const Storage* p, int64_t count, scalar_t<Storage> fill) {
    using V = vector_t<Storage>;
    if (count >= lanes<V>) return load(p);
    Storage buffer[lanes<V>] = {};
    std::memcpy(buffer, p, count * sizeof(Storage));
    const V v = load(buffer);
    return lane_numbers<V>() < static_cast<scalar_t<Storage>>(count) ? v : broadcast<V>(fill);
}

template <class Storage>
inline void store(Storage* p, vector_t<Storage> v, int64_t count) {
    if (count >= lanes<vector_t<Storage>>) return store(p, v);
    Storage buffer[lanes<vector_t<Storage>>];
    store(buffer, v);
    std::memcpy(p, buffer, count * sizeof(Storage));
}

#if defined(__AVX__) && !defined(__AVX512F__)
// Of float32 without a detour through memory: rows of few classes consist of little else.
inline __m256i first_lanes(int64_t count) {
    return bit_cast<__m256i>(lane_numbers<ints>() < static_cast<int32_t>(count < 8 ? count : 8));
}

inline floats load(const float* p, int64_t count, float fill) {
    const __m256i mask = first_lanes(count);
    const floats v = bit_cast<floats>(_mm256_maskload_ps(p, mask));
    return bit_cast<ints>(mask) ? v : broadcast<floats>(fill);
}

inline void store(float* p, floats v, int64_t count) {
    _mm256_maskstore_ps(p, first_lanes(count), bit_cast<__m256>(v));
}
#endif

template <class V>
inline V select(decltype(V{} == V{}) condition, V yes, V no) {
    return condition ? yes : no;
}

// A NaN in `b` is dropped.
template <class V>
inline V max(V a, V b) {
    return b > a ? b : a;
}

template <class V>
inline auto sum_of_lanes(V v) {
    double total = 0;
    for (int i = 0; i < lanes<V>; ++i) total += v[i];
    return total;
}

template <class V>
inline auto max_of_lanes(V v) {
    auto largest = v[0];
    for (int i = 1; i < lanes<V>; ++i) largest = v[i] > largest ? v[i] : largest;
    return largest;
}

// e^x for x ≤ 88. x = n ln 2 + r, |r| ≤ ln 2 / 2; e^r by a minimax polynomial of relative error 3e-9. What
// underflows float32's normal numbers is 0; NaN stays NaN.
inline floats exp(floats x) {
    const floats shifted = x * 1.44269504f + 0x1.8p23f;  // rounds to an integer, left in the low bits
    const floats n = shifted - 0x1.8p23f;
    const floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    floats p = 0.00138145985f * r + 0.00836871689f;
    p = p * r + 0.041668388f;
    p = p * r + 0.166665206f;
    p = p * r + 0.499999934f;
    p = p * (r * r) + r + 1.0f;
    const words scale = (bit_cast<words>(shifted) + 127) << 23;
    return x < -87.3365448f ? floats{} : p * bit_cast<floats>(scale);
}

// ln x for normal x > 0. x = 2^n (1 + f), √½ ≤ 1 + f < √2; ln(1 + f) by a minimax polynomial of relative
// error 6e-9. NaN stays NaN; zero and subnormal numbers give a finite number below -87.
inline floats log(floats x) {
    const words bits = bit_cast<words>(x) - bit_cast<uint32_t>(0.707106781f);
    const floats n = __builtin_convertvector(bit_cast<ints>(bits) >> 23, floats);
    const floats f = bit_cast<floats>((bits & 0x7fffff) + bit_cast<uint32_t>(0.707106781f)) - 1.0f;
    floats p = -0.0763449653f * f + 0.12761577f;
    p = p * f - 0.131601824f;
    p = p * f + 0.14201758f;
    p = p * f - 0.166233573f;
    p = p * f + 0.200012269f;
    p = p * f - 0.25000821f;
    p = p * f + 0.333333317f;
    const floats f2 = f * f;
    const floats y = n * 0.693145752f + (f + (n * 1.42860677e-6f + (p * (f2 * f) - 0.5f * f2)));
    return x == x ? y : x;
}

inline doubles exp(doubles x) {
    for (int i = 0; i < lanes<doubles>; ++i) x[i] = std::exp(x[i]);
    return x;
}

inline doubles log(doubles x) {
    for (int i = 0; i < lanes<doubles>; ++i) x[i] = std::log(x[i]);
    return x;
}

// Calls f with a null pointer to the storage type.
template <class F>
inline void with_storage(Dtype dtype, F&& f) {
    switch (dtype) {
        case Dtype::float32:
            return f(static_cast<float*>(nullptr));
        case Dtype::float64:
            return f(static_cast<double*>(nullptr));
        case Dtype::bfloat16:
            return f(static_cast<bfloat16*>(nullptr));
        case Dtype::float16:
            return f(static_cast<float16*>(nullptr));
    }
}

// A scalar of the compute type: a loss, or the gradient that comes back for it.
inline double read_scalar(const Array& a) {
    return a.dtype == Dtype::float64 ? *static_cast<double*>(a.data) : *static_cast<float*>(a.data);
}

inline void write_scalar(const Array& a, double value) {
    if (a.dtype == Dtype::float64) *static_cast<double*>(a.data) = value;
    else *static_cast<float*>(a.data) = static_cast<float>(value);
}

}  // namespace dfad::DFAD_ISA
