# Every outside package the project links, under one name each.
find_package(Threads REQUIRED)

# The C interface only: the old C++ bindings in mpi.h would need libmpi_cxx.
find_package(MPI REQUIRED COMPONENTS C CXX)
add_library(sala_mpi INTERFACE)
target_link_libraries(sala_mpi INTERFACE MPI::MPI_C)
target_compile_definitions(sala_mpi INTERFACE OMPI_SKIP_MPICXX=1)

find_package(HDF5 REQUIRED COMPONENTS C)
find_package(yaml-cpp REQUIRED)
if(NOT TARGET yaml-cpp::yaml-cpp)
  add_library(yaml-cpp::yaml-cpp ALIAS yaml-cpp)
endif()
find_package(absl REQUIRED CONFIG)
find_package(nlohmann_json REQUIRED)
find_package(CLI11 REQUIRED)
find_package(OpenSSL REQUIRED COMPONENTS Crypto)

find_package(PkgConfig REQUIRED)
pkg_check_modules(SENTENCEPIECE REQUIRED IMPORTED_TARGET sentencepiece)
pkg_check_modules(ISAL REQUIRED IMPORTED_TARGET libisal)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)

if(SALA_BUILD_TESTS)
  find_package(GTest REQUIRED)
  find_package(benchmark REQUIRED)
  find_package(OpenBLAS CONFIG)  # a yardstick for benchmarks only
endif()
