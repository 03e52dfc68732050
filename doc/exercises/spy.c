/* Loaded in front of libc, this counts the calls of send that succeed. The file that SPY_TO names
   always has the count, so that a test can read it while kv runs:

       cc -shared -fPIC -o spy.so doc/exercises/spy.c -ldl
       LD_PRELOAD=./spy.so SPY_TO=sends ./kv

   needs: linux */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards the rest */
static long sends;
static int file = -1;

/* The text always has the same length, so it is written over the old one. */
static void count(void) {
    char text[32];
    pthread_mutex_lock(&lock);
    const char *name = getenv("SPY_TO");
    if (file < 0 && name)
        file = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    int len = snprintf(text, sizeof text, "%-20ld\n", ++sends);
    if (file >= 0 && pwrite(file, text, (size_t)len, 0) != len) abort();
    pthread_mutex_unlock(&lock);
}

ssize_t send(int fd, const void *p, size_t n, int flags) {
    static ssize_t (*_Atomic call)(int, const void *, size_t, int);
    if (!call)
        call = (ssize_t(*)(int, const void *, size_t, int))dlsym(RTLD_NEXT, "send");
    if (!call) abort();
    ssize_t sent = call(fd, p, n, flags);
    if (sent >= 0) count();
    return sent;
}
