#include "capi/model.hpp"

#include <algorithm>

#include "core/json.hpp"
#include "core/status.hpp"

namespace adalayer::capi {
namespace {

using engine::Value;

constexpr int64_t kMaxSize = int64_t{1} << 40;

int64_t elements_of(const Value& v) { return v.c * v.h * v.w; }

/// A list of sizes whose product stays below kMaxSize.
std::vector<int64_t> read_shape(const Json& json, const char* what) {
  std::vector<int64_t> shape;
  int64_t product = 1;
  for (const Json& size : json.as_list(what)) {
    shape.push_back(size.as_index(what, engine::kMaxElements));
    if (shape.back() == 0 || product > kMaxSize / shape.back())
      fail<CorruptData>(what, ": expected sizes from 1 on, of at most ", kMaxSize, " elements");
    product *= shape.back();
  }
  if (shape.size() > kMaxRank)
    fail<CorruptData>(what, ": expected at most ", kMaxRank, " sizes, got ", shape.size());
  return shape;
}

int64_t product(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t size : shape)
    n *= size;
  return n;
}

const Json& at(const std::vector<Json>& list, size_t k, const char* what) {
  if (k >= list.size())
    fail<CorruptData>(what, ": expected at least ", k + 1, " entries, got ", list.size());
  return list[k];
}

using Atoms = std::vector<std::pair<int64_t, int64_t>>;

/// Sizes and strides, which are at most `elements`, of a view of so many numbers: every number that
/// they lead to exists.
void check_atoms(const Atoms& atoms, int64_t elements) {
  constexpr const char* kWhat = "adalayer.outputs";
  int64_t count = 1, reach = 0;
  for (const auto& [size, stride] : atoms) {
    // Sizes are at most `elements`, at most 2^31, and so is their product so far.
    if (size == 0 || size > elements / count || stride > elements)
      fail<CorruptData>(kWhat, ": expected a view of ", elements, " elements");
    count *= size;
    reach += (size - 1) * stride;
    if (reach >= elements)
      fail<CorruptData>(kWhat, ": the view leads outside of ", elements, " elements");
  }
  if (count != elements)
    fail<CorruptData>(kWhat, ": expected a view of ", elements, " elements, got ", count);
}

Atoms read_atoms(const Json& json, int64_t elements) {
  constexpr const char* kWhat = "adalayer.outputs";
  Atoms atoms;
  if (json.as_list(kWhat).size() > kMaxAtoms)
    fail<CorruptData>(kWhat, ": expected a view of at most ", kMaxAtoms, " axes, got ",
                      json.items.size());
  for (const Json& pair : json.items) {
    const std::vector<Json>& both = pair.as_list(kWhat);
    atoms.emplace_back(at(both, 0, kWhat).as_index(kWhat, elements),
                       at(both, 1, kWhat).as_index(kWhat, elements));
  }
  check_atoms(atoms, elements);
  return atoms;
}

/// Names of the leaves by their paths in the nest of tuples, lists and dictionaries: "out", "0.1".
void name_leaves(const Json& structure, const std::string& path, std::vector<std::string>& names) {
  constexpr const char* kWhat = "adalayer.structure";
  if (structure.kind == Json::Kind::Number) {
    const int64_t leaf =
        structure.as_index(kWhat, std::max<int64_t>(static_cast<int64_t>(names.size()) - 1, 0));
    if (static_cast<size_t>(leaf) < names.size()) names[leaf] = path;
    return;
  }
  const auto below = [&](const std::string& name) {
    return path.empty() ? name : path + "." + name;
  };
  if (const Json* members = structure.find("dict")) {
    for (size_t k = 0; k < members->names.size(); ++k)
      name_leaves(members->items[k], below(members->names[k]), names);
    return;
  }
  const Json* items = structure.find("tuple");
  if (items == nullptr) items = structure.find("list");
  if (items == nullptr) fail<CorruptData>(kWhat, ": expected a tuple, list or dict");
  const std::vector<Json>& list = items->as_list(kWhat);
  for (size_t k = 0; k < list.size(); ++k)
    name_leaves(list[k], below(std::to_string(k)), names);
}

}  // namespace

Model::Model(engine::Program program, const engine::EngineOptions& options)
    : engine_(std::move(program), options) {
  const engine::Program& p = engine().program();
  for (const int32_t v : p.outputs)
    result_elements_.push_back(elements_of(p.values[v]));
  describe_inputs();
  describe_outputs();
  if (const std::string* classes = text("classes")) {
    const Json json = parse_json(*classes);
    for (const Json& name : json.as_list("classes"))
      class_names_.push_back(name.as_text("classes"));
  }
  read_preprocessing();
  check_rules();
}

/// The text about sizes is about these inputs and outputs.
void Model::check_rules() const {
  const engine::SizeRules& r = rules();
  if (!r.any()) return;
  constexpr const char* kSizes = "adalayer.sizes";
  if (r.ports.size() != inputs_.size())
    fail<CorruptData>(kSizes, ": expected ", inputs_.size(), " inputs, got ", r.ports.size());
  for (size_t k = 0; k < inputs_.size(); ++k) {
    if (r.ports[k].size() != inputs_[k].shape.size())
      fail<CorruptData>(kSizes, ": expected ", inputs_[k].shape.size(), " axes of input \"",
                        inputs_[k].name, "\", got ", r.ports[k].size());
    for (size_t a = 0; a < r.ports[k].size(); ++a)
      if (r.ports[k][a] >= 0 &&
          inputs_[k].shape[a] !=
              engine_.best()->compiled_sizes()[static_cast<size_t>(r.ports[k][a])])
        fail<CorruptData>(kSizes, ": axis ", a, " of input \"", inputs_[k].name, "\" is not ",
                          r.axes[static_cast<size_t>(r.ports[k][a])].name);
  }
  for (const OutputView& view : outputs_)
    if (view.entry >= r.outputs.size())
      fail<CorruptData>(kSizes, ": expected rules for ", view.entry + 1, " outputs, got ",
                        r.outputs.size());
}

const engine::SizeAxis* Model::axis(size_t input, size_t axis) const {
  if (!rules().any() || rules().ports[input][axis] < 0) return nullptr;
  return &rules().axes[static_cast<size_t>(rules().ports[input][axis])];
}

Sized Model::compiled(size_t level) const {
  return {engine_.at(level)->compiled(), inputs_, outputs_, result_elements_};
}

Sized Model::for_inputs(std::vector<Port> inputs, size_t level) const {
  const engine::SizeRules& r = rules();
  // Every axis is fixed, and nothing says how results would grow.
  if (!r.any()) return compiled(level);
  std::vector<int64_t> sizes(r.axes.size(), 0);
  for (size_t k = 0; k < inputs.size(); ++k)
    for (size_t a = 0; a < inputs[k].shape.size(); ++a) {
      if (axis(k, a) == nullptr) continue;
      int64_t& size = sizes[static_cast<size_t>(r.ports[k][a])];
      if (size != 0 && size != inputs[k].shape[a])
        fail<InvalidArgument>("input ", k, " ('", inputs[k].name, "'): expected ", size,
                              " along axis ", a, " (", axis(k, a)->name,
                              ") as in another input, got ", inputs[k].shape[a]);
      size = inputs[k].shape[a];
    }
  Sized found{engine_.at(level)->at(sizes), std::move(inputs), outputs_, {}};
  const engine::Program& p = found.engine->program();
  for (size_t k = 0; k < order_.size(); ++k)
    if (found.inputs[order_[k]].elements != elements_of(p.values[p.inputs[k]]))
      fail<CorruptData>("adalayer.sizes: input \"", found.inputs[order_[k]].name,
                        "\" is not what the program reads at this size");
  for (const int32_t v : p.outputs)
    found.result_elements.push_back(elements_of(p.values[v]));
  for (OutputView& view : found.outputs) {
    const Value& v = p.values[p.outputs[view.source]];
    const engine::OutputRule& rule = r.outputs[view.entry];
    const int64_t elements = elements_of(v);
    view.shape.clear();
    int64_t product = 1;
    for (const engine::Monomial& size : rule.shape) {
      view.shape.push_back(size.at(v.h, v.w));
      if (view.shape.back() < 1 || view.shape.back() > elements / product)
        fail<CorruptData>("adalayer.sizes: output \"", view.name, "\" does not fit");
      product *= view.shape.back();
    }
    if (product != elements || view.shape.size() > kMaxRank)
      fail<CorruptData>("adalayer.sizes: output \"", view.name, "\" does not fit");
    view.elements = elements;
    view.atoms.clear();
    if (!rule.atoms) continue;
    for (const engine::AxisPart& part : *rule.atoms)
      view.atoms.emplace_back(part.count.at(v.h, v.w), part.step.at(v.h, v.w));
    check_atoms(view.atoms, elements);
  }
  return found;
}

const std::string* Model::text(const char* key) const {
  const auto& metadata = engine().program().metadata;
  const auto found = metadata.find(key);
  return found == metadata.end() ? nullptr : &found->second;
}

bool Model::is_image(size_t input) const {
  const engine::Program& p = engine().program();
  for (size_t k = 0; k < order_.size(); ++k) {
    const Value& v = p.values[p.inputs[k]];
    if (order_[k] == input && inputs_[input].shape != std::vector<int64_t>{v.c, v.h, v.w})
      return false;
  }
  return inputs_[input].shape.size() == 3;
}

void Model::describe_inputs() {
  constexpr const char* kInputs = "adalayer.inputs";
  constexpr const char* kOrder = "adalayer.order";
  const engine::Program& p = engine().program();
  const std::string* described = text(kInputs);
  if (described == nullptr) {  // written by something else than the Python package
    for (const int32_t v : p.inputs) {
      const Value& value = p.values[v];
      order_.push_back(inputs_.size());
      const bool ids = value.kind == engine::ValueKind::I32;
      inputs_.push_back({value.name, {value.c, value.h, value.w}, elements_of(value), ids});
    }
    return;
  }
  const Json json = parse_json(*described);
  for (const Json& entry : json.as_list(kInputs)) {
    const std::vector<Json>& pair = entry.as_list(kInputs);
    Port port;
    port.name = at(pair, 0, kInputs).as_text(kInputs);
    port.shape = read_shape(at(pair, 1, kInputs), kInputs);
    port.elements = product(port.shape);
    inputs_.push_back(std::move(port));
  }
  const std::string* order = text(kOrder);
  if (order == nullptr) fail<CorruptData>(kOrder, " is missing");
  const Json numbers = parse_json(*order);
  if (inputs_.empty() || numbers.as_list(kOrder).size() != p.inputs.size())
    fail<CorruptData>(kOrder, ": expected ", p.inputs.size(), " numbers of inputs");
  for (size_t k = 0; k < p.inputs.size(); ++k) {
    const int64_t input =
        numbers.items[k].as_index(kOrder, static_cast<int64_t>(inputs_.size()) - 1);
    const int64_t wanted = elements_of(p.values[p.inputs[k]]);
    if (inputs_[input].elements != wanted)
      fail<CorruptData>(kInputs, ": input \"", inputs_[input].name, "\" has ",
                        inputs_[input].elements, " elements, the program reads ", wanted);
    const bool ids = p.values[p.inputs[k]].kind == engine::ValueKind::I32;
    const bool known = std::find(order_.begin(), order_.end(), input) != order_.end();
    if (known && inputs_[input].ids != ids)
      fail<CorruptData>(kInputs, ": input \"", inputs_[input].name,
                        "\" is read as floats and as token ids");
    inputs_[input].ids = ids;
    order_.push_back(static_cast<size_t>(input));
  }
}

void Model::describe_outputs() {
  constexpr const char* kOutputs = "adalayer.outputs";
  constexpr const char* kLeaves = "adalayer.leaves";
  const engine::Program& p = engine().program();
  const std::string* described = text(kOutputs);
  if (described == nullptr) {
    for (size_t k = 0; k < p.outputs.size(); ++k) {
      const Value& v = p.values[p.outputs[k]];
      outputs_.push_back({v.name, {v.c, v.h, v.w}, elements_of(v), k, k, {}});
    }
    return;
  }
  std::vector<OutputView> views;
  const Json json = parse_json(*described);
  for (const Json& entry : json.as_list(kOutputs)) {
    const std::vector<Json>& fields = entry.as_list(kOutputs);
    OutputView view;
    view.source = static_cast<size_t>(
        at(fields, 0, kOutputs)
            .as_index(kOutputs, static_cast<int64_t>(result_elements_.size()) - 1));
    view.shape = read_shape(at(fields, 1, kOutputs), kOutputs);
    view.elements = product(view.shape);
    if (view.elements != result_elements_[view.source])
      fail<CorruptData>(kOutputs, ": a tensor of ", view.elements,
                        " elements is described, the program writes ",
                        result_elements_[view.source]);
    const Json& atoms = at(fields, 2, kOutputs);
    if (atoms.kind != Json::Kind::Null) view.atoms = read_atoms(atoms, view.elements);
    view.name = p.values[p.outputs[view.source]].name;
    view.entry = views.size();
    views.push_back(std::move(view));
  }
  // The result's tensors in the order in which the network returns them, constants left out.
  const std::string* leaves = text(kLeaves);
  if (leaves == nullptr) fail<CorruptData>(kLeaves, " is missing");
  const Json list = parse_json(*leaves);
  std::vector<std::string> names(list.as_list(kLeaves).size());
  if (const std::string* structure = text("adalayer.structure"))
    name_leaves(parse_json(*structure), "", names);
  for (size_t k = 0; k < list.items.size(); ++k) {
    const Json* tensor = list.items[k].find("tensor");
    if (tensor == nullptr) continue;
    const int64_t view =
        tensor->as_index(kLeaves, std::max<int64_t>(static_cast<int64_t>(views.size()) - 1, 0));
    if (static_cast<size_t>(view) >= views.size())
      fail<CorruptData>(kLeaves, ": tensor ", view, " does not exist");
    outputs_.push_back(views[view]);
    if (!names[k].empty()) outputs_.back().name = names[k];
  }
  if (outputs_.empty()) fail<CorruptData>(kLeaves, ": the network returns no tensor");
}

void Model::read_preprocessing() {
  const std::string* preprocessing = text("preprocessing");
  if (preprocessing == nullptr) return;
  const Json json = parse_json(*preprocessing);
  if (json.kind != Json::Kind::Object) return;  // the writer's own
  has_preprocessing_ = true;
  const auto read = [&](const char* key, const char* what, float absent) {
    const Json* given = json.find(key);
    std::vector<float> numbers;
    if (given == nullptr || given->kind == Json::Kind::Null) {
      numbers.push_back(absent);
    } else if (given->kind == Json::Kind::Number) {
      numbers.push_back(given->as_float(what));
    } else {
      for (const Json& v : given->as_list(what))
        numbers.push_back(v.as_float(what));
    }
    return numbers;
  };
  mean_ = read("mean", "preprocessing, mean", 0.0f);
  std_ = read("std", "preprocessing, std", 1.0f);
  const bool positive = std::all_of(std_.begin(), std_.end(), [](float s) { return s > 0.0f; });
  if (mean_.empty() || std_.empty() || !positive)
    fail<CorruptData>("preprocessing: expected numbers as mean, and positive ones as std");
}

std::optional<Normalization> Model::normalization(int64_t channels) const {
  if (!has_preprocessing_ || channels < 1) return std::nullopt;
  const auto count = static_cast<size_t>(channels);
  const auto fits = [&](const std::vector<float>& v) { return v.size() == 1 || v.size() == count; };
  if (!fits(mean_) || !fits(std_)) return std::nullopt;
  Normalization n{mean_, std_};
  n.mean.resize(count, mean_[0]);
  n.std.resize(count, std_[0]);
  return n;
}

}  // namespace adalayer::capi
