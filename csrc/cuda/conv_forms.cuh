// All forms of conv_mma for one width of the weights.
#pragma once

#include "cuda/conv_group.cuh"
#include "cuda/conv_mma.cuh"
#include "cuda/kernels.hpp"

namespace adalayer::cuda {
namespace {

template <class T>
KernelInfo form() {
  return {ADALAYER_KERNEL_ADDRESS(conv_mma<T>, ConvParams), T::kThreads, T::kSharedBytes};
}

template <class T>
KernelInfo group_form() {
  return {ADALAYER_KERNEL_ADDRESS(conv_group<T>, ConvParams), T::kThreads, T::kSharedBytes};
}

template <int kBits>
[[maybe_unused]] KernelInfo conv_form(int tile, int piece) {
  if (piece != 16) {
    if constexpr (kBits == 8) {
      if (tile == 2 && piece == 8) return form<ConvTile<8, 1, 4, 4, 4, 8>>();
      if (tile == 2 && piece == 4) return form<ConvTile<8, 1, 4, 4, 4, 4>>();
    }
    return {};
  }
  switch (tile) {
    case 0:
      return form<ConvTile<kBits, 2, 2, 8, 3, 16>>();
    case 1:
      return form<ConvTile<kBits, 2, 4, 8, 3, 16>>();
    case 2:
      return form<ConvTile<kBits, 1, 4, 4, 4, 16>>();
    case 3:
      return form<ConvTile<kBits, 1, 4, 2, 4, 16>>();
    case 4:
      return form<ConvTile<kBits, 4, 1, 2, 4, 16>>();
    case 5:
      return form<ConvTile<kBits, 1, 8, 4, 3, 16>>();
    case 6:
      return group_form<GroupTile<kBits, 2, 256, 4>>();
    case 7:
      return group_form<GroupTile<kBits, 2, 128, 4>>();
    default:
      return {};
  }
}

/// Skipped cells need tiles of one block of channels: its steps are a list of its own.
template <int kBits>
[[maybe_unused]] KernelInfo sparse_form(int tile, Form which) {
  const bool blocks = which == Form::Blocks;
  switch (tile) {
    case 0:
      return blocks ? KernelInfo{} : form<ConvTile<kBits, 2, 2, 8, 3, 16, Form::Structured>>();
    case 2:
      return blocks ? form<ConvTile<kBits, 1, 4, 4, 4, 16, Form::Blocks>>()
                    : form<ConvTile<kBits, 1, 4, 4, 4, 16, Form::Structured>>();
    case 3:
      return blocks ? form<ConvTile<kBits, 1, 4, 2, 4, 16, Form::Blocks>>() : KernelInfo{};
    default:
      return {};
  }
}

}  // namespace
}  // namespace adalayer::cuda
