/* A volume that lacks something, for what Linux cannot be made to do: preloaded, it refuses calls.

   LACKING_UNDER  the beginning of the paths that it is about
   LACKING        "call=errno ...", or "call=errno:n", which lets the first n such calls pass
   statvfs=0 answers nothing but zeros. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

static int passed; /* calls that were let pass: one rule counts at a time */

/* The errno that a rule gives this call on this path; -1 for none. */
static int ruled(const char *call, const char *path)
{
    const char *under = getenv("LACKING_UNDER"), *rules = getenv("LACKING");
    char word[40];
    if (!under || !rules || strncmp(path, under, strlen(under)))
        return -1;
    snprintf(word, sizeof word, " %s=", call);
    const char *rule = strstr(rules, word);
    if (!rule)
        return -1;
    char *end;
    int number = (int)strtol(rule + strlen(word), &end, 10);
    if (*end == ':' && passed++ < atoi(end + 1))
        return -1;
    return number;
}

static int ruled_fd(const char *call, int fd)
{
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0)
        return -1;
    path[n] = 0;
    return ruled(call, path);
}

#define REFUSE(call, fd, value) \
    do { int no = ruled_fd(call, fd); if (no >= 0) { errno = no; return value; } } while (0)
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FD_CALL(type, name, word, parameters, arguments) \
    type name parameters { REFUSE(word, fd, -1); return NEXT(name) arguments; }

FD_CALL(int, flock, "flock", (int fd, int how), (fd, how))
FD_CALL(int, fchmod, "fchmod", (int fd, mode_t mode), (fd, mode))
FD_CALL(int, ftruncate64, "ftruncate", (int fd, off_t size), (fd, size))
FD_CALL(ssize_t, read, "read", (int fd, void *to, size_t n), (fd, to, n))
FD_CALL(ssize_t, write, "write", (int fd, const void *from, size_t n), (fd, from, n))
FD_CALL(ssize_t, pread64, "read", (int fd, void *to, size_t n, off_t at), (fd, to, n, at))
FD_CALL(ssize_t, pwrite64, "write", (int fd, const void *from, size_t n, off_t at),
        (fd, from, n, at))
FD_CALL(ssize_t, preadv64, "read", (int fd, const struct iovec *to, int n, off_t at),
        (fd, to, n, at))
FD_CALL(int, linkat, "link", (int fd, const char *a, int to, const char *b, int flags),
        (fd, a, to, b, flags))
FD_CALL(int, renameat, "rename", (int fd, const char *a, int to, const char *b), (fd, a, to, b))

int fsync(int fd)
{
    struct stat status;
    int folder = !fstat(fd, &status) && S_ISDIR(status.st_mode);
    REFUSE(folder ? "fsync_folder" : "fsync_file", fd, -1);
    return NEXT(fsync)(fd);
}

int posix_fallocate64(int fd, off_t at, off_t n)
{
    int no = ruled_fd("fallocate", fd);
    return no >= 0 ? no : NEXT(posix_fallocate64)(fd, at, n);
}

int link(const char *a, const char *b)
{
    int no = ruled("link", a);
    if (no >= 0) {
        errno = no;
        return -1;
    }
    return NEXT(link)(a, b);
}

int statvfs64(const char *path, struct statvfs64 *to)
{
    int no = ruled("statvfs", path);
    if (no == 0) {
        memset(to, 0, sizeof *to);
        return 0;
    }
    if (no > 0) {
        errno = no;
        return -1;
    }
    return NEXT(statvfs64)(path, to);
}

void *mmap64(void *at, size_t n, int how, int flags, int fd, off_t from)
{
    if (fd >= 0)
        REFUSE("mmap", fd, MAP_FAILED);
    return NEXT(mmap64)(at, n, how, flags, fd, from);
}
