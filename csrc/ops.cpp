// trialign._C: registers the ops of csrc/cpu at the SIMD level this machine has, and holds the hash and torch version that reveal a stale build.
#include <Python.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#define TRIALIGN_LEVEL 0
#include "op.h"

namespace trialign {
namespace {

struct Pending {
  int level;
  void (*fill)(Ops&);
};

std::vector<Pending>& pending() {
  static std::vector<Pending> list;
  return list;
}

constexpr const char* level_names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

int machine_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
  return avx512 && __builtin_cpu_supports("avx512bf16") ? 3 : avx512 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

// TRIALIGN_KERNELS=baseline|avx2|avx512 chooses a lower level than the machine's, for tests; see kernels/dispatch.py.
int chosen_level() {
  const int best = machine_level();
  const char* asked = std::getenv("TRIALIGN_KERNELS");
  for (int level = 0; asked && level < best; ++level)
    if (!std::strcmp(asked, level_names[level])) return level;
  return best;
}

Ops& ops() {
  static Ops instance;  // lives as long as the process: its libraries hold the registrations
  return instance;
}

}  // namespace

Registration::Registration(int level, void (*fill)(Ops&)) { pending().push_back({level, fill}); }

void Ops::add(const char* schema, void (*boxed)(StableIValue*, uint64_t, uint64_t)) {
  schemas_.def(schema);
  const std::string name(schema, std::strcspn(schema, "("));
  cpu_.impl(name.c_str(), boxed);
}

}  // namespace trialign

// Read from the file by kernels/backends/extension.py before it loads the module: a stale one must not register its ops.
extern "C" __attribute__((visibility("default"), used)) const char trialign_facts[] =
    "trialign._C built from <" TRIALIGN_SOURCES "> for torch <" TRIALIGN_TORCH ">";

#if defined(TRIALIGN_CUDA)
namespace trialign {
const char* cuda_problem();  // cuda_ops.cpp
void register_cuda();
}  // namespace trialign

namespace {

PyObject* cuda_problem(PyObject*, PyObject*) {
  const char* problem = trialign::cuda_problem();
  return problem ? PyUnicode_FromString(problem) : Py_NewRef(Py_None);
}

PyObject* register_cuda(PyObject*, PyObject*) {
  trialign::register_cuda();
  return Py_NewRef(Py_None);
}

PyMethodDef methods[] = {
    {"cuda_problem", cuda_problem, METH_NOARGS, "Launches a kernel on the current device: None, or why it does not run."},
    {"register_cuda", register_cuda, METH_NOARGS, "Registers the CUDA C++ implementations."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
#else
namespace {
PyMethodDef methods[] = {{nullptr, nullptr, 0, nullptr}};
}
#endif

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "The compiled ops of trialign.", -1, methods, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (!module) return nullptr;
  const int level = trialign::chosen_level();
  try {
    for (const auto& entry : trialign::pending())
      if (entry.level == level) entry.fill(trialign::ops());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    Py_DECREF(module);
    return nullptr;
  }
  PyModule_AddStringConstant(module, "simd_level", trialign::level_names[level]);
#if defined(TRIALIGN_CUDA)
  PyModule_AddStringConstant(module, "cuda_runtime", TRIALIGN_CUDA_RUNTIME);
  PyModule_AddStringConstant(module, "cuda_archs", TRIALIGN_CUDA_ARCHS);
#endif
  return module;
}
