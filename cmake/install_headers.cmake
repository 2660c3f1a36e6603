# Installs HEADERS of the folder FROM as include/recurra/..., with their includes of each other under
# that name.
foreach(header IN LISTS HEADERS)
  file(READ "${FROM}/${header}" text)
  string(REGEX REPLACE "(#[ ]*include \")" "\\1recurra/" text "${text}")
  file(WRITE "$ENV{DESTDIR}${CMAKE_INSTALL_PREFIX}/include/recurra/${header}" "${text}")
endforeach()
