# SALA_UNITY=N: up to N sources of a room or of a test program are compiled as one unit, for the sanitizer builds (presets
# asan and tsan). Headers are then read, and their templates compiled, once for all of them. The release build stays file by
# file and so shows that every file includes what it uses.
set(SALA_UNITY 0 CACHE STRING "sources compiled as one unit; 0: each alone")

# sala_unity(TARGET): once all sources of the target are known.
function(sala_unity TARGET)
  if(NOT SALA_UNITY)
    return()
  endif()
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  get_target_property(FILES ${TARGET} SOURCES)
  list(TRANSFORM FILES PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/ REGEX "^[^/]")
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -B ${CMAKE_SOURCE_DIR}/cmake/unity_groups.py --size ${SALA_UNITY} ${FILES}
    OUTPUT_VARIABLE LINES
    COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]+" LINES "${LINES}")
  foreach(LINE ${LINES})
    string(REGEX MATCH "^([0-9]+) (.*)$" LINE "${LINE}")
    set_source_files_properties(${CMAKE_MATCH_2} PROPERTIES UNITY_GROUP ${CMAKE_MATCH_1})
  endforeach()
  set_target_properties(${TARGET} PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
  # What is no mistake where two files meet; the release build warns of it within each file.
  target_compile_options(${TARGET} PRIVATE -Wno-shadow $<$<CXX_COMPILER_ID:GNU>:-Wno-subobject-linkage>)
endfunction()
