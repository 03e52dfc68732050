/* Loaded in front of libc, this counts the calls of send and of fsync that succeed, and makes
   each fsync take 5 ms longer: so while a thread waits for the disk, others certainly come and
   wait, too, and what they can share they share. The file that SPY_TO names always has the
   counts, so that a test can read them while kv runs:

       cc -shared -fPIC -o spy.so doc/exercises/spy.c -ldl
       LD_PRELOAD=./spy.so SPY_TO=counts ./kv --aof file --fsync always

       sends:   12
       fsyncs:  3

   needs: linux */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum { MORE_MS = 5 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards the rest */
static long sends, fsyncs;
static int file = -1;

/* The function of this name that libc has. */
static void *real(const char *name) {
    void *function = dlsym(RTLD_NEXT, name);
    if (!function) abort();
    return function;
}

/* Adds one to a count. The text always has the same length, so it is written over the old one. */
static void count(long *what) {
    char text[64];
    pthread_mutex_lock(&lock);
    ++*what;
    const char *name = getenv("SPY_TO");
    if (file < 0 && name)
        file = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    int len =
        snprintf(text, sizeof text, "sends:   %-12ld\nfsyncs:  %-12ld\n", sends, fsyncs);
    if (file >= 0 && pwrite(file, text, (size_t)len, 0) != len) abort();
    pthread_mutex_unlock(&lock);
}

ssize_t send(int fd, const void *p, size_t n, int flags) {
    static ssize_t (*_Atomic call)(int, const void *, size_t, int);
    if (!call) call = (ssize_t(*)(int, const void *, size_t, int))real("send");
    ssize_t sent = call(fd, p, n, flags);
    if (sent >= 0) count(&sends);
    return sent;
}

int fsync(int fd) {
    static int (*_Atomic call)(int);
    if (!call) call = (int (*)(int))real("fsync");
    int result = call(fd);
    nanosleep(&(struct timespec){0, MORE_MS * 1000000L}, NULL);
    if (result == 0) count(&fsyncs);
    return result;
}
