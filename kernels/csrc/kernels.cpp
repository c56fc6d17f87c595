// Compiled once for each instruction set.
#include "kernels.hpp"

#include "losses/activation_boundary_loss.hpp"
#include "batch_norm/batch_norm.hpp"
#include "batch_norm/batchnorm_distance.hpp"
#include "batch_norm/frozen_batch_norm.hpp"
#include "elementwise.hpp"
#include "losses/interpolated_kl_div.hpp"
#include "losses/normalized_squared_error.hpp"
#include "batch_norm/subsampling.hpp"

namespace dfad::DFAD_ISA {

void activation_boundary_loss_forward(Array loss, Array student, Array teacher, double margin, double scale,
                                      Array, int threads) {
    elementwise_forward<ActivationBoundary>(loss, student, teacher, scale, threads, margin);
}

void activation_boundary_loss_backward(Array student_gradient, Array loss_gradient, Array student,
                                       Array teacher, double margin, double scale, Array, int threads) {
    elementwise_backward<ActivationBoundary>(student_gradient, loss_gradient, student, teacher, scale,
                                             threads, margin);
}

}  // namespace dfad::DFAD_ISA
