// The CUDA kernels once more, as C++ over a GPU in software.
#include "cuda_emulation.hpp"
//
#include "cuda/conv_b2.cu"
#include "cuda/conv_b3.cu"
#include "cuda/conv_b4.cu"
#include "cuda/conv_b5.cu"
#include "cuda/conv_b6.cu"
#include "cuda/conv_b7.cu"
#include "cuda/conv_b8.cu"
#include "cuda/kernels.cu"
#include "cuda/linear.cu"
#include "cuda/linear_forms.cu"
#include "cuda/runtime.cu"
//
#include "cuda/engine.cu"
