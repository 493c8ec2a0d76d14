#include "engine/operations.hpp"

#include "core/status.hpp"

namespace adalayer::engine {

const char* kind_name(ValueKind kind) {
  constexpr const char* kKinds[] = {"u8", "f32", "i32"};
  return kKinds[static_cast<size_t>(kind)];
}

const char* kind_name(ConstantKind kind) {
  constexpr const char* kKinds[] = {"weights", "f32", "i32", "u8"};
  return kKinds[static_cast<size_t>(kind)];
}

const char* op_name(OpKind op) {
  return is_operation(static_cast<uint32_t>(op)) ? operation(op).name.data() : "unknown";
}

OpKind op_from_name(std::string_view name) {
  for (int k = 0; k < kOpKinds; ++k)
    if (name == kOperations[k].name) return static_cast<OpKind>(k);
  fail<InvalidArgument>("unknown operation \"", name, "\"");
}

}  // namespace adalayer::engine
