// The .ada file: a program in one file, the same for every machine. Layout and compatibility
// promise: docs/ada-format.md.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "core/status.hpp"
#include "engine/program.hpp"

namespace adalayer::engine {

constexpr uint8_t kAdaMagic[8] = {0x89, 'A', 'D', 'A', '\r', '\n', 0x1A, '\n'};
constexpr uint16_t kAdaMajor = 1;
constexpr uint16_t kAdaMinor = 6;  // the newest that is read; files have the least they need
constexpr uint32_t kAdaMaxSections = 64;

/// The first 64 bytes; all fields little-endian.
struct AdaHeader {
  uint8_t magic[8] = {};
  uint16_t major = 0;
  uint16_t minor = 0;
  uint32_t sections = 0;
  uint64_t file_bytes = 0;
  uint64_t table_offset = 0;
  uint64_t table_checksum = 0;
  uint8_t reserved[16] = {};
  uint64_t checksum = 0;  // of the 56 bytes above
};
static_assert(sizeof(AdaHeader) == 64, "the header is part of the file format");

/// One entry of the section table.
struct AdaSection {
  char id[4] = {};
  uint32_t reserved = 0;
  uint64_t offset = 0;  // from the start of the file, a multiple of 64
  uint64_t bytes = 0;
  uint64_t checksum = 0;
};
static_assert(sizeof(AdaSection) == 32, "the section table is part of the file format");

/// Validates the program. The same program gives the same bytes.
std::vector<uint8_t> write_program(const Program& program);

/// Throws CorruptData naming the section, what was expected and what came. Allocates no more than
/// a small multiple of the bytes given. What it returns is valid.
Program read_program(std::span<const uint8_t> bytes);

/// The halves of the two functions above without validate(): a file of a program that may be
/// anything, and back. Tests make files from them that only validate() can refuse.
std::vector<uint8_t> serialize(const Program& program);
Program parse(std::span<const uint8_t> bytes);

/// Reads and checks the first 64 bytes of a file of `file_bytes` bytes; part of read_program().
AdaHeader read_ada_header(std::span<const uint8_t> bytes, uint64_t file_bytes);

/// The operating system refused: `code` is its errno. The message names the path.
class FileError : public Error {
 public:
  FileError(const std::string& message, int code) : Error(message), code_(code) {}
  int code() const { return code_; }

 private:
  int code_;
};

/// Writes to a temporary file beside `path`, flushes it to disk and moves it into place: readers
/// see the old file or the new one. A failure, a full disk for instance, leaves the old file and
/// nothing else. Throws FileError.
void save_program(const Program& program, const std::filesystem::path& path);

/// Throws FileError, or CorruptData that begins with the path; LimitExceeded, before it is read,
/// for a file of more than `memory_bytes` bytes (0: no limit).
Program load_program(const std::filesystem::path& path, int64_t memory_bytes = 0);

}  // namespace adalayer::engine
