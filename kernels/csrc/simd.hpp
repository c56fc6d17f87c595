// Vectors of one register of the instruction set that the including file is compiled for, and what is
// computed with them. Wider ones would be lowered to several registers, but GCC 12 takes their comparisons
// apart into scalars.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

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
// Bytes of a vector in memory.
template <class Storage>
constexpr int stored_bytes = lanes<vector_t<Storage>> * sizeof(Storage);

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

#if defined(__AVX512BW__)
inline floats load(const bfloat16* p) {
    alignas(64) static constexpr uint16_t places[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                        0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
    const __m512i h = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return bit_cast<floats>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_load_si512(places), h));
}
#else
inline floats load(const bfloat16* p) { return bit_cast<floats>(load_halfwords(p) << 16); }
#endif

#if defined(__AVX512F__)
inline floats load(const float16* p) {
    __m256i h;
    std::memcpy(&h, p, sizeof h);
    return _mm512_cvtph_ps(h);
}
#elif defined(__F16C__)
inline floats load(const float16* p) {
    __m128i h;
    std::memcpy(&h, p, sizeof h);
    return _mm256_cvtph_ps(h);
}
#else
inline floats load(const float16* p) {
    const words h = load_halfwords(p);
    const words magnitude = (h & 0x7fff) << 13;
    const words rebiased = magnitude + (112u << 23);
    const floats subnormal = bit_cast<floats>(magnitude + (113u << 23)) - 0x1p-14f;
    words bits = magnitude < (0x0400u << 13) ? bit_cast<words>(subnormal) : rebiased;
    bits = magnitude >= (0x7c00u << 13) ? rebiased + (112u << 23) : bits;
    return bit_cast<floats>(bits | (h & 0x8000) << 16);
}
#endif

inline void store(float* p, floats v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, doubles v) { std::memcpy(p, &v, sizeof v); }

inline void store_halfwords(void* p, words w) {
    const halfwords h = __builtin_convertvector(w, halfwords);
    std::memcpy(p, &h, sizeof h);
}

inline void store_high_halfwords(void* p, words w) {
#if defined(__AVX512BW__)
    alignas(64) static constexpr uint16_t high[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    const __m512i packed = _mm512_permutexvar_epi16(_mm512_load_si512(high), bit_cast<__m512i>(w));
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_castsi512_si256(packed));
#else
    store_halfwords(p, w >> 16);
#endif
}

// Both roundings are to nearest, ties to even; the processor's own takes subnormal numbers for zero.
#if defined(__AVX512BF16__)
inline void store(bfloat16* p, floats v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}
#else
inline void store(bfloat16* p, floats v) {
    const words bits = bit_cast<words>(v);
    const words rounded = bits + 0x7fff + (bits >> 16 & 1);
    store_high_halfwords(p, v == v ? rounded : bits | 0x400000);
}
#endif

#if defined(__AVX512F__)
inline void store(float16* p, floats v) {
    const __m256i h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &h, sizeof h);
}
#elif defined(__F16C__)
inline void store(float16* p, floats v) {
    const __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &h, sizeof h);
}
#else
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
#endif

template <class V>
inline V lane_numbers() {
    V v;
    for (int i = 0; i < lanes<V>; ++i) v[i] = i;
    return v;
}

// The first `count` elements from p on; the lanes after them hold `fill`. Masks avoid a copy through memory, which
// would be most of the work for rows of few classes.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline uint32_t first_lanes(int64_t count) { return count < 16 ? (1u << count) - 1 : 0xffff; }

inline floats load(const float* p, int64_t count, float fill) {
    return _mm512_mask_loadu_ps(broadcast<floats>(fill), first_lanes(count), p);
}
inline doubles load(const double* p, int64_t count, double fill) {
    return _mm512_mask_loadu_pd(broadcast<doubles>(fill), first_lanes(count), p);
}
template <class Halfword>
inline floats load(const Halfword* p, int64_t count, float fill) {
    const __m256i h = _mm256_maskz_loadu_epi16(first_lanes(count), p);
    return _mm512_mask_mov_ps(broadcast<floats>(fill), first_lanes(count), load(reinterpret_cast<const Halfword*>(&h)));
}

inline void store(float* p, floats v, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), v); }
inline void store(double* p, doubles v, int64_t count) { _mm512_mask_storeu_pd(p, first_lanes(count), v); }
template <class Halfword>
inline void store(Halfword* p, floats v, int64_t count) {
    __m256i h;
    store(reinterpret_cast<Halfword*>(&h), v);
    _mm256_mask_storeu_epi16(p, first_lanes(count), h);
}
#else
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

#if defined(__AVX__)
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
#endif

// Whether so many bytes are better written past the caches: a line is then not read before it is written, and the
// caches keep their content. A smaller result is likely to be still in the caches when it is read.
inline bool is_streamed(int64_t bytes) { return bytes >= 1 << 23; }

// A store past the caches; p is aligned as the stored register is. Visible to other threads after finish_streaming().
#if defined(__AVX__)
inline void stream_register(void* p, vector_of<long long, 16>::type r) {
    _mm_stream_si128(static_cast<__m128i*>(p), r);
}
inline void stream_register(void* p, vector_of<long long, 32>::type r) {
    _mm256_stream_si256(static_cast<__m256i*>(p), r);
}
#if defined(__AVX512F__)
inline void stream_register(void* p, vector_of<long long, 64>::type r) {
    _mm512_stream_si512(static_cast<__m512i*>(p), r);
}
#endif
template <class Storage>
inline void stream(Storage* p, vector_t<Storage> v) {
    typename vector_of<long long, stored_bytes<Storage>>::type r;
    store(reinterpret_cast<Storage*>(&r), v);
    stream_register(p, r);
}
inline void finish_streaming() { _mm_sfence(); }
#else
template <class Storage>
inline void stream(Storage* p, vector_t<Storage> v) {
    store(p, v);
}
inline void finish_streaming() {}
#endif

template <class Storage>
inline bool is_aligned(const Storage* p) {
    return reinterpret_cast<uintptr_t>(p) % stored_bytes<Storage> == 0;
}

// A NaN in `b` is dropped.
template <class V>
inline V max(V a, V b) {
    return b > a ? b : a;
}

template <int from, class V, int... lane>
inline auto part(V v, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(v, v, from + lane...);
}

// All lanes combined into one, pairwise.
template <class V, class F>
inline auto fold(V v, F combine) {
    constexpr int half = lanes<V> / 2;
    const auto low = part<0>(v, std::make_integer_sequence<int, half>());
    const auto high = part<half>(v, std::make_integer_sequence<int, half>());
    if constexpr (sizeof low >= 16) return fold(combine(low, high), combine);
    else if constexpr (half == 1) return combine(v[0], v[1]);
    else return combine(combine(v[0], v[1]), combine(v[2], v[3]));
}

// A polynomial, given its coefficients from the highest power to the lowest.
template <class... Rest>
inline floats polynomial(floats x, float highest, Rest... rest) {
    floats p = broadcast<floats>(highest);
    ((p = p * x + rest), ...);
    return p;
}

// 2^x for x ≤ 127. x = n + f; 2^f by a minimax polynomial of relative error 2e-9. What underflows float32's normal
// numbers is 0; NaN stays NaN.
#if defined(__AVX512F__) && defined(__AVX512DQ__)
inline floats exp2(floats x) {
    const floats f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const floats p = polynomial(f, 0.000217022555f, 0.00124396877f, 0.009678841f, 0.0554833420f, 0.240229836f,
                                0.693146984f, 1.0f);
    // without the mask a subnormal result would cost forty times as much as a normal one
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, broadcast<floats>(-126), _CMP_NLT_UQ), p, x);
}
#else
inline floats exp2(floats x) {
    const floats shifted = x + 0x1.8p23f;  // rounds to an integer, left in the low bits
    const floats f = x - (shifted - 0x1.8p23f);
    const floats p = polynomial(f, 0.000153458120f, 0.00133999312f, 0.00961848896f, 0.0555032878f, 0.240226469f,
                                0.693147206f, 1.0f);
    const words scale = (bit_cast<words>(shifted) + 127) << 23;
    return x < -126 ? floats{} : p * bit_cast<floats>(scale);
}
#endif

// log2 x for normal x > 0, with an absolute error of a few units in the last place of 1 or of the result. NaN stays
// NaN; zero and subnormal numbers give a finite number, about -126 in float32.
#if defined(__AVX512F__)
// x = 2^n m; m = c (1 + r) with one of sixteen c, |r| ≤ 1/32; log2(1 + r) by a minimax polynomial of error 7e-10.
inline floats log2(floats x) {
    alignas(64) static constexpr float inverse_c[16] = {
        0.969696999f, 0.914285719f, 0.864864886f, 0.820512831f, 0.780487776f, 0.744186044f, 0.711111128f, 0.680851042f,
        0.653061211f, 0.627451003f, 0.603773594f, 0.581818163f, 0.561403513f, 0.542372882f, 0.524590135f, 0.507936537f};
    alignas(64) static constexpr float log2_c[16] = {
        0.0443940764f, 0.129283009f, 0.209453331f, 0.2854022f, 0.357552058f, 0.42626476f, 0.491853061f, 0.554588897f,
        0.614709874f, 0.672425291f, 0.727920433f, 0.781359759f, 0.832890003f, 0.882643047f, 0.930737418f, 0.97727984f};
    x = _mm512_max_ps(broadcast<floats>(0x1p-126), x);
    const __m512i c = bit_cast<__m512i>(bit_cast<words>(x) >> 19);
    const floats n = _mm512_getexp_ps(x);
    const floats m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    const floats r = m * _mm512_permutexvar_ps(c, load(inverse_c)) - 1.0f;
    const floats p = polynomial(r, -0.361086488f, 0.481269844f, -0.721347352f, 1.44269495f);
    return n + (p * r + _mm512_permutexvar_ps(c, load(log2_c)));
}
#else
// x = 2^n (1 + f), √½ ≤ 1 + f < √2; ln(1 + f) by a minimax polynomial of relative error 6e-9.
inline floats log2(floats x) {
    const words bits = bit_cast<words>(x) - bit_cast<uint32_t>(0.707106781f);
    const floats n = __builtin_convertvector(bit_cast<ints>(bits) >> 23, floats);
    const floats f = bit_cast<floats>((bits & 0x7fffff) + bit_cast<uint32_t>(0.707106781f)) - 1.0f;
    const floats p = polynomial(f, -0.0763449653f, 0.12761577f, -0.131601824f, 0.14201758f, -0.166233573f,
                                0.200012269f, -0.25000821f, 0.333333317f);
    const floats f2 = f * f;
    const floats y = (f + (p * (f2 * f) - 0.5f * f2)) * 1.44269504f + n;
    return x == x ? y : x;
}
#endif

inline doubles exp2(doubles x) {
    for (int i = 0; i < lanes<doubles>; ++i) x[i] = std::exp2(x[i]);
    return x;
}

inline doubles log2(doubles x) {
    for (int i = 0; i < lanes<doubles>; ++i) x[i] = std::log2(x[i] < 0x1p-1022 ? 0x1p-1022 : x[i]);
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
