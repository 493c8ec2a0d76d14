/* adalayer.h is C99, complete by itself, and its functions link from C. */
#include "adalayer/adalayer.h"

/* The layout of structs is part of the interface. */
typedef char options_size[sizeof(adalayer_load_options) == 24 ? 1 : -1];
typedef char info_size[sizeof(adalayer_tensor_info) == 104 ? 1 : -1];
typedef char first_info_size[offsetof(adalayer_tensor_info, type) == 96 ? 1 : -1];
typedef char input_size[sizeof(adalayer_input) == 24 ? 1 : -1];
typedef char output_size[sizeof(adalayer_output) == 16 ? 1 : -1];

uint32_t abi_version_from_c(void);
uint32_t abi_version_from_c(void) { return adalayer_abi_version(); }
