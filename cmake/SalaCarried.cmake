# The packages of SalaDependencies.cmake as copies below SALA_CARRY: include/, and lib/ with static libraries where the
# system has them (HDF5 and OpenSSL, which would drag in many others) and shared ones under their run-time names.
# launch/gpu-carry fills the folder; it and this file name the same libraries.
cmake_path(ABSOLUTE_PATH SALA_CARRY BASE_DIRECTORY ${CMAKE_SOURCE_DIR} NORMALIZE)

# sala_carried(TARGET files...): an imported target of libraries in lib/; a file may be a pattern and must be there.
function(sala_carried TARGET)
  add_library(${TARGET} INTERFACE IMPORTED GLOBAL)
  target_include_directories(${TARGET} SYSTEM INTERFACE ${SALA_CARRY}/include)
  foreach(PATTERN ${ARGN})
    file(GLOB FILES ${SALA_CARRY}/lib/${PATTERN})
    if(NOT FILES)
      message(FATAL_ERROR "${SALA_CARRY}/lib has no ${PATTERN}: make the folder again with launch/gpu-carry")
    endif()
    target_link_libraries(${TARGET} INTERFACE ${FILES})
  endforeach()
endfunction()

# Carried libraries find each other beside themselves; RUNPATH, the default of newer linkers, is not passed on to them.
add_link_options(-Wl,--disable-new-dtags)

sala_carried(absl::strings libabsl_*)
sala_carried(absl::status libabsl_*)
sala_carried(absl::statusor libabsl_*)
sala_carried(yaml-cpp::yaml-cpp libyaml-cpp.so*)
sala_carried(nlohmann_json::nlohmann_json)
sala_carried(CLI11::CLI11)
sala_carried(hdf5::hdf5 libhdf5_serial.a libsz.a libaec.a libz.a)
target_link_libraries(hdf5::hdf5 INTERFACE m ${CMAKE_DL_LIBS} Threads::Threads)
sala_carried(OpenSSL::Crypto libcrypto.a)
target_link_libraries(OpenSSL::Crypto INTERFACE ${CMAKE_DL_LIBS} Threads::Threads)
sala_carried(PkgConfig::SENTENCEPIECE libsentencepiece.so* libsentencepiece_train.so*)
sala_carried(PkgConfig::ISAL libisal.so*)
sala_carried(PkgConfig::XXHASH libxxhash.so*)
sala_carried(ZLIB::ZLIB libz.a)
sala_carried(PkgConfig::ZSTD libzstd.a)
sala_carried(PkgConfig::SIMDJSON libsimdjson.so*)
if(SALA_BUILD_TESTS)
  sala_carried(GTest::gtest libgtest.a)
  target_link_libraries(GTest::gtest INTERFACE Threads::Threads)
  sala_carried(GTest::gmock libgmock.a libgtest.a)
  sala_carried(GTest::gtest_main libgtest_main.a libgtest.a)
endif()
