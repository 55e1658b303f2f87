// A CUDA driver that runs nothing: it answers what our launcher asks, through NVIDIA's own bindings, and prints each
// launch as "launched kernel grid block shared cluster stream".
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned id; char pad[4]; unsigned value[16]; } Attribute;
typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream;
    Attribute *attributes;
    unsigned count;
} Config;

static char names[64][64];
static int known;

static int ok(void) { return 0; }
static int version(int *to) { *to = 13000; return 0; }
static int device(int *to, int ordinal) { *to = ordinal; return 0; }
static int attribute(int *to, int which, int device) {
    switch (which) {
        case 75: *to = 9; break;            // compute capability, major
        case 76: *to = 0; break;            // and minor
        case 38: *to = 50 << 20; break;     // L2 cache
        case 97: *to = 227 << 10; break;    // shared memory that a block can ask for
        default: return 1;
    }
    return 0;
}
static int context(void **to) { *to = (void *)77; return 0; }
static int retain(void **to, int device) { return context(to); }
static int load(void **to) { *to = (void *)88; return 0; }
static int kernel(void **to, void *library, const char *name) {
    strncpy(names[known], name, sizeof names[0] - 1);
    *to = names[known++];
    return 0;
}
static int function(void **to, void *from) { *to = from; return 0; }
static void print(const char *name, const unsigned *grid, const unsigned *block, unsigned shared, unsigned cluster,
                  void *stream) {
    printf("launched %s %u %u %u %u %zu\n", name, grid[0], block[0], shared, cluster, (size_t)stream);
    fflush(stdout);
}
static int launch(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                  unsigned shared, void *stream, void **parameters, void **extra) {
    unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
    print(f, grid, block, shared, 1, stream);
    return 0;
}
static int launch_ex(const Config *c, void *f, void **parameters, void **extra) {
    print(f, c->grid, c->block, c->shared, c->count ? c->attributes[0].value[0] : 1, c->stream);
    return 0;
}
static int error_string(int code, const char **to) { *to = "an error"; return 0; }

static const struct { const char *name; void *function; } table[] = {
    {"cuDriverGetVersion", version}, {"cuDeviceGet", device}, {"cuDeviceGetAttribute", attribute},
    {"cuDevicePrimaryCtxRetain", retain}, {"cuCtxGetCurrent", context}, {"cuLibraryLoadData", load},
    {"cuLibraryGetKernel", kernel}, {"cuKernelGetFunction", function}, {"cuLaunchKernel", launch},
    {"cuLaunchKernelEx", launch_ex}, {"cuGetErrorString", error_string},
};

int cuGetProcAddress_v2(const char *name, void **to, int version, unsigned long long flags, int *status) {
    if (status) *status = 0;
    *to = ok;
    if (!strcmp(name, "cuGetProcAddress")) *to = cuGetProcAddress_v2;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(name, table[i].name)) *to = table[i].function;
    return 0;
}
int cuGetProcAddress(const char *name, void **to, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, to, version, flags, NULL);
}
