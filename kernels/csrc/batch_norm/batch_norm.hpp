// Batch normalisation of a (rows, channels) matrix, with the addition and the activation that follow it:
// y = φ(γ (x − μ) / √(σ² + ε) + β + r), φ(v) = v where v > 0, else slope · v.
#pragma once

#include <cmath>
#include <type_traits>

#include "buffer.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace dfad::DFAD_ISA {

// Registers that are summed side by side, so that no addition waits for the one before it.
constexpr int side_by_side = 4;

// A matrix walked in storage order. Which channel a lane holds repeats after `period` elements, a whole number of
// rows and of registers; blocks are whole periods, all but the last of one size.
template <class T>
struct Rows {
    using V = vector_t<T>;
    using S = scalar_t<T>;
    static constexpr int64_t step = side_by_side * lanes<V>;

    int64_t channels, size, period, block_size, blocks;

    Rows(int64_t rows, int64_t channels) : channels(channels), size(rows * channels) {
        int64_t divisor = channels;
        for (int64_t rest = step; rest != 0;) {
            const int64_t next = divisor % rest;
            divisor = rest;
            rest = next;
        }
        period = channels / divisor * step;
        constexpr int64_t wanted = 1 << 14;
        block_size = wanted > period ? wanted / period * period : period;
        blocks = (size + block_size - 1) / block_size;
    }

    int64_t begin(int64_t block) const { return block * block_size; }
    int64_t end(int64_t block) const { return begin(block + 1) < size ? begin(block + 1) : size; }
    int64_t rows(int64_t block) const { return (end(block) - begin(block)) / channels; }

    // A number for each channel, repeated over a period.
    template <class F>
    void repeat(Buffer<S>& to, F&& value) const {
        for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<S>(value(c));
        repeat(to);
    }
    void repeat(Buffer<S>& to) const {
        for (int64_t i = channels; i < period; ++i) to[i] = to[i - channels];
    }

    // Calls f(access, element, its place in the period) for each register of a block that begins at `place`.
    template <class F>
    void each_at(int64_t block, int64_t place, F&& f) const {
        const int64_t last = end(block);
        int64_t i = begin(block) + place;
        for (; i + step <= last; i += period)
            for (int k = 0; k < side_by_side; ++k) f(Whole{}, i + k * lanes<V>, k);
        for (int k = 0; k < side_by_side && i + k * lanes<V> < last; ++k)
            f(Part{last - i - k * lanes<V>}, i + k * lanes<V>, k);
    }

    // sums[c] = Σ over the rows of a block of what make(place)(access, element, register, terms) leaves in its `count`
    // terms.
    template <int count, class F>
    void sum(int64_t block, double* sums, F&& make) const {
        for (int64_t i = 0; i < count * channels; ++i) sums[i] = 0;
        int64_t channel = 0;
        for (int64_t place = 0; place < period; place += step) {
            V totals[count][side_by_side] = {};
            const auto f = make(place);
            each_at(block, place, [&](auto access, int64_t i, int k) {
                V terms[count];
                f(access, i, k, terms);
                for (int n = 0; n < count; ++n) totals[n][k] += access.keep(terms[n]);
            });
            for (int k = 0; k < side_by_side; ++k)
                for (int lane = 0; lane < lanes<V>; ++lane) {
                    for (int n = 0; n < count; ++n) sums[n * channels + channel] += totals[n][k][lane];
                    channel = channel + 1 == channels ? 0 : channel + 1;
                }
        }
    }

    // A register within a block, and one that the tensor ends in.
    struct Whole {
        template <class P>
        V read(const P* p) const {
            return load(p);
        }
        template <class P>
        void write(P* p, V v) const {
            store(p, v);
        }
        V keep(V v) const { return v; }
    };
    struct Part {
        int64_t count;
        template <class P>
        V read(const P* p) const {
            return load(p, count, 0);
        }
        template <class P>
        void write(P* p, V v) const {
            store(p, v, count);
        }
        V keep(V v) const { return lane_numbers<V>() < static_cast<S>(count) ? v : V{}; }
    };
};

template <class S>
inline double at(Address numbers, int64_t i, double otherwise) {
    return numbers.exists() ? static_cast<const S*>(numbers.data)[i] : otherwise;
}

// γ (x − μ) / √(σ² + ε) + β for the registers that are side by side from a place in the period on.
template <class V>
struct Affine {
    using S = decltype(V{}[0] + 0);
    V mean[side_by_side], scale[side_by_side], shift[side_by_side];

    Affine(int64_t place, Buffer<S>& means, Buffer<S>& scales, Buffer<S>& shifts) {
        for (int k = 0; k < side_by_side; ++k) {
            mean[k] = load(means.data() + place + k * lanes<V>);
            scale[k] = load(scales.data() + place + k * lanes<V>);
            shift[k] = load(shifts.data() + place + k * lanes<V>);
        }
    }
    V operator()(V x, int k) const { return (x - mean[k]) * scale[k] + shift[k]; }
};

// Mean and biased variance of a batch, (2, channels). The running ones, with the unbiased variance, may be missing.
struct BatchStatistics {
    Address batch, running_mean, running_variance;
    double momentum;

    // Out of each block's mean and squares about it, (blocks, 2, channels); rows(block) is how many they are of.
    template <class S, class F>
    void merge(const double* partial, int64_t blocks, int64_t channels, F&& rows) const {
        double all = 0;
        for (int64_t block = 0; block < blocks; ++block) all += static_cast<double>(rows(block));
        Buffer<double> exact(2 * channels);
        for (int64_t i = 0; i < 2 * channels; ++i) exact[i] = 0;
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t c = 0; c < channels; ++c)
                exact[c] += static_cast<double>(rows(block)) / all * partial[block * 2 * channels + c];
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t c = 0; c < channels; ++c) {
                const double* of_block = partial + block * 2 * channels;
                const double d = of_block[c] - exact[c];
                exact[channels + c] += of_block[channels + c] / all + static_cast<double>(rows(block)) / all * d * d;
            }
        auto* mean = static_cast<S*>(batch.data);
        for (int64_t i = 0; i < 2 * channels; ++i) mean[i] = static_cast<S>(exact[i]);
        if (!running_mean.exists()) return;
        for (int64_t c = 0; c < channels; ++c) {
            move<S>(running_mean, c, exact[c]);
            move<S>(running_variance, c, exact[channels + c] * all / (all - 1));
        }
    }

private:
    template <class S>
    void move(Address running, int64_t c, double value) const {
        auto& old = static_cast<S*>(running.data)[c];
        old = static_cast<S>(old + momentum * (value - old));
    }
};

// Sums about a centre as a mean and squares about that.
template <class S>
inline void about_mean(double* sums, const S* centre, int64_t channels, int64_t rows) {
    for (int64_t c = 0; c < channels; ++c) {
        const double shift = sums[c] / static_cast<double>(rows);
        sums[channels + c] -= shift * sums[c];
        sums[c] = static_cast<double>(centre[c]) + shift;
    }
}

// Of each block its columns' means and squares about them, (blocks, 2, channels).
template <class T>
void sum_blocks_about_means(const Rows<T>& walk, const T* in, double* partial, int threads) {
    using S = typename Rows<T>::S;
    using V = typename Rows<T>::V;
    const int64_t channels = walk.channels;
    // Squared deviations from a block's first row. By Samuelson's inequality no row is so far from the mean that the
    // cancellation exceeds the length of the block.
    parallel_stretches(walk.blocks, walk.size, threads, Order::forth, [&](int64_t block) {
        const T* first = in + walk.begin(block);
        double* sums = partial + block * 2 * channels;
        Buffer<S> centre(walk.period);
        for (int64_t c = 0; c < channels; c += lanes<V>)
            store(centre.data() + c, load(first + c, channels - c, 0), channels - c);
        walk.repeat(centre);
        walk.template sum<2>(block, sums, [&](int64_t place) {
            return [in, from = centre.data() + place](auto access, int64_t i, int k, V* terms) {
                const V d = access.read(in + i) - load(from + k * lanes<V>);
                terms[0] = d;
                terms[1] = d * d;
            };
        });
        about_mean(sums, centre.data(), channels, walk.rows(block));
    });
}

// The factor and the offset of a BatchNorm, repeated over a period.
template <class Walk>
struct Coefficients {
    using S = typename Walk::S;
    Buffer<S> centre, scale, shift;

    // statistics: as of BatchStatistics::batch.
    Coefficients(const Walk& walk, const S* statistics, Address weight, Address bias, double epsilon)
        : Coefficients(walk, {const_cast<S*>(statistics)}, {const_cast<S*>(statistics) + walk.channels}, weight, bias,
                       epsilon) {}
    // Without a mean and a variance there is nothing to subtract, and nothing to divide by.
    Coefficients(const Walk& walk, Address mean, Address variance, Address weight, Address bias, double epsilon)
        : centre(walk.period), scale(walk.period), shift(walk.period) {
        walk.repeat(centre, [&](int64_t c) { return at<S>(mean, c, 0); });
        walk.repeat(scale, [&](int64_t c) {
            const double deviation = variance.exists() ? std::sqrt(at<S>(variance, c, 1) + epsilon) : 1;
            return at<S>(weight, c, 1) / deviation;
        });
        walk.repeat(shift, [&](int64_t c) { return at<S>(bias, c, 0); });
    }
    Affine<typename Walk::V> at_place(int64_t place) { return {place, centre, scale, shift}; }
};

// pre = γ (x − μ) / √(σ² + ε) + β + r and post = φ(pre); r and one of the two results may be missing.
template <class T>
void normalise(const Rows<T>& walk, Coefficients<Rows<T>>& coefficients, const T* x, const T* residual, T* pre, T* post,
               double slope, int threads) {
    using V = typename Rows<T>::V;
    const V below = broadcast<V>(slope);
    const auto run = [&](auto adds, auto keeps, auto activates) {
        parallel_stretches(walk.blocks, walk.size, threads, Order::back, [&](int64_t block) {
            for (int64_t place = 0; place < walk.period; place += Rows<T>::step) {
                const auto affine = coefficients.at_place(place);
                walk.each_at(block, place, [=](auto access, int64_t i, int k) {
                    V v = affine(access.read(x + i), k);
                    if constexpr (decltype(adds)::value) v += access.read(residual + i);
                    if constexpr (decltype(keeps)::value) access.write(pre + i, v);
                    if constexpr (decltype(activates)::value) access.write(post + i, v > 0 ? v : below * v);
                });
            }
        });
    };
    const auto with_results = [&](auto adds) {
        if (!pre) run(adds, std::false_type{}, std::true_type{});
        else if (!post) run(adds, std::true_type{}, std::false_type{});
        else run(adds, std::true_type{}, std::true_type{});
    };
    residual ? with_results(std::true_type{}) : with_results(std::false_type{});
}

// All are dense; residual, weight and bias may be missing.
void batch_norm_forward(Array x, Address y, Address statistics, Address running_mean, Address running_variance,
                        Address weight, Address bias, Address residual, double momentum, double epsilon, double slope,
                        int threads) {
    with_storage(x.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using Walk = Rows<T>;
        using S = typename Walk::S;
        const Walk walk(x.shape[0], x.shape[1]);
        const auto* in = static_cast<const T*>(x.data);
        Buffer<double> partial(walk.blocks * 2 * walk.channels);
        sum_blocks_about_means(walk, in, partial.data(), threads);
        const BatchStatistics moved{statistics, running_mean, running_variance, momentum};
        moved.merge<S>(partial.data(), walk.blocks, walk.channels, [&](int64_t block) { return walk.rows(block); });
        Coefficients<Walk> coefficients(walk, static_cast<const S*>(statistics.data), weight, bias, epsilon);
        normalise<T>(walk, coefficients, in, static_cast<const T*>(residual.data), nullptr, static_cast<T*>(y.data),
                     slope, threads);
    });
}

// Gradients of a BatchNorm's parameters, of sums Σ g (x − μ) and Σ g in blocks, (blocks, 2, channels).
template <class S>
inline void parameter_gradients(double* partial, int64_t blocks, int64_t channels, const S* statistics, double epsilon,
                                Address weight_gradient, Address bias_gradient) {
    for (int64_t block = 1; block < blocks; ++block)
        for (int64_t i = 0; i < 2 * channels; ++i) partial[i] += partial[block * 2 * channels + i];
    for (int64_t c = 0; c < channels; ++c) {
        const double inverse = 1 / std::sqrt(statistics[channels + c] + epsilon);
        static_cast<S*>(weight_gradient.data)[c] = static_cast<S>(partial[c] * inverse);
        static_cast<S*>(bias_gradient.data)[c] = static_cast<S>(partial[channels + c]);
    }
}

// The same of all elements' g(access, element, x, affine, register).
template <class T, class G>
inline void sum_gradients(const Rows<T>& walk, Coefficients<Rows<T>>& coefficients, const T* x,
                          const scalar_t<T>* statistics, double epsilon, Address weight_gradient,
                          Address bias_gradient, int threads, G&& g) {
    using V = typename Rows<T>::V;
    Buffer<double> partial(walk.blocks * 2 * walk.channels);
    parallel_stretches(walk.blocks, walk.size, threads, Order::forth, [&](int64_t block) {
        walk.template sum<2>(block, partial.data() + block * 2 * walk.channels, [&](int64_t place) {
            return [=, affine = coefficients.at_place(place)](auto access, int64_t i, int k, V* terms) {
                const V value = access.read(x + i);
                terms[1] = g(access, i, value, affine, k);
                terms[0] = terms[1] * (value - affine.mean[k]);
            };
        });
    });
    parameter_gradients(partial.data(), walk.blocks, walk.channels, statistics, epsilon, weight_gradient,
                        bias_gradient);
}

// The gradient of a BatchNorm's input: scale · g − tilt · (x − μ) − level, where g is the gradient of its output.
template <class Walk>
struct Gradient {
    using S = typename Walk::S;
    Buffer<S> tilt, level;

    Gradient(const Walk& walk, Coefficients<Walk>& coefficients, const S* statistics, double epsilon,
             Address weight_gradient, Address bias_gradient)
        : tilt(walk.period), level(walk.period) {
        const auto rows = static_cast<double>(walk.size / walk.channels);
        walk.repeat(tilt, [&](int64_t c) {
            const double inverse = 1 / std::sqrt(statistics[walk.channels + c] + epsilon);
            return coefficients.scale[c] * at<S>(weight_gradient, c, 0) / rows * inverse;
        });
        walk.repeat(level, [&](int64_t c) { return coefficients.scale[c] * at<S>(bias_gradient, c, 0) / rows; });
    }
};

// y and residual_gradient are given where something was added before an activation; elsewhere the sign of y is computed
// again, which is faster than reading it.
void batch_norm_backward(Array x, Address x_gradient, Address weight_gradient, Address bias_gradient,
                         Address residual_gradient, Address y_gradient, Address y, Address statistics, Address weight,
                         Address bias, double epsilon, double slope, int threads) {
    with_storage(x.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using Walk = Rows<T>;
        using S = typename Walk::S;
        using V = typename Walk::V;
        const Walk walk(x.shape[0], x.shape[1]);
        const auto* in = static_cast<const T*>(x.data);
        const auto* result = static_cast<const T*>(y.data);
        const auto* upstream = static_cast<const T*>(y_gradient.data);
        auto* out = static_cast<T*>(x_gradient.data);
        auto* passed_on = static_cast<T*>(residual_gradient.data);
        const auto* batch = static_cast<const S*>(statistics.data);
        const V below = broadcast<V>(slope);
        Coefficients<Walk> coefficients(walk, batch, weight, bias, epsilon);

        // g(access, element, x, affine, register) is the gradient before the activation.
        const auto differentiate = [&](auto g, auto g_again) {
            sum_gradients<T>(walk, coefficients, in, batch, epsilon, weight_gradient, bias_gradient, threads, g);
            Gradient<Walk> gradient(walk, coefficients, batch, epsilon, weight_gradient, bias_gradient);
            parallel_stretches(walk.blocks, walk.size, threads, Order::back, [&](int64_t block) {
                for (int64_t place = 0; place < walk.period; place += Walk::step) {
                    const auto affine = coefficients.at_place(place);
                    const Affine<V> pull(place, coefficients.centre, gradient.tilt, gradient.level);
                    walk.each_at(block, place, [=](auto access, int64_t i, int k) {
                        const V value = access.read(in + i);
                        access.write(out + i, affine.scale[k] * g_again(access, i, value, affine, k) - pull(value, k));
                    });
                }
            });
        };
        const auto plain = [=](auto access, int64_t i, V, const Affine<V>&, int) { return access.read(upstream + i); };
        const auto recomputed = [=](auto access, int64_t i, V value, const Affine<V>& affine, int k) {
            const V incoming = access.read(upstream + i);
            return affine(value, k) > 0 ? incoming : below * incoming;
        };
        const auto passing_on = [=](auto access, int64_t i, V, const Affine<V>&, int) {
            const V incoming = access.read(upstream + i);
            const V gradient = access.read(result + i) > 0 ? incoming : below * incoming;
            access.write(passed_on + i, gradient);
            return gradient;
        };
        const auto passed = [=](auto access, int64_t i, V, const Affine<V>&, int) { return access.read(passed_on + i); };
        if (slope == 1) differentiate(plain, plain);
        else if (residual_gradient.exists()) differentiate(passing_on, passed);
        else differentiate(recomputed, recomputed);
    });
}

}  // namespace dfad::DFAD_ISA
