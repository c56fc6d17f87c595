// A 3×3 convolution with the BatchNorm, the addition and the activation that follow it: y = conv(x),
// pre = γ (y − μ) / √(σ² + ε) + β + r, post = φ(pre).
#pragma once

#include <optional>

#include "batch_norm/batch_norm.hpp"
#include "chains/frozen_convolution.hpp"
#include "chains/link.hpp"

namespace dfad::DFAD_ISA {

// The input of the convolution: x itself or, where statistics are given, x after a BatchNorm and an activation. Such an
// x is another convolution's result that nothing else needs normalised, so that its normalised form is never stored.
struct Source {
    Address x, statistics, weight, bias;
    double slope, epsilon;

    explicit Source(const Link& link)
        : x(link.x), statistics(link.source_statistics), weight(link.source_weight), bias(link.source_bias),
          slope(link.source_slope), epsilon(link.source_epsilon) {}

    // Calls f(fill), fill(convolution, positions, first image, images).
    template <class F>
    void with_fill(int64_t in, F&& f) const {
        const auto* from = static_cast<const bfloat16*>(x.data);
        if (!statistics.exists())
            return f([=](const Convolution& convolution, Positions& positions, int64_t first, int64_t images) {
                convolution.fill(positions, from, first, images);
            });
        Coefficients<Rows<bfloat16>> coefficients(Rows<bfloat16>(1, in), static_cast<const float*>(statistics.data),
                                                  weight, bias, epsilon);
        const floats below = broadcast<floats>(slope);
        f([=, &coefficients](const Convolution& convolution, Positions& positions, int64_t first, int64_t images) {
            const bfloat16* of_chunk = from + first * convolution.pixels() * in;
            positions.fill(images, [&](bfloat16* to, int64_t pixel, int64_t pixels) {
                for (int64_t c = 0; c < in; c += lanes<floats>) {
                    const floats centre = load(coefficients.centre.data() + c);
                    const floats scale = load(coefficients.scale.data() + c);
                    const floats shift = load(coefficients.shift.data() + c);
                    for (int64_t i = c; i < pixels * in; i += in) {
                        const floats v = (load(of_chunk + pixel * in + i) - centre) * scale + shift;
                        store_rounded(to + i, v > 0 ? v : below * v);
                    }
                }
            });
        });
    }
};

void convolution_batch_norm_forward(const Link& link, int threads) {
    const Source source(link);
    const Convolution convolution(link);
    const int64_t count = link.images, in = link.in, out = link.out;
    const Images images = convolution.images();
    const int64_t chunk = images.chunk(), chunks = (count + chunk - 1) / chunk;
    const int64_t result_pixels = convolution.result_pixels();
    Factors factors(images, images.channels, out);
    convolution.with_padded(link.kernel, [&](const float* weights) { factors.pack(weights); });
    Pixels result(images, link.stride);
    const auto images_in = [&](int64_t number) { return number + 1 < chunks ? chunk : count - number * chunk; };

    struct Memory {
        Tiles tiles;
        Positions in;
        Products products;
        Buffer<float> sums;  // about a chunk's first pixel: (3, out), that, sum and sum of squares
    };
    Buffer<double> partial(chunks * 2 * out);
    const auto convolve_all = [&](auto fill) {
        parallel_stretches(
            chunks, count * convolution.pixels() * images.channels, threads, Order::forth,
            [&] { return Memory{{}, {images, 1}, new_products(), Buffer<float>(3 * out)}; },
            [&](int64_t number, Memory& memory) {
                fill(convolution, memory.in, number * chunk, images_in(number));
                bfloat16* results = static_cast<bfloat16*>(link.y.data) + number * chunk * result_pixels * out;
                float *centre = memory.sums.data(), *sum = centre + out, *squares = sum + out;
                convolve(memory.tiles, memory.in.data(), images, images_in(number), factors, memory.products,
                         [&](int64_t q, int64_t positions, const float* from, int64_t channel, int64_t channels) {
                             for (int64_t c = 0; c < channels; c += lanes<floats>) {
                                 bfloat16* to = results + channel + c;
                                 floats about{}, total[2] = {}, total_squares[2] = {};
                                 if (q == 0) {
                                     about = store_rounded(to, load(from + c));
                                     store(centre + channel + c, about);
                                 } else {
                                     about = load(centre + channel + c);
                                     total[0] = load(sum + channel + c);
                                     total_squares[0] = load(squares + channel + c);
                                 }
                                 result.each(q, positions, [&](int64_t i, int64_t pixel, int64_t pixels) {
                                     alternate(pixels, [&](int64_t k, int side) {
                                         const floats sums = load(from + (i + k) * channels + c);
                                         const floats d = store_rounded(to + (pixel + k) * out, sums) - about;
                                         total[side] += d;
                                         total_squares[side] += d * d;
                                     });
                                 });
                                 store(sum + channel + c, total[0] + total[1]);
                                 store(squares + channel + c, total_squares[0] + total_squares[1]);
                             }
                         });
                double* of_chunk = partial.data() + number * 2 * out;
                for (int64_t c = 0; c < 2 * out; ++c) of_chunk[c] = sum[c];
                about_mean(of_chunk, centre, out, images_in(number) * result_pixels);
            });
    };
    source.with_fill(in, convolve_all);

    const BatchStatistics moved{link.statistics, link.running_mean, link.running_variance, link.momentum};
    moved.merge<float>(partial.data(), chunks, out, [&](int64_t number) { return images_in(number) * result_pixels; });
    if (!link.pre.exists() && !link.post.exists()) return;
    const Rows<bfloat16> walk(count * result_pixels, out);
    Coefficients<Rows<bfloat16>> coefficients(walk, static_cast<const float*>(link.statistics.data), link.weight,
                                              link.bias, link.epsilon);
    normalise<bfloat16>(walk, coefficients, static_cast<const bfloat16*>(link.y.data),
                        static_cast<const bfloat16*>(link.residual.data), static_cast<bfloat16*>(link.pre.data),
                        static_cast<bfloat16*>(link.post.data), link.negative_slope, threads);
}

// total_pre must be given if there is a residual or more than one incoming gradient; the sign of post then
// gives the slope of the activation. If source_weight and source_bias are given they are summed on the way.
void convolution_batch_norm_backward(const Link& link, const LinkGradients& gradients, int threads) {
    using Walk = Rows<bfloat16>;
    const Source source(link);
    const Convolution convolution(link);
    const int64_t count = link.images, in = link.in, out = link.out;
    const Images images = convolution.images();
    const int64_t result_pixels = convolution.result_pixels();
    const auto* results = static_cast<const bfloat16*>(link.y.data);
    const auto* activated = static_cast<const bfloat16*>(link.post.data);
    const auto* of_pre = static_cast<const bfloat16*>(gradients.pre.data);
    const auto* of_post = static_cast<const bfloat16*>(gradients.post.data);
    const auto* of_post_too = static_cast<const bfloat16*>(gradients.second_post.data);
    auto* passed_on = static_cast<bfloat16*>(gradients.total_pre.data);
    const auto* batch = static_cast<const float*>(link.statistics.data);
    const floats below = broadcast<floats>(link.negative_slope);
    const Walk walk(count * result_pixels, out);
    Coefficients<Walk> coefficients(walk, batch, link.weight, link.bias, link.epsilon);

    const int64_t chunk = images.chunk();
    const int64_t block = round_up((count + 15) / 16, chunk), blocks = (count + block - 1) / block;
    const int64_t weights = out * taps * images.channels;
    Factors factors(images, out, images.channels);
    if (gradients.x.exists()) convolution.with_padded(link.kernel, [&](const float* all) { factors.pack_reversed(all); });
    Pixels every(images, 1);
    Buffer<float> partial(gradients.kernel.exists() ? blocks * weights : 1);
    std::optional<Coefficients<Walk>> source_coefficients;
    if (gradients.source_weight.exists())
        source_coefficients.emplace(Walk(1, in), static_cast<const float*>(link.source_statistics.data),
                                    link.source_weight, link.source_bias, link.source_epsilon);
    Buffer<double> source_partial(blocks * 2 * in);
    struct Memory {
        Tiles tiles;
        Positions in, upstream;
        Products products;
        KernelGradient kernel;
        Buffer<float> sums;  // of the source's gradient: (2, in)
    };
    const auto new_memory = [&] {
        return Memory{{},           {images, 1},     {convolution.results(), link.stride},
                      new_products(), {images, out}, Buffer<float>(2 * in)};
    };

    // What reached the upstream positions goes back through the convolution.
    const auto write_plainly = [&](Memory& memory, int64_t, int64_t first, int64_t here) {
        bfloat16* to = static_cast<bfloat16*>(gradients.x.data) + first * convolution.pixels() * in;
        convolve(memory.tiles, memory.upstream.data(), images, here, factors, memory.products,
                 [&](int64_t q, int64_t rows, const float* from, int64_t channel, int64_t channels) {
                     every.each(q, rows, [&](int64_t i, int64_t pixel, int64_t pixels) {
                         convolution.store(to + pixel * in + channel, from + i * channels, pixels, channels);
                     });
                 });
    };
    const auto write_and_sum = [&](Memory& memory, int64_t number, int64_t first, int64_t here) {
        const int64_t offset = first * convolution.pixels() * in;
        bfloat16* to = static_cast<bfloat16*>(gradients.x.data) + offset;
        const bfloat16* of_source = static_cast<const bfloat16*>(link.x.data) + offset;
        const floats below_source = broadcast<floats>(link.source_slope);
        float *tilted = memory.sums.data(), *level = tilted + in;
        convolve(memory.tiles, memory.upstream.data(), images, here, factors, memory.products,
                 [&](int64_t q, int64_t rows, const float* from, int64_t channel, int64_t channels) {
                     for (int64_t c = 0; c < channels; c += lanes<floats>) {
                         floats total_tilted[2] = {}, total[2] = {};
                         if (q > 0) {
                             total_tilted[0] = load(tilted + channel + c);
                             total[0] = load(level + channel + c);
                         }
                         const floats centre = load(source_coefficients->centre.data() + channel + c);
                         const floats scale = load(source_coefficients->scale.data() + channel + c);
                         const floats shift = load(source_coefficients->shift.data() + channel + c);
                         every.each(q, rows, [&](int64_t i, int64_t pixel, int64_t pixels) {
                             alternate(pixels, [&](int64_t k, int side) {
                                 const int64_t place = (pixel + k) * in + channel + c;
                                 const floats incoming = store_rounded(to + place, load(from + (i + k) * channels + c));
                                 const floats d = load(of_source + place) - centre;
                                 const floats g = d * scale + shift > 0 ? incoming : below_source * incoming;
                                 total[side] += g;
                                 total_tilted[side] += g * d;
                             });
                         });
                         store(tilted + channel + c, total_tilted[0] + total_tilted[1]);
                         store(level + channel + c, total[0] + total[1]);
                     }
                 });
        double* of_block = source_partial.data() + number * 2 * in;
        for (int64_t i = 0; i < 2 * in; ++i) of_block[i] = tilted[i] + (first == number * block ? 0 : of_block[i]);
    };

    // again(element, normalised) is the gradient before the activation, computed again.
    const auto convolve_back = [&](auto again, auto write_gradient) {
        Gradient<Walk> gradient(walk, coefficients, batch, link.epsilon, gradients.weight, gradients.bias);
        const auto differentiate = [&](bfloat16* to, int64_t from, int64_t pixels) {
            for (int64_t c = 0; c < out; c += lanes<floats>) {
                const floats scale = load(coefficients.scale.data() + c), tilt = load(gradient.tilt.data() + c);
                const floats centre = load(coefficients.centre.data() + c), level = load(gradient.level.data() + c);
                const floats shift = load(coefficients.shift.data() + c);
                for (int64_t i = c; i < pixels * out; i += out) {
                    const floats d = load(results + from + i) - centre;
                    store_rounded(to + i, again(from + i, d * scale + shift) * scale - d * tilt - level);
                }
            }
        };
        source.with_fill(in, [&](auto fill) {
            parallel_stretches(
                blocks, count * convolution.pixels() * images.channels, threads, Order::back,
                new_memory,
                [&](int64_t number, Memory& memory) {
                    const int64_t last = (number + 1) * block < count ? (number + 1) * block : count;
                    for (int64_t first = number * block; first < last; first += chunk) {
                        const int64_t here = first + chunk < last ? chunk : last - first;
                        const int64_t positions = here * images.plane();
                        memory.upstream.fill(here, [&](bfloat16* to, int64_t pixel, int64_t pixels) {
                            differentiate(to, (first * result_pixels + pixel) * out, pixels);
                        });
                        if (gradients.x.exists()) write_gradient(memory, number, first, here);
                        if (!gradients.kernel.exists()) continue;
                        fill(convolution, memory.in, first, here);
                        memory.kernel.add(memory.tiles, memory.in.data(), memory.upstream.data(), positions,
                                          partial.data() + number * weights, first == number * block);
                    }
                });
        });
    };

    const auto differentiate = [&](auto g, auto again) {
        if (!gradients.summed)
            sum_gradients<bfloat16>(walk, coefficients, results, batch, link.epsilon, gradients.weight, gradients.bias,
                                    threads, g);
        source_coefficients ? convolve_back(again, write_and_sum) : convolve_back(again, write_plainly);
    };
    const auto plain = [=](auto access, int64_t i, floats, const auto&, int) { return access.read(of_pre + i); };
    const auto plain_again = [=](int64_t i, floats) { return load(of_pre + i); };
    const auto recomputed = [=](auto access, int64_t i, floats value, const Affine<floats>& affine, int k) {
        const floats incoming = access.read(of_post + i);
        return affine(value, k) > 0 ? incoming : below * incoming;
    };
    const auto recomputed_again = [=](int64_t i, floats normalised) {
        const floats incoming = load(of_post + i);
        return normalised > 0 ? incoming : below * incoming;
    };
    const auto passed_again = [=](int64_t i, floats) { return load(passed_on + i); };
    const auto met = [&](auto has_pre, auto has_two) {
        differentiate(
            [=](auto access, int64_t i, floats, const Affine<floats>&, int) {
                floats incoming = access.read(of_post + i);
                if constexpr (decltype(has_two)::value) incoming += access.read(of_post_too + i);
                floats g = access.read(activated + i) > 0 ? incoming : below * incoming;
                if constexpr (decltype(has_pre)::value) g += access.read(of_pre + i);
                access.write(passed_on + i, g);
                return g;
            },
            passed_again);
    };
    if (!passed_on) of_post ? differentiate(recomputed, recomputed_again) : differentiate(plain, plain_again);
    else if (of_pre && of_post_too) met(std::true_type{}, std::true_type{});
    else if (of_pre) met(std::true_type{}, std::false_type{});
    else if (of_post_too) met(std::false_type{}, std::true_type{});
    else met(std::false_type{}, std::false_type{});

    if (source_coefficients)
        parameter_gradients(source_partial.data(), blocks, in, static_cast<const float*>(link.source_statistics.data),
                            link.source_epsilon, gradients.source_weight, gradients.source_bias);
    if (!gradients.kernel.exists()) return;
    Buffer<float> sums(images.channels == in ? 1 : weights);
    auto* gradient = images.channels == in ? static_cast<float*>(gradients.kernel.data) : sums.data();
    sum_blocks(partial, blocks, weights, gradient, threads);
    if (images.channels != in)
        resize(sums.data(), out * taps, images.channels, in, static_cast<float*>(gradients.kernel.data));
}

}  // namespace dfad::DFAD_ISA
