// Makes system calls fail, for tests of what writes files. Loaded by LD_PRELOAD.
//
// Counts the calls on files below a folder and makes the n-th of them fail, write short, or all
// from the n-th on find the disk full. A call is below the folder if its path is, or if its
// descriptor was opened there.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, FAIL, SHORT, FULL };  // FULL: what needs room fails, for ever
enum { OTHER, ROOM, WRITE };       // what a call does; a write needs room too

static char folder[4096];
static char last[256];
static int kind, code;
static long count, at, fired, room = -1;
static char mine[1 << 16];

// The n-th call from now on, counted from 1; `room`: the bytes that may still be written, or -1.
void faults_arm(const char* path, int what, long n, int error, long bytes) {
  snprintf(folder, sizeof folder, "%s/", path);
  kind = what, at = n, code = error, room = bytes;
  count = fired = 0;
  last[0] = 0;
}
long faults_count(void) { return count; }
long faults_fired(void) { return fired; }
const char* faults_last(void) { return last; }

__attribute__((constructor)) static void start(void) {
  const char* path = getenv("FAULTS_FOLDER");
  const char* bytes = getenv("FAULTS_ROOM");
  if (path && bytes) faults_arm(path, NONE, 0, ENOSPC, atol(bytes));
}

static int below(int dir, const char* path) {
  if (!folder[0]) return 0;
  if (path[0] != '/') return dir >= 0 && dir < (int)sizeof mine && mine[dir];
  return !strncmp(path, folder, strlen(folder)) ||
         (strlen(path) + 1 == strlen(folder) && !strncmp(path, folder, strlen(path)));
}

static int held(int fd) { return folder[0] && fd >= 0 && fd < (int)sizeof mine && mine[fd]; }

// Whether this call is to fail. A short write is not a failure; it is asked for in `bytes`.
static int fails(int here, const char* name, int does, size_t* bytes) {
  if (!here) return 0;
  ++count;
  int full = room >= 0 && does == WRITE && (long)*bytes > room;
  int hit = full || (kind == FULL ? count >= at && does != OTHER : kind == FAIL && count == at);
  if (kind == SHORT && count == at && does == WRITE && *bytes > 1) {
    *bytes /= 2;
    ++fired;
  }
  if (room >= 0 && does == WRITE && !hit) room -= *bytes;
  if (!hit) return 0;
  if (!fired++) snprintf(last, sizeof last, "%s, call %ld", name, count);
  errno = code;
  return 1;
}

#define REAL(type, name, ...)       \
  static type (*real)(__VA_ARGS__); \
  if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int opened(int fd, int here) {
  if (fd >= 0 && fd < (int)sizeof mine) mine[fd] = here;
  return fd;
}

#define MODE                           \
  mode_t mode = 0;                     \
  if (flags & (O_CREAT | O_TMPFILE)) { \
    va_list rest;                      \
    va_start(rest, flags);             \
    mode = va_arg(rest, mode_t);       \
    va_end(rest);                      \
  }                                    \
  int does = flags & O_CREAT ? ROOM : OTHER

#define OPEN(name)                                \
  int name(const char* path, int flags, ...) {    \
    REAL(int, #name, const char*, int, ...);      \
    MODE;                                         \
    int here = below(-1, path);                   \
    if (fails(here, #name, does, 0)) return -1;   \
    return opened(real(path, flags, mode), here); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                    \
  int name(int dir, const char* path, int flags, ...) { \
    REAL(int, #name, int, const char*, int, ...);       \
    MODE;                                               \
    int here = below(dir, path);                        \
    if (fails(here, #name, does, 0)) return -1;         \
    return opened(real(dir, path, flags, mode), here);  \
  }
OPENAT(openat)
OPENAT(openat64)

#define CREAT(name)                             \
  int name(const char* path, mode_t mode) {     \
    REAL(int, #name, const char*, mode_t);      \
    int here = below(-1, path);                 \
    if (fails(here, #name, ROOM, 0)) return -1; \
    return opened(real(path, mode), here);      \
  }
CREAT(creat)
CREAT(creat64)

ssize_t write(int fd, const void* data, size_t bytes) {
  REAL(ssize_t, "write", int, const void*, size_t);
  return fails(held(fd), "write", WRITE, &bytes) ? -1 : real(fd, data, bytes);
}

#define PWRITE(name, offset_type)                                                 \
  ssize_t name(int fd, const void* data, size_t bytes, offset_type o) {           \
    REAL(ssize_t, #name, int, const void*, size_t, offset_type);                  \
    return fails(held(fd), #name, WRITE, &bytes) ? -1 : real(fd, data, bytes, o); \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec* parts, int n) {
  REAL(ssize_t, "writev", int, const struct iovec*, int);
  size_t bytes = 0;
  for (int i = 0; i < n; ++i) bytes += parts[i].iov_len;
  size_t asked = bytes;
  if (fails(held(fd), "writev", WRITE, &bytes)) return -1;
  return asked == bytes ? real(fd, parts, n) : real(fd, parts, 1);
}

// Nothing here tests the disk, only what is told of it: no need to wait for it.
#define SYNC(name) \
  int name(int fd) { return fails(held(fd), #name, OTHER, 0) ? -1 : 0; }
SYNC(fsync)
SYNC(fdatasync)

int rename(const char* from, const char* to) {
  REAL(int, "rename", const char*, const char*);
  int here = below(-1, from) || below(-1, to);
  return fails(here, "rename", ROOM, 0) ? -1 : real(from, to);
}

int renameat(int a, const char* from, int b, const char* to) {
  REAL(int, "renameat", int, const char*, int, const char*);
  int here = below(a, from) || below(b, to);
  return fails(here, "renameat", ROOM, 0) ? -1 : real(a, from, b, to);
}

int mkdir(const char* path, mode_t mode) {
  REAL(int, "mkdir", const char*, mode_t);
  return fails(below(-1, path), "mkdir", ROOM, 0) ? -1 : real(path, mode);
}

int mkdirat(int dir, const char* path, mode_t mode) {
  REAL(int, "mkdirat", int, const char*, mode_t);
  return fails(below(dir, path), "mkdirat", ROOM, 0) ? -1 : real(dir, path, mode);
}

#define TRUNCATE(name, offset_type)                               \
  int name(int fd, offset_type size) {                            \
    REAL(int, #name, int, offset_type);                           \
    return fails(held(fd), #name, ROOM, 0) ? -1 : real(fd, size); \
  }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

// These return the error.
#define ALLOCATE(name, offset_type)                                         \
  int name(int fd, offset_type offset, offset_type size) {                  \
    REAL(int, #name, int, offset_type, offset_type);                        \
    return fails(held(fd), #name, ROOM, 0) ? code : real(fd, offset, size); \
  }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)

#define MAP(name, offset_type)                                                       \
  void* name(void* where, size_t size, int prot, int flags, int fd, offset_type o) { \
    REAL(void*, #name, void*, size_t, int, int, int, offset_type);                   \
    if (fails(held(fd), #name, OTHER, 0)) return MAP_FAILED;                         \
    return real(where, size, prot, flags, fd, o);                                    \
  }
MAP(mmap, off_t)
MAP(mmap64, off64_t)

int close(int fd) {
  REAL(int, "close", int);
  int failed = fails(held(fd), "close", OTHER, 0);
  if (fd >= 0 && fd < (int)sizeof mine) mine[fd] = 0;
  int result = real(fd);  // the descriptor is gone even when Linux reports an error
  return failed ? (errno = code, -1) : result;
}
