# Every outside package the project links, under one name each.
#
# SALA_GPU_SUITE: for launch/gpu-test and launch/gpu-bench on a machine with a GPU that lacks some of the packages: no MPI
#   (the program then runs alone), no Google Benchmark, and of the tests only those that need a GPU.
# SALA_CARRY: a folder that launch/gpu-carry made on another machine; its copies stand in for the packages.
option(SALA_GPU_SUITE "without MPI and with the tests of the GPU only" OFF)
set(SALA_CARRY "" CACHE PATH "folder of carried packages (launch/gpu-carry)")

find_package(Threads REQUIRED)

add_library(sala_mpi INTERFACE)
if(SALA_GPU_SUITE)
  set(SALA_MPI OFF)
else()
  # The C interface only: the old C++ bindings in mpi.h would need libmpi_cxx.
  find_package(MPI REQUIRED COMPONENTS C CXX)
  target_link_libraries(sala_mpi INTERFACE MPI::MPI_C)
  target_compile_definitions(sala_mpi INTERFACE OMPI_SKIP_MPICXX=1)
  set(SALA_MPI ON)
endif()

if(SALA_CARRY)
  include(SalaCarried)
  return()
endif()

find_package(HDF5 REQUIRED COMPONENTS C)
find_package(yaml-cpp REQUIRED)
if(NOT TARGET yaml-cpp::yaml-cpp)
  add_library(yaml-cpp::yaml-cpp ALIAS yaml-cpp)
endif()
find_package(absl REQUIRED CONFIG)
find_package(nlohmann_json REQUIRED)
find_package(CLI11 REQUIRED)
find_package(OpenSSL REQUIRED COMPONENTS Crypto)
find_package(ZLIB REQUIRED)

find_package(PkgConfig REQUIRED)
pkg_check_modules(SENTENCEPIECE REQUIRED IMPORTED_TARGET sentencepiece)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(ISAL REQUIRED IMPORTED_TARGET libisal)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(ZSTD REQUIRED IMPORTED_TARGET libzstd)
pkg_check_modules(SIMDJSON REQUIRED IMPORTED_TARGET simdjson)

if(SALA_BUILD_TESTS)
  find_package(GTest REQUIRED)
  if(NOT SALA_GPU_SUITE)
    find_package(benchmark REQUIRED)
    find_package(OpenBLAS CONFIG)  # a yardstick for benchmarks only
  endif()
endif()
