// What a link of a chain works on: a 3×3 convolution of x, padded by 1, and what follows it. Features are bfloat16,
// (images, height, width, channels), all else is float32.
#pragma once

#include "array.hpp"

namespace dfad {

struct Link {
    Address x, kernel;                     // kernel: (out, 3, 3, in)
    Address weight, bias, residual;        // each may be missing
    Address pre, post;                     // before and after the activation; one may be missing, with a BatchNorm both
    Address y;                             // what the convolution gives, where a BatchNorm follows
    Address statistics;                    // the batch's mean and biased variance, (2, out), likewise
    Address running_mean, running_variance;  // moved by it; may be missing
    // Where x is what another link's convolution gave, these make of it what is convolved; else they are missing.
    Address source_statistics, source_weight, source_bias;
    int64_t images = 0, height = 0, width = 0, in = 0, out = 0, stride = 1;
    double negative_slope = 1, epsilon = 0, momentum = 0;
    double source_slope = 1, source_epsilon = 0;
};

struct LinkGradients {
    Address pre, post, second_post;  // what comes in, of post from up to two consumers; each may be missing
    Address behind_activation;       // all of them behind the activation, which is the residual's gradient; may be missing
    Address x, kernel;               // may be missing; of what is convolved, however it came to be
    Address weight, bias;
    Address source_weight, source_bias;  // given where x's gradient is all that reaches the BatchNorm before x
    bool summed = false;                 // whether weight and bias are given: whoever convolved the result summed them
};

}  // namespace dfad
