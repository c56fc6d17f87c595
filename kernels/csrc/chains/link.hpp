// The tensors of a link of a chain: a 3×3 convolution of x, padded by 1, and what follows it. Features are bfloat16,
// (images, height, width, channels), all else is float32.
#pragma once

#include "array.hpp"

namespace dfad {

struct Link {
    Address x, kernel;                     // kernel: (out, 3, 3, in)
    Address weight, bias, residual;        // each may be missing
    Address pre, post;                     // before and after the activation; one may be missing, with a BatchNorm both
    Address y;                             // the convolution's result, where a BatchNorm follows
    Address statistics;                    // the batch's mean and biased variance, (2, out), likewise
    Address running_mean, running_variance;  // updated by it; may be missing
    // Where x is another link's convolution result, these normalise and activate it for this one; else missing.
    Address source_statistics, source_weight, source_bias;
    int64_t images = 0, height = 0, width = 0, in = 0, out = 0, stride = 1;
    double negative_slope = 1, epsilon = 0, momentum = 0;
    double source_slope = 1, source_epsilon = 0;
};

struct LinkGradients {
    Address pre, post, second_post;  // incoming; that of post from up to two consumers; each may be missing
    Address total_pre;               // all that reaches pre, which is the residual's gradient, too; may be missing
    Address x, kernel;               // may be missing; x: of the convolution's input
    Address weight, bias;
    Address source_weight, source_bias;  // given where x's gradient is all that reaches the BatchNorm before x
    bool summed = false;                 // whether the link that reads the result has already summed weight and bias
};

}  // namespace dfad
