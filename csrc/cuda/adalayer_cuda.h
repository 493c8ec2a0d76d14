/* C interface of the CUDA kernels (libadalayer_cuda.so).
 *
 * Every function returns 0, a positive cudaError_t, or one of the negative codes below, and never
 * throws. Pointers named "device" are device memory of the calling thread's current device; a
 * stream is a cudaStream_t as a number (0: the default stream). Work is enqueued, not awaited.
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
  ADALAYER_CUDA_BAD_BITS = -2,       /* not 2 to 8 */
  ADALAYER_CUDA_BAD_SHAPE = -3,      /* an extent out of range, or a kernel larger than the image */
  ADALAYER_CUDA_BAD_GROUPS = -4,     /* channels not divisible by groups */
  ADALAYER_CUDA_OVERFLOW = -5,       /* the int32 sum could reach 2^31 */
  ADALAYER_CUDA_BAD_GRID = -6,       /* zero point or clamp outside 0 to 255, or lo > hi */
  ADALAYER_CUDA_TOO_LARGE = -7,      /* more outputs than one launch can have */
  ADALAYER_CUDA_BAD_ENUM = -8,       /* unknown layout or output type */
  ADALAYER_CUDA_BAD_STRUCT_SIZE = -9 /* the caller was built against another version */
};

/* A full sentence for any code that a function of this library returns; never NULL. */
ADALAYER_CUDA_API const char* adalayer_cuda_message(int code);

typedef struct {
  size_t struct_size; /* sizeof(AdalayerCudaDevice), set by the caller */
  char name[256];
  int32_t compute_major, compute_minor;
  int32_t multiprocessors;
  uint64_t memory_bytes;
} AdalayerCudaDevice;

ADALAYER_CUDA_API int adalayer_cuda_device_count(int* count);
ADALAYER_CUDA_API int adalayer_cuda_device_info(int device, AdalayerCudaDevice* info);

/* Canonical dense bit-planes (csrc/formats/FORMATS.md; the payload, without its 64-byte header) to
 * int8 weights. planes_device: the streams of `count` weights of `bits` bits; weights_device: int8
 * [count]. */
ADALAYER_CUDA_API int adalayer_cuda_unpack_dense(const void* planes_device, int64_t count, int bits,
                                                 void* weights_device, uint64_t stream);

enum { ADALAYER_CUDA_NCHW = 0, ADALAYER_CUDA_NHWC = 1 };
enum { ADALAYER_CUDA_F32 = 0, ADALAYER_CUDA_U8 = 1 };

/* One convolution: u8 levels in, law 1 of docs/architecture.md, u8 levels or float32 out.
 *   f32: y = clamp(fma(acc, scale[o], bias[o]), lo, hi)
 *   u8:  q = rne(clamp(fma(acc, scale[o], bias[o]), lo, hi)) + output_zero_point
 * with acc = sum of w * (a - input_zero_point); padding holds input_zero_point. For u8, lo and hi
 * are relative to output_zero_point. scale and bias must be finite. */
typedef struct {
  size_t struct_size; /* sizeof(AdalayerCudaConv), set by the caller */
  int64_t batch, in_channels, in_h, in_w;
  int64_t out_channels, kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left, pad_bottom, pad_right;
  int64_t dilation_h, dilation_w, groups;
  int32_t bits; /* of the weights, for the bound on the sum */
  int32_t input_zero_point, output_zero_point;
  int32_t input_layout, output_layout; /* ADALAYER_CUDA_NCHW or _NHWC */
  int32_t output_type;                 /* ADALAYER_CUDA_F32 or _U8 */
  float lo, hi;
  const uint8_t* input_device;
  const int8_t* weights_device; /* [out_channels][in_channels / groups][kernel_h][kernel_w] */
  const float* scale_device;    /* [out_channels] */
  const float* bias_device;     /* [out_channels] */
  void* output_device;
} AdalayerCudaConv;

ADALAYER_CUDA_API int adalayer_cuda_conv2d(const AdalayerCudaConv* conv, uint64_t stream);

#ifdef __cplusplus
}
#endif

#endif
