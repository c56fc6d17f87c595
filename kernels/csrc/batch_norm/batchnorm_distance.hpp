// How far a batch's statistics are from given ones: ‖μ(x) − μ‖₂ + ‖σ²(x) − σ²‖₂.
#pragma once

#include "batch_norm/batch_norm.hpp"

namespace dfad::DFAD_ISA {

// Terms of the distance's gradient tilt · (x − μ(x)) + level: μ(x), tilt and level, (3, channels). loss is a scalar.
void batchnorm_distance_forward(Array x, Address loss, Address saved, Address mean, Address variance, int threads) {
    with_storage(x.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using S = typename Rows<T>::S;
        const Rows<T> walk(x.shape[0], x.shape[1]);
        const int64_t channels = walk.channels;
        Buffer<double> partial(walk.blocks * 2 * channels);
        sum_blocks_about_means(walk, static_cast<const T*>(x.data), partial.data(), threads);
        const BatchStatistics batch{saved, {}, {}, 0};
        batch.merge<S>(partial.data(), walk.blocks, channels, [&](int64_t block) { return walk.rows(block); });

        auto* centre = static_cast<S*>(saved.data);
        S *tilt = centre + channels, *level = tilt + channels;
        double of_means = 0, of_variances = 0;
        for (int64_t c = 0; c < channels; ++c) {
            level[c] = static_cast<S>(centre[c] - at<S>(mean, c, 0));
            tilt[c] = static_cast<S>(tilt[c] - at<S>(variance, c, 0));
            of_means += static_cast<double>(level[c]) * level[c];
            of_variances += static_cast<double>(tilt[c]) * tilt[c];
        }
        of_means = std::sqrt(of_means);
        of_variances = std::sqrt(of_variances);
        *static_cast<S*>(loss.data) = static_cast<S>(of_means + of_variances);
        const auto rows = static_cast<double>(x.shape[0]);
        for (int64_t c = 0; c < channels; ++c) {  // a norm of zero has no gradient
            level[c] = static_cast<S>(of_means == 0 ? 0 : level[c] / of_means / rows);
            tilt[c] = static_cast<S>(of_variances == 0 ? 0 : 2 * tilt[c] / of_variances / rows);
        }
    });
}

void batchnorm_distance_backward(Array x, Address x_gradient, Address loss_gradient, Address saved, int threads) {
    with_storage(x.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using Walk = Rows<T>;
        using S = typename Walk::S;
        const Walk walk(x.shape[0], x.shape[1]);
        const int64_t channels = walk.channels;
        const auto* centre = static_cast<const S*>(saved.data);
        const S upstream = *static_cast<const S*>(loss_gradient.data);
        Buffer<S> means(walk.period), tilt(walk.period), level(walk.period);
        walk.repeat(means, [&](int64_t c) { return centre[c]; });
        walk.repeat(tilt, [&](int64_t c) { return upstream * centre[channels + c]; });
        walk.repeat(level, [&](int64_t c) { return upstream * centre[2 * channels + c]; });
        const auto* in = static_cast<const T*>(x.data);
        auto* out = static_cast<T*>(x_gradient.data);
        parallel_stretches(walk.blocks, walk.size, threads, Order::back, [&](int64_t block) {
            for (int64_t place = 0; place < walk.period; place += Walk::step) {
                const Affine<typename Walk::V> pull(place, means, tilt, level);
                walk.each_at(block, place, [=](auto access, int64_t i, int k) {
                    access.write(out + i, pull(access.read(in + i), k));
                });
            }
        });
    });
}

}  // namespace dfad::DFAD_ISA
