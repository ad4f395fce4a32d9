# cmake --install BUILD --prefix DIR: a folder that runs from any place and on any machine whose C library is not older.
#
#   bin/sala   lib/ (CUDA module, shared libraries)   configs/   share/launch/   share/doc/sala/
#
# What stays the target machine's business: the C and C++ runtime libraries; MPI, whose library must fit its plug-ins, its
# daemons and the cluster's network; the driver, cuBLASLt and NCCL.
set(SALA_BASE_LIBRARIES
  "^ld-linux" "^lib(c|m|dl|rt|pthread|util|resolv|anl|nsl)\\.so" "^libgcc_s\\." "^libstdc\\+\\+\\.")
set(SALA_CLUSTER_LIBRARIES "^libmpi" "^libopen-(rte|pal)" "^libpmix" "^libcuda" "^libcublas" "^libnccl" "^libnv")

# DT_RPATH and not DT_RUNPATH: it also holds for the libraries that the copied ones ask for.
target_link_options(sala PRIVATE -Wl,--disable-new-dtags)
set_target_properties(sala PROPERTIES INSTALL_RPATH "$ORIGIN/../lib")
install(TARGETS sala RUNTIME_DEPENDENCY_SET sala_dependencies RUNTIME DESTINATION bin)
if(TARGET sala_cuda)
  set_target_properties(sala_cuda PROPERTIES INSTALL_RPATH "$ORIGIN")
  install(TARGETS sala_cuda LIBRARY DESTINATION lib OPTIONAL)  # a build of the program alone has none
endif()
install(RUNTIME_DEPENDENCY_SET sala_dependencies
  PRE_EXCLUDE_REGEXES ${SALA_BASE_LIBRARIES} ${SALA_CLUSTER_LIBRARIES}
  LIBRARY DESTINATION lib)

install(DIRECTORY configs DESTINATION .)
install(PROGRAMS launch/mpirun DESTINATION share/launch)
install(FILES launch/slurm.sbatch launch/kubernetes-mpijob.yaml DESTINATION share/launch)
install(DIRECTORY docs/ DESTINATION share/doc/sala)
install(FILES README.md DESTINATION share/doc/sala)
