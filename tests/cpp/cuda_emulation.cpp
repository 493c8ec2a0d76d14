#include "cuda_emulation.hpp"

#include <ucontext.h>

#include <exception>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace adalayer::cuda::emulation {

namespace {

constexpr size_t kStackBytes = 96 << 10;
constexpr size_t kMostExchanged = 64;

enum class State { Ready, AtBarrier, AtExchange, Done };

struct Copy {
  void* to;
  const void* from;
  int bytes;
  int64_t group;
};

/// Of four warps, one thread's view of it.
struct Product {
  int columns;
  int32_t* sums;
  const uint32_t* a;
  const uint8_t* b;
  int64_t group;
};

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<uint8_t[]> stack = std::make_unique<uint8_t[]>(kStackBytes);
  State state = State::Done;
  int number = 0;
  int parity = 0;
  std::vector<Copy> copies;
  int64_t group = 0;
  std::vector<Copy> unshown;  // copies that have arrived for threads, not yet for tensor cores
  std::vector<Product> products;
  int64_t product_group = 0;
};

struct Warp {
  // Two turns: who is fast may be one exchange ahead of who still reads.
  alignas(64) uint8_t slots[2][32 * kMostExchanged];
};

struct Machine {
  ucontext_t scheduler{};
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<int> order;  // of the threads, newly drawn for every turn
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* shared = nullptr;
  int shared_bytes = 0;
  // [shared_bytes / 4] a copy to there has begun, and tensor cores may not see it yet.
  std::vector<bool> unshown;
  int threads = 0;
  uint32_t block[3] = {}, grid[3] = {};
  const void* function = nullptr;
  const void* params = nullptr;
  Fiber* current = nullptr;
  std::exception_ptr error;
  std::mt19937_64 random{1};
};

Machine& machine() {
  static thread_local Machine m;
  return m;
}

[[noreturn]] void fault(const std::string& what) {
  throw std::runtime_error("thread " + std::to_string(machine().current->number) + " of block " +
                           std::to_string(machine().block[0]) + ": " + what);
}

void mark(const Copy& c, bool unshown) {
  Machine& m = machine();
  const auto first = static_cast<size_t>(static_cast<uint8_t*>(c.to) - m.shared) / 4;
  for (size_t k = 0; k < static_cast<size_t>(c.bytes) / 4; ++k)
    m.unshown[first + k] = unshown;
}

void yield(State state) {
  Machine& m = machine();
  m.current->state = state;
  Fiber* const self = m.current;
  swapcontext(&self->context, &m.scheduler);
  if (m.error) throw std::runtime_error("another thread of the block failed");
}

void enter() {
  Machine& m = machine();
  try {
    reinterpret_cast<void (*)(const void*)>(const_cast<void*>(m.function))(m.params);
  } catch (...) {
    if (!m.error) m.error = std::current_exception();
  }
  m.current->state = State::Done;
  swapcontext(&m.current->context, &m.scheduler);
}

void run_block() {
  Machine& m = machine();
  for (int t = 0; t < m.threads; ++t) {
    Fiber& f = *m.fibers[t];
    f.state = State::Ready;
    f.number = t;
    f.parity = 0;
    f.copies.clear();
    f.group = 0;
    f.unshown.clear();
    f.products.clear();
    f.product_group = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  while (true) {
    std::shuffle(m.order.begin(), m.order.end(), m.random);
    bool ran = false;
    for (const int t : m.order) {
      Fiber& f = *m.fibers[t];
      if (f.state != State::Ready) continue;
      ran = true;
      m.current = &f;
      swapcontext(&m.scheduler, &f.context);
    }
    int done = 0, at_barrier = 0;
    for (int t = 0; t < m.threads; ++t) {
      done += m.fibers[t]->state == State::Done;
      at_barrier += m.fibers[t]->state == State::AtBarrier;
    }
    if (done == m.threads) break;
    if (m.error) {  // let the others unwind
      for (int t = 0; t < m.threads; ++t)
        if (m.fibers[t]->state != State::Done) m.fibers[t]->state = State::Ready;
      continue;
    }
    if (done + at_barrier == m.threads) {
      for (int t = 0; t < m.threads; ++t)
        if (m.fibers[t]->state == State::AtBarrier) m.fibers[t]->state = State::Ready;
      continue;
    }
    for (int first = 0; first < m.threads; first += 32) {
      int waiting = 0;
      for (int t = first; t < first + 32; ++t)
        waiting += m.fibers[t]->state == State::AtExchange;
      if (waiting < 32) continue;
      for (int t = first; t < first + 32; ++t)
        m.fibers[t]->state = State::Ready;
      ran = true;
    }
    if (!ran)
      m.error = std::make_exception_ptr(
          std::runtime_error("threads of a block wait for others that do not come"));
  }
}

}  // namespace

int thread() { return machine().current->number; }
int threads() { return machine().threads; }
uint32_t block(int axis) { return machine().block[axis]; }
uint32_t grid(int axis) { return machine().grid[axis]; }
uint8_t* shared() { return machine().shared; }
void barrier() { yield(State::AtBarrier); }

const uint8_t* exchange(const void* mine, size_t bytes) {
  Machine& m = machine();
  Fiber& f = *m.current;
  if (bytes > kMostExchanged) fault("more bytes exchanged than a slot has");
  uint8_t* slots = m.warps[f.number / 32].slots[f.parity];
  f.parity ^= 1;
  std::memcpy(slots + static_cast<size_t>(f.number % 32) * bytes, mine, bytes);
  yield(State::AtExchange);
  return slots;
}

void disordered() { fault("the places of two of four values are not in order"); }

void check_shared(const void* p, int bytes) {
  const Machine& m = machine();
  const auto* at = static_cast<const uint8_t*>(p);
  if (at < m.shared || at + bytes > m.shared + m.shared_bytes)
    fault("an access outside of shared memory, at byte " + std::to_string(at - m.shared));
  if ((at - m.shared) % bytes != 0)
    fault("a misaligned access to shared memory, at byte " + std::to_string(at - m.shared));
}

void start_copy(void* to, const void* from, int bytes) {
  check_shared(to, bytes);
  if (reinterpret_cast<uintptr_t>(from) % static_cast<uintptr_t>(bytes) != 0)
    fault("a copy from a misaligned address");
  Fiber& f = *machine().current;
  f.copies.push_back({to, from, bytes, f.group});
  mark(f.copies.back(), true);
}

void commit_copies() { ++machine().current->group; }

void finish_copies(int newest_groups_left) {
  Fiber& f = *machine().current;
  const int64_t before = f.group - newest_groups_left;
  std::erase_if(f.copies, [&](const Copy& c) {
    if (c.group >= before) return false;
    std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
    f.unshown.push_back(c);
    return true;
  });
}

void show_copies() {
  Fiber& f = *machine().current;
  for (const Copy& c : f.unshown)
    mark(c, false);
  f.unshown.clear();
}

void start_product(int columns, int32_t* sums, const uint32_t* a, const uint8_t* b) {
  const Machine& m = machine();
  const std::ptrdiff_t at = b - m.shared;
  if (at < 0 || at + columns * 128 > m.shared_bytes + at % 128)
    fault("a product's columns outside of shared memory, at byte " + std::to_string(at));
  if (at % 1024 >= 128 || at % 32 != 0)
    fault("a product's misaligned columns, at byte " + std::to_string(at));
  Fiber& f = *m.current;
  f.products.push_back({columns, sums, a, b, f.product_group});
}

void commit_products() { ++machine().current->product_group; }

void finish_products(int newest_groups_left) {
  Machine& m = machine();
  Fiber& f = *m.current;
  const int64_t before = f.product_group - newest_groups_left;
  size_t done = 0;
  for (; done < f.products.size() && f.products[done].group < before; ++done) {
    const Product p = f.products[done];
    uint32_t mine[4];
    std::memcpy(mine, p.a, sizeof mine);
    const auto* all = reinterpret_cast<const uint32_t*>(exchange(mine, sizeof mine));
    const int lane = f.number % 32, g = lane / 4;
    // Rows g and g + 8 of the warp's left operand.
    int8_t left[2][32];
    for (int quad = 0; quad < 4; ++quad)
      for (int r = 0; r < 4; ++r)
        for (int i = 0; i < 4; ++i)
          left[r % 2][r / 2 * 16 + quad * 4 + i] =
              static_cast<int8_t>(all[(g * 4 + quad) * 4 + r] >> (8 * i));
    for (int j = 0; j < p.columns / 8; ++j)
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + lane % 4 * 2 + e;
        const size_t row = static_cast<size_t>(p.b - m.shared) + static_cast<size_t>(column) * 128;
        int32_t sums[2] = {};
        for (size_t k = 0; k < 32; ++k) {
          const size_t logical = row + k, at = logical ^ (logical >> 7 & 7) << 4;
          if (k % 4 == 0 && m.unshown[at / 4])
            fault("a product reads where a copy is under way or was not shown to it, at byte " +
                  std::to_string(at));
          sums[0] += left[0][k] * m.shared[at];
          sums[1] += left[1][k] * m.shared[at];
        }
        for (int half = 0; half < 2; ++half) {
          int32_t& sum = p.sums[4 * j + 2 * half + e];
          sum =
              static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(sums[half]));
        }
      }
  }
  f.products.erase(f.products.begin(), f.products.begin() + static_cast<std::ptrdiff_t>(done));
}

void seed(uint64_t value) { machine().random.seed(value); }

void run(const void* function, const uint32_t grid[3], int threads, int shared_bytes,
         const void* params) {
  Machine& m = machine();
  if (threads < 1 || threads > 1024 || threads % 32 != 0)
    throw std::runtime_error("a block of " + std::to_string(threads) + " threads");
  while (m.fibers.size() < static_cast<size_t>(threads))
    m.fibers.push_back(std::make_unique<Fiber>());
  m.warps.resize(static_cast<size_t>(threads) / 32);
  m.order.resize(static_cast<size_t>(threads));
  std::iota(m.order.begin(), m.order.end(), 0);
  m.threads = threads;
  m.function = function;
  m.params = params;
  m.shared_bytes = shared_bytes;
  m.error = nullptr;
  std::copy_n(grid, 3, m.grid);
  const uint64_t blocks = uint64_t{grid[0]} * grid[1] * grid[2];
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  std::shuffle(order.begin(), order.end(), m.random);
  // Aligned as the hardware's, and as long as asked for: a sanitizer sees what reads beyond.
  const size_t room = static_cast<size_t>(shared_bytes) + 1024;
  m.memory = std::make_unique<uint8_t[]>(room);
  m.shared = m.memory.get() + (1024 - reinterpret_cast<uintptr_t>(m.memory.get()) % 1024) % 1024;
  for (const uint64_t b : order) {
    m.block[0] = static_cast<uint32_t>(b % grid[0]);
    m.block[1] = static_cast<uint32_t>(b / grid[0] % grid[1]);
    m.block[2] = static_cast<uint32_t>(b / grid[0] / grid[1]);
    std::memset(m.memory.get(), 0xA5, room);
    m.unshown.assign(static_cast<size_t>(shared_bytes) / 4 + 1, false);
    run_block();
    if (m.error) std::rethrow_exception(m.error);
  }
}

float half_to_float(uint16_t v) {
  const int exponent = v >> 10 & 31, fraction = v & 1023;
  const float sign = (v & 0x8000) != 0 ? -1.0f : 1.0f;
  if (exponent == 31)
    return fraction != 0 ? std::nanf("") : sign * std::numeric_limits<float>::infinity();
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
}

uint16_t float_to_half(float v) {
  const auto bits = std::bit_cast<uint32_t>(v);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float size = std::fabs(v);
  if (std::isnan(v)) return sign | 0x7E00;
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size < 0x1p-14f)  // subnormal: whole steps of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  int exponent;
  const float fraction = std::frexp(size, &exponent);                            // 0.5 .. 1
  auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(fraction, 11)));  // 1024 .. 2048
  if (steps == 2048) {
    steps = 1024;
    ++exponent;
  }
  return static_cast<uint16_t>(sign | static_cast<uint32_t>(exponent + 14) << 10 | (steps - 1024));
}

}  // namespace adalayer::cuda::emulation
