// Contexts of a model: many threads, other sizes, other levels.
#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "capi_models.hpp"

using namespace programs;

TEST(many_threads_with_contexts_of_their_own) {
  const Program program = every_operation();
  const Floats x = ramp(3 * 120), z = ramp(3 * 4);
  const std::vector<Floats> want = engine_run(program, 3, {x, z});
  const adalayer::Model model = shared(program);
  constexpr int kThreads = 4, kRounds = 10;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      adalayer::Context context(model);
      context.set_threads(1 + t % 3);
      for (int round = 0; round < kRounds; ++round) {
        Outputs outputs(want);
        const std::vector<Floats>& got = outputs.got;
        context.run(3,
                    {{x.data(), x.size() * 4, ADALAYER_FLOAT32, ADALAYER_NCHW},
                     {z.data(), z.size() * 4, ADALAYER_FLOAT32, ADALAYER_NCHW}},
                    outputs.places);
        for (size_t k = 0; k < got.size(); ++k)
          CHECK(same(got[k], want[k]));
        // Errors belong to the thread that made them.
        CHECK_EQ(adalayer_context_set_threads(nullptr, t), ADALAYER_INVALID_ARGUMENT);
        CHECK(says("context"));
      }
    });
  for (std::thread& thread : threads)
    thread.join();
}

TEST(one_context_in_two_threads_is_refused_or_right) {
  const Program program = classifier();
  const Floats x = ramp(60);
  const Floats want = engine_run(program, 1, {x})[0];
  const adalayer::Model model = shared(program);
  adalayer_context* context = nullptr;
  CHECK_EQ(adalayer_context_create(model.get(), &context), ADALAYER_OK);
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        Floats y(4);
        const adalayer_input in{x.data(), 240, ADALAYER_FLOAT32, ADALAYER_NCHW};
        const adalayer_output out{y.data(), 16};
        const adalayer_status status = adalayer_run(context, 1, &in, 1, &out, 1);
        if (status == ADALAYER_OK)
          CHECK(same(y, want));
        else
          CHECK(status == ADALAYER_INVALID_ARGUMENT && says("in use by another thread"));
      }
    });
  for (std::thread& thread : threads)
    thread.join();
  adalayer_context_free(context);
}

TEST(a_context_at_other_sizes) {
  const adalayer::Model model = shared(ranged());
  const adalayer::AxisInfo height = model.sizes(0, 1);
  CHECK_EQ(height.name, "height");
  CHECK(height.least == 8 && height.most == 64 && height.multiple_of == 2);
  const adalayer::AxisInfo channels = model.sizes(0, 0);
  CHECK(channels.name.empty() && channels.least == 3 && channels.most == 3);
  adalayer::Context context(model);
  for (const auto& [h, w] : {std::pair<int64_t, int64_t>{16, 20}, {10, 64}, {64, 8}, {16, 20}}) {
    context.set_shape({3, h, w});
    CHECK(context.input().shape == (std::vector<int64_t>{3, h, w}));
    CHECK(context.output(0).shape == (std::vector<int64_t>{4, h - 3, w}));
    const size_t elements = context.input().elements;
    const Floats x = ramp(elements);
    Floats dense(context.output(0).elements), means(context.output(1).elements);
    context.run(1, {{x.data(), x.size() * 4, ADALAYER_FLOAT32, ADALAYER_NCHW}},
                {{dense.data(), dense.size() * 4}, {means.data(), means.size() * 4}});
    const std::vector<Floats> wanted = engine_run(sized_network(h, w), 1, {x});
    CHECK(same(dense, wanted[0]) && same(means, wanted[1]));
  }
  // What the buffers hold has to be what the shape says.
  const Floats small(3 * 16 * 18);
  adalayer_context* c = nullptr;
  CHECK_EQ(adalayer_context_create(model.get(), &c), ADALAYER_OK);
  const int64_t shape[] = {3, 16, 18}, odd[] = {3, 15, 18}, other[] = {4, 16, 18};
  CHECK_EQ(adalayer_context_set_shape(c, 0, shape, 3), ADALAYER_OK);
  const adalayer_input in = {small.data(), small.size() * 4 - 4, ADALAYER_FLOAT32, ADALAYER_NCHW};
  Floats dense(4 * 13 * 18), means(4);
  const adalayer_output out[] = {{dense.data(), dense.size() * 4}, {means.data(), 16}};
  CHECK_EQ(adalayer_run(c, 1, &in, 1, out, 2), ADALAYER_INVALID_ARGUMENT);
  CHECK(says("expected 3456 bytes"));
  CHECK_EQ(adalayer_context_set_shape(c, 0, odd, 3), ADALAYER_INVALID_ARGUMENT);
  CHECK(says("(height): expected a multiple of 2 from 8 to 64, got 15"));
  CHECK_EQ(adalayer_context_set_shape(c, 0, other, 3), ADALAYER_INVALID_ARGUMENT);
  CHECK(says("axis 0 is fixed"));
  CHECK_EQ(adalayer_context_set_shape(c, 0, shape, 2), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(adalayer_context_set_shape(c, 1, shape, 3), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(adalayer_context_set_shape(c, 0, nullptr, 3), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(adalayer_context_set_shape(nullptr, 0, shape, 3), ADALAYER_INVALID_ARGUMENT);
  adalayer_tensor_info info = {};
  info.struct_size = sizeof info;
  CHECK_EQ(adalayer_context_output_info(c, 0, &info), ADALAYER_OK);
  CHECK(info.shape[1] == 13 && info.shape[2] == 18);
  CHECK_EQ(adalayer_context_output_info(c, 2, &info), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(adalayer_context_input_info(nullptr, 0, &info), ADALAYER_INVALID_ARGUMENT);
  adalayer_axis_info axis = {};
  CHECK_EQ(adalayer_model_input_sizes(model.get(), 0, 1, &axis), ADALAYER_INVALID_ARGUMENT);
  axis.struct_size = sizeof axis;
  CHECK_EQ(adalayer_model_input_sizes(model.get(), 0, 3, &axis), ADALAYER_INVALID_ARGUMENT);
  CHECK_EQ(adalayer_model_input_sizes(model.get(), 1, 0, &axis), ADALAYER_INVALID_ARGUMENT);
  adalayer_context_free(c);
  // A model for one size.
  const adalayer::Model fixed = shared(classifier());
  CHECK_EQ(fixed.sizes(0, 1).most, int64_t{5});
  adalayer::Context alone(fixed);
  bool refused = false;
  try {
    alone.set_shape({3, 6, 4});
  } catch (const adalayer::Failure& e) {
    refused = e.status() == ADALAYER_INVALID_ARGUMENT;
  }
  CHECK(refused);
  alone.set_shape({3, 5, 4});  // the size that it has
  CHECK_EQ(alone.output().elements, fixed.output().elements);
}

TEST(a_context_at_other_levels) {
  Program p = programs::ranged();
  for (const int drop : {1, 2})
    add_level(p, narrowed(ranged(), drop));
  const adalayer::Model model = shared(p);
  CHECK_EQ(model.quality_count(), size_t{3});
  CHECK_EQ(adalayer_model_quality_count(nullptr), size_t{0});
  adalayer::Context context(model);
  for (const size_t level : {0, 2, 1, 2, 0})
    for (const auto& [h, w] : {std::pair<int64_t, int64_t>{16, 20}, {10, 64}}) {
      context.set_quality(level);
      context.set_shape({3, h, w});
      const Floats x = ramp(context.input().elements);
      Floats dense(context.output(0).elements), means(context.output(1).elements);
      context.run(1, {{x.data(), x.size() * 4, ADALAYER_FLOAT32, ADALAYER_NCHW}},
                  {{dense.data(), dense.size() * 4}, {means.data(), means.size() * 4}});
      const Program wanted = narrowed(sized_network(h, w), static_cast<int>(level));
      const std::vector<Floats> want = engine_run(wanted, 1, {x});
      CHECK(same(dense, want[0]) && same(means, want[1]));
    }
  adalayer_context* c = nullptr;
  CHECK_EQ(adalayer_context_create(model.get(), &c), ADALAYER_OK);
  CHECK_EQ(adalayer_context_set_quality(c, 3), ADALAYER_INVALID_ARGUMENT);
  CHECK(says("quality level 3 does not exist: there are 3"));
  CHECK_EQ(adalayer_context_set_quality(nullptr, 0), ADALAYER_INVALID_ARGUMENT);
  adalayer_context_free(c);
  const adalayer::Model alone = shared(classifier());
  CHECK_EQ(alone.quality_count(), size_t{1});
  CHECK_EQ(adalayer_context_create(alone.get(), &c), ADALAYER_OK);
  CHECK_EQ(adalayer_context_set_quality(c, 0), ADALAYER_OK);
  CHECK_EQ(adalayer_context_set_quality(c, 1), ADALAYER_INVALID_ARGUMENT);
  adalayer_context_free(c);
}
