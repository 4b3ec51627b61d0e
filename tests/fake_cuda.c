// Stands in for libcuda.so.1: launches call back into the test, which runs Triton's interpreter.
#include <stddef.h>
typedef int (*callback_t)(void*, unsigned, unsigned, unsigned, void**);
static callback_t callback = NULL;
static long launches = 0, modules = 0;
static void* context = NULL;
static int refusal = 0;
void fake_set_callback(callback_t c) { callback = c; }
void fake_refuse(int code) { refusal = code; }
long fake_launches(void) { return launches; }
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** params, void** extra) {
  ++launches;
  if (gy != 1 || gz != 1 || by != 1 || bz != 1 || extra || !context) return 1;
  return callback ? callback(f, gx, bx, shared, params) : refusal;
}
int cuModuleLoadData(void** m, const void* image) {
  *m = (void*)++modules;
  return refusal;
}
int cuModuleGetFunction(void** f, void* m, const char* name) { *f = m; return 0; }
int cuFuncSetAttribute(void* f, int attribute, int value) { return 0; }
int cuFuncGetAttribute(int* value, int attribute, void* f) { *value = 0; return 0; }
int cuCtxGetCurrent(void** c) { *c = context; return 0; }
int cuCtxSetCurrent(void* c) { context = c; return 0; }
int cuDevicePrimaryCtxRetain(void** c, int device) { *c = (void*)1; return 0; }
int cuThreadExchangeStreamCaptureMode(int* mode) { return 0; }
int cuGetErrorString(int error, const char** text) { *text = "the fake's"; return 0; }
