# How every room is built: lodge_library() makes a static library of a folder's sources, and one test program of
# the *_test.cpp files that stand beside them.

set(LODGE_WARNINGS -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual -Wcast-align
                   -Wno-missing-field-initializers -Werror)
if(CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  list(APPEND LODGE_WARNINGS -Wno-gnu-zero-variadic-macro-arguments -Wno-gnu-case-range
                             -Wno-zero-length-array -Wno-flexible-array-extensions -Wno-c99-extensions)
endif()

function(lodge_flags target)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${LODGE_WARNINGS}>)
  if(LODGE_SANITIZE)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${LODGE_SANITIZE}
                           -fno-sanitize-recover=all -fno-omit-frame-pointer>)
    target_link_options(${target} PUBLIC -fsanitize=${LODGE_SANITIZE})
  endif()
  if(LODGE_FUZZ)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=fuzzer-no-link,address,undefined
                           -fno-sanitize-recover=all>)
    target_link_options(${target} PUBLIC -fsanitize=address,undefined)
  endif()
endfunction()

# lodge_library(NAME SOURCES a.cpp... [TESTS a_test.cpp...] [LINK libs...] [TEST_LINK libs...])
function(lodge_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;TESTS;LINK;TEST_LINK" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  target_link_libraries(${name} PUBLIC ${ARG_LINK})
  lodge_flags(${name})
  if(LODGE_TESTS AND ARG_TESTS)
    lodge_test(${name}_test SOURCES ${ARG_TESTS} LINK ${name} ${ARG_TEST_LINK})
  endif()
endfunction()

# For what is compiled once and runs for seconds: most of such a file's time in a compiler is its optimiser's.
function(lodge_compile_quickly target)
  target_compile_options(${target} PRIVATE -O0)
endfunction()

# lodge_test(NAME SOURCES a_test.cpp... LINK libs... [TIMEOUT seconds]): one GoogleTest program in CTest.
function(lodge_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LINK" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE ${ARG_LINK} GTest::gtest GTest::gmock GTest::gtest_main)
  lodge_flags(${name})
  lodge_compile_quickly(${name})
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT})
endfunction()

# What stands before LD_PRELOAD's other libraries where sanitizers instrument everything: their run-time insists on
# being first. Empty without them.
set(LODGE_RUNTIME "")
if(LODGE_SANITIZE MATCHES "address|thread")
  string(REGEX MATCH "address|thread" runtime ${LODGE_SANITIZE})
  string(REPLACE "address" "asan" runtime ${runtime})
  string(REPLACE "thread" "tsan" runtime ${runtime})
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=lib${runtime}.so
                  OUTPUT_VARIABLE LODGE_RUNTIME OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()

# lodge_preload_test(NAME [LABELS labels...] [ENVIRONMENT settings...] COMMAND words...): a test whose program sees
# the preload library's /dev/kvm.
function(lodge_preload_test name)
  cmake_parse_arguments(ARG "" "" "COMMAND;ENVIRONMENT;LABELS" ${ARGN})
  add_test(NAME ${name} COMMAND lodge kvm -- ${ARG_COMMAND})
  if(LODGE_RUNTIME)
    list(APPEND ARG_ENVIRONMENT LD_PRELOAD=${LODGE_RUNTIME})
  endif()
  set_tests_properties(${name} PROPERTIES TIMEOUT 1300 LABELS "${ARG_LABELS}" ENVIRONMENT "${ARG_ENVIRONMENT}")
endfunction()
