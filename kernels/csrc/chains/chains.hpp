// The functions of one instruction set, DFAD_ISA; included once for each.
#include "chains/link.hpp"

namespace dfad::DFAD_ISA {

void frozen_convolution_forward(const Link& link, int threads);
void frozen_convolution_backward(const Link& link, const LinkGradients& gradients, int threads);
void convolution_batch_norm_forward(const Link& link, int threads);
void convolution_batch_norm_backward(const Link& link, const LinkGradients& gradients, int threads);

}  // namespace dfad::DFAD_ISA
