/* A disk that fails: preloaded into a process, it makes the calls that write to paths with `disk_path` in them fail, from the
   `disk_at`-th on: that one alone, or all that follow too. test_failing_disk.py sets these, and compiles this. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

char disk_path[256];
long disk_at, disk_calls;
int disk_error, disk_stays;
char disk_failed[64];

static int fails(const char *path, const char *name) {
  if (!disk_path[0] || !path || !strstr(path, disk_path)) return 0;
  long call = ++disk_calls;
  if (!disk_at || call < disk_at || (call > disk_at && !disk_stays)) return 0;
  if (!disk_failed[0]) snprintf(disk_failed, sizeof disk_failed, "%s", name);
  errno = disk_error;
  return 1;
}

static int file_fails(int file, const char *name) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(path, name);
}

#define THEIRS(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *from, size_t size) {
  return file_fails(file, "write") ? -1 : THEIRS(write)(file, from, size);
}
ssize_t pwrite(int file, const void *from, size_t size, off_t at) {
  return file_fails(file, "pwrite") ? -1 : THEIRS(pwrite)(file, from, size, at);
}
ssize_t pwrite64(int file, const void *from, size_t size, off64_t at) {
  return file_fails(file, "pwrite") ? -1 : THEIRS(pwrite64)(file, from, size, at);
}
int ftruncate64(int file, off64_t size) { return file_fails(file, "ftruncate") ? -1 : THEIRS(ftruncate64)(file, size); }
int fsync(int file) { return file_fails(file, "fsync") ? -1 : THEIRS(fsync)(file); }
int rename(const char *from, const char *to) { return fails(from, "rename") ? -1 : THEIRS(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { return fails(path, "mkdir") ? -1 : THEIRS(mkdir)(path, mode); }
int chmod(const char *path, mode_t mode) { return fails(path, "chmod") ? -1 : THEIRS(chmod)(path, mode); }
int unlink(const char *path) { return fails(path, "unlink") ? -1 : THEIRS(unlink)(path); }
int unlinkat(int folder, const char *path, int flags) {
  return file_fails(folder, "unlinkat") ? -1 : THEIRS(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) { return fails(path, "rmdir") ? -1 : THEIRS(rmdir)(path); }

#define OPENS(name)                                                    \
  int name(const char *path, int flags, ...) {                         \
    va_list rest;                                                      \
    va_start(rest, flags);                                             \
    mode_t mode = va_arg(rest, mode_t);                                \
    va_end(rest);                                                      \
    if (flags & (O_WRONLY | O_RDWR) && fails(path, "open")) return -1; \
    return THEIRS(name)(path, flags, mode);                            \
  }
OPENS(open)
OPENS(open64)
