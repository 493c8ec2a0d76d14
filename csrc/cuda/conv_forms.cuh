// All forms of conv_mma for one width of the weights.
#pragma once

#include <type_traits>
#include <utility>

#include "cuda/conv_group.cuh"
#include "cuda/conv_mma.cuh"
#include "cuda/kernels.hpp"

namespace adalayer::cuda {
namespace {

template <class T>
KernelInfo form() {
  if constexpr (T::kShape.group)
    return {ADALAYER_KERNEL_ADDRESS(conv_group<T>, ConvParams), T::kThreads, T::kSharedBytes};
  else
    return {ADALAYER_KERNEL_ADDRESS(conv_mma<T>, ConvParams), T::kThreads, T::kSharedBytes};
}

template <int kBits, Tile kTile>
KernelInfo dense_form(int piece) {
  constexpr const TileShape& shape = shape_of(kTile);
  if constexpr (shape.group) {
    if (piece == 16) return form<GroupTile<kBits, kTile>>();
  } else {
    if (piece == 16) return form<ConvTile<kBits, kTile>>();
  }
  if constexpr (shape.has_small_pieces && kBits == 8) {
    if (piece == 8) return form<ConvTile<kBits, kTile, 8>>();
    if (piece == 4) return form<ConvTile<kBits, kTile, 4>>();
  }
  return {};
}

template <int kBits, Tile kTile>
KernelInfo form_without_zeros(Form which) {
  constexpr const TileShape& shape = shape_of(kTile);
  if constexpr (shape.has_blocks)
    if (which == Form::Blocks) return form<ConvTile<kBits, kTile, 16, Form::Blocks>>();
  if constexpr (shape.has_structured)
    if (which == Form::Structured) return form<ConvTile<kBits, kTile, 16, Form::Structured>>();
  return {};
}

/// make(std::integral_constant<Tile, tile>()) for a tile that is known when the program runs.
template <class Make, int... kNumbers>
KernelInfo of_tile(Tile tile, const Make& make, std::integer_sequence<int, kNumbers...>) {
  KernelInfo found{};
  ((tile == Tile{kNumbers} ? void(found = make(std::integral_constant<Tile, Tile{kNumbers}>()))
                           : void()),
   ...);
  return found;
}

template <int kBits>
[[maybe_unused]] KernelInfo conv_form(Tile tile, int piece) {
  const auto make = [&](auto t) { return dense_form<kBits, decltype(t)::value>(piece); };
  return of_tile(tile, make, std::make_integer_sequence<int, kTiles>());
}

template <int kBits>
[[maybe_unused]] KernelInfo sparse_form(Tile tile, Form which) {
  const auto make = [&](auto t) { return form_without_zeros<kBits, decltype(t)::value>(which); };
  return of_tile(tile, make, std::make_integer_sequence<int, kTiles>());
}

}  // namespace
}  // namespace adalayer::cuda
