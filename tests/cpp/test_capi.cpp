// adalayer.h: what it computes is what the engine computes, every wrong argument is a status and a
// sentence, and many threads may use it at once.
#include <unistd.h>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "capi_models.hpp"

using namespace programs;

extern "C" uint32_t abi_version_from_c(void);

TEST(versions_and_texts) {
  CHECK_EQ(adalayer_abi_version(), uint32_t{ADALAYER_ABI_VERSION});
  CHECK_EQ(abi_version_from_c(), uint32_t{ADALAYER_ABI_VERSION});
  CHECK(std::strlen(adalayer_version()) >= 5);
  CHECK(std::strlen(adalayer_instruction_set()) >= 3);
  CHECK_EQ(std::string(adalayer_status_text(ADALAYER_LIMIT_EXCEEDED)), "limit exceeded");
  CHECK_EQ(std::string(adalayer_status_text(99)), "unknown status");
}

TEST(describes_the_model) {
  adalayer_model* model = loaded(classifier());
  CHECK_EQ(adalayer_model_input_count(model), size_t{1});
  CHECK_EQ(adalayer_model_output_count(model), size_t{1});
  adalayer_tensor_info info = {};
  info.struct_size = sizeof info;
  CHECK_EQ(adalayer_model_input_info(model, 0, &info), ADALAYER_OK);
  CHECK_EQ(std::string(info.name), "pixels");
  CHECK_EQ(info.rank, size_t{3});
  CHECK(info.shape[0] == 3 && info.shape[1] == 5 && info.shape[2] == 4 && info.elements == 60);
  CHECK_EQ(adalayer_model_output_info(model, 0, &info), ADALAYER_OK);
  CHECK(info.shape[0] == 4 && info.elements == 4);
  CHECK_EQ(adalayer_model_class_count(model), size_t{4});
  CHECK_EQ(std::string(adalayer_model_class_name(model, 1)), "caf\xC3\xA9");
  CHECK(adalayer_model_class_name(model, 4) == nullptr);
  CHECK(adalayer_model_metadata(model, "absent") == nullptr);
  CHECK_EQ(adalayer_model_metadata_count(model), size_t{2});
  CHECK_EQ(std::string(adalayer_model_metadata_key(model, 1)), "preprocessing");
  CHECK(adalayer_model_metadata_key(model, 2) == nullptr);
  float mean[3], std[3];
  CHECK_EQ(adalayer_model_normalization(model, mean, std, 3), ADALAYER_OK);
  CHECK(mean[1] == 0.25f && std[2] == 0.4f);
  CHECK_EQ(adalayer_model_normalization(model, mean, std, 1), ADALAYER_INVALID_ARGUMENT);
  CHECK(adalayer_model_workspace_bytes(model) > 0);
  adalayer_model_free(model);
}

TEST(computes_what_the_engine_computes) {
  const Program program = classifier();
  const adalayer::Model model = shared(program);
  adalayer::Context context(model);
  for (const int threads : {0, 1, 2}) {
    context.set_threads(threads);
    for (const int64_t batch : {1, 3, 8}) {
      const Floats x = ramp(static_cast<size_t>(60 * batch));
      CHECK(same(context.run(batch, x), engine_run(program, batch, {x})[0]));
    }
  }
  CHECK(context.run(0, Floats()).empty());
}

TEST(every_form_of_weights_gives_the_same_bits) {
  const Program program = every_operation();
  const std::vector<uint8_t> file = write_program(program);
  const Floats x = ramp(120), z = ramp(4);
  const std::vector<Floats> want = engine_run(program, 1, {x, z});
  for (const adalayer_weights form :
       {ADALAYER_WEIGHTS_MEASURED, ADALAYER_WEIGHTS_PACKED, ADALAYER_WEIGHTS_UNPACKED}) {
    adalayer::Context context(adalayer::Model(file.data(), file.size(), 0, form));
    Outputs outputs(want);
    const std::vector<Floats>& got = outputs.got;
    context.run(1,
                {{x.data(), 480, ADALAYER_FLOAT32, ADALAYER_NCHW},
                 {z.data(), 16, ADALAYER_FLOAT32, ADALAYER_NCHW}},
                outputs.places);
    for (size_t k = 0; k < got.size(); ++k)
      CHECK_MSG(same(got[k], want[k]), std::to_string(form) + " " + std::to_string(k));
  }
}

TEST(pixels_and_channels_last) {
  const Program program = classifier();
  const adalayer::Model model = shared(program);
  adalayer::Context context(model);
  constexpr float kMean[] = {0.5f, 0.25f, 0.125f}, kStd[] = {0.2f, 0.3f, 0.4f};
  constexpr size_t kBatch = 2, kPlane = 20;
  std::vector<uint8_t> last(kBatch * 60), planes(kBatch * 60);
  Floats floats_last(kBatch * 60), floats(kBatch * 60);
  for (size_t n = 0; n < kBatch; ++n)
    for (size_t i = 0; i < kPlane; ++i)
      for (size_t c = 0; c < 3; ++c) {
        const size_t a = n * 60 + i * 3 + c, b = n * 60 + c * kPlane + i;
        last[a] = planes[b] = static_cast<uint8_t>((n * 97 + i * 31 + c * 111) % 256);
        const float scaled = static_cast<float>(last[a]) / 255.0f;
        floats_last[a] = floats[b] = (scaled - kMean[c]) / kStd[c];
      }
  const Floats want = engine_run(program, kBatch, {floats})[0];
  CHECK(same(context.run(kBatch, last, ADALAYER_NHWC), want));
  CHECK(same(context.run(kBatch, planes, ADALAYER_NCHW), want));
  CHECK(same(context.run(kBatch, floats_last, ADALAYER_NHWC), want));
  // The caller's own normalization takes the place of the model's.
  context.set_normalization({0, 0, 0}, {1, 1, 1});
  for (size_t i = 0; i < floats.size(); ++i)
    floats[i] = static_cast<float>(planes[i]) / 255.0f;
  CHECK(same(context.run(kBatch, planes, ADALAYER_NCHW), engine_run(program, kBatch, {floats})[0]));
}

TEST(an_input_that_is_read_as_floats_may_be_channels_last) {
  Builder b;
  const auto x = b.value("x", 2, 2, 2, ValueKind::F32);
  const auto y = b.node(OpKind::Softmax, {x}, b.value("y", 2, 2, 2, ValueKind::F32));
  b.p.inputs = {x};
  b.p.outputs = {y};
  const adalayer::Model model = shared(b.p);
  adalayer::Context context(model);
  const Floats planes = {1, 2, 3, 4, 5, 7, 9, 11}, last = {1, 5, 2, 7, 3, 9, 4, 11};
  CHECK(same(context.run(1, last, ADALAYER_NHWC), context.run(1, planes, ADALAYER_NCHW)));
}

TEST(several_inputs_and_outputs) {
  const Program program = every_operation();
  const adalayer::Model model = shared(program);
  CHECK_EQ(model.input_count(), size_t{2});
  CHECK_EQ(model.output_count(), size_t{3});
  adalayer::Context context(model);
  const Floats x = ramp(2 * 120), z = ramp(2 * 4);
  std::vector<Floats> got;
  std::vector<adalayer_output> outputs;
  for (size_t k = 0; k < 3; ++k)
    got.emplace_back(2 * model.output(k).elements);
  for (Floats& y : got)
    outputs.push_back({y.data(), y.size() * 4});
  context.run(2,
              {{x.data(), x.size() * 4, ADALAYER_FLOAT32, ADALAYER_NCHW},
               {z.data(), z.size() * 4, ADALAYER_FLOAT32, ADALAYER_NCHW}},
              outputs);
  const std::vector<Floats> want = engine_run(program, 2, {x, z});
  for (size_t k = 0; k < 3; ++k)
    CHECK_MSG(same(got[k], want[k]), std::to_string(k));
}

TEST(floats_and_masks) {
  const Program program = float_program();
  const adalayer::Model model = shared(program);
  adalayer::Context context(model);
  Floats images(2 * 4 * 4 * 7);
  for (size_t i = 0; i < images.size(); ++i)
    images[i] = static_cast<float>(i % 23) * 0.3f - 3.0f;
  const std::vector<int32_t> mask = {1, 1, 0, 1, 5, 0, 1, 0, 0, 0, 1, 1};
  std::vector<std::vector<float>> given = {images, Floats(12)};
  std::memcpy(given[1].data(), mask.data(), 48);
  const auto want = engine_run(program, 2, given);
  std::vector<Floats> got;
  std::vector<adalayer_output> outputs;
  for (const auto& y : want)
    outputs.push_back({got.emplace_back(y.size()).data(), y.size() * 4});
  context.run(2,
              {{images.data(), images.size() * 4, ADALAYER_FLOAT32, ADALAYER_NCHW},
               {mask.data(), 48, ADALAYER_INT32, ADALAYER_NCHW}},
              outputs);
  for (size_t k = 0; k < want.size(); ++k)
    CHECK_MSG(same(got[k], want[k]), std::to_string(k));
}

/// A program whose inputs are all floats gives the engine's bits.
static void check_floats_in_and_out(const Program& program, int64_t batch) {
  const adalayer::Model model = shared(program);
  adalayer::Context context(model);
  std::vector<std::vector<float>> given;
  std::vector<adalayer_input> inputs;
  for (const int32_t v : program.inputs) {
    const Value& value = program.values[v];
    Floats x(static_cast<size_t>(batch * value.c * value.h * value.w));
    for (size_t i = 0; i < x.size(); ++i)
      x[i] = static_cast<float>((i * 7 + static_cast<size_t>(v)) % 23) * 0.3f - 3.0f;
    given.push_back(std::move(x));
  }
  for (const auto& x : given)
    inputs.push_back({x.data(), x.size() * 4, ADALAYER_FLOAT32, ADALAYER_NCHW});
  const auto want = engine_run(program, batch, given);
  std::vector<Floats> got;
  std::vector<adalayer_output> outputs;
  for (const auto& y : want)
    outputs.push_back({got.emplace_back(y.size()).data(), y.size() * 4});
  context.run(batch, inputs, outputs);
  for (size_t k = 0; k < want.size(); ++k)
    CHECK_MSG(same(got[k], want[k]), std::to_string(k));
}

TEST(recurrent_layers) {
  for (const int64_t batch : {1, 5})
    check_floats_in_and_out(recurrent_program(7, 9, 8), batch);
}

TEST(reductions_and_joined_floats) { check_floats_in_and_out(reduced_program(), 3); }

TEST(token_ids) {
  const Program program = token_program();
  const adalayer::Model model = shared(program);
  CHECK_EQ(model.input().type, ADALAYER_INT32);
  CHECK_EQ(model.output().type, ADALAYER_FLOAT32);
  CHECK_EQ(model.input().elements, size_t{6});
  adalayer::Context context(model);
  const std::vector<int32_t> ids = {0, 1, 2, 3, 4, 0, 4, 4, 2, 2, 1, 3};
  std::vector<std::vector<float>> bits = {Floats(12)};
  std::memcpy(bits[0].data(), ids.data(), 48);
  CHECK(same(context.run(2, ids), engine_run(program, 2, bits)[0]));

  const auto refused = [&](int64_t batch, adalayer_input in, const char* text) {
    Floats out(static_cast<size_t>(batch) * 18);
    std::string message;
    try {
      context.run(batch, {in}, {{out.data(), out.size() * 4}});
    } catch (const adalayer::Failure& e) {
      CHECK_EQ(e.status(), ADALAYER_INVALID_ARGUMENT);
      message = e.what();
    }
    CHECK_MSG(message.find(text) != std::string::npos, message);
  };
  const std::vector<int32_t> wrong = {0, 1, 2, 3, 5, 0};
  refused(1, {wrong.data(), 24, ADALAYER_INT32, ADALAYER_NCHW},
          "input 0 ('ids'): expected ids of 0 to 4, got 5 in sample 0, position 4");
  refused(1, {bits[0].data(), 24, ADALAYER_FLOAT32, ADALAYER_NCHW},
          "it is token ids: expected type ADALAYER_INT32, got 0");
  refused(1, {ids.data(), 6, ADALAYER_UINT8, ADALAYER_NCHW}, "expected type ADALAYER_INT32");
  refused(1, {ids.data(), 24, ADALAYER_INT32, ADALAYER_NHWC}, "expected layout ADALAYER_NCHW");
  refused(1, {ids.data(), 20, ADALAYER_INT32, ADALAYER_NCHW}, "expected 24 bytes");
  refused(1, {reinterpret_cast<const char*>(ids.data()) + 1, 24, ADALAYER_INT32, ADALAYER_NCHW},
          "not aligned");
  adalayer::Context images(shared(classifier()));
  bool threw = false;
  try {
    images.run(1, std::vector<int32_t>(60));
  } catch (const adalayer::Failure& e) {
    threw = std::string(e.what()).find("expected type ADALAYER_FLOAT32") != std::string::npos;
  }
  CHECK(threw);
}

TEST(a_program_of_an_earlier_header_gets_what_it_knows) {
  adalayer_model* model = loaded(token_program());
  adalayer_tensor_info info = {};
  info.struct_size = offsetof(adalayer_tensor_info, type);
  info.type = 77;
  CHECK_EQ(adalayer_model_input_info(model, 0, &info), ADALAYER_OK);
  CHECK(info.elements == 6 && info.type == 77);
  info.struct_size -= 1;
  CHECK_EQ(adalayer_model_input_info(model, 0, &info), ADALAYER_INVALID_ARGUMENT);
  adalayer_model_free(model);
}

TEST(one_input_is_floats_or_ids) {
  Builder b;
  b.p = token_program();
  const auto x = b.value("numbers", 1, 1, 6, ValueKind::F32);
  const auto y = b.node(OpKind::Softmax, {x}, b.value("copy", 1, 1, 6, ValueKind::F32));
  b.p.inputs.push_back(x);
  b.p.outputs.push_back(y);
  b.p.metadata["adalayer.inputs"] = R"([["both", [6], "int64"]])";
  b.p.metadata["adalayer.order"] = "[0, 0]";
  b.p.metadata["adalayer.outputs"] = "[[0, [18], null], [1, [6], null]]";
  b.p.metadata["adalayer.leaves"] = R"([{"tensor": 0}, {"tensor": 1}])";
  const std::vector<uint8_t> file = write_program(b.p);
  adalayer_model* model = nullptr;
  CHECK_EQ(adalayer_model_load_memory(file.data(), file.size(), nullptr, &model),
           ADALAYER_CORRUPT_DATA);
  CHECK_MSG(says("read as floats and as token ids"), adalayer_last_error());
}

TEST(views_and_names_of_the_result) {
  // As the Python package describes a dictionary of a transposed tensor, a constant and the tensor
  // as it is, of a network whose one input has another shape than the program's.
  Program p = classifier();
  p.metadata["adalayer.inputs"] = R"([["unused", [2]], ["image", [60]]])";
  p.metadata["adalayer.order"] = "[1]";
  p.metadata["adalayer.outputs"] = R"([[0, [2, 2], [[2, 1], [2, 2]]], [0, [4], null]])";
  p.metadata["adalayer.leaves"] = R"([{"tensor": 0}, {"constant": 3}, {"tensor": 1}])";
  p.metadata["adalayer.structure"] = R"({"dict": {"out": 0, "rest": {"tuple": [1, 2]}}})";
  const adalayer::Model model = shared(p);
  CHECK_EQ(model.input(1).name, "image");
  CHECK_EQ(model.output(0).name, "out");
  CHECK_EQ(model.output(1).name, "rest.1");
  CHECK_EQ(model.output(0).shape.size(), size_t{2});
  adalayer::Context context(model);
  const Floats unused(2 * 2), x = ramp(2 * 60);
  Floats turned(2 * 4), plain(2 * 4);
  const adalayer_input first{unused.data(), 16, ADALAYER_FLOAT32, ADALAYER_NCHW};
  context.run(2, {first, {x.data(), x.size() * 4, ADALAYER_FLOAT32, ADALAYER_NCHW}},
              {{turned.data(), 32}, {plain.data(), 32}});
  const Floats want = engine_run(classifier(), 2, {x})[0];
  CHECK(same(plain, want));
  for (size_t n = 0; n < 2; ++n)
    CHECK(turned[n * 4 + 1] == want[n * 4 + 2] && turned[n * 4 + 2] == want[n * 4 + 1] &&
          turned[n * 4] == want[n * 4] && turned[n * 4 + 3] == want[n * 4 + 3]);
  // It is no image of three axes.
  bool threw = false;
  try {
    context.run(2, {first, {x.data(), x.size() * 4, ADALAYER_FLOAT32, ADALAYER_NHWC}},
                {{turned.data(), 32}, {plain.data(), 32}});
  } catch (const adalayer::Failure& e) {
    threw = e.status() == ADALAYER_INVALID_ARGUMENT;
  }
  CHECK(threw);
}

TEST(texts_that_do_not_describe_the_program) {
  const auto status = [](const std::vector<std::pair<std::string, std::string>>& texts) {
    Program p = classifier();
    p.metadata["adalayer.inputs"] = R"([["image", [3, 5, 4]]])";
    p.metadata["adalayer.order"] = "[0]";
    p.metadata["adalayer.outputs"] = "[[0, [4], null]]";
    p.metadata["adalayer.leaves"] = R"([{"tensor": 0}])";
    p.metadata["adalayer.structure"] = "0";
    for (const auto& [key, text] : texts) {
      if (text.empty())
        p.metadata.erase(key);
      else
        p.metadata[key] = text;
    }
    const std::vector<uint8_t> file = write_program(p);
    adalayer_model* model = nullptr;
    const adalayer_status s = adalayer_model_load_memory(file.data(), file.size(), nullptr, &model);
    CHECK_EQ(model == nullptr, s != ADALAYER_OK);
    adalayer_model_free(model);
    return s;
  };
  CHECK_EQ(status({}), ADALAYER_OK);
  const std::vector<std::pair<std::string, std::string>> wrong = {
      {"classes", "[1]"},
      {"classes", "{"},
      {"preprocessing", R"({"mean": [0.5], "std": [0]})"},
      {"preprocessing", R"({"mean": []})"},
      {"preprocessing", R"({"mean": "3"})"},
      {"preprocessing", R"({"std": -1})"},
      {"preprocessing", R"({"mean": [1e400], "std": [1]})"},
      {"adalayer.inputs", "[]"},
      {"adalayer.inputs", R"([["image", [61]]])"},
      {"adalayer.inputs", R"([["image", [0, 60]]])"},
      {"adalayer.inputs", R"([["image", [1, 1, 1, 1, 1, 1, 1, 1, 60]]])"},
      {"adalayer.inputs", R"([["image", [1e300, 1e300]]])"},
      {"adalayer.order", ""},
      {"adalayer.order", "[1]"},
      {"adalayer.order", "[-1]"},
      {"adalayer.order", "[0, 0]"},
      {"adalayer.outputs", "[[1, [4], null]]"},
      {"adalayer.outputs", "[[0, [5], null]]"},
      {"adalayer.outputs", "[[0, [4]]]"},
      {"adalayer.outputs", "[[0, [4], [[4, 2]]]]"},
      {"adalayer.outputs", "[[0, [4], [[2, 1]]]]"},
      {"adalayer.outputs", "[[0, [4], [[4, 9007199254740993]]]]"},
      {"adalayer.leaves", ""},
      {"adalayer.leaves", "[]"},
      {"adalayer.leaves", R"([{"tensor": 1}])"},
      {"adalayer.structure", R"({"set": [0]})"},
      {"adalayer.structure", std::string(100000, '[')},
  };
  for (const auto& text : wrong)
    CHECK_MSG(status({text}) == ADALAYER_CORRUPT_DATA,
              text.first + " " + text.second.substr(0, 60));
}

TEST(wrong_arguments) {
  adalayer_model* model = loaded(classifier());
  adalayer_context* context = nullptr;
  CHECK_EQ(adalayer_context_create(model, &context), ADALAYER_OK);
  adalayer_model_free(model);  // the context keeps it
  const Floats x = ramp(60);
  Floats y(4);
  const adalayer_input in{x.data(), 240, ADALAYER_FLOAT32, ADALAYER_NCHW};
  const adalayer_output out{y.data(), 16};
  CHECK_EQ(adalayer_run(context, 1, &in, 1, &out, 1), ADALAYER_OK);

  const auto refused = [&](int64_t batch, adalayer_input i, adalayer_output o, const char* part) {
    CHECK_EQ(adalayer_run(context, batch, &i, 1, &o, 1), ADALAYER_INVALID_ARGUMENT);
    CHECK_MSG(says(part), adalayer_last_error());
  };
  refused(-1, in, out, "batch of 0 or more");
  refused(2, in, out, "expected 480 bytes for a batch of 2, got 240");
  refused(INT64_MAX, in, out, "too large");
  refused(1, {nullptr, 240, ADALAYER_FLOAT32, ADALAYER_NCHW}, out, "'pixels'): the data are null");
  refused(1, {x.data(), 239, ADALAYER_FLOAT32, ADALAYER_NCHW}, out, "expected 240 bytes");
  refused(1, {x.data(), 240, 7, ADALAYER_NCHW}, out, "type");
  refused(1, {x.data(), 240, ADALAYER_FLOAT32, 7}, out, "layout");
  refused(1, {reinterpret_cast<const char*>(x.data()) + 1, 240, ADALAYER_FLOAT32, ADALAYER_NCHW},
          out, "aligned");
  refused(1, in, {nullptr, 16}, "output 0 ('scores'): the data are null");
  refused(1, in, {y.data(), 20}, "expected 16 bytes");
  CHECK_EQ(adalayer_run(nullptr, 1, &in, 1, &out, 1), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(adalayer_run(context, 1, nullptr, 1, &out, 1), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(adalayer_run(context, 1, &in, 1, nullptr, 1), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(adalayer_run(context, 1, &in, 0, &out, 1), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(adalayer_run(context, 1, &in, 1, &out, 0), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(adalayer_context_set_threads(context, -1), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(adalayer_context_set_threads(context, 1 << 20), ADALAYER_INVALID_ARGUMENT);
  const float zeros[] = {0, 0, 0}, ones[] = {1, 1, 1}, nan[] = {NAN, 0, 0};
  const auto normalize = [&](size_t k, const float* mean, const float* std, size_t n) {
    return adalayer_context_set_normalization(context, k, mean, std, n);
  };
  CHECK_EQ(normalize(0, zeros, ones, 3), ADALAYER_OK);
  CHECK_EQ(normalize(1, zeros, ones, 3), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(normalize(0, zeros, ones, 2), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(normalize(0, zeros, zeros, 3), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(normalize(0, nan, ones, 3), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(normalize(0, nullptr, ones, 3), ADALAYER_INVALID_ARGUMENT);
  // It still works.
  CHECK_EQ(adalayer_run(context, 1, &in, 1, &out, 1), ADALAYER_OK);
  adalayer_context_free(context);

  CHECK_EQ(adalayer_context_create(nullptr, &context), ADALAYER_INVALID_ARGUMENT);
  CHECK(context == nullptr);
  CHECK_EQ(adalayer_context_create(nullptr, nullptr), ADALAYER_INVALID_ARGUMENT);
  adalayer_model_free(nullptr);
  adalayer_context_free(nullptr);
  CHECK_EQ(adalayer_model_input_count(nullptr), size_t{0});
  CHECK(adalayer_model_metadata(nullptr, "a") == nullptr);
  CHECK(adalayer_model_class_name(nullptr, 0) == nullptr);

  model = loaded(classifier());
  adalayer_tensor_info info = {};
  CHECK_EQ(adalayer_model_input_info(model, 0, &info), ADALAYER_INVALID_ARGUMENT);
  info.struct_size = sizeof info;
  CHECK_EQ(adalayer_model_input_info(model, 1, &info), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(adalayer_model_input_info(model, 0, nullptr), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(adalayer_model_input_info(nullptr, 0, &info), ADALAYER_INVALID_ARGUMENT);
  adalayer_model_free(model);
}

TEST(pixels_without_normalization_are_refused) {
  Program p = classifier();
  p.metadata.erase("preprocessing");
  const adalayer::Model model = shared(p);
  adalayer::Context context(model);
  std::string message;
  try {
    context.run(1, std::vector<uint8_t>(60));
  } catch (const adalayer::Failure& e) {
    message = e.what();
  }
  CHECK(message.find("adalayer_context_set_normalization") != std::string::npos);
  context.set_normalization({0, 0, 0}, {1, 1, 1});
  CHECK_EQ(context.run(1, std::vector<uint8_t>(60)).size(), size_t{4});
}

TEST(preprocessing_that_leaves_something_out) {
  const auto normalization = [](const char* text, size_t channels) {
    Program p = classifier();
    p.metadata["preprocessing"] = text;
    adalayer_model* model = loaded(p);
    Floats mean(channels, -7), std(channels, -7);
    const adalayer_status status =
        adalayer_model_normalization(model, mean.data(), std.data(), channels);
    adalayer_model_free(model);
    mean.insert(mean.end(), std.begin(), std.end());
    return status == ADALAYER_OK ? mean : Floats();
  };
  CHECK(normalization(R"({"size": 4})", 3) == (Floats{0, 0, 0, 1, 1, 1}));
  CHECK(normalization(R"({"mean": 0.5, "std": [1, 2, 3]})", 3) ==
        (Floats{0.5f, 0.5f, 0.5f, 1, 2, 3}));
  CHECK(normalization(R"({"mean": null, "std": 2})", 1) == (Floats{0, 2}));
  CHECK(normalization(R"({"mean": [1, 2, 3]})", 1).empty());
  CHECK(normalization(R"(["another form"])", 3).empty());
}

TEST(files) {
  namespace fs = std::filesystem;
  const fs::path path = fs::temp_directory_path() / ("capi-" + std::to_string(::getpid()) + ".ada");
  const std::vector<uint8_t> bytes = write_program(classifier());
  adalayer_model* model = nullptr;
  CHECK_EQ(adalayer_model_load(path.c_str(), nullptr, &model), ADALAYER_FILE_ERROR);
  CHECK(says(path.c_str()));
  const auto write = [&](size_t size) {
    std::ofstream out(path, std::ios::binary);
    out.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(size));
  };
  write(bytes.size());
  CHECK_EQ(adalayer_model_load(path.c_str(), nullptr, &model), ADALAYER_OK);
  adalayer_model_free(model);
  CHECK_EQ(adalayer_model_load(path.c_str(), nullptr, nullptr), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(adalayer_model_load(nullptr, nullptr, &model), ADALAYER_INVALID_ARGUMENT);
  adalayer_load_options options = {sizeof options, 100, ADALAYER_WEIGHTS_MEASURED, 0};
  CHECK_EQ(adalayer_model_load(path.c_str(), &options, &model), ADALAYER_LIMIT_EXCEEDED);
  options = {sizeof options, 0, 3, 0};
  CHECK_EQ(adalayer_model_load(path.c_str(), &options, &model), ADALAYER_INVALID_ARGUMENT);
  CHECK(says("weights"));
  options = {sizeof options, 0, ADALAYER_WEIGHTS_PACKED, 1};
  CHECK_EQ(adalayer_model_load(path.c_str(), &options, &model), ADALAYER_INVALID_ARGUMENT);
  // Callers of an older header gave the limit alone, or know more than this library.
  options.struct_size = 16;
  CHECK_EQ(adalayer_model_load(path.c_str(), &options, &model), ADALAYER_OK);
  adalayer_model_free(model);
  options.struct_size = 4;
  CHECK_EQ(adalayer_model_load(path.c_str(), &options, &model), ADALAYER_INVALID_ARGUMENT);
  write(bytes.size() - 1);
  CHECK_EQ(adalayer_model_load(path.c_str(), nullptr, &model), ADALAYER_CORRUPT_DATA);
  CHECK(says(path.c_str()) && model == nullptr);
  fs::remove(path);
  CHECK_EQ(adalayer_model_load_memory(nullptr, 4, nullptr, &model), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(adalayer_model_load_memory(bytes.data(), 0, nullptr, &model), ADALAYER_CORRUPT_DATA);
}

TEST(small_files_of_large_programs_are_refused) {
  // A few hundred bytes that describe tensors of 33 MB.
  Builder b;
  const auto x = b.value("x", 1, 1 << 12, 1 << 11, ValueKind::F32);
  const auto q = b.node(OpKind::Quantize, {x}, b.value("q", 1, 1 << 12, 1 << 11));
  const auto y = b.node(OpKind::AdaptiveAvgPool, {q}, b.value("y", 1, 1, 1), {0, 255, 10},
                        {kInverse, kScale}, {-1});
  const auto f = b.node(OpKind::Dequantize, {y}, b.value("f", 1, 1, 1, ValueKind::F32));
  b.p.inputs = {x};
  b.p.outputs = {f};
  const std::vector<uint8_t> file = write_program(b.p);
  CHECK(file.size() < 2000);
  adalayer_model* model = nullptr;
  adalayer_load_options options = {sizeof options, 16 << 20, ADALAYER_WEIGHTS_PACKED, 0};
  CHECK_EQ(adalayer_model_load_memory(file.data(), file.size(), &options, &model),
           ADALAYER_LIMIT_EXCEEDED);
  CHECK_MSG(says("the limit is"), adalayer_last_error());
  options.memory_limit = 128 << 20;
  CHECK_EQ(adalayer_model_load_memory(file.data(), file.size(), &options, &model), ADALAYER_OK);
  CHECK(adalayer_model_workspace_bytes(model) > (16u << 20));
  adalayer_model_free(model);
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }
