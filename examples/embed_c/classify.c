/* Classifies one image with a compiled network, in plain C.
 *
 *   classify model.ada image.ppm [scores.f32]
 *
 * The image is a binary PPM (P6, 8 bits) of the size that the network takes; any picture becomes
 * one with, for instance, `convert photo.jpg -resize 224x224^ -gravity center -extent 224x224
 * image.ppm`: the shorter side is scaled and the middle taken, as the compression did. Its pixels are
 * normalized with "mean" and "std" of the model's preprocessing. Prints the five best classes; the third
 * argument names a file for all scores (float32). */
#include <adalayer/adalayer.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The next number of a PPM header; blanks and comments are skipped. -1 if there is none. */
static long header_number(FILE* file) {
  int c = fgetc(file);
  while (c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '#') {
    if (c == '#')
      while (c != '\n' && c != EOF)
        c = fgetc(file);
    c = fgetc(file);
  }
  if (c < '0' || c > '9') return -1;
  long value = 0;
  while (c >= '0' && c <= '9' && value < 1000000) {
    value = value * 10 + (c - '0');
    c = fgetc(file);
  }
  return value; /* the one blank behind the number has been read */
}

/* Pixels of a PPM file, height x width x 3. Null, with a message, if it has another size. */
static unsigned char* read_ppm(const char* path, long width, long height) {
  FILE* file = fopen(path, "rb");
  unsigned char* pixels = NULL;
  if (file == NULL) {
    fprintf(stderr, "%s: cannot be opened\n", path);
    return NULL;
  }
  if (fgetc(file) != 'P' || fgetc(file) != '6') {
    fprintf(stderr, "%s: expected a binary PPM file (P6)\n", path);
  } else {
    const long w = header_number(file), h = header_number(file), levels = header_number(file);
    if (w != width || h != height || levels != 255) {
      fprintf(stderr, "%s: expected %ld x %ld pixels of 8 bits, got %ld x %ld with maximum %ld\n",
              path, width, height, w, h, levels);
    } else {
      const size_t bytes = (size_t)width * (size_t)height * 3;
      pixels = malloc(bytes);
      if (pixels != NULL && fread(pixels, 1, bytes, file) != bytes) {
        fprintf(stderr, "%s: ends early\n", path);
        free(pixels);
        pixels = NULL;
      }
    }
  }
  fclose(file);
  return pixels;
}

static void print_best(const adalayer_model* model, const float* scores, size_t count) {
  char* printed = calloc(count, 1);
  if (printed == NULL) return;
  for (size_t rank = 0; rank < 5 && rank < count; ++rank) {
    size_t best = count;
    for (size_t k = 0; k < count; ++k)
      if (!printed[k] && (best == count || scores[k] > scores[best])) best = k;
    printed[best] = 1;
    const char* name = adalayer_model_class_name(model, best);
    printf("%10.4f  %s (class %zu)\n", scores[best], name == NULL ? "?" : name, best);
  }
  free(printed);
}

static int classify(const adalayer_model* model, adalayer_context* context, const char* image,
                    const char* scores_path) {
  adalayer_tensor_info in = {.struct_size = sizeof in}, out = {.struct_size = sizeof out};
  if (adalayer_model_input_info(model, 0, &in) != ADALAYER_OK ||
      adalayer_model_output_info(model, 0, &out) != ADALAYER_OK) {
    fprintf(stderr, "%s\n", adalayer_last_error());
    return 1;
  }
  if (adalayer_model_input_count(model) != 1 || in.rank != 3 || in.shape[0] != 3) {
    fprintf(stderr, "expected a network whose one input is an image of 3 channels\n");
    return 1;
  }
  unsigned char* pixels = read_ppm(image, (long)in.shape[2], (long)in.shape[1]);
  float* scores = malloc(out.elements * sizeof(float));
  int failed = 1;
  if (pixels != NULL && scores != NULL) {
    const adalayer_input input = {pixels, in.elements, ADALAYER_UINT8, ADALAYER_NHWC};
    const adalayer_output output = {scores, out.elements * sizeof(float)};
    if (adalayer_run(context, 1, &input, 1, &output, 1) != ADALAYER_OK) {
      fprintf(stderr, "%s\n", adalayer_last_error());
    } else {
      print_best(model, scores, out.elements);
      failed = 0;
    }
  }
  if (!failed && scores_path != NULL) {
    FILE* file = fopen(scores_path, "wb");
    failed = file == NULL || fwrite(scores, sizeof(float), out.elements, file) != out.elements;
    if (file != NULL && fclose(file) != 0) failed = 1;
    if (failed) fprintf(stderr, "%s: cannot be written\n", scores_path);
  }
  free(scores);
  free(pixels);
  return failed;
}

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    fprintf(stderr, "usage: %s model.ada image.ppm [scores.f32]\n", argv[0]);
    return 2;
  }
  adalayer_model* model = NULL;
  adalayer_context* context = NULL;
  int failed = 1;
  if (adalayer_model_load(argv[1], NULL, &model) != ADALAYER_OK ||
      adalayer_context_create(model, &context) != ADALAYER_OK)
    fprintf(stderr, "%s\n", adalayer_last_error());
  else
    failed = classify(model, context, argv[2], argc > 3 ? argv[3] : NULL);
  adalayer_context_free(context);
  adalayer_model_free(model);
  return failed;
}
