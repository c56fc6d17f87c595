// The functions of one instruction set, DFAD_ISA; included once for each.
#include "array.hpp"

namespace dfad::DFAD_ISA {

void activation_boundary_loss_forward(Array loss, Array student, Array teacher, double margin, double scale,
                                      Array saved, int threads);
void activation_boundary_loss_backward(Array student_gradient, Array loss_gradient, Array student,
                                       Array teacher, double margin, double scale, Array saved,
                                       int threads);
void interpolated_kl_div_forward(Array loss, Array student, Array teacher, Array mixing_coefficient,
                                 Indices partner, double temperature, double scale, Array saved, int threads);
void interpolated_kl_div_backward(Array student_gradient, Array teacher_gradient, Array loss_gradient,
                                  Array student, Array teacher, Array mixing_coefficient, Indices partner,
                                  double temperature, double scale, Array saved, int threads);
void normalized_squared_error_forward(Array loss, Array student, Array teacher, Array size, double scale, Array saved,
                                      int threads);
void normalized_squared_error_backward(Array student_gradient, Array loss_gradient, Array student, Array teacher,
                                       Array size, double scale, Array saved, int threads);

void batch_norm_forward(Array x, Address y, Address statistics, Address running_mean, Address running_variance,
                        Address weight, Address bias, Address residual, double momentum, double epsilon, double slope,
                        int threads);
void batch_norm_backward(Array x, Address x_gradient, Address weight_gradient, Address bias_gradient,
                         Address residual_gradient, Address y_gradient, Address y, Address statistics, Address weight,
                         Address bias, double epsilon, double slope, int threads);

void frozen_batch_norm_forward(Array x, Address y, Address mean, Address variance, Address weight, Address bias,
                               Address residual, double epsilon, double slope, int threads);
void frozen_batch_norm_backward(Array y_gradient, Address x_gradient, Address residual_gradient, Address y,
                                Address variance, Address weight, double epsilon, double slope, int threads);

void batchnorm_distance_forward(Array x, Address loss, Address saved, Address mean, Address variance, int threads);
void batchnorm_distance_backward(Array x, Address x_gradient, Address loss_gradient, Address saved, int threads);

void subsampling_forward(Address x, Address y, int64_t count, int64_t height, int64_t width, int64_t in, int64_t out,
                         int64_t before, int64_t step, int64_t bytes, int threads);
void subsampling_backward(Address x_gradient, Address y_gradient, int64_t count, int64_t height, int64_t width,
                          int64_t in, int64_t out, int64_t before, int64_t step, int64_t bytes, int threads);

}  // namespace dfad::DFAD_ISA
