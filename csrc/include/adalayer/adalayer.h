/* The C interface of adalayer_native: runs compiled networks (.ada files) inside any program.
 *
 *   adalayer_model* model = NULL;
 *   adalayer_context* context = NULL;
 *   if (adalayer_model_load("model.ada", NULL, &model) != ADALAYER_OK ||
 *       adalayer_context_create(model, &context) != ADALAYER_OK) {
 *     fprintf(stderr, "%s\n", adalayer_last_error());
 *     ...
 *   }
 *   adalayer_input in = {pixels, sizeof pixels, ADALAYER_UINT8, ADALAYER_NHWC};
 *   adalayer_output out = {scores, sizeof scores};
 *   adalayer_run(context, 1, &in, 1, &out, 1);
 *
 * Needs neither Python nor torch. No exception leaves a function. Every function may be called from
 * any thread; a model may be shared by any number of threads, a context is used by one at a time.
 * Texts are UTF-8 and end with a zero byte. Functions check every size that they are given.
 *
 * Stability: functions, numbers and the layout of structs stay as they are for one value of
 * ADALAYER_ABI_VERSION, which is also the number in libadalayer.so.N. Structs that may grow begin
 * with struct_size, which the caller sets; the library touches no byte beyond it. */
#ifndef ADALAYER_ADALAYER_H_
#define ADALAYER_ADALAYER_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ADALAYER_ABI_VERSION 1
#define ADALAYER_API __attribute__((visibility("default")))

typedef int32_t adalayer_status;
enum {
  ADALAYER_OK = 0,
  ADALAYER_INVALID_ARGUMENT = 1, /* the caller passed something wrong: null, size, name, number */
  ADALAYER_CORRUPT_DATA = 2,     /* the model is damaged, of another format, or not valid */
  ADALAYER_FILE_ERROR = 3,       /* the operating system refused to open or read the file */
  ADALAYER_LIMIT_EXCEEDED = 4,   /* the model would need more memory than allowed */
  ADALAYER_OUT_OF_MEMORY = 5,
  ADALAYER_INTERNAL_ERROR = 6
};

/* What went wrong in the last call of this thread that did not return ADALAYER_OK: a sentence,
 * empty if there was none. Valid until the thread's next failing call. Never null. */
ADALAYER_API const char* adalayer_last_error(void);

/* "invalid argument", ...; "unknown status" for other numbers. */
ADALAYER_API const char* adalayer_status_text(adalayer_status status);

/* ADALAYER_ABI_VERSION and the version of the package, "1.2.3", that the library was built from. */
ADALAYER_API uint32_t adalayer_abi_version(void);
ADALAYER_API const char* adalayer_version(void);

/* The instruction set that runs here: "amx", "avx512vnni", "avx512", "avxvnni", "avx2", on ARM
 * "i8mm", "dotprod", "neon", or "scalar". The environment variable ADALAYER_FORCE_ISA chooses
 * another; results have the same bits on all of them. If it names an unknown or unsupported one:
 * "invalid", and loading a model says why. */
ADALAYER_API const char* adalayer_instruction_set(void);

/* ---- models -----------------------------------------------------------------------------------
 */

/* A network: immutable, shared by its contexts, which keep it alive. */
typedef struct adalayer_model adalayer_model;

/* Weights below 8 bits stay packed in memory, or are unpacked to bytes once. Which is faster
 * depends on layer and machine: by default the model is run a few times on noise while it is
 * loaded, to find out, and the result is kept in the user's cache folder (ADALAYER_PLAN_CACHE names
 * another file, or says "off"). All forms give the same bits. */
typedef int32_t adalayer_weights;
enum { ADALAYER_WEIGHTS_MEASURED = 0, ADALAYER_WEIGHTS_PACKED = 1, ADALAYER_WEIGHTS_UNPACKED = 2 };

typedef struct adalayer_load_options {
  size_t struct_size; /* sizeof(adalayer_load_options) */
  /* The most bytes that the file, the weights and tables made of it and the tensors of one call may
   * take in all. A model that needs more is refused before that much is allocated. 0: 4 GiB. */
  uint64_t memory_limit;
  adalayer_weights weights;
  int32_t reserved; /* 0 */
} adalayer_load_options;

/* options: null for the defaults. *model is set to null on failure. */
ADALAYER_API adalayer_status adalayer_model_load(const char* path,
                                                 const adalayer_load_options* options,
                                                 adalayer_model** model);
/* The bytes of an .ada file. They are copied; the caller may free them afterwards. */
ADALAYER_API adalayer_status adalayer_model_load_memory(const void* bytes, size_t size,
                                                        const adalayer_load_options* options,
                                                        adalayer_model** model);
/* Null is allowed. Contexts of the model stay usable. */
ADALAYER_API void adalayer_model_free(adalayer_model* model);

#define ADALAYER_MAX_RANK 8

typedef int32_t adalayer_type;
enum {
  ADALAYER_FLOAT32 = 0, /* what the network takes, preprocessed already */
  ADALAYER_UINT8 = 1,   /* pixels, which are normalized, see adalayer_context_set_normalization */
  ADALAYER_INT32 = 2    /* token ids, where the network takes those */
};

/* One input or output, without its batch axis, which comes first and has any size. */
typedef struct adalayer_tensor_info {
  size_t struct_size; /* sizeof(adalayer_tensor_info) */
  const char* name;   /* lives as long as the model */
  size_t rank;
  int64_t shape[ADALAYER_MAX_RANK]; /* channels, height, width for an image */
  uint64_t elements;                /* the product of `shape` */
  /* ADALAYER_FLOAT32, or ADALAYER_INT32 for an input of token ids. Not touched where struct_size
   * ends before it. */
  adalayer_type type;
  int32_t reserved; /* 0 */
} adalayer_tensor_info;

/* 0 for a null model. */
ADALAYER_API size_t adalayer_model_input_count(const adalayer_model* model);
ADALAYER_API size_t adalayer_model_output_count(const adalayer_model* model);
ADALAYER_API adalayer_status adalayer_model_input_info(const adalayer_model* model, size_t index,
                                                       adalayer_tensor_info* info);
ADALAYER_API adalayer_status adalayer_model_output_info(const adalayer_model* model, size_t index,
                                                        adalayer_tensor_info* info);

/* The sizes that one axis of an input may have: the shapes of adalayer_tensor_info are those that
 * the network was compiled for, and some networks take others. */
typedef struct adalayer_axis_info {
  size_t struct_size;  /* sizeof(adalayer_axis_info) */
  const char* name;    /* axes of one name have one size; "" for a fixed one; lives as long
                        * as the model */
  int64_t least, most; /* the same number for a fixed one */
  int64_t multiple_of;
} adalayer_axis_info;

/* `axis`: of the input's shape, which has no batch. */
ADALAYER_API adalayer_status adalayer_model_input_sizes(const adalayer_model* model, size_t index,
                                                        size_t axis, adalayer_axis_info* info);

/* Names of the classes; 0 and null where the model has none. */
ADALAYER_API size_t adalayer_model_class_count(const adalayer_model* model);
ADALAYER_API const char* adalayer_model_class_name(const adalayer_model* model, size_t index);

/* A text of the file: "preprocessing" and "classes" are JSON. Null where there is none. Texts and
 * keys live as long as the model. */
ADALAYER_API const char* adalayer_model_metadata(const adalayer_model* model, const char* key);
ADALAYER_API size_t adalayer_model_metadata_count(const adalayer_model* model);
ADALAYER_API const char* adalayer_model_metadata_key(const adalayer_model* model, size_t index);

/* "mean" and "std" of the model's preprocessing, `channels` numbers each: an image whose pixels are
 * scaled to 0 .. 1 becomes (x - mean[c]) / std[c]. Where it leaves them out they are 0 and 1; one
 * number stands for all channels. INVALID_ARGUMENT if the model has no preprocessing, or one for
 * another number of channels. */
ADALAYER_API adalayer_status adalayer_model_normalization(const adalayer_model* model, float* mean,
                                                          float* std, size_t channels);

/* Levels of quality that the model has, 1 or more; 0 for a null model. Level 0 is the best one, and
 * what contexts begin with; the others read fewer bits of the same stored weights
 * (adalayer_context_set_quality). */
ADALAYER_API size_t adalayer_model_quality_count(const adalayer_model* model);

/* Bytes of the weights at the best quality, shared by all contexts, and of the tensors of one
 * running call. */
ADALAYER_API uint64_t adalayer_model_weight_bytes(const adalayer_model* model);
ADALAYER_API uint64_t adalayer_model_workspace_bytes(const adalayer_model* model);

/* ---- contexts and runs --------------------------------------------------------------------------
 */

/* What one thread needs to run a model: settings and scratch memory. One call at a time; a second
 * one that comes meanwhile is refused. */
typedef struct adalayer_context adalayer_context;

ADALAYER_API adalayer_status adalayer_context_create(const adalayer_model* model,
                                                     adalayer_context** context);
/* Null is allowed. */
ADALAYER_API void adalayer_context_free(adalayer_context* context);

/* How many threads a run may use, the caller included. 0, the default: one per CPU that the process
 * may use. A server that runs many contexts at once wants 1. */
ADALAYER_API adalayer_status adalayer_context_set_threads(adalayer_context* context,
                                                          int32_t threads);

/* How u8 pixels of input `index` become numbers: (q / 255 - mean[c]) / std[c] in float32, as
 * torchvision's ToTensor and Normalize compute it. Replaces the model's own. `channels` is the
 * first size of the input. */
ADALAYER_API adalayer_status adalayer_context_set_normalization(adalayer_context* context,
                                                                size_t index, const float* mean,
                                                                const float* std, size_t channels);

/* The shape of input `index` in the runs to come, `rank` sizes without the batch, as in
 * adalayer_tensor_info: what adalayer_model_input_sizes allows. The first run at a new shape makes
 * tables for it, which takes milliseconds; the model keeps those of the shapes used last. */
ADALAYER_API adalayer_status adalayer_context_set_shape(adalayer_context* context, size_t index,
                                                        const int64_t* shape, size_t rank);

/* The quality of the runs to come, from 0, the best, to adalayer_model_quality_count - 1.
 * INVALID_ARGUMENT for a level that does not exist; the context then keeps the one that it has. The
 * first context that asks for a level makes it ready, which takes as long as loading does; contexts
 * at other levels go on running meanwhile, and the model keeps the levels used last. */
ADALAYER_API adalayer_status adalayer_context_set_quality(adalayer_context* context, size_t level);

/* Inputs and outputs at the shapes that the context was given. Names live as long as the context,
 * until its next adalayer_context_set_shape. INVALID_ARGUMENT where the shapes of inputs do not
 * belong together, or the network cannot be made for them. */
ADALAYER_API adalayer_status adalayer_context_input_info(adalayer_context* context, size_t index,
                                                         adalayer_tensor_info* info);
ADALAYER_API adalayer_status adalayer_context_output_info(adalayer_context* context, size_t index,
                                                          adalayer_tensor_info* info);

typedef int32_t adalayer_layout;
enum {
  ADALAYER_NCHW = 0, /* the order of adalayer_tensor_info.shape */
  ADALAYER_NHWC = 1  /* images: channels last, as decoders of JPEG and PNG give them */
};

/* `bytes` must be exactly batch x elements x (4 or 1). Floats and ids are aligned to 4 bytes. An
 * input of token ids (adalayer_tensor_info.type) comes as ADALAYER_INT32, all others as one of the
 * other two. */
typedef struct adalayer_input {
  const void* data;
  size_t bytes;
  adalayer_type type;
  adalayer_layout layout;
} adalayer_input;

/* float32, batch x elements, in the order of the output's shape. */
typedef struct adalayer_output {
  float* data;
  size_t bytes;
} adalayer_output;

/* Runs a batch of any size, 0 included. Buffers must not overlap. A NaN among the inputs becomes
 * the lowest level of the input's grid, infinities saturate. A token id that the network has no
 * embedding for is INVALID_ARGUMENT, before anything is computed. After an error the outputs hold
 * nothing of use. Once a context has run a batch of some size it allocates nothing for that size or
 * less. */
ADALAYER_API adalayer_status adalayer_run(adalayer_context* context, int64_t batch,
                                          const adalayer_input* inputs, size_t input_count,
                                          const adalayer_output* outputs, size_t output_count);

#ifdef __cplusplus
}
#endif

#endif /* ADALAYER_ADALAYER_H_ */
