// What an instrumented engine calls in a program that is no fuzzer: nothing.
extern "C" __attribute__((weak)) void __sanitizer_cov_trace_pc() {}
