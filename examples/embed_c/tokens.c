/* Runs a network over one text's token ids, in plain C.
 *
 *   tokens model.ada ids.txt [results.f32]
 *
 * ids.txt holds as many whole numbers as the network takes, between blanks: the ids that the
 * model's tokenizer gives, padded as in training. Prints the numbers of the first result; the third
 * argument names a file for them (float32). */
#include <adalayer/adalayer.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

/* `count` ids of a text file. Null, with a message, if it holds others. */
static int32_t* read_ids(const char* path, size_t count) {
  FILE* file = fopen(path, "r");
  int32_t* ids = malloc(count * sizeof *ids);
  size_t found = 0;
  if (file == NULL || ids == NULL) {
    fprintf(stderr, "%s: cannot be opened\n", path);
  } else {
    int32_t id;
    while (fscanf(file, "%" SCNd32, &id) == 1) {
      if (found < count) ids[found] = id;
      ++found;
    }
    if (found != count || !feof(file)) {
      fprintf(stderr, "%s: expected %zu whole numbers, found %zu\n", path, count, found);
      found = 0;
    }
  }
  if (file != NULL) fclose(file);
  if (found == count) return ids;
  free(ids);
  return NULL;
}

static int run(const adalayer_model* model, adalayer_context* context, const char* ids_path,
               const char* results_path) {
  adalayer_tensor_info in = {.struct_size = sizeof in}, out = {.struct_size = sizeof out};
  if (adalayer_model_input_info(model, 0, &in) != ADALAYER_OK ||
      adalayer_model_output_info(model, 0, &out) != ADALAYER_OK) {
    fprintf(stderr, "%s\n", adalayer_last_error());
    return 1;
  }
  if (adalayer_model_input_count(model) != 1 || in.type != ADALAYER_INT32 ||
      adalayer_model_output_count(model) != 1) {
    fprintf(stderr, "expected a network that makes one tensor of token ids\n");
    return 1;
  }
  int32_t* ids = read_ids(ids_path, in.elements);
  float* results = malloc(out.elements * sizeof(float));
  int failed = 1;
  if (ids != NULL && results != NULL) {
    const adalayer_input input = {ids, in.elements * sizeof *ids, ADALAYER_INT32, ADALAYER_NCHW};
    const adalayer_output output = {results, out.elements * sizeof(float)};
    if (adalayer_run(context, 1, &input, 1, &output, 1) != ADALAYER_OK) {
      fprintf(stderr, "%s\n", adalayer_last_error()); /* an id that the model does not know, too */
    } else {
      for (size_t k = 0; k < out.elements; ++k)
        printf("%10.4f\n", results[k]);
      failed = 0;
    }
  }
  if (!failed && results_path != NULL) {
    FILE* file = fopen(results_path, "wb");
    failed = file == NULL || fwrite(results, sizeof(float), out.elements, file) != out.elements;
    if (file != NULL && fclose(file) != 0) failed = 1;
    if (failed) fprintf(stderr, "%s: cannot be written\n", results_path);
  }
  free(results);
  free(ids);
  return failed;
}

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    fprintf(stderr, "usage: %s model.ada ids.txt [results.f32]\n", argv[0]);
    return 2;
  }
  adalayer_model* model = NULL;
  adalayer_context* context = NULL;
  int failed = 1;
  if (adalayer_model_load(argv[1], NULL, &model) != ADALAYER_OK ||
      adalayer_context_create(model, &context) != ADALAYER_OK)
    fprintf(stderr, "%s\n", adalayer_last_error());
  else
    failed = run(model, context, argv[2], argc > 3 ? argv[3] : NULL);
  adalayer_context_free(context);
  adalayer_model_free(model);
  return failed;
}
