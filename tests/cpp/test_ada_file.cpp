// The .ada file: round trips, damage, versions, disks that are full, and what a small file may
// claim.
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <new>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "check.hpp"
#include "engine/container.hpp"
#include "engine/engine.hpp"
#include "engine/interpret.hpp"
#include "engine_programs.hpp"
#include "program_checks.hpp"

using namespace adalayer;
using namespace adalayer::engine;
using namespace programs;

// ---- the largest allocation of a piece of code --------------------------------------------------

namespace {
size_t g_largest = 0;
}

// Not inlined: g++ 12 would see free() of what operator new returned, and warn.
[[gnu::noinline]] void* operator new(size_t size) {
  g_largest = std::max(g_largest, size);
  if (void* p = std::malloc(size == 0 ? 1 : size)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(size_t size, const std::nothrow_t&) noexcept {
  g_largest = std::max(g_largest, size);
  return std::malloc(size == 0 ? 1 : size);
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept { std::free(p); }

namespace {

namespace fs = std::filesystem;

/// A folder of its own, removed at the end.
class Folder {
 public:
  Folder() {
    std::string name = (fs::temp_directory_path() / "ada-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) fail("no temporary folder");
    path_ = name;
  }
  ~Folder() { fs::remove_all(path_); }
  fs::path operator/(const char* name) const { return path_ / name; }
  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (const auto& entry : fs::directory_iterator(path_))
      out.push_back(entry.path().filename().string());
    return out;
  }

 private:
  fs::path path_;
};

AdaSection section(const std::vector<uint8_t>& file, const char* id) {
  for (size_t k = 0; k < 6; ++k) {
    AdaSection s;
    std::memcpy(&s, file.data() + sizeof(AdaHeader) + k * sizeof s, sizeof s);
    if (std::memcmp(s.id, id, 4) == 0) return s;
  }
  fail("no section ", id);
}

}  // namespace

// ---- the file -----------------------------------------------------------------------------------

TEST(round_trip) {
  for (const Program& p : {every_operation(), small_program(), token_program(), float_program(),
                           recurrent_program(), reduced_program(), grouped_program()}) {
    const auto file = write_program(p);
    const Program back = read_program(file);
    CHECK(write_program(back) == file);
    CHECK_EQ(back.nodes.size(), p.nodes.size());
    for (size_t k = 0; k < p.nodes.size(); ++k) {
      const Node &a = p.nodes[k], &b = back.nodes[k];
      CHECK(a.op == b.op && a.name == b.name && a.inputs == b.inputs && a.output == b.output);
      CHECK(a.ints == b.ints && a.floats == b.floats && a.constants == b.constants);
    }
    for (size_t k = 0; k < p.values.size(); ++k) {
      const Value &a = p.values[k], &b = back.values[k];
      CHECK(a.name == b.name && a.kind == b.kind && a.c == b.c && a.h == b.h && a.w == b.w);
      CHECK(a.scale == b.scale && a.zero_point == b.zero_point && a.qmax == b.qmax);
    }
    for (size_t k = 0; k < p.constants.size(); ++k)
      CHECK(p.constants[k].kind == back.constants[k].kind &&
            p.constants[k].bytes == back.constants[k].bytes);
    CHECK(p.inputs == back.inputs && p.outputs == back.outputs && p.metadata == back.metadata);
    CHECK(run(p, 1) == run(back, 1));
  }
}

TEST(constants_lie_on_multiples_of_64) {
  const Program p = every_operation();
  const auto file = write_program(p);
  for (const Constant& c : p.constants) {
    bool found = false;
    for (uint64_t at = 0; at + c.bytes.size() <= file.size(); at += 64)
      found = found || std::equal(c.bytes.begin(), c.bytes.end(), file.begin() + at);
    CHECK(found);
  }
}

TEST(invalid_programs_are_not_written) {
  Program p = small_program();
  p.nodes[0].inputs[0] = 17;
  CHECK_THROWS(write_program(p), InvalidArgument, "does not exist");
}

TEST(every_truncation_is_refused) {
  const auto file = write_program(small_program());
  for (size_t n = 0; n < file.size(); ++n)
    CHECK(refused(std::vector<uint8_t>(file.begin(), file.begin() + n)));
  auto longer = file;
  longer.push_back(0);
  CHECK(refused(longer));
  // Also where the header tells the new size.
  for (size_t n = sizeof(AdaHeader); n < file.size(); ++n) {
    std::vector<uint8_t> shorter(file.begin(), file.begin() + n);
    poke(shorter, offsetof(AdaHeader, file_bytes), uint64_t{n});
    repair_checksums(shorter);
    CHECK(refused(shorter));
  }
}

TEST(every_flipped_bit_is_noticed) {
  const auto file = write_program(small_program());
  for (size_t i = 0; i < file.size(); ++i)
    for (int bit = 0; bit < 8; ++bit) {
      auto damaged = file;
      damaged[i] ^= static_cast<uint8_t>(1 << bit);
      CHECK_MSG(refused(damaged), "byte " + std::to_string(i));
    }
}

TEST(damage_names_its_section) {
  const auto file = write_program(every_operation());
  for (const char* id : {"VALS", "NODE", "PORT", "CNST", "DATA", "META"}) {
    auto damaged = file;
    damaged[section(file, id).offset] ^= 1;
    CHECK_THROWS(read_program(damaged), CorruptData, std::string("section ") + id);
  }
  CHECK_THROWS(read_program(std::vector<uint8_t>(10)), CorruptData, "at least 64 bytes, got 10");
  CHECK_THROWS(read_program(std::vector<uint8_t>(100)), CorruptData, "magic");
}

TEST(other_versions) {
  const Program p = every_operation();
  const auto file = write_program(p);
  auto major = file;
  poke(major, offsetof(AdaHeader, major), uint16_t{2});
  CHECK_THROWS(read_program(major), CorruptData,
               "format version 2.2 is not supported; this library reads 1.x");
  poke(major, offsetof(AdaHeader, major), uint16_t{0});
  CHECK_THROWS(read_program(major), CorruptData, "format version 0.2 is not supported");

  // A later minor version: reserved bytes in use, a new section behind the others, and new fields
  // at the end of the section META.
  const auto extended = [&](uint16_t minor) {
    constexpr size_t kOld = 6, kTable = sizeof(AdaHeader);
    std::vector<uint8_t> out(kTable + (kOld + 1) * sizeof(AdaSection));
    AdaHeader h;
    std::memcpy(&h, file.data(), sizeof h);
    h.minor = minor;
    h.sections = kOld + 1;
    h.reserved[3] = 5;
    for (size_t k = 0; k <= kOld; ++k) {
      AdaSection s;
      out.resize((out.size() + 63) / 64 * 64);
      const uint64_t offset = out.size();
      if (k < kOld) {
        std::memcpy(&s, file.data() + kTable + k * sizeof s, sizeof s);
        out.insert(out.end(), file.begin() + s.offset, file.begin() + s.offset + s.bytes);
        if (k == kOld - 1) out.insert(out.end(), {1, 2, 3});
      } else {
        std::memcpy(s.id, "NEWS", 4);
        out.insert(out.end(), {4, 5, 6});
      }
      s.reserved = 9;
      s.offset = offset;
      s.bytes = out.size() - offset;
      std::memcpy(out.data() + kTable + k * sizeof s, &s, sizeof s);
    }
    h.file_bytes = out.size();
    std::memcpy(out.data(), &h, sizeof h);
    repair_checksums(out);
    return out;
  };
  CHECK(write_program(read_program(extended(kAdaMinor + 1))) == file);
  CHECK_THROWS(read_program(extended(0)), CorruptData, "reserved");

  // An operation of the future.
  auto future = file;
  poke(future, offsetof(AdaHeader, minor), static_cast<uint16_t>(kAdaMinor + 1));
  poke(future, section(file, "NODE").offset + 8, uint32_t{kOpKinds});
  repair_checksums(future);
  CHECK_THROWS(read_program(future), CorruptData,
               "operation 34 is unknown to format 1.6; the file is of format 1.7");

  // A file has the least version that its operations need.
  CHECK_EQ(int{read_ada_header(file, file.size()).minor}, 2);
  const auto tokens = write_program(token_program());
  CHECK_EQ(int{read_ada_header(tokens, tokens.size()).minor}, 2);
  const auto floats = write_program(float_program());
  CHECK_EQ(int{read_ada_header(floats, floats.size()).minor}, 3);
  const auto recurrent = write_program(recurrent_program());
  CHECK_EQ(int{read_ada_header(recurrent, recurrent.size()).minor}, 5);
  // Reductions, floats that are joined, quotients and pairs of different sizes: each alone.
  for (size_t k = 0; k < reduced_program().nodes.size(); ++k) {
    Program p = reduced_program();
    p.nodes = {p.nodes[k]};
    if (p.nodes[0].op == OpKind::Quantize || p.nodes[0].op == OpKind::Constant ||
        p.values[p.nodes[0].output].name == "divisor")
      continue;
    const auto alone = serialize(p);
    CHECK_EQ(int{read_ada_header(alone, alone.size()).minor}, 6);
  }
  const auto grouped = write_program(grouped_program());
  CHECK_EQ(int{read_ada_header(grouped, grouped.size()).minor}, 6);
  Builder b;
  const auto x = b.value("x", 2, 1, 1, ValueKind::F32);
  const auto y = b.value("y", 2, 1, 1, ValueKind::F32);
  b.node(OpKind::Function, {x}, y, {3}, {0, 0});
  b.p.inputs = {x};
  b.p.outputs = {y};
  const auto earlier = write_program(b.p);
  CHECK_EQ(int{read_ada_header(earlier, earlier.size()).minor}, 1);
  const auto small = write_program(small_program());
  CHECK_EQ(int{read_ada_header(small, small.size()).minor}, 0);
}

TEST(longer_records_of_a_later_version) {
  // META with one byte more in its only record.
  const Program p = small_program();
  const auto file = write_program(p);
  const AdaSection meta = section(file, "META");
  auto longer = file;
  longer.push_back(77);
  poke(longer, meta.offset + 4, static_cast<uint32_t>(meta.bytes - 8 + 1));
  AdaSection changed = meta;
  ++changed.bytes;
  poke(longer, sizeof(AdaHeader) + 5 * sizeof(AdaSection), changed);
  poke(longer, offsetof(AdaHeader, file_bytes), uint64_t{longer.size()});
  repair_checksums(longer);
  CHECK_THROWS(read_program(longer), CorruptData, "an entry has 1 bytes too many");
  poke(longer, offsetof(AdaHeader, minor), static_cast<uint16_t>(kAdaMinor + 1));
  repair_checksums(longer);
  CHECK(read_program(longer).metadata == p.metadata);
}

TEST(forged_headers) {
  const auto file = write_program(small_program());
  const auto forged = [&](uint64_t at, auto value) {
    auto f = file;
    poke(f, at, value);
    repair_checksums(f);
    return f;
  };
  constexpr size_t kTable = sizeof(AdaHeader);
  for (const uint64_t v : {uint64_t{0}, uint64_t{65}, UINT64_MAX, uint64_t{1} << 63}) {
    CHECK_THROWS(read_program(forged(offsetof(AdaHeader, file_bytes), v)), CorruptData, "header");
    CHECK_THROWS(read_program(forged(offsetof(AdaHeader, table_offset), v)), CorruptData, "header");
    CHECK_THROWS(read_program(forged(kTable + offsetof(AdaSection, offset), v)), CorruptData,
                 "section VALS");
    CHECK_THROWS(read_program(forged(kTable + offsetof(AdaSection, bytes), v)), CorruptData,
                 "section");
  }
  CHECK_THROWS(read_program(forged(offsetof(AdaHeader, sections), UINT32_MAX)), CorruptData,
               "at most 64 sections");
  CHECK_THROWS(read_program(forged(offsetof(AdaHeader, sections), uint32_t{64})), CorruptData,
               "section table");
  CHECK_THROWS(read_program(forged(offsetof(AdaHeader, sections), uint32_t{0})), CorruptData,
               "section table");
  CHECK_THROWS(read_program(forged(kTable, 'X')), CorruptData, "section VALS is missing");
  CHECK_THROWS(read_program(forged(kTable + sizeof(AdaSection), section(file, "VALS"))),
               CorruptData, "expected offset");
}

TEST(forged_numbers_are_refused_without_large_allocations) {
  const auto file = write_program(every_operation());
  const uint64_t first = section(file, "VALS").offset;
  std::mt19937 random(3);
  for (uint64_t at = first; at + 4 <= file.size(); ++at)
    for (const uint32_t v : {UINT32_MAX, 0x7FFFFFFFu, 0x10000u, 0u}) {
      auto forged = file;
      poke(forged, at, v);
      repair_checksums(forged);
      g_largest = 0;
      const bool accepted = !refused(forged);
      CHECK(g_largest <= 16 * file.size());
      if (!accepted) continue;
      const Program p = read_program(forged);
      // A constant or a name, where any number may stand. The payload of packed weights has a hash
      // of its own, which is checked when it is unpacked.
      if (is_small(p) && random() % 64 == 0) outcome([&] { run(p, 1); });
    }
  const AdaSection values = section(file, "VALS");
  for (const char* id : {"VALS", "NODE", "PORT", "CNST", "META"}) {
    auto forged = file;
    poke(forged, section(file, id).offset, UINT32_MAX);
    repair_checksums(forged);
    CHECK_THROWS(read_program(forged), CorruptData, "expected at most");
  }
  auto forged = file;
  poke(forged, values.offset, uint32_t{60000});
  repair_checksums(forged);
  CHECK_THROWS(read_program(forged), CorruptData, "bytes are left");
}

TEST(random_damage_behind_the_checksums) {
  // A small fuzzer: whatever is accepted is valid and runs.
  const auto file = write_program(every_operation());
  std::mt19937 random(11);
  int accepted = 0;
  for (int round = 0; round < 20000; ++round) {
    auto damaged = file;
    const int changes = 1 + static_cast<int>(random() % 3);
    for (int k = 0; k < changes; ++k) {
      uint8_t& byte = damaged[random() % damaged.size()];
      byte = random() % 2 != 0 ? static_cast<uint8_t>(random()) : static_cast<uint8_t>(byte + 1);
    }
    repair_checksums(damaged);
    Program p;
    if (outcome([&] { p = read_program(damaged); }) == Outcome::Refused) continue;
    ++accepted;
    if (is_small(p) && random() % 16 == 0) outcome([&] { run(p, 1); });
  }
  CHECK(accepted > 100);
}

// ---- on disk ------------------------------------------------------------------------------------

TEST(save_and_load) {
  const Folder folder;
  const Program p = every_operation();
  save_program(small_program(), folder / "m.ada");
  save_program(p, folder / "m.ada");
  CHECK(write_program(load_program(folder / "m.ada")) == write_program(p));
  CHECK_EQ(folder.names().size(), size_t{1});
}

TEST(load_refuses_what_is_no_file) {
  const Folder folder;
  CHECK_THROWS(load_program(folder / "absent.ada"), FileError, "No such file");
  CHECK_THROWS(load_program(folder / ""), FileError, "Is a directory");
  CHECK_THROWS(load_program("/dev/zero"), FileError, "expected a regular file");
  CHECK_EQ(::mkfifo((folder / "pipe").c_str(), 0600), 0);
  CHECK_THROWS(load_program(folder / "pipe"), FileError, "expected a regular file");
  std::ofstream(folder / "text.ada") << std::string(5000, 'x');
  CHECK_THROWS(load_program(folder / "text.ada"), CorruptData, "text.ada': ada file, header");
  std::ofstream(folder / "empty.ada").flush();
  CHECK_THROWS(load_program(folder / "empty.ada"), CorruptData, "got 0");
  CHECK_THROWS(save_program(small_program(), folder / ""), FileError, "Is a directory");
  CHECK_THROWS(save_program(small_program(), "/dev/null"), FileError, "expected a regular file");
  CHECK_THROWS(save_program(small_program(), folder / "no" / "m.ada"), FileError, "No such file");
}

TEST(a_full_disk_leaves_the_old_file) {
  const Folder folder;
  const fs::path path = folder / "m.ada";
  save_program(small_program(), path);
  const auto before = write_program(small_program());
  rlimit old{};
  CHECK_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit tight{1024, old.rlim_max};
  CHECK_EQ(::setrlimit(RLIMIT_FSIZE, &tight), 0);
  std::string message;
  int code = 0;
  try {
    save_program(every_operation(), path);
  } catch (const FileError& e) {
    message = e.what();
    code = e.code();
  }
  ::setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, handler);
  CHECK_EQ(code, EFBIG);
  CHECK_MSG(message.find("after 1024 of") != std::string::npos, message);
  CHECK_EQ(folder.names().size(), size_t{1});
  CHECK(write_program(load_program(path)) == before);
}

// ---- limits -------------------------------------------------------------------------------------

/// What a small file claims, as an engine: refused for its memory, with no large allocation made.
void check_refused(const char* what, const Program& p, int64_t limit) {
  const std::vector<uint8_t> file = write_program(p);
  CHECK_MSG(file.size() < 4096, what);
  EngineOptions options;
  options.memory_bytes = limit;
  options.weights = WeightForm::Streamed;
  g_largest = 0;
  bool threw = false;
  try {
    const Engine engine(read_program(file), options);
  } catch (const LimitExceeded&) {
    threw = true;
  }
  CHECK_MSG(threw, what);
  CHECK_MSG(g_largest <= static_cast<size_t>(limit),
            std::string(what) + ": allocated " + std::to_string(g_largest) + " bytes");
}

/// One convolution or transposed one over a 1 x h x w image, all weights zero: a bitmask alone.
Program one_convolution(OpKind op, int64_t h, int64_t w, int64_t out_h, int64_t out_w,
                        std::vector<int64_t> ints, uint32_t kernel_h, uint32_t kernel_w,
                        uint32_t outputs = 1) {
  Builder b;
  const auto x = b.value("x", 1, h, w, ValueKind::F32);
  const auto q = b.node(OpKind::Quantize, {x}, b.value("q", 1, h, w));
  const std::vector<int8_t> zeros(size_t{outputs} * kernel_h * kernel_w, 0);
  const auto weights = b.constant(
      ConstantKind::Weights, formats::pack_canonical(zeros, 8, outputs, 1, kernel_h, kernel_w));
  const std::vector<float> ones(outputs, 1.0f);
  const auto y = b.node(op, {q}, b.value("y", outputs, out_h, out_w, ValueKind::F32),
                        std::move(ints), {1, -1, 1}, {weights, b.floats(ones), b.floats(ones), -1});
  b.p.inputs = {x};
  b.p.outputs = {y};
  return b.p;
}

TEST(small_files_that_need_much_memory) {
  // A tensor of 4 MB.
  check_refused("tensor",
                one_convolution(OpKind::Conv, 1 << 10, 1 << 10, 1, 1,
                                {1, 1, 1 << 10, 1 << 10, 0, 0, 0, 0, 1, 1, 1, 0, 255, 0}, 1, 1),
                1 << 20);
  // A kernel of 16384 zeros, 2 KB in the file: a table entry for each byte of each step.
  check_refused("kernel",
                one_convolution(OpKind::Conv, 128, 128, 1, 1,
                                {128, 128, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 255, 0}, 128, 128),
                2 << 20);
  // Padding around a pixel.
  check_refused("padding",
                one_convolution(OpKind::Conv, 1, 1, 1001, 1001,
                                {1, 1, 1, 1, 500, 500, 500, 500, 1, 1, 1, 0, 255, 0}, 1, 1),
                1 << 20);
  // A transposed convolution is one convolution per phase.
  check_refused("phases",
                one_convolution(OpKind::ConvTranspose, 1, 1, 64, 64,
                                {64, 64, 64, 64, 0, 0, 0, 0, 1, 1, 1, 0, 255, 0}, 64, 64),
                1 << 20);
}

TEST(phases_of_a_transposed_convolution_are_limited) {
  const auto with_stride = [](int64_t stride) {
    return one_convolution(OpKind::ConvTranspose, 1, 1, stride, stride,
                           {1, 1, stride, stride, 0, 0, 0, 0, 1, 1, 1, 0, 255, 0}, 1, 1);
  };
  CHECK(!refused(with_stride(64)));
  CHECK(refused(with_stride(65)));
}

TEST(an_ordinary_program_fits_a_small_limit) {
  const Program p = every_operation();
  EngineOptions options;
  options.memory_bytes = 1 << 20;
  const Engine engine(Program(p), options);
  CHECK(engine.weight_bytes() > 0);
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }
