# Writes recurra.cdx.json, in CycloneDX: what of others is compiled or linked into the libraries. It
# has neither a time nor a random serial number, so that two builds of the same are the same.
set(version "${SKBUILD_PROJECT_VERSION_FULL}")
set(components "")
set(references "")
macro(recurra_component purl name component_version license what)
  list(APPEND references "\"${purl}@${component_version}\"")
  list(APPEND components "{
    \"type\": \"library\", \"bom-ref\": \"${purl}@${component_version}\",
    \"name\": \"${name}\", \"version\": \"${component_version}\",
    \"licenses\": [{${license}}],
    \"purl\": \"${purl}@${component_version}\",
    \"description\": \"${what}\"
  }")
endmacro()

file(STRINGS ${TORCH_DIR}/version.py torch_version REGEX "^__version__ = ")
string(REGEX REPLACE ".*['\"]([0-9.a-z]+).*" "\\1" torch_version "${torch_version}")
recurra_component(pkg:pypi/torch torch ${torch_version} "\"license\": {\"id\": \"BSD-3-Clause\"}"
                  "headers of the stable ABI, compiled into _ops_cpu.so and _ops_cuda.so")
if(TARGET _native)
  recurra_component(pkg:pypi/pybind11 pybind11 ${pybind11_VERSION}
                    "\"license\": {\"id\": \"BSD-3-Clause\"}" "headers, compiled into _native")
endif()
if(TARGET recurra_cuda)
  recurra_component(pkg:generic/nvidia/cudart_static cudart_static ${CUDAToolkit_VERSION}
                    "\"license\": {\"name\": \"NVIDIA CUDA Toolkit End User License Agreement\"}"
                    "the CUDA runtime, linked statically into librecurra_cuda.so")
endif()
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  recurra_component(pkg:generic/gcc libstdc++ ${CMAKE_CXX_COMPILER_VERSION}
                    "\"expression\": \"GPL-3.0-or-later WITH GCC-exception-3.1\""
                    "templates of its headers, and where GCC is newer than the system's libstdc++.so.6 the functions that this lacks")
endif()
string(REPLACE ";" ", " components "${components}")
string(REPLACE ";" ", " references "${references}")

file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/recurra.cdx.json "{
  \"bomFormat\": \"CycloneDX\",
  \"specVersion\": \"1.6\",
  \"version\": 1,
  \"metadata\": {\"component\": {
    \"type\": \"library\", \"bom-ref\": \"pkg:pypi/recurra@${version}\",
    \"name\": \"recurra\", \"version\": \"${version}\",
    \"licenses\": [{\"license\": {\"id\": \"Apache-2.0\"}}],
    \"purl\": \"pkg:pypi/recurra@${version}\"
  }},
  \"components\": [${components}],
  \"dependencies\": [{\"ref\": \"pkg:pypi/recurra@${version}\", \"dependsOn\": [${references}]}]
}
")
