/* The calls of CuTe DSL's host code into the CUDA runtime -> one callback for each launch.
 *
 * Host code that is compiled for the simulator has its imports renamed: the first character of each
 * name becomes an S, so `_cudaLaunchKernelEx` binds to `ScudaLaunchKernelEx` here whatever real
 * runtime is loaded, and code compiled for a real GPU never comes by. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 1, NO_DEVICE = 100, NOT_SUPPORTED = 801, BINARIES = 64 };

typedef struct { unsigned x, y, z; } dim3_t;
typedef struct { unsigned id, pad; uint8_t value[64]; } attribute_t;
typedef struct {
    dim3_t grid, block;
    size_t smem;
    void *stream;
    const attribute_t *attributes;
    unsigned count;
} config_t;
typedef struct kernel { struct kernel *next; const void *image; char *name; } kernel_t;
typedef struct { const void *image; kernel_t *kernels; } library_t;
typedef int (*launch_t)(const void *image, const char *name, const config_t *config, void **args);

static launch_t launch;
static int capability, sm_count;
static const char *refused; /* the last call that is not simulated */

void coda_sim_install(launch_t callback, int cc, int sms) {
    launch = callback;
    capability = cc;
    sm_count = sms;
}

const char *coda_sim_refused(void) {
    const char *name = refused;
    refused = NULL;
    return name;
}

int ScudaGetDevice(int *device) { *device = 0; return OK; }
int ScudaSetDevice(int device) { return device == 0 ? OK : INVALID; }
int ScudaGetDeviceCount(int *count) { *count = 1; return OK; }
int ScuDeviceGet(int *device, int ordinal) { *device = 0; return ordinal == 0 ? OK : INVALID; }
int ScudaDeviceSynchronize(void) { return OK; }
int ScudaStreamSynchronize(void *stream) { (void)stream; return OK; }
int ScudaFuncSetAttribute(void *f, int a, int v) { (void)f, (void)a, (void)v; return OK; }

int ScudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) {
    (void)kernel, (void)attribute, (void)value;
    return device == 0 ? OK : INVALID;
}

int ScuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
    (void)attribute, (void)kernel, (void)device;
    *value = 0; /* static shared memory is not used by the DSL's kernels */
    return OK;
}

int ScudaDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
    case 1: *value = 1024; break;       /* threads per block */
    case 8: *value = 49152; break;      /* shared memory per block */
    case 16: *value = sm_count; break;  /* multiprocessors */
    case 39: *value = 2048; break;      /* threads per multiprocessor */
    case 75: *value = capability / 10; break;
    case 76: *value = capability % 10; break;
    case 81: *value = 233472; break;    /* shared memory per multiprocessor */
    case 95: *value = 1; break;         /* cooperative launch */
    case 97: *value = 232448; break;    /* shared memory per block, opt-in */
    case 106: *value = 32; break;       /* blocks per multiprocessor */
    default: *value = 0;
    }
    return OK;
}

int ScudaLibraryLoadData(library_t **out, const void *code, void *jit_options, void *jit_values,
                         unsigned jit_count, void *options, void *values, unsigned count) {
    (void)jit_options, (void)jit_values, (void)jit_count, (void)options, (void)values, (void)count;
    library_t *library = calloc(1, sizeof *library);
    if (!library) return INVALID;
    library->image = code;
    *out = library;
    return OK;
}

int ScudaLibraryGetKernel(kernel_t **out, library_t *library, const char *name) {
    kernel_t *kernel = calloc(1, sizeof *kernel);
    if (!kernel) return INVALID;
    *kernel = (kernel_t){library->kernels, library->image, strdup(name)};
    library->kernels = kernel;
    *out = kernel;
    return OK;
}

int ScudaLibraryUnload(library_t *library) {
    while (library && library->kernels) {
        kernel_t *kernel = library->kernels;
        library->kernels = kernel->next;
        free(kernel->name);
        free(kernel);
    }
    free(library);
    return OK;
}

int ScudaLaunchKernelEx(const config_t *config, kernel_t *kernel, void **args) {
    if (!launch) {
        fprintf(stderr, "coda.sim: %s was compiled for a simulated device and is launched "
                        "outside of it\n", kernel->name);
        return NO_DEVICE;
    }
    return launch(kernel->image, kernel->name, config, args);
}

int ScudaLaunchKernel(kernel_t *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                      unsigned by, unsigned bz, void **args, size_t smem, void *stream) {
    config_t config = {{gx, gy, gz}, {bx, by, bz}, smem, stream, NULL, 0};
    return ScudaLaunchKernelEx(&config, kernel, args);
}

int ScudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, void *kernel, int threads,
                                                   size_t smem) {
    (void)kernel, (void)threads, (void)smem;
    *count = 1;
    return OK;
}

/* `slot` keeps the loaded libraries of a module from its first call on. */
int Suda_dialect_init_library_once(void **slot, int (*init)(void **), int (*load)(void **, int),
                                   void (*error)(const char *, const char *)) {
    if (*slot) return OK;
    void **libraries = calloc(BINARIES, sizeof *libraries);
    int code = libraries ? init(libraries) : INVALID;
    if (!code && load) code = load(libraries, 0);
    if (code) {
        free(libraries);
        if (error) error("RuntimeError", "coda.sim could not load a module's kernels");
        return code;
    }
    *slot = libraries;
    return OK;
}

void Suda_dialect_unload_library_once(void **slot) {
    void **libraries = *slot;
    *slot = NULL;
    for (int i = 0; libraries && i < BINARIES && libraries[i]; i++) ScudaLibraryUnload(libraries[i]);
    free(libraries);
}

#define SIMULATED(X)                                                                               \
    X(udaGetDevice) X(udaSetDevice) X(udaGetDeviceCount) X(uDeviceGet) X(udaDeviceSynchronize)     \
    X(udaStreamSynchronize) X(udaFuncSetAttribute) X(udaKernelSetAttributeForDevice)               \
    X(uKernelGetAttribute) X(udaDeviceGetAttribute) X(udaLibraryLoadData) X(udaLibraryGetKernel)   \
    X(udaLibraryUnload) X(udaLaunchKernelEx) X(udaLaunchKernel)                                    \
    X(udaOccupancyMaxActiveBlocksPerMultiprocessor)
#define REFUSED(X)                                                                                 \
    X(uLibraryGetGlobal) X(uLibraryGetKernel) X(uLibraryGetKernelCount) X(uLibraryGetManaged)      \
    X(uLibraryGetModule) X(uLibraryGetUnifiedFunction) X(uLibraryLoadData)                         \
    X(uLibraryLoadFromFile) X(uLibraryUnload) X(uTensorMapEncodeTiled) X(udaEventCreate)           \
    X(udaEventDestroy) X(udaEventElapsedTime) X(udaEventRecord) X(udaFree) X(udaFreeAsync)         \
    X(udaFreeHost) X(udaGetDeviceProperties) X(udaGraphDestroy) X(udaGraphExecDestroy)             \
    X(udaGraphInstantiate) X(udaGraphLaunch) X(udaLibraryGetGlobal) X(udaLibraryGetKernelCount)    \
    X(udaLibraryGetManaged) X(udaLibraryGetUnifiedFunction) X(udaLibraryLoadFromFile)              \
    X(udaMalloc) X(udaMallocAsync) X(udaMallocHost) X(udaMallocManaged) X(udaMemcpy)               \
    X(udaMemcpyAsync) X(udaMemset) X(udaMemsetAsync) X(udaStreamAddCallback)                       \
    X(udaStreamBeginCapture) X(udaStreamCreate) X(udaStreamDestroy) X(udaStreamEndCapture)         \
    X(udaStreamWaitEvent)

#define REFUSE(name) int Sc##name(void) { refused = "_c" #name; return NOT_SUPPORTED; }
REFUSED(REFUSE)

typedef struct { const char *name; void *address; } symbol_t;
#define ROW(name) {"_c" #name, (void *)Sc##name},
const symbol_t coda_sim_symbols[] = {
    SIMULATED(ROW) REFUSED(ROW)
    {"cuda_dialect_init_library_once", (void *)Suda_dialect_init_library_once},
    {"cuda_dialect_unload_library_once", (void *)Suda_dialect_unload_library_once},
    {NULL, NULL},
};
