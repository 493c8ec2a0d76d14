#include "engine/container.hpp"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>
#include <string_view>

#include "formats/canonical.hpp"

namespace adalayer::engine {

static_assert(std::endian::native == std::endian::little, ".ada files are little-endian");

namespace {

constexpr uint64_t kAlign = 64;
constexpr const char* kSections[] = {"VALS", "NODE", "PORT", "CNST", "DATA", "META", "LEVL"};
constexpr size_t kSectionCount = std::size(kSections);
constexpr size_t kRequired = 6;       // all but the last
constexpr uint16_t kLevelsMinor = 4;  // files with levels

uint64_t aligned(uint64_t offset) { return (offset + kAlign - 1) / kAlign * kAlign; }

std::string version_text(uint16_t major, uint16_t minor) {
  return std::to_string(major) + "." + std::to_string(minor);
}

// ---- writing ------------------------------------------------------------------------------------

class Writer {
 public:
  explicit Writer(std::vector<uint8_t>& out) : out_(out) {}

  template <typename T>
  void put(T v) {
    static_assert(std::is_arithmetic_v<T>);
    bytes(&v, sizeof v);
  }
  void bytes(const void* data, size_t size) {
    const auto* first = static_cast<const uint8_t*>(data);
    out_.insert(out_.end(), first, first + size);
  }
  void count(size_t n) { put(static_cast<uint32_t>(n)); }
  template <typename T>
  void list(const std::vector<T>& values) {
    bytes(values.data(), values.size() * sizeof(T));
  }
  void text(const std::string& s) { bytes(s.data(), s.size()); }
  void align() { out_.resize(aligned(out_.size())); }

  /// A record: its size in bytes, then what `body` writes.
  template <class F>
  void record(F&& body) {
    const size_t at = out_.size();
    count(0);
    body();
    const auto size = static_cast<uint32_t>(out_.size() - at - 4);
    std::memcpy(out_.data() + at, &size, 4);
  }

 private:
  std::vector<uint8_t>& out_;
};

void write_value(Writer& w, const Value& v) {
  w.record([&] {
    w.put(static_cast<uint32_t>(v.kind));
    for (const int64_t axis : {v.c, v.h, v.w})
      w.put(static_cast<uint32_t>(axis));
    w.put(v.scale);
    w.put(v.zero_point);
    w.put(v.qmax);
    w.count(v.name.size());
    w.text(v.name);
  });
}

void write_values(Writer& w, const Program& p) {
  w.count(p.values.size());
  for (const Value& v : p.values)
    write_value(w, v);
}

void write_node(Writer& w, const Node& n) {
  w.record([&] {
    w.put(static_cast<uint32_t>(n.op));
    w.put(n.output);
    w.count(n.name.size());
    w.count(n.inputs.size());
    w.count(n.ints.size());
    w.count(n.floats.size());
    w.count(n.constants.size());
    w.text(n.name);
    w.list(n.inputs);
    w.list(n.ints);
    w.list(n.floats);
    w.list(n.constants);
  });
}

void write_nodes(Writer& w, const Program& p) {
  w.count(p.nodes.size());
  for (const Node& n : p.nodes)
    write_node(w, n);
}

void write_ports(Writer& w, const Program& p) {
  for (const auto* ports : {&p.inputs, &p.outputs}) {
    w.count(ports->size());
    w.list(*ports);
  }
}

void write_constants(Writer& w, const Program& p) {
  w.count(p.constants.size());
  uint64_t offset = 0;
  for (const Constant& c : p.constants) {
    offset = aligned(offset);
    w.record([&] {
      w.put(static_cast<uint32_t>(c.kind));
      w.put(offset);
      w.put(static_cast<uint64_t>(c.bytes.size()));
    });
    offset += c.bytes.size();
  }
}

/// The section starts on a multiple of 64 of the file, so each constant does too.
void write_data(Writer& w, const Program& p) {
  for (const Constant& c : p.constants) {
    w.align();
    w.list<uint8_t>(c.bytes);
  }
}

void write_metadata(Writer& w, const Program& p) {
  w.count(p.metadata.size());
  for (const auto& entry : p.metadata)
    w.record([&] {
      w.count(entry.first.size());
      w.count(entry.second.size());
      w.text(entry.first);
      w.text(entry.second);
    });
}

void write_levels(Writer& w, const Program& p) {
  w.count(p.levels.size());
  for (const Level& level : p.levels)
    w.record([&] {
      w.count(level.views.size());
      for (const Level::View& view : level.views) {
        w.put(view.constant);
        w.put(static_cast<uint32_t>(view.planes.bits));
        w.put(static_cast<uint32_t>(view.planes.drop));
      }
      w.count(level.values.size());
      for (const auto& [number, value] : level.values) {
        w.put(number);
        write_value(w, value);
      }
      w.count(level.nodes.size());
      for (const auto& [number, node] : level.nodes) {
        w.put(number);
        write_node(w, node);
      }
    });
}

// ---- reading ------------------------------------------------------------------------------------

/// Takes bytes from a section; never beyond its end.
class Reader {
 public:
  Reader(std::string_view section, std::span<const uint8_t> bytes)
      : section_(section), bytes_(bytes) {}

  template <typename... Pieces>
  [[noreturn]] void bad(const Pieces&... pieces) const {
    fail<CorruptData>("ada file, section ", section_, ": ", pieces...);
  }

  size_t left() const { return bytes_.size() - at_; }

  std::span<const uint8_t> take(uint64_t size, const char* what) {
    if (size > left()) bad("expected ", size, " bytes of ", what, ", ", left(), " are left");
    const auto taken = bytes_.subspan(at_, size);
    at_ += size;
    return taken;
  }
  template <typename T>
  T get(const char* what) {
    T v;
    std::memcpy(&v, take(sizeof v, what).data(), sizeof v);
    return v;
  }
  /// A count of things that take at least `each` bytes.
  uint32_t count(const char* what, uint64_t each, uint64_t limit) {
    const auto n = get<uint32_t>(what);
    if (n > limit) bad("expected at most ", limit, ' ', what, ", got ", n);
    if (n * each > left())
      bad("expected ", n, ' ', what, " of at least ", each, " bytes, ", left(), " bytes are left");
    return n;
  }
  template <typename T>
  std::vector<T> list(uint32_t n, const char* what) {
    const auto taken = take(uint64_t{n} * sizeof(T), what);
    std::vector<T> values(n);
    if (n != 0) std::memcpy(values.data(), taken.data(), taken.size());
    return values;
  }
  std::string text(uint32_t size, int64_t limit, const char* what) {
    if (size > limit) bad("expected at most ", limit, " bytes of ", what, ", got ", size);
    const auto taken = take(size, what);
    return {reinterpret_cast<const char*>(taken.data()), taken.size()};
  }
  /// The fields of one record. Later minor versions may add fields at its end.
  Reader record(const char* what) {
    const auto size = get<uint32_t>(what);
    return {section_, take(size, what)};
  }
  void end(bool newer, const char* what) const {
    if (!newer && left() != 0) bad(what, " has ", left(), " bytes too many");
  }

 private:
  std::string_view section_;
  std::span<const uint8_t> bytes_;
  size_t at_ = 0;
};

/// The sections of a file by their place in kSections.
struct Sections {
  std::span<const uint8_t> bytes[kSectionCount];
  bool have[kSectionCount] = {};
  bool newer = false;  // a later minor version than this reader's
  std::string version;

  Reader reader(std::string_view id) const {
    for (size_t k = 0; k < kSectionCount; ++k)
      if (id == kSections[k]) return {kSections[k], bytes[k]};
    fail("no such section: ", id);
  }
};

Value read_value(const Sections& sections, Reader& r, uint32_t k) {
  Reader f = r.record("a value");
  Value v;
  const auto kind = f.get<uint32_t>("a value's kind");
  if (kind > static_cast<uint32_t>(ValueKind::I32)) f.bad("value ", k, ": unknown kind ", kind);
  v.kind = static_cast<ValueKind>(kind);
  v.c = f.get<uint32_t>("a value's channels");
  v.h = f.get<uint32_t>("a value's height");
  v.w = f.get<uint32_t>("a value's width");
  v.scale = f.get<float>("a value's scale");
  v.zero_point = f.get<int32_t>("a value's zero point");
  v.qmax = f.get<int32_t>("a value's qmax");
  v.name = f.text(f.get<uint32_t>("a value's name"), kMaxName, "a value's name");
  f.end(sections.newer, "a value");
  return v;
}

// The least bytes of a record, the u32 in front of it included.
constexpr uint64_t kValueBytes = 36, kNodeBytes = 32;

void read_values(const Sections& sections, Program& p) {
  Reader r = sections.reader("VALS");
  const uint32_t n = r.count("values", kValueBytes, kMaxNodes + kMaxPorts);
  p.values.reserve(n);
  for (uint32_t k = 0; k < n; ++k)
    p.values.push_back(read_value(sections, r, k));
  r.end(sections.newer, "the section");
}

Node read_node(const Sections& sections, Reader& r, uint32_t k) {
  Reader f = r.record("a node");
  Node node;
  const auto op = f.get<uint32_t>("a node's operation");
  if (!is_operation(op))
    f.bad("node ", k, ": operation ", op, " is unknown to format ",
          version_text(kAdaMajor, kAdaMinor), "; the file is of format ", sections.version);
  node.op = static_cast<OpKind>(op);
  node.output = f.get<int32_t>("a node's output");
  const auto name = f.get<uint32_t>("the size of a node's name");
  const auto inputs = f.get<uint32_t>("the number of a node's inputs");
  const auto ints = f.get<uint32_t>("the number of a node's ints");
  const auto floats = f.get<uint32_t>("the number of a node's floats");
  const auto constants = f.get<uint32_t>("the number of a node's constants");
  node.name = f.text(name, kMaxName, "a node's name");
  node.inputs = f.list<int32_t>(inputs, "a node's inputs");
  node.ints = f.list<int64_t>(ints, "a node's ints");
  node.floats = f.list<float>(floats, "a node's floats");
  node.constants = f.list<int32_t>(constants, "a node's constants");
  f.end(sections.newer, "a node");
  return node;
}

void read_nodes(const Sections& sections, Program& p) {
  Reader r = sections.reader("NODE");
  const uint32_t n = r.count("nodes", kNodeBytes, kMaxNodes);
  p.nodes.reserve(n);
  for (uint32_t k = 0; k < n; ++k)
    p.nodes.push_back(read_node(sections, r, k));
  r.end(sections.newer, "the section");
}

void read_levels(const Sections& sections, Program& p) {
  if (!sections.have[kRequired]) return;
  Reader r = sections.reader("LEVL");
  const uint32_t n = r.count("levels", 16, kMaxLevels - 1);
  if (n == 0) r.bad("expected at least one level");
  for (uint32_t k = 0; k < n; ++k) {
    Reader f = r.record("a level");
    Level level;
    const uint32_t views = f.count("views of weights", 12, kMaxConstants);
    level.views.reserve(views);
    for (uint32_t v = 0; v < views; ++v) {
      const auto constant = f.get<int32_t>("the constant of a view");
      const auto bits = f.get<uint32_t>("the bits of a view");
      const auto drop = f.get<uint32_t>("the planes that a view leaves out");
      // All else is validate()'s: it knows what the constant holds.
      if (bits > formats::kMaxBits || drop > formats::kMaxBits)
        f.bad("level ", k + 1, ": expected views of at most ", formats::kMaxBits, " planes, got ",
              bits, " above ", drop);
      level.views.push_back({constant, {static_cast<int>(bits), static_cast<int>(drop)}});
    }
    const uint32_t values = f.count("values", 4 + kValueBytes, kMaxNodes + kMaxPorts);
    level.values.reserve(values);
    for (uint32_t v = 0; v < values; ++v) {
      const auto number = f.get<int32_t>("the number of a value");
      level.values.emplace_back(number, read_value(sections, f, v));
    }
    const uint32_t nodes = f.count("nodes", 4 + kNodeBytes, kMaxNodes);
    level.nodes.reserve(nodes);
    for (uint32_t v = 0; v < nodes; ++v) {
      const auto number = f.get<int32_t>("the number of a node");
      level.nodes.emplace_back(number, read_node(sections, f, v));
    }
    f.end(sections.newer, "a level");
    p.levels.push_back(std::move(level));
  }
  r.end(sections.newer, "the section");
}

void read_ports(const Sections& sections, Program& p) {
  Reader r = sections.reader("PORT");
  p.inputs = r.list<int32_t>(r.count("inputs", 4, kMaxPorts), "inputs");
  p.outputs = r.list<int32_t>(r.count("outputs", 4, kMaxPorts), "outputs");
  r.end(sections.newer, "the section");
}

void read_constants(const Sections& sections, Program& p) {
  Reader r = sections.reader("CNST");
  Reader data = sections.reader("DATA");
  const uint64_t data_bytes = data.left();
  const uint32_t n = r.count("constants", 24, kMaxConstants);
  p.constants.reserve(n);
  uint64_t end = 0;
  for (uint32_t k = 0; k < n; ++k) {
    Reader f = r.record("a constant");
    Constant c;
    const auto kind = f.get<uint32_t>("a constant's kind");
    if (kind > static_cast<uint32_t>(ConstantKind::U8))
      f.bad("constant ", k, ": unknown kind ", kind);
    c.kind = static_cast<ConstantKind>(kind);
    const auto offset = f.get<uint64_t>("a constant's offset");
    const auto size = f.get<uint64_t>("a constant's size");
    f.end(sections.newer, "a constant");
    // One after the other: shared bytes would let a small file fill the memory.
    if (offset != aligned(end))
      f.bad("constant ", k, ": expected offset ", aligned(end), ", got ", offset);
    if (offset > data_bytes || size > data_bytes - offset)
      f.bad("constant ", k, ": ", size, " bytes at offset ", offset, " do not fit in the ",
            data_bytes, " bytes of section DATA");
    data.take(offset - end, "padding");
    const auto bytes = data.take(size, "a constant");
    c.bytes = SharedBytes(bytes.begin(), bytes.end());
    end = offset + size;
    p.constants.push_back(std::move(c));
  }
  r.end(sections.newer, "the section");
  data.end(sections.newer, "the section");
}

void read_metadata(const Sections& sections, Program& p) {
  Reader r = sections.reader("META");
  const uint32_t n = r.count("entries", 12, kMaxMetadata);
  for (uint32_t k = 0; k < n; ++k) {
    Reader f = r.record("an entry");
    const auto key_size = f.get<uint32_t>("the size of a key");
    const auto text_size = f.get<uint32_t>("the size of a text");
    std::string key = f.text(key_size, kMaxName, "a key");
    std::string text = f.text(text_size, kMaxText, "a text");
    f.end(sections.newer, "an entry");
    if (!p.metadata.empty() && key <= p.metadata.rbegin()->first)
      f.bad("entry ", k, ": the keys are not in ascending order");
    p.metadata.emplace_hint(p.metadata.end(), std::move(key), std::move(text));
  }
  r.end(sections.newer, "the section");
}

std::string id_text(const AdaSection& s) {
  std::string text;
  for (const char c : s.id)
    text += c >= ' ' && c <= '~' ? c : '?';
  return text;
}

/// Checks the section table and every section's place and checksum.
Sections read_sections(std::span<const uint8_t> file) {
  const AdaHeader header = read_ada_header(file, file.size());
  const auto bad = [](const auto&... pieces) {
    fail<CorruptData>("ada file, section table: ", pieces...);
  };
  const uint64_t table_bytes = uint64_t{header.sections} * sizeof(AdaSection);
  if (table_bytes > file.size() - sizeof header)
    bad("expected ", table_bytes, " bytes, ", file.size() - sizeof header, " are left");
  const auto table = file.subspan(sizeof header, table_bytes);
  if (formats::checksum(table) != header.table_checksum)
    bad("the checksum does not match, the file is damaged");

  Sections found;
  found.newer = header.minor > kAdaMinor;
  found.version = version_text(header.major, header.minor);
  uint64_t end = sizeof header + table_bytes;
  for (uint32_t k = 0; k < header.sections; ++k) {
    AdaSection s;
    std::memcpy(&s, table.data() + k * sizeof s, sizeof s);
    const std::string id = id_text(s);
    if (!found.newer && s.reserved != 0) bad("section ", id, ": reserved bytes are not zero");
    if (s.offset != aligned(end))
      bad("section ", id, ": expected offset ", aligned(end), ", got ", s.offset);
    if (s.offset > file.size() || s.bytes > file.size() - s.offset)
      bad("section ", id, ": ", s.bytes, " bytes at offset ", s.offset,
          " do not fit in the file of ", file.size(), " bytes");
    for (const uint8_t byte : file.subspan(end, s.offset - end))
      if (byte != 0) bad("section ", id, ": the padding before it is not zero");
    const auto bytes = file.subspan(s.offset, s.bytes);
    if (formats::checksum(bytes) != s.checksum)
      fail<CorruptData>("ada file, section ", id,
                        ": the checksum does not match, the file is damaged");
    end = s.offset + s.bytes;
    for (size_t known = 0; known < kSectionCount; ++known) {
      if (std::memcmp(s.id, kSections[known], 4) != 0) continue;
      if (found.have[known]) bad("section ", id, " is listed twice");
      found.have[known] = true;
      found.bytes[known] = bytes;
    }
  }
  if (end != file.size())
    bad("expected the file to end at ", end, ", it has ", file.size(), " bytes");
  for (size_t known = 0; known < kRequired; ++known)
    if (!found.have[known]) bad("section ", kSections[known], " is missing");
  return found;
}

}  // namespace

AdaHeader read_ada_header(std::span<const uint8_t> bytes, uint64_t file_bytes) {
  const auto bad = [](const auto&... pieces) {
    fail<CorruptData>("ada file, header: ", pieces...);
  };
  AdaHeader h;
  if (bytes.size() < sizeof h) bad("expected at least ", sizeof h, " bytes, got ", bytes.size());
  std::memcpy(&h, bytes.data(), sizeof h);
  if (std::memcmp(h.magic, kAdaMagic, sizeof kAdaMagic) != 0)
    bad("the magic number is wrong, this is not an .ada file");
  // Before the checksum: a later major version may place it elsewhere.
  if (h.major != kAdaMajor)
    bad("format version ", version_text(h.major, h.minor), " is not supported; this library reads ",
        kAdaMajor, ".x and writes ", version_text(kAdaMajor, kAdaMinor));
  if (formats::checksum(bytes.first(offsetof(AdaHeader, checksum))) != h.checksum)
    bad("the checksum does not match, the file is damaged");
  if (h.file_bytes != file_bytes)
    bad("expected a file of ", h.file_bytes, " bytes, got ", file_bytes);
  if (h.table_offset != sizeof h)
    bad("expected the section table at ", sizeof h, ", got ", h.table_offset);
  if (h.minor <= kAdaMinor)
    for (const uint8_t byte : h.reserved)
      if (byte != 0) bad("reserved bytes are not zero");
  if (h.sections > kAdaMaxSections)
    bad("expected at most ", kAdaMaxSections, " sections, got ", h.sections);
  return h;
}

std::vector<uint8_t> write_program(const Program& p) {
  validate(p);
  return serialize(p);
}

namespace {

/// Whether a Combine divides, or has operands of different sizes.
bool combines_as_of_6(const Program& p, const Node& n) {
  const auto exists = [&](int32_t v) { return v >= 0 && static_cast<size_t>(v) < p.values.size(); };
  if (n.ints.size() != 1 || n.inputs.size() != 2) return false;
  if (n.ints[0] == static_cast<int64_t>(FloatPair::Quotient)) return true;
  if (!exists(n.inputs[0]) || !exists(n.inputs[1])) return false;
  const Value &a = p.values[n.inputs[0]], &b = p.values[n.inputs[1]];
  return a.c != b.c || a.h != b.h || a.w != b.w;
}

/// The first minor version that has all operations of a program in the forms that it uses, so that
/// older libraries read what they can run. (Programs that are not valid are written, too: tests and
/// the fuzzer make such files.)
uint16_t needed_minor(const Program& p) {
  const auto is = [&](int32_t v, ValueKind kind) {
    return v >= 0 && static_cast<size_t>(v) < p.values.size() && p.values[v].kind == kind;
  };
  uint16_t minor = 0;
  const auto since = [&](bool used, uint16_t version) {
    if (used) minor = std::max(minor, version);
  };
  since(!p.levels.empty(), kLevelsMinor);
  for (const Value& v : p.values)
    since(v.kind == ValueKind::I32, 2);
  for (const Node& n : p.nodes) {
    if (!is_operation(static_cast<uint32_t>(n.op))) continue;
    const Operation& o = operation(n.op);
    since(true, o.minor);
    since(n.op == OpKind::Attention && n.inputs.size() > 3, 3);
    since(n.op == OpKind::Combine && combines_as_of_6(p, n), 6);
    for (const Form& form : o.forms)
      since(is(n.output, form.output) && (n.inputs.empty() || is(n.inputs[0], form.inputs)),
            form.minor);
  }
  return minor;
}

}  // namespace

std::vector<uint8_t> serialize(const Program& p) {
  for (size_t k = 0; k < p.constants.size(); ++k)
    if (!p.constants[k].planes.all())
      fail<InvalidArgument>("constant ", k,
                            ": views of weights belong to levels; a program that is "
                            "saved has weights of its own");
  const size_t sections = p.levels.empty() ? kRequired : kSectionCount;
  AdaHeader header;
  std::copy(std::begin(kAdaMagic), std::end(kAdaMagic), header.magic);
  header.major = kAdaMajor;
  header.minor = needed_minor(p);
  header.sections = static_cast<uint32_t>(sections);
  header.table_offset = sizeof header;

  size_t constants = 0;
  for (const Constant& c : p.constants)
    constants += aligned(c.bytes.size());
  std::vector<uint8_t> file;
  file.reserve(constants + (size_t{1} << 16));
  const size_t table_bytes = sections * sizeof(AdaSection);
  file.resize(sizeof header + table_bytes);
  Writer w(file);
  constexpr void (*kWriters[])(Writer&, const Program&) = {
      write_values, write_nodes,    write_ports, write_constants,
      write_data,   write_metadata, write_levels};
  AdaSection table[kSectionCount];
  for (size_t k = 0; k < sections; ++k) {
    w.align();
    AdaSection& s = table[k];
    std::memcpy(s.id, kSections[k], 4);
    s.offset = file.size();
    kWriters[k](w, p);
    s.bytes = file.size() - s.offset;
    s.checksum = formats::checksum(std::span(file).subspan(s.offset, s.bytes));
  }
  std::memcpy(file.data() + sizeof header, table, table_bytes);
  header.file_bytes = file.size();
  header.table_checksum = formats::checksum(std::span(file).subspan(sizeof header, table_bytes));
  std::memcpy(file.data(), &header, sizeof header);
  header.checksum = formats::checksum(std::span(file).first(offsetof(AdaHeader, checksum)));
  std::memcpy(file.data(), &header, sizeof header);
  return file;
}

Program parse(std::span<const uint8_t> bytes) {
  const Sections sections = read_sections(bytes);
  Program p;
  read_values(sections, p);
  read_nodes(sections, p);
  read_ports(sections, p);
  read_constants(sections, p);
  read_metadata(sections, p);
  read_levels(sections, p);
  return p;
}

Program read_program(std::span<const uint8_t> bytes) {
  Program p = parse(bytes);
  try {
    validate(p);
  } catch (const InvalidArgument& e) {
    fail<CorruptData>("ada file, the program is not valid: ", e.what());
  }
  return p;
}

}  // namespace adalayer::engine
