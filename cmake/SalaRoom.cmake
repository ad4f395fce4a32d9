# sala_compile_options(TARGET): the warnings and floating-point rules of the whole project.
#
# -ffp-contract=off: the compiler must not fuse a*b+c on machines that can and leave it on those that cannot; where a fused
# multiply-add is wanted it is written std::fma. Together with the absence of -ffast-math this keeps results the same on
# every x86-64 machine.
# -Wno-restrict: g++ 12 raises it wrongly for "literal" + std::string (GCC bug 105651).
function(sala_compile_options TARGET)
  target_compile_options(${TARGET} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra $<$<BOOL:${SALA_WERROR}>:-Werror> -Wshadow -Wnon-virtual-dtor -Wno-unused-parameter $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>
    -ffp-contract=off -fno-math-errno -fno-trapping-math>)
  target_include_directories(${TARGET} PUBLIC ${CMAKE_SOURCE_DIR})
  if(SALA_FUZZ)
    target_compile_options(${TARGET} PRIVATE -fsanitize=fuzzer-no-link)
  endif()
  if(SALA_SANITIZE)
    target_compile_options(${TARGET} PUBLIC -fsanitize=${SALA_SANITIZE} -fno-omit-frame-pointer)
    target_compile_options(${TARGET} PRIVATE -fno-sanitize-recover=all)
    target_compile_definitions(${TARGET} PUBLIC SALA_SANITIZED=1)
    target_link_options(${TARGET} PUBLIC -fsanitize=${SALA_SANITIZE})
  endif()
endfunction()

# sala_room(NAME [SHARED] USES rooms... LINKS libraries... WITHOUT files...): one library target sala_NAME of all .cc files below
# the folder, without those named, and those in folders named cuda or nccl, which belong to the CUDA module (SalaCuda.cmake).
# SHARED: that module links the room too.
function(sala_room NAME)
  cmake_parse_arguments(ROOM "SHARED" "" "USES;LINKS;WITHOUT" ${ARGN})
  file(GLOB_RECURSE SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.cc)
  list(FILTER SOURCES EXCLUDE REGEX "/(cuda|nccl)/")
  foreach(FILE ${ROOM_WITHOUT})
    list(REMOVE_ITEM SOURCES ${CMAKE_CURRENT_SOURCE_DIR}/${FILE})
  endforeach()
  if(NOT SOURCES)  # a room that is headers only so far
    add_library(sala_${NAME} INTERFACE)
    foreach(USED ${ROOM_USES})
      target_link_libraries(sala_${NAME} INTERFACE sala_${USED})
    endforeach()
    return()
  endif()
  add_library(sala_${NAME} STATIC ${SOURCES})
  sala_compile_options(sala_${NAME})
  sala_unity(sala_${NAME})
  if(ROOM_SHARED)
    set_target_properties(sala_${NAME} PROPERTIES POSITION_INDEPENDENT_CODE ON)
  endif()
  foreach(USED ${ROOM_USES})
    target_link_libraries(sala_${NAME} PUBLIC sala_${USED})
  endforeach()
  target_link_libraries(sala_${NAME} PUBLIC ${ROOM_LINKS})
endfunction()

# sala_tests(NAME LINKS targets... [TIMEOUT seconds]): one GoogleTest program of the .cc files in this folder and below,
# excluding *_bench.cc and *_cuda_test.cc (tests/cuda).
function(sala_tests NAME)
  cmake_parse_arguments(TESTS "" "TIMEOUT" "LINKS" ${ARGN})
  file(GLOB_RECURSE SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.cc)
  list(FILTER SOURCES EXCLUDE REGEX "(_bench|_cuda_test|_mpi_test)\\.cc$")
  if(NOT SOURCES)
    return()
  endif()
  add_executable(${NAME} ${SOURCES})
  sala_compile_options(${NAME})
  sala_unity(${NAME})
  target_link_libraries(${NAME} PRIVATE ${TESTS_LINKS} GTest::gtest GTest::gmock GTest::gtest_main)
  if(NOT TESTS_TIMEOUT)
    set(TESTS_TIMEOUT 600)
  endif()
  if(SALA_SANITIZE)
    math(EXPR TESTS_TIMEOUT "3 * ${TESTS_TIMEOUT}")  # sanitizers cost a factor of two to ten
  endif()
  add_test(NAME ${NAME} COMMAND ${NAME})
  set_tests_properties(${NAME} PROPERTIES TIMEOUT ${TESTS_TIMEOUT})
endfunction()
