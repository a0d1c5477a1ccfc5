/* A CUDA driver of a machine with one GPU and no context: calls are logged and fail. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int asked(const char *what) {
    const char *path = getenv("CODA_TEST_DRIVER_LOG");
    FILE *log = path ? fopen(path, "a") : NULL;
    if (log) {
        fprintf(log, "%s\n", what);
        fclose(log);
    }
    return 201; /* CUDA_ERROR_INVALID_CONTEXT */
}

static int call(void) { return asked("a call"); }

int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long flags,
                        void *status) {
    (void)version, (void)flags, (void)status;
    asked(name);
    *function = (void *)call;
    return 0;
}

int cuGetProcAddress(const char *name, void **function, int version, unsigned long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}

int cuInit(unsigned flags) { (void)flags; return asked("cuInit"); }
int cuDeviceGetCount(int *count) { *count = 1; return asked("cuDeviceGetCount"); }
int cuCtxGetCurrent(void **context) { *context = NULL; return asked("cuCtxGetCurrent"); }

/* CuTe DSL chooses its libraries by it when it is imported; it needs no device. */
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
