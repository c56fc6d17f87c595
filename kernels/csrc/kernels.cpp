// Compiled once for each instruction set.
#include "kernels.hpp"

#include "losses/activation_boundary_loss.hpp"
#include "batch_norm/batch_norm.hpp"
#include "batch_norm/batchnorm_distance.hpp"
#include "batch_norm/frozen_batch_norm.hpp"
#include "losses/interpolated_kl_div.hpp"
#include "losses/normalized_squared_error.hpp"
#include "batch_norm/subsampling.hpp"
