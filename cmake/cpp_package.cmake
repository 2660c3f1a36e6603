# What C++ programs get: headers, librecurra and the files of find_package(recurra). Of a wheel all of
# it lies in the package's folder, recurra.cmake_prefix_path().

# The headers of cells, and of each op what its kernels are given; recurra.include_path() names the
# folder. They stand in a folder of their own in it, so that `view.h` cannot be mistaken for another
# one.
file(GLOB RECURRA_HEADERS CONFIGURE_DEPENDS RELATIVE ${CMAKE_SOURCE_DIR}/csrc csrc/*.h csrc/cells/*.h
     csrc/cuda/*.h csrc/math/*.h csrc/simd/*.h)
file(GLOB RECURRA_FOLDERS CONFIGURE_DEPENDS RELATIVE ${CMAKE_SOURCE_DIR}/csrc csrc/*)
foreach(op IN LISTS RECURRA_FOLDERS)
  if(EXISTS ${CMAKE_SOURCE_DIR}/csrc/${op}/${op}.h)
    list(APPEND RECURRA_HEADERS ${op}/${op}.h)
  endif()
endforeach()
# And what recurra.jit compiles with a cell of the user's own: the engines, and their flags.
file(GLOB RECURRA_ENGINES CONFIGURE_DEPENDS RELATIVE ${CMAKE_SOURCE_DIR}/csrc csrc/rnn/* csrc/parallel.cpp)
list(APPEND RECURRA_HEADERS ${RECURRA_ENGINES})
list(REMOVE_DUPLICATES RECURRA_HEADERS)
set(text "")
foreach(isa IN LISTS RECURRA_ISAS)
  list(JOIN RECURRA_FLAGS_${isa} " " flags)
  list(JOIN RECURRA_SIMD_FLAGS " " common)
  string(APPEND text "${isa} ${flags} ${common}\n")
endforeach()
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/flags.txt "${text}")
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/flags.txt DESTINATION include/recurra/simd)
install(CODE "set(HEADERS \"${RECURRA_HEADERS}\")\nset(FROM \"${CMAKE_SOURCE_DIR}/csrc\")")
install(SCRIPT cmake/install_headers.cmake)

# The library: a static one, or a shared one of the same objects, which needs no OpenMP of its users.
# Of its kernels it has those that choose the instruction set, compiled here; what they choose from is
# hidden, as in the libraries of torch ops.
if(BUILD_SHARED_LIBS)
  set(text "#define RECURRA_CHOOSER __attribute__((visibility(\"default\")))\n")
  foreach(op IN LISTS RECURRA_FOLDERS)
    if(EXISTS ${CMAKE_SOURCE_DIR}/csrc/${op}/${op}.h)
      string(APPEND text "#include \"${op}/${op}.h\"\n")
    endif()
  endforeach()
  file(CONFIGURE OUTPUT kernels.cpp CONTENT "${text}" @ONLY)
  add_library(recurra SHARED ${CMAKE_CURRENT_BINARY_DIR}/kernels.cpp csrc/simd/isa.cpp csrc/parallel.cpp
              csrc/cells/evaluate.cpp)
  foreach(isa IN LISTS RECURRA_ISAS)
    target_sources(recurra PRIVATE $<TARGET_OBJECTS:recurra_kernels_${isa}>)
  endforeach()
  set_target_properties(recurra PROPERTIES CXX_VISIBILITY_PRESET default)
  target_include_directories(recurra PRIVATE csrc)
  target_compile_definitions(recurra INTERFACE RECURRA_SHARED)
  target_link_libraries(recurra PRIVATE OpenMP::OpenMP_CXX)
  # Functions, whose names have arguments behind them; constants of cells would be shown too.
  file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/recurra.map
       "{ global: _ZN7recurra*[a-z_]E?*; local: *; };\n")
  target_link_options(recurra PRIVATE -Wl,--version-script=${CMAKE_CURRENT_BINARY_DIR}/recurra.map
                      $<$<NOT:$<BOOL:${RECURRA_SANITIZE}>>:-Wl,--no-undefined>)
  set(library recurra)
else()
  set_target_properties(recurra_kernels PROPERTIES OUTPUT_NAME recurra EXPORT_NAME recurra)
  set(library recurra_kernels)
endif()
target_compile_features(${library} INTERFACE cxx_std_20)

include(CMakePackageConfigHelpers)
install(TARGETS ${library} EXPORT recurra ARCHIVE DESTINATION lib LIBRARY DESTINATION lib
        INCLUDES DESTINATION include)
set(folder lib/cmake/recurra)
install(EXPORT recurra NAMESPACE recurra:: FILE recurra-targets.cmake DESTINATION ${folder})
configure_package_config_file(cmake/recurra-config.cmake.in recurra-config.cmake
                              INSTALL_DESTINATION ${folder} NO_SET_AND_CHECK_MACRO
                              NO_CHECK_REQUIRED_COMPONENTS_MACRO)
write_basic_package_version_file(recurra-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/recurra-config.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/recurra-config-version.cmake DESTINATION ${folder})
