/* C interface of the CUDA engine (libadalayer_cuda.so).
 *
 * Every function returns 0, a positive cudaError_t, or one of the negative codes below, and never
 * throws; adalayer_cuda_last_error() then says what happened. Pointers named "device" are memory of
 * the engine's device; a stream is a cudaStream_t as a number (0: the default stream). Work is
 * enqueued, not awaited, unless a function says so. Functions may be called from many threads.
 */
#ifndef ADALAYER_CUDA_H
#define ADALAYER_CUDA_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define ADALAYER_CUDA_API
#else
#define ADALAYER_CUDA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
  ADALAYER_CUDA_OK = 0,
  ADALAYER_CUDA_NULL_POINTER = -1,
  ADALAYER_CUDA_INVALID = -2,       /* an argument out of range, or a program that cannot run */
  ADALAYER_CUDA_CORRUPT = -3,       /* damaged program or weights */
  ADALAYER_CUDA_OUT_OF_MEMORY = -4, /* on the device or the host */
  ADALAYER_CUDA_UNSUPPORTED = -5,   /* the device's compute capability is below 8.0 */
  ADALAYER_CUDA_STRUCT_SIZE = -6,   /* the caller was built against another version */
  ADALAYER_CUDA_FAILED = -7         /* anything else */
};

/* What the last failed call of this thread said, in a full sentence; "" before one. */
ADALAYER_CUDA_API const char* adalayer_cuda_last_error(void);

typedef struct {
  size_t struct_size; /* sizeof(AdalayerCudaDevice), set by the caller */
  char name[256];
  int32_t compute_major, compute_minor;
  int32_t multiprocessors;
  int32_t shared_bytes; /* that one block can have */
  uint64_t memory_bytes;
} AdalayerCudaDevice;

ADALAYER_CUDA_API int adalayer_cuda_device_count(int* count);
ADALAYER_CUDA_API int adalayer_cuda_device_info(int device, AdalayerCudaDevice* info);

/* ---- engines: a program on one device ------------------------------------------------------- */

typedef struct AdalayerCudaEngine AdalayerCudaEngine;

enum {
  ADALAYER_CUDA_NO_GRAPH = 1,   /* launch kernels one by one, not as a CUDA graph */
  ADALAYER_CUDA_NO_OVERLAP = 2, /* a kernel starts when the one in front has ended */
  ADALAYER_CUDA_TUNE = 4 /* measure the convolution kernels when a batch size is first seen */
};

typedef struct {
  size_t struct_size; /* sizeof(AdalayerCudaOptions), set by the caller */
  uint32_t flags;
  int32_t choice; /* >= 0: every product takes its choice of this number (tests); else -1 */
  int64_t images_per_pass; /* larger batches run in parts; 0: as large as 32-bit offsets allow */
  /* The output of a program that is a single layer: a nearest value on a u8 grid. */
  int32_t on_grid;
  float grid_scale;
  int32_t grid_zero_point, grid_qmax;
} AdalayerCudaOptions;

/* `program`: the bytes of an .ada file (docs/ada-format.md). Copies the weights to the device and
 * waits for that. */
ADALAYER_CUDA_API int adalayer_cuda_engine_create(const void* program, size_t bytes, int device,
                                                  const AdalayerCudaOptions* options,
                                                  AdalayerCudaEngine** engine);
/* Waits for the engine's work. */
ADALAYER_CUDA_API void adalayer_cuda_engine_destroy(AdalayerCudaEngine* engine);

/* One batch. inputs_device, outputs_device: float32, [batch][c][h][w] in the program's order.
 * nhwc: per input, whether it is [batch][h][w][c] instead (only inputs that are quantized at once),
 * or NULL. A batch of 0 does nothing. In a capturing stream kernels are captured one by one, and
 * the memory they use stays theirs as long as the engine lives. */
ADALAYER_CUDA_API int adalayer_cuda_engine_run(AdalayerCudaEngine* engine,
                                               const void* const* inputs_device,
                                               const uint8_t* nhwc, int64_t batch,
                                               void* const* outputs_device, uint64_t stream);

/* The same for a program that is one layer: `residual_device` (or NULL) is added to the output
 * before its clamp, and output_nhwc asks for an output of [batch][h][w][c]; the residual has the
 * output's layout. */
ADALAYER_CUDA_API int adalayer_cuda_layer_run(AdalayerCudaEngine* engine, const void* input_device,
                                              uint8_t input_nhwc, int64_t batch,
                                              const void* residual_device, void* output_device,
                                              uint8_t output_nhwc, uint64_t stream);

typedef struct {
  size_t struct_size;   /* sizeof(AdalayerCudaInfo), set by the caller */
  int64_t nodes;        /* of the program */
  int64_t weight_bytes; /* packed weights on the device */
  int64_t image_bytes;  /* all constants on the device */
  int64_t arena_bytes;  /* tensors between operations, of all workspaces */
  int64_t most_images;  /* of one pass */
} AdalayerCudaInfo;
ADALAYER_CUDA_API int adalayer_cuda_engine_info(AdalayerCudaEngine* engine, AdalayerCudaInfo* info);

typedef struct {
  double microseconds; /* median */
  char kernel[64];
} AdalayerCudaNodeProfile;

/* Times every node by itself over noise-free memory; waits. profiles: [nodes]. */
ADALAYER_CUDA_API int adalayer_cuda_engine_profile(AdalayerCudaEngine* engine, int64_t batch,
                                                   int rounds, AdalayerCudaNodeProfile* profiles);

/* ---- element-wise operators -------------------------------------------------------------------
 */

/* q = rne(clamp(x / scale, -zero_point, qmax - zero_point)) + zero_point of `count` contiguous
 * floats; to levels (uint8) or, for real = 1, back to floats (q - zero_point) * scale. */
ADALAYER_CUDA_API int adalayer_cuda_quantize(const void* x_device, int64_t count, float scale,
                                             int32_t zero_point, int32_t qmax, int real,
                                             void* out_device, int device, uint64_t stream);

/* ---- linear layers with float activations -----------------------------------------------------
 */

typedef struct AdalayerCudaLinear AdalayerCudaLinear;

/* Weights for y = x W^T scale + bias with half or bfloat16 x: canonical packed bytes on the host,
 * scale and bias float32 [out_features] on the host (bias may be NULL). Waits. */
ADALAYER_CUDA_API int adalayer_cuda_linear_create(const void* packed, size_t bytes,
                                                  const float* scale, const float* bias, int device,
                                                  AdalayerCudaLinear** linear);
ADALAYER_CUDA_API void adalayer_cuda_linear_destroy(AdalayerCudaLinear* linear);
/* x_device: [rows][in_features], y_device: [rows][out_features], both half (bfloat = 0) or bfloat16
 * (1), contiguous, aligned to 16 bytes. Sums are float32; their order is fixed for a device. */
ADALAYER_CUDA_API int adalayer_cuda_linear_run(AdalayerCudaLinear* linear, const void* x_device,
                                               int64_t rows, int bfloat, void* y_device,
                                               uint64_t stream);

#ifdef __cplusplus
}
#endif

#endif
