# Cross-compiling for 64-bit ARM with Debian's g++-aarch64-linux-gnu, and running the result with
# qemu-user-static: ctest starts every test through it. QEMU_CPU in the environment says which
# processor that is (cortex-a53, cortex-a76, max).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# Where Debian puts the libraries of that architecture.
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
find_program(ADALAYER_QEMU qemu-aarch64-static)
if(ADALAYER_QEMU)
  set(CMAKE_CROSSCOMPILING_EMULATOR "${ADALAYER_QEMU};-L;/usr/aarch64-linux-gnu")
endif()
