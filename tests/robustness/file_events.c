/* Counts what a process changes below a folder, and ends the process or the disk at one change.
 *
 * Loaded with LD_PRELOAD. `events_arm` starts counting; calls of the C library that change files or
 * folders below the armed one are events, numbered from 1. A process is killed before, or in the
 * middle of, the chosen event. A disk is full from the chosen event on: what is there can be renamed
 * and removed, and nothing can be added. A read-only file system, as one becomes after an error, and
 * a missing permission refuse every change from the chosen event on.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum action { COUNT, KILL, TEAR, FULL, READ_ONLY, DENIED };

static char folder[PATH_MAX];
static size_t folder_length;
static long count, chosen;
static enum action action;
static FILE *record;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* `record_to` is a file for one line an event, or empty. */
void events_arm(const char *below, long at, int what, const char *record_to)
{
    snprintf(folder, sizeof folder, "%s", below);
    folder_length = strlen(folder);
    count = 0;
    chosen = at;
    action = what;
    record = *record_to ? fopen(record_to, "w") : NULL;
}

static int is_below(const char *path)
{
    return folder_length && !strncmp(path, folder, folder_length)
        && (path[folder_length] == '/' || !path[folder_length]);
}

static void whole_path(int at, const char *path, char *out)
{
    char base[PATH_MAX] = "", link[64];
    if (*path == '/' || !folder_length) {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    if (at == AT_FDCWD) {
        if (!getcwd(base, sizeof base))
            *base = 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t length = readlink(link, base, sizeof base - 1);
        base[length < 0 ? 0 : length] = 0;
    }
    if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX)
        *out = 0;
}

/* Whether the event, which `adds` to the disk, is to fail; its caller cuts a torn write. */
static int event(const char *name, const char *path, int adds, int *torn)
{
    if (!is_below(path))
        return 0;
    pthread_mutex_lock(&lock);
    long number = ++count;
    if (record) {
        fprintf(record, "%s\t%s\n", name, path + folder_length);
        fflush(record);
    }
    pthread_mutex_unlock(&lock);
    if (number == chosen && (action == KILL || (action == TEAR && !torn)))
        kill(getpid(), SIGKILL);
    if (torn)
        *torn = number == chosen && action == TEAR;
    if (!chosen || number < chosen)
        return 0;
    if (adds && action == FULL) {
        errno = ENOSPC;
        return 1;
    }
    if ((action == READ_ONLY || action == DENIED) && strcmp(name, "sync")) {
        errno = action == DENIED ? EACCES : EROFS;
        return 1;
    }
    return 0;
}

static int event_at(const char *name, int at, const char *path, int adds)
{
    char whole[PATH_MAX];
    whole_path(at, path, whole);
    return event(name, whole, adds, NULL);
}

static int event_of(const char *name, int file, int *torn)
{
    char path[PATH_MAX], link[64];
    *path = 0;
    if (folder_length) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", file);
        ssize_t length = readlink(link, path, sizeof path - 1);
        path[length < 0 ? 0 : length] = 0;
    }
    return event(name, path, 1, torn);
}

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))
#define CALL(name, ...)                                                                            \
    static typeof(&name) real;                                                                     \
    if (!real)                                                                                     \
        real = REAL(name);                                                                         \
    return real(__VA_ARGS__)

static int changes(int flags)
{
    return (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
}

static mode_t mode_of(int flags, va_list arguments)
{
    return flags & (O_CREAT | __O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
}

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...)                                                     \
    {                                                                                              \
        va_list arguments;                                                                         \
        va_start(arguments, flags);                                                                \
        mode_t mode = mode_of(flags, arguments);                                                   \
        va_end(arguments);                                                                         \
        if (changes(flags) && event_at("open", AT_FDCWD, path, flags & O_CREAT))                                    \
            return -1;                                                                             \
        CALL(name, path, flags, mode);                                                             \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                               \
    int name(int at, const char *path, int flags, ...)                                             \
    {                                                                                              \
        va_list arguments;                                                                         \
        va_start(arguments, flags);                                                                \
        mode_t mode = mode_of(flags, arguments);                                                   \
        va_end(arguments);                                                                         \
        if (changes(flags) && event_at("open", at, path, flags & O_CREAT))                                          \
            return -1;                                                                             \
        CALL(name, at, path, flags, mode);                                                         \
    }
OPENAT(openat)
OPENAT(openat64)

/* Half of what was to be written reaches the disk, and the process ends. */
#define TEAR_AFTER(call)                                                                           \
    do {                                                                                           \
        if (torn) {                                                                                \
            (void)!(call);                                                                         \
            kill(getpid(), SIGKILL);                                                               \
        }                                                                                          \
    } while (0)

ssize_t write(int file, const void *data, size_t size)
{
    int torn = 0;
    static typeof(&write) real;
    if (!real)
        real = REAL(write);
    if (event_of("write", file, &torn))
        return -1;
    TEAR_AFTER(real(file, data, size / 2));
    return real(file, data, size);
}

#define PWRITE(name)                                                                               \
    ssize_t name(int file, const void *data, size_t size, off_t offset)                            \
    {                                                                                              \
        int torn = 0;                                                                              \
        static typeof(&name) real;                                                                 \
        if (!real)                                                                                 \
            real = REAL(name);                                                                     \
        if (event_of("write", file, &torn))                                                        \
            return -1;                                                                             \
        TEAR_AFTER(real(file, data, size / 2, offset));                                            \
        return real(file, data, size, offset);                                                     \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

int ftruncate(int file, off_t size)
{
    if (event_of("truncate", file, NULL))
        return -1;
    CALL(ftruncate, file, size);
}

int ftruncate64(int file, off64_t size)
{
    if (event_of("truncate", file, NULL))
        return -1;
    CALL(ftruncate64, file, size);
}

int fsync(int file)
{
    if (event_of("sync", file, NULL))
        return -1;
    CALL(fsync, file);
}

int fdatasync(int file)
{
    if (event_of("sync", file, NULL))
        return -1;
    CALL(fdatasync, file);
}

int rename(const char *from, const char *to)
{
    if (event_at("rename", AT_FDCWD, to, 0))
        return -1;
    CALL(rename, from, to);
}

int renameat(int from_at, const char *from, int to_at, const char *to)
{
    if (event_at("rename", to_at, to, 0))
        return -1;
    CALL(renameat, from_at, from, to_at, to);
}

int mkdir(const char *path, mode_t mode)
{
    if (event_at("mkdir", AT_FDCWD, path, 1))
        return -1;
    CALL(mkdir, path, mode);
}

int mkdirat(int at, const char *path, mode_t mode)
{
    if (event_at("mkdir", at, path, 1))
        return -1;
    CALL(mkdirat, at, path, mode);
}

int unlink(const char *path)
{
    if (event_at("remove", AT_FDCWD, path, 0))
        return -1;
    CALL(unlink, path);
}

int rmdir(const char *path)
{
    if (event_at("remove", AT_FDCWD, path, 0))
        return -1;
    CALL(rmdir, path);
}

int unlinkat(int at, const char *path, int flags)
{
    if (event_at("remove", at, path, 0))
        return -1;
    CALL(unlinkat, at, path, flags);
}
