// A 3×3 convolution that does not learn, with the addition and the activation that follow it: pre = conv(x) + β + r,
// post = φ(pre).
#pragma once

#include "chains/convolution.hpp"
#include "chains/link.hpp"

namespace dfad::DFAD_ISA {

// Less than a tile's channels, as of images, are padded to one.
inline int64_t padded(int64_t channels) { return channels < 16 ? 16 : channels; }

// (rows, from) as (rows, to), the new columns zero, or the old ones left out.
inline void resize(const float* in, int64_t rows, int64_t from, int64_t to, float* out) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = 0; c < to; ++c) out[row * to + c] = c < from ? in[row * from + c] : 0;
}

// The sizes of a convolution, for both directions: x is (images, height, width, in), y every step-th pixel of it.
struct Convolution {
    int64_t count, height, width, in, out, step;

    explicit Convolution(const Link& link)
        : count(link.images), height(link.height), width(link.width), in(link.in), out(link.out), step(link.stride) {}

    Images images() const { return {count, height, width, padded(in)}; }
    Images results() const { return {count, height, width, out}; }
    int64_t pixels() const { return height * width; }
    int64_t result_pixels() const { return ((height + step - 1) / step) * ((width + step - 1) / step); }

    // Calls f with a kernel for as many channels as an image's are padded to.
    template <class F>
    void with_padded(Address kernel, F&& f) const {
        const auto* weights = static_cast<const float*>(kernel.data);
        if (in == padded(in)) return f(weights);
        Buffer<float> all(out * taps * padded(in));
        resize(weights, out * taps, in, padded(in), all.data());
        f(static_cast<const float*>(all.data()));
    }

    // Writes (pixels, channels) of an image, or as many of them as it has.
    void store(bfloat16* to, const float* from, int64_t pixels, int64_t channels) const {
        for (int64_t i = 0; i < pixels; ++i, to += in, from += channels) {
            if (in == padded(in)) {
                store_rounded(to, from, channels);
            } else {
                bfloat16 all[16];
                store_rounded(all, from, 16);
                std::memcpy(to, all, in * 2);
            }
        }
    }

    // An image's channels are padded with zeros.
    void fill(Positions& positions, const bfloat16* x, int64_t first, int64_t images) const {
        const bfloat16* from = x + first * pixels() * in;
        if (in == padded(in))
            positions.fill(images, [&](bfloat16* to, int64_t pixel, int64_t pixels) {
                std::memcpy(to, from + pixel * in, pixels * in * 2);
            });
        else
            positions.fill(images, [&](bfloat16* to, int64_t pixel, int64_t pixels) {
                std::memset(to, 0, pixels * padded(in) * 2);
                for (int64_t i = 0; i < pixels; ++i)
                    std::memcpy(to + i * padded(in), from + (pixel + i) * in, in * 2);
            });
    }
};

void frozen_convolution_forward(const Link& link, int threads) {
    const Convolution convolution(link);
    const int64_t count = link.images, out = link.out;
    const Images images = convolution.images();
    const int64_t chunk = images.chunk(), chunks = (count + chunk - 1) / chunk;
    Factors factors(images, images.channels, out);
    convolution.with_padded(link.kernel, [&](const float* weights) { factors.pack(weights); });
    Pixels result(images, link.stride);
    const floats below = broadcast<floats>(link.negative_slope);
    Buffer<float> shift(out);
    for (int64_t c = 0; c < out; ++c) shift[c] = link.bias.exists() ? static_cast<const float*>(link.bias.data)[c] : 0;

    struct Memory {
        Tiles tiles;
        Positions in;
        Products products;
    };
    parallel_stretches(
        chunks, count * convolution.pixels() * images.channels, threads, Order::forth,
        [&] { return Memory{{}, {images, 1}, new_products()}; },
        [&](int64_t number, Memory& memory) {
            const int64_t here = number + 1 < chunks ? chunk : count - number * chunk;
            convolution.fill(memory.in, static_cast<const bfloat16*>(link.x.data), number * chunk, here);
            const int64_t offset = number * chunk * convolution.result_pixels() * out;
            const auto at_chunk = [&](Address a) {
                return a.exists() ? static_cast<bfloat16*>(a.data) + offset : nullptr;
            };
            const bfloat16* added = at_chunk(link.residual);
            bfloat16 *before = at_chunk(link.pre), *after = at_chunk(link.post);
            convolve(memory.tiles, memory.in.data(), images, here, factors, memory.products,
                     [&](int64_t q, int64_t positions, const float* from, int64_t channel, int64_t channels) {
                         for (int64_t c = 0; c < channels; c += lanes<floats>) {
                             const floats level = load(shift.data() + channel + c);
                             result.each(q, positions, [&](int64_t i, int64_t pixel, int64_t pixels) {
                                 const int64_t to = pixel * out + channel + c;
                                 for (int64_t k = 0; k < pixels; ++k) {
                                     floats v = load(from + (i + k) * channels + c) + level;
                                     if (added) v += load(added + to + k * out);
                                     if (before) store_rounded(before + to + k * out, v);
                                     if (after) store_rounded(after + to + k * out, v > 0 ? v : below * v);
                                 }
                             });
                         }
                     });
        });
}

void frozen_convolution_backward(const Link& link, const LinkGradients& gradients, int threads) {
    const Convolution convolution(link);
    const int64_t count = link.images, in = link.in, out = link.out;
    const Images images = convolution.images();
    const int64_t chunk = images.chunk(), chunks = (count + chunk - 1) / chunk;
    const auto* activated = static_cast<const bfloat16*>(link.post.data);
    const auto* of_pre = static_cast<const bfloat16*>(gradients.pre.data);
    const auto* of_post = static_cast<const bfloat16*>(gradients.post.data);
    const auto* of_post_too = static_cast<const bfloat16*>(gradients.second_post.data);
    auto* passed_on = static_cast<bfloat16*>(gradients.total_pre.data);
    Factors factors(images, out, images.channels);
    convolution.with_padded(link.kernel, [&](const float* weights) { factors.pack_reversed(weights); });
    Pixels every(images, 1);
    const floats below = broadcast<floats>(link.negative_slope);

    struct Memory {
        Tiles tiles;
        Positions upstream;
        Products products;
    };
    parallel_stretches(
        chunks, count * convolution.pixels() * images.channels, threads, Order::back,
        [&] { return Memory{{}, {convolution.results(), link.stride}, new_products()}; },
        [&](int64_t number, Memory& memory) {
            const int64_t here = number + 1 < chunks ? chunk : count - number * chunk;
            const int64_t first = number * chunk * convolution.result_pixels();
            memory.upstream.fill(here, [&](bfloat16* to, int64_t pixel, int64_t pixels) {
                const int64_t from = (first + pixel) * out;
                for (int64_t i = 0; i < pixels * out; i += lanes<floats>) {
                    floats g{};
                    if (of_post) {
                        g = load(of_post + from + i);
                        if (of_post_too) g += load(of_post_too + from + i);
                        g = load(activated + from + i) > 0 ? g : below * g;
                    }
                    if (of_pre) g += load(of_pre + from + i);
                    store_rounded(to + i, g);
                    if (passed_on) store_rounded(passed_on + from + i, g);
                }
            });
            bfloat16* to = static_cast<bfloat16*>(gradients.x.data) + number * chunk * convolution.pixels() * in;
            convolve(memory.tiles, memory.upstream.data(), images, here, factors, memory.products,
                     [&](int64_t q, int64_t rows, const float* from, int64_t channel, int64_t channels) {
                         every.each(q, rows, [&](int64_t i, int64_t pixel, int64_t pixels) {
                             convolution.store(to + pixel * in + channel, from + i * channels, pixels, channels);
                         });
                     });
        });
}

}  // namespace dfad::DFAD_ISA
