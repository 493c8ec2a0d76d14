# Fails if a file compiled with instruction-set flags defines a weak (inline or template) symbol.
#
# The linker keeps ONE copy of an inline function, from whichever object file comes first. If that
# is a copy compiled with, say, AVX-512, every machine runs it, also those without AVX-512. So
# such files may define functions of their own only: shared helpers go into an unnamed namespace,
# and the standard library's containers stay outside.
#
#   cmake -DNM=nm -DOBJECTS=a.o|b.o -DFILES=avx2/row.cpp|amx/row.cpp -P check_isa_symbols.cmake
string(REPLACE "|" ";" objects "${OBJECTS}")
string(REPLACE "|" ";" files "${FILES}")
set(checked 0)
set(found "")
foreach(object IN LISTS objects)
  foreach(file IN LISTS files)
    if(NOT object MATCHES "/${file}\\.(o|obj)$")
      continue()
    endif()
    execute_process(COMMAND "${NM}" --demangle --defined-only "${object}"
      OUTPUT_VARIABLE symbols RESULT_VARIABLE result)
    if(NOT result EQUAL 0)
      message(FATAL_ERROR "${NM} failed on ${object}")
    endif()
    math(EXPR checked "${checked} + 1")
    string(REGEX MATCHALL "[0-9a-f]+ [VWu] [^\n]*" weak "${symbols}")
    foreach(symbol IN LISTS weak)
      string(APPEND found "  ${file}: ${symbol}\n")
    endforeach()
  endforeach()
endforeach()
list(LENGTH files expected)
if(NOT checked EQUAL expected)
  message(FATAL_ERROR "expected ${expected} object files, found ${checked}: nothing may be skipped")
endif()
if(found)
  message(FATAL_ERROR "weak symbols in files with instruction-set flags:\n${found}")
endif()
message(STATUS "${checked} object files define no weak symbols")
