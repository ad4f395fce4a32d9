# The CUDA module: every source that needs the toolkit, built into one library that the program loads at run time
# (core/cuda_module.h). Two forms of it are made from the same sources: libsala_cuda by nvcc, and libsala_cuda_emulated by
# the host compiler over the emulator of tests/simt.
#
# SALA_CUDA = AUTO: built when nvcc and its libraries are there; ON: must be there; OFF: left out.
set(SALA_CUDA AUTO CACHE STRING "build the CUDA module: AUTO, ON or OFF")
set(SALA_CUDA_ARCHITECTURES 90a-real CACHE STRING "architectures of the CUDA module, for example 80-real;90a-real")

# sala_cuda_sources(HOST DEVICE): the module's .cc and .cu files.
function(sala_cuda_sources HOST DEVICE)
  file(GLOB_RECURSE CC CONFIGURE_DEPENDS
    ${CMAKE_SOURCE_DIR}/core/cuda/*.cc ${CMAKE_SOURCE_DIR}/launch/cuda/*.cc ${CMAKE_SOURCE_DIR}/parallel/nccl/*.cc
    ${CMAKE_SOURCE_DIR}/kernels/*/cuda/*.cc)
  file(GLOB_RECURSE CU CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/kernels/*.cu)
  set(${HOST} ${CC} PARENT_SCOPE)
  set(${DEVICE} ${CU} PARENT_SCOPE)
endfunction()

# What passes between the program and the module: both carry the checksum of these headers and refuse another one.
file(GLOB SALA_INTERFACE_HEADERS CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/kernels/*/*.h)
list(FILTER SALA_INTERFACE_HEADERS EXCLUDE REGEX "/reference\\.h$")
foreach(HEADER core/arena.h core/buffer.h core/context.h core/cuda_module.h core/device.h core/dtype.h core/status.h core/tensor.h
               kernels/cuda_kernels.h parallel/communicator.h parallel/device_communicator.h parallel/ordered_sum.h)
  list(APPEND SALA_INTERFACE_HEADERS ${CMAKE_SOURCE_DIR}/${HEADER})
endforeach()
set(SALA_INTERFACE_TEXT "")
foreach(HEADER ${SALA_INTERFACE_HEADERS})
  file(SHA256 ${HEADER} CHECKSUM)
  string(APPEND SALA_INTERFACE_TEXT ${CHECKSUM})
endforeach()
string(SHA256 SALA_CUDA_INTERFACE "${SALA_INTERFACE_TEXT}")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${SALA_INTERFACE_HEADERS})

# Headers alone are enough to compile the sources for the emulator.
find_package(CUDAToolkit QUIET)
find_path(SALA_NCCL_INCLUDE nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
# Where cuBLASLt comes with Python packages and not with the toolkit, its library and the folder of its header can be named.
if(SALA_CUBLASLT_LIBRARY AND SALA_CUBLASLT_INCLUDE AND NOT TARGET CUDA::cublasLt)
  add_library(CUDA::cublasLt UNKNOWN IMPORTED)
  set_target_properties(CUDA::cublasLt PROPERTIES IMPORTED_LOCATION ${SALA_CUBLASLT_LIBRARY}
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES ${SALA_CUBLASLT_INCLUDE} INTERFACE_INCLUDE_DIRECTORIES ${SALA_CUBLASLT_INCLUDE})
endif()
set(SALA_CUDA_HEADERS OFF)
if(CUDAToolkit_FOUND AND SALA_NCCL_INCLUDE)
  set(SALA_CUDA_HEADERS ON)
endif()

set(SALA_CUDA_COMPILER OFF)
if(NOT SALA_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  # Before enable_language: otherwise CMake picks its own default and nvcc is asked for it.
  set(CMAKE_CUDA_ARCHITECTURES ${SALA_CUDA_ARCHITECTURES})
  check_language(CUDA)
  find_library(SALA_NCCL_LIBRARY nccl HINTS ${CUDAToolkit_LIBRARY_DIR})
  if(CMAKE_CUDA_COMPILER AND SALA_CUDA_HEADERS AND TARGET CUDA::cublasLt AND SALA_NCCL_LIBRARY)
    enable_language(CUDA)
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know how to ask nvcc for C++20
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
    endif()
    set(SALA_CUDA_COMPILER ON)
    if(CCACHE_PROGRAM)
      set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
    endif()
  elseif(SALA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "SALA_CUDA is ON, but nvcc, cuBLASLt or NCCL was not found (CUDA toolkit: ${CUDAToolkit_BIN_DIR}, "
                        "NCCL header: ${SALA_NCCL_INCLUDE}, NCCL library: ${SALA_NCCL_LIBRARY})")
  endif()
endif()
if(NOT SALA_CUDA_COMPILER)
  message(STATUS "CUDA module: not built (no nvcc with cuBLASLt and NCCL, or SALA_CUDA=OFF)")
endif()
