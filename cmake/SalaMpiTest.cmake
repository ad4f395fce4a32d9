# What every test under mpirun needs on a shared or small machine (docs/operations.md explains each).
set(SALA_MPI_ENVIRONMENT
  OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_mpi_yield_when_idle=1
  OMPI_MCA_pml=ob1 OMPI_MCA_btl=self,vader,tcp)

# sala_mpi_test(NAME RANKS command...): one CTest that runs the command under mpirun.
function(sala_mpi_test NAME RANKS)
  add_test(NAME ${NAME} COMMAND ${MPIEXEC_EXECUTABLE} -np ${RANKS} ${ARGN})
  set_tests_properties(${NAME} PROPERTIES TIMEOUT 300 ENVIRONMENT "${SALA_MPI_ENVIRONMENT}")
endfunction()
