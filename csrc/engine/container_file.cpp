// .ada files on disk.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>
#include <system_error>
#include <utility>

#include "engine/container.hpp"

namespace adalayer::engine {

namespace {

namespace fs = std::filesystem;

[[noreturn]] void refuse(const char* what, const fs::path& path, int code,
                         const std::string& more = {}) {
  throw FileError(std::string(what) + " '" + path.string() +
                      "': " + std::generic_category().message(code) + more,
                  code);
}

[[noreturn]] void refuse_special(const char* what, const fs::path& path,
                                 const struct stat& status) {
  refuse(what, path, S_ISDIR(status.st_mode) ? EISDIR : EINVAL, " (expected a regular file)");
}

/// An open file, closed at the end of the scope.
class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  int get() const { return descriptor_; }
  bool close() { return ::close(std::exchange(descriptor_, -1)) == 0; }

 private:
  int descriptor_;
};

/// Fills `out`, or throws; a file that ends early has changed since its size was asked for.
void read_all(const File& file, std::span<uint8_t> out, const fs::path& path) {
  while (!out.empty()) {
    const ssize_t n = ::read(file.get(), out.data(), out.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) refuse("cannot read", path, errno);
    if (n == 0)
      fail<CorruptData>("'", path.string(), "' ended ", out.size(), " bytes early while reading");
    out = out.subspan(static_cast<size_t>(n));
  }
}

void write_all(const File& file, std::span<const uint8_t> bytes, const fs::path& path) {
  const size_t total = bytes.size();
  while (!bytes.empty()) {
    const ssize_t n = ::write(file.get(), bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0)
      refuse("cannot write", path, errno,
             " (after " + std::to_string(total - bytes.size()) + " of " + std::to_string(total) +
                 " bytes; the file is left as it was)");
    bytes = bytes.subspan(static_cast<size_t>(n));
  }
}

/// A new file beside `path` that is removed unless it has been moved into place.
class Temporary {
 public:
  explicit Temporary(const fs::path& target) : target_(target) {
    static std::atomic<unsigned> counter{0};
    // A process that was killed may have left a file of this name.
    for (int attempt = 0; attempt < 1000 && descriptor_ < 0; ++attempt) {
      std::string name(1, '.');
      name += target.filename().string();
      name += '.' + std::to_string(::getpid()) + '.' + std::to_string(counter++) + ".tmp";
      path_ = target;
      path_.replace_filename(name);
      descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (descriptor_ < 0 && errno != EEXIST) break;
    }
    if (descriptor_ < 0) refuse("cannot write", target, errno);
  }
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;
  ~Temporary() {
    if (!moved_) ::unlink(path_.c_str());
  }

  int descriptor() const { return descriptor_; }
  void move_into_place() {
    if (::rename(path_.c_str(), target_.c_str()) != 0) refuse("cannot write", target_, errno);
    moved_ = true;
  }

 private:
  fs::path target_, path_;
  int descriptor_ = -1;
  bool moved_ = false;
};

}  // namespace

void save_program(const Program& program, const std::filesystem::path& path) {
  const std::vector<uint8_t> bytes = write_program(program);
  struct stat status{};
  // A rename would replace a device such as /dev/null by a file.
  if (::stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode))
    refuse_special("cannot write", path, status);
  Temporary temporary(path);
  File file(temporary.descriptor());
  write_all(file, bytes, path);
  if (::fsync(file.get()) != 0) refuse("cannot write", path, errno);
  if (!file.close()) refuse("cannot write", path, errno);
  temporary.move_into_place();
  // The new name too should outlast a power failure. Not every file system can promise it.
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  const File directory(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (directory.get() >= 0) (void)::fsync(directory.get());
}

Program load_program(const std::filesystem::path& path, int64_t memory_bytes) {
  // A named pipe would block the caller until somebody writes to it.
  const File file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) refuse("cannot open", path, errno);
  struct stat status{};
  if (::fstat(file.get(), &status) != 0) refuse("cannot read", path, errno);
  if (!S_ISREG(status.st_mode)) refuse_special("cannot read", path, status);
  const auto size = static_cast<uint64_t>(status.st_size);
  try {
    // The header first: a large file of another kind is not read at all.
    std::vector<uint8_t> bytes(std::min<uint64_t>(size, sizeof(AdaHeader)));
    read_all(file, bytes, path);
    read_ada_header(bytes, size);
    if (memory_bytes > 0 && size > static_cast<uint64_t>(memory_bytes))
      fail<LimitExceeded>("'", path.string(), "': expected a file of at most ", memory_bytes,
                          " bytes (the limit on memory), got ", size);
    bytes.resize(size);
    read_all(file, std::span(bytes).subspan(sizeof(AdaHeader)), path);
    return read_program(bytes);
  } catch (const CorruptData& e) {
    fail<CorruptData>("'", path.string(), "': ", e.what());
  }
}

}  // namespace adalayer::engine
