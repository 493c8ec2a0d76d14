// The cells of a recurrent layer, for any vector width. Included behind image.inl.

F tanh_of(F x) {
  const F two = V::set(2.0f);
  return V::fma(two, sigmoid(V::mul(two, x)), V::set(-1.0f));
}

/// What the hidden state contributes to output o and those behind it.
template <class Left>
F recurrent_part(const RecurrentCell& a, int64_t o, Left left) {
  const auto ints = [](const int32_t* p) {
    return V::load(reinterpret_cast<const uint8_t*>(p), Whole{});
  };
  const F sum = V::to_float(V::add32(ints(a.sums + o), ints(a.correction + o)));
  return V::fma(sum, V::floats(a.scale + o, left), V::floats(a.bias + o, left));
}

template <class Left>
F gate_sum(const RecurrentCell& a, int64_t o, Left left) {
  return V::add(V::floats(a.products + o, left), recurrent_part(a, o, left));
}

template <class Left>
F lstm_units(const RecurrentCell& a, int64_t j, Left left) {
  const F input = sigmoid(gate_sum(a, j, left));
  const F forget = sigmoid(gate_sum(a, a.hidden + j, left));
  const F candidate = tanh_of(gate_sum(a, 2 * a.hidden + j, left));
  const F output = sigmoid(gate_sum(a, 3 * a.hidden + j, left));
  const F cell = V::fma(forget, V::floats(a.cell + j, left), V::mul(input, candidate));
  V::store_floats(a.cell + j, cell, left);
  return V::mul(output, tanh_of(cell));
}

template <class Left>
F gru_units(const RecurrentCell& a, int64_t j, Left left) {
  const F reset = sigmoid(gate_sum(a, j, left));
  const F update = sigmoid(gate_sum(a, a.hidden + j, left));
  const int64_t third = 2 * a.hidden + j;
  const F candidate =
      tanh_of(V::fma(reset, recurrent_part(a, third, left), V::floats(a.products + third, left)));
  return V::fma(update, V::sub(V::floats(a.state + j, left), candidate), candidate);
}

void recurrent_cell(const RecurrentCell& a) {
  const Finish<false> finish(a.finish);
  const auto each = [&](auto units) {
    emit(finish, a.levels, a.hidden, [&](int64_t j, auto left) {
      const F state = units(j, left);
      V::store_floats(a.state + j, state, left);
      return state;
    });
  };
  switch (a.kind) {
    case RecurrentKind::Lstm:
      return each([&](int64_t j, auto left) { return lstm_units(a, j, left); });
    case RecurrentKind::Gru:
      return each([&](int64_t j, auto left) { return gru_units(a, j, left); });
    case RecurrentKind::Tanh:
      return each([&](int64_t j, auto left) { return tanh_of(gate_sum(a, j, left)); });
    case RecurrentKind::Relu:
      return each([&](int64_t j, auto left) { return V::max(gate_sum(a, j, left), V::set(0.0f)); });
  }
}
