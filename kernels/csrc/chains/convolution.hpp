// 3×3 convolutions, padded by 1, of channels-last bfloat16 features, by tiles; sums are float32.
//
// Images are laid out so that a convolution is one matrix product per tap, without special cases at borders: each row
// ends with a pixel of zeros and each image with a row of zeros, which also pad the next row and image. A tap then
// reads each pixel at a constant distance. Products at the padding are discarded; with a stride, so are the pixels that
// it skips, and in the other direction zeros are inserted for them.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "buffer.hpp"
#include "parallel.hpp"
#include "simd.hpp"
#include "chains/tiles.hpp"

namespace dfad::DFAD_ISA {

constexpr int taps = 9;

// Two neighbours in memory in one lane: the lower one in the lower half.
using pairs = vector_of<uint32_t, 64>::type;

inline pairs interleave(const bfloat16* even, const bfloat16* odd) {
#if defined(__AVX512BW__)
    alignas(64) static constexpr uint16_t places[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even))),
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)), 1);
    return bit_cast<pairs>(_mm512_permutexvar_epi16(_mm512_load_si512(places), both));
#else
    using halves = vector_of<uint16_t, 32>::type;
    halves e, o;
    std::memcpy(&e, even, sizeof e);
    std::memcpy(&o, odd, sizeof o);
    return __builtin_convertvector(e, pairs) | __builtin_convertvector(o, pairs) << 16;
#endif
}

inline void transpose(pairs (&rows)[16]) {
#if defined(__AVX512F__)
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = bit_cast<__m512i>(rows[i]);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; ++k) {
            a[i + 2 * k] = _mm512_unpacklo_epi64(b[i + k], b[i + 2 + k]);
            a[i + 2 * k + 1] = _mm512_unpackhi_epi64(b[i + k], b[i + 2 + k]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int k = 0; k < 4; ++k) {
            b[i + k] = _mm512_shuffle_i32x4(a[i + k], a[i + 4 + k], 0x88);
            b[i + 4 + k] = _mm512_shuffle_i32x4(a[i + k], a[i + 4 + k], 0xdd);
        }
    for (int k = 0; k < 8; ++k) {
        rows[k] = bit_cast<pairs>(_mm512_shuffle_i32x4(b[k], b[8 + k], 0x88));
        rows[8 + k] = bit_cast<pairs>(_mm512_shuffle_i32x4(b[k], b[8 + k], 0xdd));
    }
#else
    pairs columns[16];
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k) columns[i][k] = rows[k][i];
    std::memcpy(rows, columns, sizeof columns);
#endif
}

// Rounded to bfloat16, and that as a float again. Subnormal numbers may become zero.
inline floats store_rounded(bfloat16* p, floats v) {
#if defined(__AVX512BF16__)
    const __m256i h = bit_cast<__m256i>(_mm512_cvtneps_pbh(v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
    return bit_cast<floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
#else
    store(p, v);
    return load(p);
#endif
}

inline void store_rounded(bfloat16* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; i += lanes<floats>) store_rounded(to + i, load(from + i));
}

// A batch of images of one size; their channels fill tiles: 16, or a multiple of 32.
struct Images {
    int64_t count, height, width, channels;

    int64_t pitch() const { return width + 1; }
    int64_t plane() const { return (height + 1) * pitch(); }
    // Distance of a tap's pixel from the pixel of the result: the largest, and that of one tap.
    int64_t reach() const { return pitch() + 1; }
    int64_t distance(int64_t tap) const { return (tap / 3 - 1) * pitch() + tap % 3 - 1; }
    // How many images are processed at a time: enough for long loops, few enough for the caches, and in a number of
    // chunks that the usual numbers of threads share evenly.
    int64_t chunk() const {
        int64_t chunks = 1;
        while (chunks < count && (count + chunks - 1) / chunks * plane() > 1280) chunks *= 2;
        return (count + chunks - 1) / chunks;
    }
};

inline int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// A chunk of images as positions, zeros where no pixel is. Every position that a tile reads exists.
class Positions {
public:
    // step: of the pixels that are given; between them are zeros.
    Positions(const Images& images, int64_t step)
        : images_(images),
          step_(step),
          before_(round_up(images.reach(), 2)),
          size_((before_ + round_up(images.chunk() * images.plane(), 64) + before_ + 2) * images.channels),
          buffer_(size_) {
        const int64_t c = images_.channels;
        if (step_ > 1) std::memset(buffer_.data(), 0, size_ * 2);
        else
            for (int64_t row = -1; row < images_.chunk() * (images_.height + 1); ++row) {
                const bool all = row < 0 || row % (images_.height + 1) == images_.height;
                zero((row * images_.pitch() + (all ? 0 : images_.width)) * c, (row + 1) * images_.pitch() * c);
            }
        zero(-before_ * c, -images_.pitch() * c);
        zero(images_.chunk() * images_.plane() * c, size_ - before_ * c);
    }

    bfloat16* data() { return buffer_.data() + before_ * images_.channels; }

    // Calls write(to, pixel, pixels) for pixels that are neighbours here as well as where they come from.
    template <class F>
    void fill(int64_t count, F&& write) {
        const int64_t c = images_.channels;
        int64_t pixel = 0;
        for (int64_t n = 0; n < count; ++n)
            for (int64_t row = 0; row < images_.height; row += step_) {
                bfloat16* to = data() + (n * images_.plane() + row * images_.pitch()) * c;
                if (step_ == 1) {
                    write(to, pixel, images_.width);
                    pixel += images_.width;
                } else {
                    for (int64_t column = 0; column < images_.width; column += step_)
                        write(to + column * c, pixel++, 1);
                }
            }
        // what images before left
        zero(count * images_.plane() * c, images_.chunk() * images_.plane() * c);
    }

private:
    void zero(int64_t first, int64_t last) {
        if (first < last) std::memset(data() + first, 0, (last - first) * 2);
    }

    Images images_;
    int64_t step_, before_, size_;
    Buffer<bfloat16> buffer_;
};

// Which positions are pixels of the result.
class Pixels {
public:
    Pixels(const Images& images, int64_t step) : at_(images.chunk() * images.plane()) {
        for (int64_t q = 0; q < images.chunk() * images.plane(); ++q) at_[q] = {0, 0};
        int32_t next = 0;
        for (int64_t n = 0; n < images.chunk(); ++n)
            for (int64_t row = 0; row < images.height; row += step)
                for (int64_t column = 0; column < images.width; column += step)
                    at_[n * images.plane() + row * images.pitch() + column] = {
                        next++, static_cast<int32_t>(step == 1 ? images.width - column : 1)};
    }
    // Calls f(i, pixel, pixels) for neighbours among `count` positions from q on that are neighbours in the result as
    // well: the first one is position q + i, and number `pixel` of the chunk.
    template <class F>
    void each(int64_t q, int64_t count, F&& f) {
        for (int64_t i = 0; i < count;) {
            const auto [pixel, rest] = at_[q + i];
            const int64_t pixels = rest < count - i ? rest : count - i;
            if (pixels) f(i, static_cast<int64_t>(pixel), pixels);
            i += pixels ? pixels : 1;
        }
    }

private:
    struct Run {
        int32_t pixel, rest;  // of the row that it begins or is within; none where there is no pixel
    };
    Buffer<Run> at_;
};

// Calls add(i, side) for i below count, with sides that alternate: of two sums side by side, no addition waits for the
// one before it.
template <class F>
inline void alternate(int64_t count, F&& add) {
    for (int64_t i = 0; i + 1 < count; i += 2) {
        add(i, 0);
        add(i + 1, 1);
    }
    if (count % 2) add(count - 1, 0);
}

// A convolution's weights as right factors, and how far from the result's position their left factors are. A left
// factor's row is one tap of 32 channels, or two neighbouring taps of 16.
struct Factors {
    int64_t in, out, count;
    Buffer<int64_t> distance;  // in elements
    Buffer<bfloat16> tiles;    // (out / 16, count, 16, 16, 2)

    Factors(const Images& images, int64_t in, int64_t out)
        : in(in), out(out), count(in == 16 ? 6 : taps * (in / 32)), distance(count), tiles(out / 16 * count * 512) {
        for (int64_t k = 0; k < count; ++k) distance[k] = images.distance(tap(k)) * in + channel(k);
    }
    int64_t tap(int64_t k) const { return in == 16 ? k / 2 * 3 + k % 2 * 2 : k / (in / 32); }
    int64_t channel(int64_t k) const { return in == 16 ? 0 : k % (in / 32) * 32; }
    // Of the two taps that a row of 16 channels has place for.
    bool has_second(int64_t k) const { return k % 2 == 0; }
    bfloat16* tile(int64_t block, int64_t k) { return tiles.data() + (block * count + k) * 512; }

    // kernel: (out, taps, in).
    void pack(const float* kernel) {
        for (int64_t block = 0; block < out / 16; ++block)
            for (int64_t k = 0; k < count; ++k) {
                pairs rows[16];
                for (int64_t o = 0; o < 16; ++o) {
                    const float* from = kernel + ((block * 16 + o) * taps + tap(k)) * in + channel(k);
                    bfloat16 row[32] = {};
                    store_rounded(row, from, in > 16 || has_second(k) ? 32 : 16);
                    std::memcpy(&rows[o], row, sizeof row);
                }
                transpose(rows);
                std::memcpy(tile(block, k), rows, sizeof rows);
            }
    }
    // kernel: (in, taps, out), of a gradient that goes back through the taps.
    void pack_reversed(const float* kernel) {
        bfloat16 even[16], odd[16];
        for (int64_t block = 0; block < out / 16; ++block)
            for (int64_t k = 0; k < count; ++k)
                for (int64_t row = 0; row < 16; ++row) {
                    const bool second = in == 16 && row >= 8;
                    const int64_t from_channel = channel(k) + 2 * (second ? row - 8 : row);
                    pairs r{};
                    if (!second || has_second(k)) {
                        const int64_t reversed = taps - 1 - tap(k) - second;
                        const float* from = kernel + (from_channel * taps + reversed) * out + block * 16;
                        store_rounded(even, from, 16);
                        store_rounded(odd, from + taps * out, 16);
                        r = interleave(even, odd);
                    }
                    std::memcpy(tile(block, k) + row * 32, &r, sizeof r);
                }
    }
};

// What products are written to before they are rounded: twice, so that one is read while the other is computed.
constexpr int64_t product_size = 1024;
using Products = Buffer<float>;
inline Products new_products() { return Products(2 * product_size); }

// Results of 16 channels out of 16, for images whose rows are whole tiles: four rows at a time, for which each left
// factor is read once where it would be read for three taps.
template <class F>
inline void convolve_by_rows(Tiles& tiles, const bfloat16* in, const Images& images, int64_t count, Factors& factors,
                             int64_t block, Products& products, F&& emit) {
    const int64_t pitch = images.pitch(), row = pitch * 16;
    int64_t previous = -1;
    const auto finish = [&](const float* sums) {
        if (previous < 0) return;
        for (int64_t i = 0; i < 4; ++i) emit(previous + i * pitch, 16, sums + i * 256, block * 16, 16);
    };
    float *to = products.data(), *other = to + product_size;
    for (int64_t n = 0; n < count; ++n)
        for (int64_t top = 0; top < images.height; top += 4)
            for (int64_t column = 0; column < images.width; column += tile_rows) {
                const int64_t q = n * images.plane() + top * pitch + column;
                tiles.zero<0>();
                tiles.zero<1>();
                tiles.zero<2>();
                tiles.zero<3>();
                for (int64_t side = 0; side < 2; ++side) {
                    const bfloat16* from = in + q * 16 + factors.distance[side];
                    tiles.load<5>(factors.tile(block, side), 64);
                    tiles.load<6>(factors.tile(block, 2 + side), 64);
                    tiles.load<7>(factors.tile(block, 4 + side), 64);
                    tiles.load<4>(from, 32);
                    tiles.multiply<0, 4, 5>();
                    tiles.load<4>(from + row, 32);
                    tiles.multiply<0, 4, 6>();
                    tiles.multiply<1, 4, 5>();
                    tiles.load<4>(from + 2 * row, 32);
                    tiles.multiply<0, 4, 7>();
                    tiles.multiply<1, 4, 6>();
                    tiles.multiply<2, 4, 5>();
                    tiles.load<4>(from + 3 * row, 32);
                    tiles.multiply<1, 4, 7>();
                    tiles.multiply<2, 4, 6>();
                    tiles.multiply<3, 4, 5>();
                    tiles.load<4>(from + 4 * row, 32);
                    tiles.multiply<2, 4, 7>();
                    tiles.multiply<3, 4, 6>();
                    tiles.load<4>(from + 5 * row, 32);
                    tiles.multiply<3, 4, 7>();
                }
                finish(other);
                tiles.store<0>(to, 64);
                tiles.store<1>(to + 256, 64);
                tiles.store<2>(to + 512, 64);
                tiles.store<3>(to + 768, 64);
                previous = q;
                std::swap(to, other);
            }
    finish(other);
}

// Calls emit(position, positions, sums, channel, width) with (positions, width) sums, from a channel on; each channel's
// first call is for position 0.
template <class F>
inline void convolve(Tiles& tiles, const bfloat16* in, const Images& images, int64_t count, Factors& factors,
                     Products& products, F&& emit) {
    const int64_t positions = count * images.plane();
    const int64_t channels = factors.in, stride = 2 * channels, rows = tile_rows * channels;
    const int64_t* distance = factors.distance.data();
    // compute(q, to) leaves the sums of `height` positions from q on
    const auto run = [&](int64_t block, int64_t width, int64_t height, auto compute) {
        int64_t previous = -1;
        const auto finish = [&](const float* sums) {
            const int64_t rest = positions - previous;
            if (previous >= 0) emit(previous, rest < height ? rest : height, sums, block * 16, width);
        };
        float *to = products.data(), *other = to + product_size;
        for (int64_t q = 0; q < positions; q += height) {
            compute(q);
            finish(other);
            const int64_t pitch = width * 4;
            tiles.store<0>(to, pitch);
            if (width == 32) {
                tiles.store<1>(to + 16, pitch);
                tiles.store<2>(to + 16 * width, pitch);
                tiles.store<3>(to + 16 * width + 16, pitch);
            } else {
                tiles.store<1>(to + 256, pitch);
                tiles.store<2>(to + 512, pitch);
                tiles.store<3>(to + 768, pitch);
            }
            previous = q;
            std::swap(to, other);
        }
        finish(other);
    };
    const auto zero = [&] {
        tiles.zero<0>();
        tiles.zero<1>();
        tiles.zero<2>();
        tiles.zero<3>();
    };
    int64_t block = 0;
    for (; block + 2 <= factors.out / 16; block += 2) {
        const bfloat16 *left = factors.tile(block, 0), *right = factors.tile(block + 1, 0);
        run(block, 32, 32, [&](int64_t q) {
            zero();
            for (int64_t k = 0; k < factors.count; ++k) {
                const bfloat16* from = in + q * channels + distance[k];
                tiles.load<4>(from, stride);
                tiles.load<6>(left + k * 512, 64);
                tiles.multiply<0, 4, 6>();
                tiles.load<7>(right + k * 512, 64);
                tiles.multiply<1, 4, 7>();
                tiles.load<5>(from + rows, stride);
                tiles.multiply<2, 5, 6>();
                tiles.multiply<3, 5, 7>();
            }
        });
    }
    if (block == factors.out / 16) return;
    if (channels == 16 && images.width % tile_rows == 0 && images.height % 4 == 0)
        return convolve_by_rows(tiles, in, images, count, factors, block, products, emit);
    const bfloat16* weights = factors.tile(block, 0);
    run(block, 16, 64, [&](int64_t q) {
        zero();
        for (int64_t k = 0; k < factors.count; ++k) {
            const bfloat16* from = in + q * channels + distance[k];
            tiles.load<7>(weights + k * 512, 64);
            tiles.load<4>(from, stride);
            tiles.multiply<0, 4, 7>();
            tiles.load<5>(from + rows, stride);
            tiles.multiply<1, 5, 7>();
            tiles.load<6>(from + 2 * rows, stride);
            tiles.multiply<2, 6, 7>();
            tiles.load<4>(from + 3 * rows, stride);
            tiles.multiply<3, 4, 7>();
        }
    });
}

// Calls f(0) to f(count - 1), with numbers that are constants.
template <class F, int... i>
inline void each(F&& f, std::integer_sequence<int, i...>) {
    (f(std::integral_constant<int, i>{}), ...);
}
template <int count, class F>
inline void each(F&& f) {
    each(f, std::make_integer_sequence<int, count>());
}

// A convolution's gradient with respect to its kernel, (out, taps, in), summed over positions: the product of the
// transposed upstream gradient and the input of each tap. Factors of the latter are pairs of positions, which begin at
// even ones or at odd ones, whichever a tap's distance asks for.
class KernelGradient {
public:
    KernelGradient(const Images& images, int64_t out)
        : images_(images),
          out_(out),
          before_(round_up(images.reach(), 2)),
          // not a power of two, for which rows would share cache lines
          pitch_(round_up(images.chunk() * images.plane(), tile_depth) + 32),
          pairs_((pitch_ - 32 + 2 * before_) / 2),
          pairs_of_{Buffer<bfloat16>(2 * pairs_ * images.channels), Buffer<bfloat16>(2 * pairs_ * images.channels)},
          upstream_(pitch_ * out) {}

    // Adds the products of so many positions to the sums, or starts the sums with them.
    void add(Tiles& tiles, const bfloat16* in, const bfloat16* upstream, int64_t positions, float* sums, bool begins) {
        pair_up(in, 0);
        pair_up(in, 1);
        transpose_positions(upstream, positions);
        const int64_t channels = images_.channels, streams = taps * (channels / 16);
        for (int64_t out = 0; out < out_; out += 16)
            for (int64_t first = 0; first < streams;) {
                const auto run = [&](auto count) {
                    const bfloat16* from[count];
                    float* to[count];
                    for (int i = 0; i < count; ++i) {
                        const int64_t tap = (first + i) % taps, block = (first + i) / taps;
                        const int64_t position = before_ + images_.distance(tap);
                        from[i] = pairs_of_[position % 2].data() + (block * pairs_ + position / 2) * 32;
                        to[i] = sums + (out * taps + tap) * channels + block * 16;
                    }
                    multiply<count>(tiles, upstream_.data() + out * pitch_, from, positions, to, begins);
                    first += count;
                };
                if (streams - first >= 6) run(std::integral_constant<int, 6>{});
                else run(std::integral_constant<int, 3>{});
            }
    }

private:
    template <int count>
    void multiply(Tiles& tiles, const bfloat16* left, const bfloat16* const* right, int64_t positions, float* const* to,
                  bool begins) {
        const int64_t row = taps * images_.channels * 4;
        each<count>([&](auto i) {
            if (begins) tiles.template zero<i>();
            else tiles.template load<i>(to[i], row);
        });
        for (int64_t q = 0; q < positions; q += tile_depth) {
            tiles.load<6>(left + q, pitch_ * 2);
            each<count>([&](auto i) {
                tiles.template load<7>(right[i] + q * 16, 64);
                tiles.template multiply<i, 6, 7>();
            });
        }
        each<count>([&](auto i) { tiles.template store<i>(to[i], row); });
    }

    // (channels / 16, pairs, 16, 2); the first pair begins at position `odd` - before.
    void pair_up(const bfloat16* in, int64_t odd) {
        const int64_t channels = images_.channels;
        bfloat16* to = pairs_of_[odd].data();
        for (int64_t block = 0; block < channels / 16; ++block)
            for (int64_t pair = 0; pair < pairs_; ++pair, to += 32) {
                const bfloat16* from = in + (odd - before_ + 2 * pair) * channels + block * 16;
                const pairs p = interleave(from, from + channels);
                std::memcpy(to, &p, sizeof p);
            }
    }

    // (out, positions)
    void transpose_positions(const bfloat16* upstream, int64_t positions) {
        for (int64_t block = 0; block < out_; block += 16)
            for (int64_t q = 0; q < positions; q += tile_depth) {
                pairs rows[16];
                for (int64_t i = 0; i < 16; ++i) {
                    const bfloat16* from = upstream + (q + 2 * i) * out_ + block;
                    rows[i] = interleave(from, from + out_);
                }
                transpose(rows);
                for (int64_t c = 0; c < 16; ++c)
                    std::memcpy(upstream_.data() + (block + c) * pitch_ + q, &rows[c], sizeof rows[c]);
            }
    }

    Images images_;
    int64_t out_, before_, pitch_, pairs_;
    Buffer<bfloat16> pairs_of_[2], upstream_;
};

// Sums of as many blocks: total[i] = Σ partial[block, i]; `size` is a multiple of a register's lanes.
inline void sum_blocks(Buffer<float>& partial, int64_t blocks, int64_t size, float* total, int threads) {
    constexpr int64_t at_once = 1 << 12;
    parallel_for((size + at_once - 1) / at_once, blocks * size, threads, [&](int64_t part) {
        const int64_t end = (part + 1) * at_once < size ? (part + 1) * at_once : size;
        for (int64_t i = part * at_once; i < end; i += lanes<floats>) {
            floats sum{};
            for (int64_t block = 0; block < blocks; ++block) sum += load(partial.data() + block * size + i);
            store(total + i, sum);
        }
    });
}

}  // namespace dfad::DFAD_ISA
