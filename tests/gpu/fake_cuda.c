// A CUDA driver for machines that have none: device memory is malloc, DMA is memcpy. It lets test_gpu_check.py run every
// section of scripts/gpu_check. It has rules of its own where the check asks how a driver behaves (a range is registered once, a
// copy stays in one registration), and environment variables make it an older driver, one without a GPU, one that copies wrong
// bytes, that crashes in a large batch, or that registers nothing. Absent: real DMA, so its times and what it says of punched
// holes mean nothing.
//
// FAKE_CUDA_VERSION (13000), FAKE_CUDA_DEVICES (1), FAKE_CUDA_FAULT (wrong, crash, noregister)
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100 };
enum { ALREADY_REGISTERED = 712, NOT_REGISTERED = 713, NOT_SUPPORTED = 801 };
enum { LARGE_BATCH = 1000, REGIONS = 256 };

typedef struct { int order; int source_hint[2]; int destination_hint[2]; unsigned flags; } Attributes;
static struct { char *base; size_t size; } regions[REGIONS];

static int number(const char *name, int otherwise) { const char *v = getenv(name); return v ? atoi(v) : otherwise; }
static int fault(const char *name) { const char *v = getenv("FAKE_CUDA_FAULT"); return v && !strcmp(v, name); }

int cuInit(unsigned flags) { return number("FAKE_CUDA_DEVICES", 1) ? OK : NO_DEVICE; }
int cuDriverGetVersion(int *v) { *v = number("FAKE_CUDA_VERSION", 13000); return OK; }
int cuDeviceGetCount(int *n) { *n = number("FAKE_CUDA_DEVICES", 1); return OK; }
int cuDeviceGet(int *d, int i) { *d = i; return OK; }
int cuDeviceGetAttribute(int *v, int which, int d) { *v = which == 75 ? 9 : which == 88 || which == 100 ? 0 : 1; return OK; }
int cuDeviceGetName(char *out, int n, int d) { strncpy(out, "fake GPU", n); return OK; }
int cuDeviceGetPCIBusId(char *out, int n, int d) { strncpy(out, "FFFF:FF:1F.0", n); return OK; }
int cuDeviceTotalMem_v2(size_t *n, int d) { *n = (size_t)4 << 30; return OK; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)1; return OK; }
int cuCtxSetCurrent(void *c) { return c == (void *)1 ? OK : INVALID_VALUE; }
int cuCtxSynchronize(void) { return OK; }
int cuStreamCreate(void **s, unsigned flags) { static intptr_t next = 100; *s = (void *)next++; return OK; }
int cuStreamSynchronize(void *s) { return (intptr_t)s >= 100 ? OK : INVALID_VALUE; }
int cuMemAlloc_v2(void **p, size_t n) { return (*p = malloc(n)) ? OK : OUT_OF_MEMORY; }
int cuMemHostAlloc(void **p, size_t n, unsigned flags) { return posix_memalign(p, 4096, n) ? OUT_OF_MEMORY : OK; }
int cuMemFreeHost(void *p) { free(p); return OK; }
int cuMemHostGetDevicePointer_v2(void **out, void *p, unsigned flags) { *out = p; return OK; }
int cuMemsetD8_v2(char *p, unsigned char v, size_t n) { memset(p, v, n); return OK; }

int cuGetErrorName(int code, const char **out) {
    *out = code == NO_DEVICE ? "CUDA_ERROR_NO_DEVICE"
         : code == ALREADY_REGISTERED ? "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"
         : code == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE"
         : code == NOT_SUPPORTED ? "CUDA_ERROR_NOT_SUPPORTED" : "CUDA_ERROR_OTHER";
    return OK;
}

int cuMemHostRegister_v2(char *p, size_t n, unsigned flags) {
    if (fault("noregister")) return NOT_SUPPORTED;
    if ((uintptr_t)p % 4096 || n % 4096 || flags > 1) return INVALID_VALUE;
    int spare = -1;
    for (int i = 0; i < REGIONS; i++) {
        if (regions[i].base && p < regions[i].base + regions[i].size && regions[i].base < p + n) return ALREADY_REGISTERED;
        if (!regions[i].base) spare = i;
    }
    if (spare < 0) return OUT_OF_MEMORY;
    for (size_t at = 0; at < n; at += 4096) *(volatile char *)(p + at);
    regions[spare].base = p;
    regions[spare].size = n;
    return OK;
}

int cuMemHostUnregister(char *p) {
    for (int i = 0; i < REGIONS; i++)
        if (regions[i].base == p) { regions[i].base = NULL; return OK; }
    return NOT_REGISTERED;
}

static int copy(char *to, const char *from, size_t n, const char *host) {
    for (int i = 0; i < REGIONS; i++)
        if (regions[i].base && host < regions[i].base + regions[i].size && host + n > regions[i].base
            && (host < regions[i].base || host + n > regions[i].base + regions[i].size)) return INVALID_VALUE;
    memcpy(to, from, n);
    if (fault("wrong") && n == 512) to[n - 1] ^= 1;
    return OK;
}

int cuMemcpyHtoD_v2(char *to, const char *from, size_t n) { memcpy(to, from, n); return OK; }
int cuMemcpyDtoH_v2(char *to, const char *from, size_t n) { memcpy(to, from, n); return OK; }
int cuMemcpyHtoDAsync_v2(char *to, const char *from, size_t n, void *s) { return copy(to, from, n, from); }
int cuMemcpyDtoHAsync_v2(char *to, const char *from, size_t n, void *s) { return copy(to, from, n, to); }

int cuMemcpyBatchAsync_v2(char **to, char **from, size_t *sizes, size_t count, Attributes *a, size_t *first, size_t n, void *s) {
    if (n != 1 || *first || a->order < 1 || a->order > 3 || a->flags > 1 || (intptr_t)s < 100) return INVALID_VALUE;
    if (count > LARGE_BATCH && fault("crash")) abort();
    for (size_t i = 0; i < count; i++) {
        int code = copy(to[i], from[i], sizes[i], to[i]);  // one of the two is registered, whichever it is
        if (!code) code = copy(to[i], from[i], sizes[i], from[i]);
        if (code) return code;
    }
    return OK;
}

int cuMemcpyBatchAsync(char **to, char **from, size_t *sizes, size_t count, Attributes *a, size_t *first, size_t n,
                       size_t *failed, void *s) {
    *failed = SIZE_MAX;
    return cuMemcpyBatchAsync_v2(to, from, sizes, count, a, first, n, s);
}

int cuGetProcAddress_v2(const char *name, void **out, int version, uint64_t flags, int *status) {
    *out = NULL;
    if (version > number("FAKE_CUDA_VERSION", 13000)) return INVALID_VALUE;
    if (!strcmp(name, "cuMemcpyBatchAsync") && version >= 12080)
        *out = version >= 13000 ? (void *)cuMemcpyBatchAsync_v2 : (void *)cuMemcpyBatchAsync;
    return OK;
}
