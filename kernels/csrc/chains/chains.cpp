// Compiled once for each instruction set.
#include "chains/chains.hpp"

#include "chains/convolution_batch_norm.hpp"
#include "chains/frozen_convolution.hpp"
