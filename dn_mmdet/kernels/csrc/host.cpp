// Launches the Triton kernels of a layer by one C++ call per direction. Python's part of a
// Triton launch costs more than most maps take a GPU, and a layer has eight of them.
//
// Compiled by g++ alone: the CUDA driver is reached by dlopen, PyTorch's streams and memory
// through c10's device-independent registries. What a layer's call needs is read from its
// modules here; anything out of the ordinary is answered by None, and the caller goes the
// general way, which also words the errors. An operator of torch.compile's hands over tensors
// in their place, and learns what does not fit. See host.py for the plans.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/object_ptr.h>

namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// ---------------------------------------------------------------- the CUDA driver

using CUresult = int;
using Handle = void*;  // CUcontext, CUmodule, CUfunction, CUstream: all opaque pointers

struct Driver {
  CUresult (*launch)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                     Handle, void**, void**);
  CUresult (*module_load)(Handle*, const void*);
  CUresult (*get_function)(Handle*, Handle, const char*);
  CUresult (*set_attribute)(Handle, int, int);
  CUresult (*get_attribute)(int*, int, Handle);
  CUresult (*get_context)(Handle*);
  CUresult (*set_context)(Handle);
  CUresult (*retain_context)(Handle*, int);
  CUresult (*exchange_capture_mode)(int*);
  CUresult (*error_string)(CUresult, const char**);
};

std::string driver_path = "libcuda.so.1";
bool accepts_cpu = false;  // where a test put another driver in its place

const Driver& driver() {
  static const Driver found = [] {
    void* library = dlopen(driver_path.c_str(), RTLD_NOW);
    TORCH_CHECK(library != nullptr, "cannot open the CUDA driver: ", dlerror());
    Driver d;
    auto resolve = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      TORCH_CHECK(function != nullptr, "the CUDA driver ", driver_path, " has no ", name);
    };
    resolve(d.launch, "cuLaunchKernel");
    resolve(d.module_load, "cuModuleLoadData");
    resolve(d.get_function, "cuModuleGetFunction");
    resolve(d.set_attribute, "cuFuncSetAttribute");
    resolve(d.get_attribute, "cuFuncGetAttribute");
    resolve(d.get_context, "cuCtxGetCurrent");
    resolve(d.set_context, "cuCtxSetCurrent");
    resolve(d.retain_context, "cuDevicePrimaryCtxRetain");
    resolve(d.exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
    resolve(d.error_string, "cuGetErrorString");
    return d;
  }();
  return found;
}

void check(CUresult code, const char* what) {
  if (code == 0) return;
  const char* text = nullptr;
  driver().error_string(code, &text);
  constexpr CUresult OUT_OF_MEMORY = 2;
  TORCH_CHECK_WITH(OutOfMemoryError, code != OUT_OF_MEMORY, what,
                   ": the GPU has no memory left for the kernels of a DN layer (", text, ")");
  TORCH_CHECK(false, what, ": CUDA error ", code, " (", text ? text : "unknown", ")");
}

// While it lives, a call that a stream in capture would not allow does not end the capture. The
// driver may load a kernel's code at any of the calls that ask for it.
class RelaxedCapture {
 public:
  RelaxedCapture() {
    check(driver().exchange_capture_mode(&mode_), "cuThreadExchangeStreamCaptureMode");
  }
  ~RelaxedCapture() { driver().exchange_capture_mode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  int mode_ = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED; then what it was before
};

// A thread of autograd's may have no context yet: the runtime makes one at its first real
// call, and to set the device that is set already is none.
void ensure_context(int device) {
  Handle context = nullptr;
  check(driver().get_context(&context), "cuCtxGetCurrent");
  if (context == nullptr) {
    check(driver().retain_context(&context, device), "cuDevicePrimaryCtxRetain");
    check(driver().set_context(context), "cuCtxSetCurrent");
  }
}

Handle stream_of(c10::Device device) {
  if (!device.is_cuda()) return nullptr;  // a test without a GPU
  const auto* impl = c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA);
  return impl->getStreamNativeHandle(impl->getStream(device));
}

// ---------------------------------------------------------------- plans

// Where an argument comes from; the order is that of host.py's SOURCES.
enum Source {
  X, Y, DY, DX,
  W, B, W_IN, B_IN, W_OUT, B_OUT, RUNNING_MEAN, RUNNING_VAR, TRACKED,
  KEPT, SCRATCH, BACKWARD_SCRATCH, DW, DB, DW_IN, DB_IN, DW_OUT, DB_OUT, TABLE, DTABLE,
  POINTERS,
  EPS = POINTERS, MOMENTUM, BOUND,
  NUMBER,
};
constexpr int PARAMETERS = 6;  // W to B_OUT
constexpr int STATE = 3;       // RUNNING_MEAN to TRACKED
constexpr int MAX_ARGUMENTS = 48;

struct Scalars {
  double eps, momentum, bound;
};

struct Launch {
  Handle function = nullptr;  // null: an all-reduce of the table
  unsigned grid = 0, threads = 0, shared = 0;
  std::vector<int16_t> sources;
  std::vector<int64_t> values;  // byte offset from the source, or the number itself

  void run(char* const* pointers, const Scalars& scalars, Handle stream) const {
    int64_t buffer[MAX_ARGUMENTS];
    void* params[MAX_ARGUMENTS + 2];
    const int n = static_cast<int>(sources.size());
    for (int i = 0; i < n; ++i) {
      const int source = sources[i];
      if (source < POINTERS) {
        buffer[i] = reinterpret_cast<int64_t>(pointers[source] + values[i]);
      } else if (source == NUMBER) {
        buffer[i] = values[i];
      } else {
        const double value = source == EPS        ? scalars.eps
                             : source == MOMENTUM ? scalars.momentum
                                                  : scalars.bound;
        std::memcpy(&buffer[i], &value, sizeof(value));
      }
      params[i] = &buffer[i];
    }
    int64_t scratch = 0;  // Triton's global_scratch and profile_scratch, which are not used
    params[n] = params[n + 1] = &scratch;
    const CUresult code =
        driver().launch(function, grid, 1, 1, threads, 1, 1, shared, stream, params, nullptr);
    if (code != 0) check(code, "cuLaunchKernel");
  }
};

struct Plan {
  std::vector<Launch> forward, backward;
  int64_t kept, scratch, backward_scratch;  // bytes
  int64_t mu, sigma;                        // where they stand in kept, in bytes
  int64_t gradients;
  std::array<int64_t, PARAMETERS> offsets;  // of the gradients, in bytes
  int64_t table;                            // values; 0: statistics of one process
  int64_t hidden, dtypes;                   // of the key
  at::ScalarType accumulator;

  int64_t values_kept() const {
    return kept / static_cast<int64_t>(c10::elementSize(accumulator));
  }

  at::ScalarType type_of(int parameter) const {
    return static_cast<at::ScalarType>((dtypes >> 6 * (PARAMETERS + STATE - 1 - parameter) & 63) -
                                       1);
  }
};

// device; N, C, S; hidden; layout, mode and dtype; dtypes of what the layer has; world; rank
using Key = std::array<int64_t, 9>;

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t h = 1469598103934665603ull;
    for (int64_t v : key) h = (h ^ static_cast<uint64_t>(v)) * 1099511628211ull + (h >> 29);
    return h;
  }
};

std::unordered_map<Key, std::shared_ptr<Plan>, KeyHash> plans;  // under the GIL
constexpr size_t MOST_PLANS = 1 << 14;  // maps of ever new sizes are not to fill the memory

enum Mode { BATCH = 1, UPDATE = 2, CUMULATIVE = 4, SHARED = 8, STANDARDIZED = 16, BOUNDED = 32,
            CHANNELS_LAST = 64, INFERENCE = 128, BACKWARD = 256 };
constexpr int MODES = 9;  // bits; the dtype of the map stands above them
constexpr int64_t OF_A_GRADIENT = BATCH | SHARED | STANDARDIZED | BOUNDED;

// ---------------------------------------------------------------- tensors, past the dispatcher

c10::Allocator* allocator_of(c10::DeviceType type) {
  static c10::Allocator* const cuda =
      accepts_cpu ? nullptr : c10::GetAllocator(c10::DeviceType::CUDA);
  return type == c10::DeviceType::CUDA ? cuda : c10::GetAllocator(type);
}

Tensor empty(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType type,
             const Tensor& like) {
  if (at::globalContext().deterministicAlgorithms())  // which may fill it
    return at::empty_strided(sizes, strides, like.options().dtype(type));
  const c10::DispatchKeySet keys(like.is_cuda() ? c10::DispatchKey::CUDA
                                                : c10::DispatchKey::CPU);
  return Tensor(at::detail::empty_strided_generic(
      sizes, strides, allocator_of(like.device().type()), keys, type));
}

Tensor empty_bytes(int64_t bytes, const Tensor& like) {
  return empty({(bytes + 7) / 8}, {1}, at::kDouble, like);
}

// A tensor of its own, with its own version, in a part of the memory of another.
Tensor part(const Tensor& base, int64_t offset, at::IntArrayRef sizes, caffe2::TypeMeta type) {
  auto t = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(base.storage()), base.key_set(),
                                                    type);
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_storage_offset(offset / static_cast<int64_t>(type.itemsize()));
  impl->set_sizes_contiguous(sizes);
  return t;
}

char* address(const Tensor& t) {
  return t.defined() ? static_cast<char*>(const_cast<void*>(t.const_data_ptr())) : nullptr;
}

bool is_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(address(t)) % 16 == 0; }

// Whether the channels are innermost and all else is in order.
bool is_channels_last(const Tensor& x) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  int64_t expected = 1;
  auto fits = [&](int64_t d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
    return true;
  };
  if (!fits(1)) return false;
  for (int64_t d = x.dim() - 1; d > 1; --d)
    if (!fits(d)) return false;
  return fits(0);
}

struct BelowAutograd {  // what is done inside is no part of the graph
  at::AutoDispatchBelowADInplaceOrView guard;
};

// x itself, or an aligned copy that is contiguous or channels_last. Autograd sees the copy made:
// a backward pass that is to be differentiated leads back to x through it.
Tensor dense(const Tensor& x, bool& channels_last) {
  const bool contiguous = x.is_contiguous();
  channels_last = !contiguous && is_channels_last(x);
  if ((contiguous || channels_last) && is_aligned(x)) return x;
  return channels_last ? x.clone() : x.clone(at::MemoryFormat::Contiguous);
}

// Whether memory holds the values as they are: not conjugate, negative or all zero by a flag.
bool is_materialized(const Tensor& t) {
  return !t.is_conj() && !t.is_neg() && !t._is_zerotensor();
}

// Not where its storage was freed, as by untyped_storage().resize_(0).
bool has_memory(const Tensor& t) {
  return t.has_storage() && (t.numel() == 0 || t.storage().data() != nullptr);
}

// A gradient of x, laid out as x is.
Tensor laid_out_as(const Tensor& x, const Tensor& dy) {
  if (dy.sizes() == x.sizes() && dy.strides() == x.strides() &&
      dy.scalar_type() == x.scalar_type() && is_materialized(dy) && has_memory(dy) &&
      is_aligned(dy))
    return dy;
  TORCH_CHECK(has_memory(dy) || dy._is_zerotensor(),
              "expected a gradient with memory, got one whose storage was freed");
  Tensor copy = at::empty_like(x);
  return copy.copy_(dy);
}

// ---------------------------------------------------------------- running a plan

void all_reduce(Tensor& t, const std::string& group) {
  std::vector<Tensor> tensors{t};
  c10d::resolve_process_group(group)->allreduce(tensors)->wait();
}

void run(const std::vector<Launch>& launches, size_t count, char* const* pointers,
         const Scalars& scalars, const Tensor& x, Tensor& reduced, const std::string& group) {
  const Handle stream = stream_of(x.device());
  ensure_context(x.is_cuda() ? x.device().index() : 0);
  for (size_t i = 0; i < count; ++i) {
    const auto& launch = launches[i];
    if (launch.function == nullptr) {
      all_reduce(reduced, group);
    } else {
      launch.run(pointers, scalars, stream);
    }
  }
}

// Writes the gradients of the parameters, and gives back that of x where it is needed.
Tensor run_backward(const Plan& plan, const Tensor& dy, const Tensor& x,
                    const std::array<Tensor, PARAMETERS>& parameters, const Tensor& kept,
                    const Tensor& table, const std::array<char*, PARAMETERS>& gradients,
                    const Scalars& scalars, const std::string& group, bool needs_dx) {
  Tensor dx, dtable;
  if (needs_dx) dx = empty(x.sizes(), x.strides(), x.scalar_type(), x);
  if (plan.table) dtable = empty({plan.table}, {1}, plan.accumulator, x);
  const Tensor scratch = empty_bytes(plan.backward_scratch, x);
  char* pointers[POINTERS] = {};
  pointers[X] = address(x);
  pointers[DY] = address(dy);
  pointers[DX] = address(dx);
  for (int i = 0; i < PARAMETERS; ++i) {
    pointers[W + i] = address(parameters[i]);
    pointers[DW + i] = gradients[i];
  }
  pointers[KEPT] = address(kept);
  pointers[BACKWARD_SCRATCH] = address(scratch);
  pointers[TABLE] = address(table);
  pointers[DTABLE] = address(dtable);
  // The last launches make dx alone. Among them is the all-reduce, which other processes
  // make only for dx too: autograd's on the general path, torch's SyncBatchNorm.
  const size_t for_dx = needs_dx ? 0 : plan.table ? 3 : 1;
  run(plan.backward, plan.backward.size() - for_dx, pointers, scalars, x, dtable, group);
  return dx;
}

// Batched gradients, say: not a plain tensor with memory of its own.
bool is_transformed(const Tensor& t) {
  return t.layout() != at::kStrided || !t.has_storage() || t._is_zerotensor() ||
         t.key_set().has_any(c10::DispatchKeySet(
             {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
              c10::DispatchKey::Python}));
}

// Hooks on saved tensors may give back anything; kernels would read past its end.
void check_saved(const Tensor& t, int64_t numel, at::ScalarType type, c10::Device device) {
  TORCH_CHECK(t.numel() == numel && t.scalar_type() == type && t.device() == device &&
                  t.layout() == at::kStrided && (has_memory(t) || t._is_zerotensor()),
              "expected the saved tensor back from a hook on saved tensors, with ", numel,
              " values of ", type, " on ", device, ", got ", t.sizes(), " values of ",
              t.scalar_type(), " on ", t.device());
}

PyObject* wrap(const Tensor& t) {
  return t.defined() ? THPVariable_Wrap(t) : (Py_INCREF(Py_None), Py_None);
}

PyObject* double_backward = nullptr;  // host.py's, set once

struct DynamicNormBackward : public torch::autograd::Node {
  std::shared_ptr<Plan> plan;
  SavedVariable x_;
  c10::SmallVector<int64_t, 5> strides;  // of x, by which the plan goes
  std::array<SavedVariable, PARAMETERS> parameters_;
  std::array<bool, PARAMETERS> has;
  Tensor kept, table;
  Scalars scalars;
  int64_t mode;
  std::string group;

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list found(1 + PARAMETERS);
    const Tensor& dy = grads[0];
    if (!dy.defined()) return found;
    Tensor x = x_.unpack();  // says so where it was released or changed
    std::array<Tensor, PARAMETERS> p;
    for (int i = 0; i < PARAMETERS; ++i)
      if (has[i]) p[i] = parameters_[i].unpack();
    if (c10::GradMode::is_enabled() || is_transformed(dy)) return differentiable(dy, x, p);
    const c10::Device device = dy.device();
    c10::OptionalDeviceGuard guard(device);
    TORCH_CHECK(x.sizes() == dy.sizes(), "expected the saved tensor of size ", dy.sizes(),
                " from a hook on saved tensors, got ", x.sizes());
    check_saved(x, dy.numel(), dy.scalar_type(), device);
    const int64_t pairs = 2 * x.size(1);
    const int64_t numels[PARAMETERS] = {x.size(1),    x.size(1),           plan->hidden * pairs,
                                        plan->hidden, plan->hidden * pairs, pairs};
    for (int i = 0; i < PARAMETERS; ++i)
      if (has[i]) check_saved(p[i], numels[i], plan->type_of(i), device);
    if (x.strides() != at::IntArrayRef(strides) || !is_materialized(x) || !is_aligned(x)) {
      Tensor copy = at::empty_strided(x.sizes(), strides, x.options());
      x = copy.copy_(x);
    }
    for (auto& t : p)
      if (t.defined() && !(t.is_contiguous() && is_materialized(t)))
        t = t.clone(at::MemoryFormat::Contiguous);
    const Tensor all = empty_bytes(plan->gradients, x);
    std::array<char*, PARAMETERS> gradients;
    for (int i = 0; i < PARAMETERS; ++i) gradients[i] = address(all) + plan->offsets[i];
    found[0] = run_backward(*plan, laid_out_as(x, dy), x, p, kept, table, gradients, scalars,
                            group, task_should_compute_output(0));
    for (int i = 0; i < PARAMETERS; ++i)
      if (has[i] && task_should_compute_output(i + 1))
        found[i + 1] = part(all, plan->offsets[i], p[i].sizes(), p[i].dtype());
    return found;
  }

  // create_graph=True, or batched gradients: by plain PyTorch, each operation seen.
  variable_list differentiable(const Tensor& dy, const Tensor& x,
                               const std::array<Tensor, PARAMETERS>& p) {
    pybind11::gil_scoped_acquire gil;
    THPObjectPtr parameters(PyTuple_New(PARAMETERS)), needed(PyTuple_New(1 + PARAMETERS));
    if (!parameters || !needed) throw python_error();
    for (int i = 0; i < PARAMETERS; ++i)
      PyTuple_SET_ITEM(parameters.get(), i, wrap(has[i] ? p[i] : Tensor()));
    for (int i = 0; i <= PARAMETERS; ++i)
      PyTuple_SET_ITEM(needed.get(), i, PyBool_FromLong(task_should_compute_output(i)));
    // of eval mode: the running statistics may have moved on
    const auto type = c10::scalarTypeToTypeMeta(plan->accumulator);
    const Tensor mu = part(kept, plan->mu, {x.size(1)}, type);
    const Tensor sigma = part(kept, plan->sigma, {x.size(1)}, type);
    THPObjectPtr result(PyObject_CallFunction(
        double_backward, "NNNNOOLdds", wrap(dy), wrap(x), wrap(mu), wrap(sigma),
        parameters.get(), needed.get(), static_cast<long long>(mode), scalars.eps,
        scalars.bound, group.c_str()));
    if (!result) throw python_error();
    variable_list found(1 + PARAMETERS);
    for (int i = 0; i <= PARAMETERS; ++i) {
      PyObject* item = PyTuple_GET_ITEM(result.get(), i);
      if (item != Py_None) found[i] = THPVariable_Unpack(item);
    }
    return found;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    x_.reset_data();
    for (auto& v : parameters_) v.reset_data();
    kept = Tensor();
    table = Tensor();
  }

  std::string name() const override { return "DynamicNormBackward"; }
};

// A call as it was read from the layer's modules, or as an operator was given it.
struct Call {
  // Not copies: each would take the GIL to count a reference of the Python object.
  std::array<const Tensor*, PARAMETERS> parameters;
  std::array<const Tensor*, STATE> state;
  std::array<THPObjectPtr, PARAMETERS + STATE> owners;
  Scalars scalars;
  int64_t mode = 0;
  std::string group;

  bool is_differentiable(const Tensor& x) const {
    const auto& p = parameters;
    return torch::autograd::compute_requires_grad(x, *p[0], *p[1], *p[2], *p[3], *p[4], *p[5]);
  }
};

struct Made {
  Tensor y, kept, table;  // kept and table are undefined where there is nothing of it
};

// Autograd sees nothing of it.
Made run_forward(const Plan& plan, const Tensor& x, const Call& call) {
  const auto& p = call.parameters;
  pybind11::gil_scoped_release released;
  c10::OptionalDeviceGuard guard(x.device());
  Made made;
  made.y = empty(x.sizes(), x.strides(), x.scalar_type(), x);
  if (plan.kept) made.kept = empty({plan.values_kept()}, {1}, plan.accumulator, x);
  if (plan.table) made.table = empty({plan.table}, {1}, plan.accumulator, x);
  const Tensor scratch = empty_bytes(plan.scratch, x);
  char* pointers[POINTERS] = {};
  std::array<Tensor, PARAMETERS> copies;
  pointers[X] = address(x);
  pointers[Y] = address(made.y);
  for (int i = 0; i < PARAMETERS; ++i) {
    if (p[i]->defined() && !p[i]->is_contiguous()) {
      BelowAutograd below;
      copies[i] = p[i]->contiguous();
    }
    pointers[W + i] = address(copies[i].defined() ? copies[i] : *p[i]);
  }
  for (int i = 0; i < STATE; ++i) {
    const Tensor& t = *call.state[i];
    if (t.defined() && call.mode & UPDATE) t.mutable_data_ptr();  // ends a lazy copy
    pointers[RUNNING_MEAN + i] = address(t);
  }
  pointers[KEPT] = address(made.kept);
  pointers[SCRATCH] = address(scratch);
  pointers[TABLE] = address(made.table);
  run(plan.forward, plan.forward.size(), pointers, call.scalars, x, made.table, call.group);
  if (call.mode & UPDATE)  // autograd is to notice, as it does an operator's write
    for (const Tensor* t : call.state)
      if (t->defined() && !t->is_inference()) t->unsafeGetTensorImpl()->bump_version();
  return made;
}

Tensor forward(const std::shared_ptr<Plan>& plan, const Tensor& x, Call& call) {
  const auto& p = call.parameters;
  auto [y, kept, table] = run_forward(*plan, x, call);
  // with the GIL: each of the copies below would take it by itself
  if (!(call.mode & INFERENCE)) {
    std::shared_ptr<DynamicNormBackward> node(new DynamicNormBackward(),
                                              torch::autograd::deleteNode);
    node->set_next_edges(
        torch::autograd::collect_next_edges(x, *p[0], *p[1], *p[2], *p[3], *p[4], *p[5]));
    node->plan = plan;
    node->x_ = SavedVariable(x, false);
    node->strides = x.strides();
    for (int i = 0; i < PARAMETERS; ++i) {
      node->has[i] = p[i]->defined();
      if (p[i]->defined()) node->parameters_[i] = SavedVariable(*p[i], false);
    }
    node->kept = std::move(kept);
    node->table = std::move(table);
    node->scalars = call.scalars;
    node->mode = call.mode;
    node->group = call.group;
    torch::autograd::set_history(y, node);
  }
  return y;
}

// ---------------------------------------------------------------- reading a layer

PyObject* intern(const char* name) { return PyUnicode_InternFromString(name); }

struct Names {
  PyObject *parameters = intern("_parameters"), *buffers = intern("_buffers"),
           *modules = intern("_modules"),
           *training = intern("training"), *eps = intern("eps"), *momentum = intern("momentum"),
           *track = intern("track_running_stats"), *forward = intern("forward"),
           *bound = intern("bound"), *inputs = intern("inputs"),
           *standardized = intern("standardized"), *is_replica = intern("_is_replica");
  PyObject* hooks[4] = {intern("_forward_hooks"), intern("_forward_pre_hooks"),
                        intern("_backward_hooks"), intern("_backward_pre_hooks")};
  PyObject* norm_parameters[2] = {intern("weight"), intern("bias")};
  PyObject* state[STATE] = {intern("running_mean"), intern("running_var"),
                            intern("num_batches_tracked")};
  PyObject* sc_parameters[4] = {intern("w_in"), intern("b_in"), intern("w_out"), intern("b_out")};
};
const Names* names = nullptr;

PyObject* kind_of_type = nullptr;   // host.py's: a module's class -> int
PyObject* group_of_norm = nullptr;  // host.py's: a SyncBatchNorm -> None or (name, world, rank)
std::array<PyObject*, 4> global_hooks = {};  // torch's dicts of hooks for all modules

enum Kind { OTHER = 0, NORM = 1, SYNC_NORM = 2, PLAIN_SC = 3 };

// Errors of Python's are left set; the caller looks.
int kind_of(PyObject* module) {
  static std::unordered_map<PyTypeObject*, int> known;
  PyTypeObject* type = Py_TYPE(module);
  const auto found = known.find(type);
  if (found != known.end()) return found->second;
  THPObjectPtr kind(
      PyObject_CallFunctionObjArgs(kind_of_type, reinterpret_cast<PyObject*>(type), nullptr));
  if (!kind) return OTHER;
  Py_INCREF(type);  // for good: the address is not to become another's
  return known[type] = static_cast<int>(PyLong_AsLong(kind.get()));
}

// A module's attributes, looked up without nn.Module's own ways.
struct Attributes {
  THPObjectPtr dict;
  explicit Attributes(PyObject* module) : dict(PyObject_GenericGetDict(module, nullptr)) {
    if (!dict) PyErr_Clear();
  }
  PyObject* get(PyObject* name) const {  // borrowed, null where missing
    return dict ? PyDict_GetItemWithError(const_cast<PyObject*>(dict.get()), name) : nullptr;
  }
  // Whether nothing is registered on the module and it computes what its class does.
  bool is_plain() const {
    for (PyObject* name : names->hooks) {
      PyObject* hooks = get(name);
      if (hooks == nullptr || !PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) != 0) return false;
    }
    PyObject* children = get(names->modules);  // parametrizations
    return children != nullptr && PyDict_Check(children) && PyDict_GET_SIZE(children) == 0 &&
           get(names->forward) == nullptr && get(names->is_replica) == nullptr;
  }
};

const Tensor no_tensor;

// The tensor of this name, undefined for None; false where it is neither, or missing.
bool read_tensor(PyObject* dict, PyObject* name, const Tensor*& t, THPObjectPtr& owner) {
  PyObject* found = PyDict_GetItemWithError(dict, name);
  if (found == nullptr) return false;
  t = &no_tensor;
  if (found == Py_None) return true;
  if (!THPVariable_CheckTypeExact(Py_TYPE(found))) return false;
  Py_INCREF(found);
  owner = found;
  t = &THPVariable_Unpack(found);
  return t->layout() == at::kStrided && is_materialized(*t) && !t->is_meta() && has_memory(*t);
}

bool read_number(PyObject* found, double& value) {
  if (found == nullptr) return false;
  if (!PyFloat_CheckExact(found) && !PyLong_CheckExact(found)) return false;
  value = PyFloat_AsDouble(found);
  return !PyErr_Occurred();
}

// A flag that is something else than True or False is no plain case.
bool read_flag(PyObject* found, bool& value) {
  value = found == Py_True;
  return value || found == Py_False;
}

bool is_floating(at::ScalarType type) {
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kDouble;
}

bool has_sizes(const Tensor& t, const Tensor& x, at::IntArrayRef sizes) {
  return t.sizes() == sizes && is_floating(t.scalar_type()) && t.device() == x.device();
}

// Whether something looks at, or transforms, the operations one by one.
bool is_watched() {
  return c10::impl::dispatch_mode_enabled() || torch::jit::tracer::isTracing() ||
         c10::impl::tls_is_dispatch_key_included(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

bool is_map(const Tensor& x) {
  return x.defined() && x.layout() == at::kStrided && is_floating(x.scalar_type()) &&
         (x.is_cuda() || (accepts_cpu && x.is_cpu())) && is_materialized(x) && has_memory(x) &&
         x.numel() != 0 && x.dim() >= 2;
}

bool fits(const Tensor& x, PyObject* ndims) {
  if (!is_map(x)) return false;
  const Py_ssize_t n = PyTuple_GET_SIZE(ndims);
  for (Py_ssize_t i = 0; i < n; ++i)
    if (PyLong_AsLong(PyTuple_GET_ITEM(ndims, i)) == x.dim()) return true;
  return n == 0;
}

const char* const OWN[PARAMETERS + STATE] = {
    "w", "b", "w_in", "b_in", "w_out", "b_out", "running_mean", "running_var", "tracked"};

// The place in OWN of a tensor that does not fit x, or -1.
int misfit(const Tensor& x, const Call& call) {
  const auto& p = call.parameters;
  const auto& state = call.state;
  const int64_t c = x.size(1), hidden = p[3]->defined() ? p[3]->numel() : 0;
  if (hidden == 0 || !has_sizes(*p[3], x, {hidden})) return 3;
  for (int i = 0; i < 2; ++i) {
    if (p[i]->defined() && !has_sizes(*p[i], x, {c})) return i;
    if (state[i]->defined() && !(has_sizes(*state[i], x, {c}) && state[i]->is_contiguous()))
      return PARAMETERS + i;
  }
  if (!p[2]->defined() || !has_sizes(*p[2], x, {hidden, 2 * c})) return 2;
  if (!p[4]->defined() || !has_sizes(*p[4], x, {2 * c, hidden})) return 4;
  if (!p[5]->defined() || !has_sizes(*p[5], x, {2 * c})) return 5;
  const Tensor& tracked = *state[2];
  if (tracked.defined() && (tracked.numel() != 1 || tracked.scalar_type() != at::kLong ||
                            tracked.device() != x.device()))
    return PARAMETERS + 2;
  return -1;
}

// False where the kernels' integers cannot hold a size.
bool make_key(const Tensor& x, const Call& call, int64_t world, int64_t rank, Key& key) {
  const int64_t n = x.size(0), c = x.size(1), s = x.numel() / (n * c);
  const int64_t hidden = call.parameters[3]->numel();
  if (s > INT32_MAX / 2 || n * std::max(c, hidden) > INT32_MAX / 2) return false;
  int64_t dtypes = 0;
  auto add = [&](const Tensor* t) {
    dtypes = (dtypes << 6) | (t->defined() ? 1 + (int64_t)t->scalar_type() : 0);
  };
  for (const Tensor* t : call.parameters) add(t);
  for (const Tensor* t : call.state) add(t);
  key = {x.device().index(), n, c, s, hidden,
         (int64_t)x.scalar_type() << MODES | call.mode, dtypes, world, rank};
  return true;
}

// False: not the plain case. An error of Python's may be set.
bool read_call(const Tensor& x, PyObject* bn, PyObject* sc, bool shared, Call& call, Key& key) {
  const int kind = kind_of(bn);
  if ((kind != NORM && kind != SYNC_NORM) || kind_of(sc) != PLAIN_SC) return false;
  for (PyObject* hooks : global_hooks)
    if (PyDict_GET_SIZE(hooks) != 0) return false;
  const Attributes norm(bn), module(sc);
  if (!norm.is_plain() || !module.is_plain()) return false;
  PyObject* dicts[3] = {norm.get(names->parameters), norm.get(names->buffers),
                        module.get(names->parameters)};
  for (PyObject* dict : dicts)
    if (dict == nullptr || !PyDict_Check(dict)) return false;
  if (PyDict_GET_SIZE(dicts[2]) != 4) return false;
  auto& p = call.parameters;
  auto& state = call.state;
  auto owner = call.owners.begin();
  for (int i = 0; i < 2; ++i)
    if (!read_tensor(dicts[0], names->norm_parameters[i], p[i], *owner++)) return false;
  for (int i = 0; i < 4; ++i)
    if (!read_tensor(dicts[2], names->sc_parameters[i], p[2 + i], *owner++) ||
        !p[2 + i]->defined())
      return false;
  for (int i = 0; i < STATE; ++i)
    if (!read_tensor(dicts[1], names->state[i], state[i], *owner++)) return false;

  if (misfit(x, call) >= 0) return false;
  const Tensor& tracked = *state[2];

  bool training, track;
  if (!read_flag(norm.get(names->training), training) ||
      !read_flag(norm.get(names->track), track))
    return false;
  const bool averages = state[0]->defined();
  if (averages != state[1]->defined()) return false;
  const bool batch = training || !averages;
  if (!read_number(norm.get(names->eps), call.scalars.eps) || !(call.scalars.eps > 0)) return false;
  call.mode = (batch ? BATCH : 0) | (shared ? SHARED : 0);
  call.scalars.momentum = call.scalars.bound = 0;
  if (training && track) {
    if (!averages) return false;
    call.mode |= UPDATE;
    PyObject* momentum = norm.get(names->momentum);
    if (momentum == Py_None) {
      if (!tracked.defined()) return false;
      call.mode |= CUMULATIVE;
    } else if (!read_number(momentum, call.scalars.momentum)) {
      return false;
    }
  }
  PyObject* bound = module.get(names->bound);
  if (bound == nullptr) return false;
  if (bound != Py_None) {
    if (!read_number(bound, call.scalars.bound)) return false;
    call.mode |= BOUNDED;
  }
  PyObject* inputs = module.get(names->inputs);
  if (inputs == nullptr || !PyUnicode_CheckExact(inputs)) return false;
  if (!shared && PyUnicode_Compare(inputs, names->standardized) == 0) call.mode |= STANDARDIZED;

  int64_t world = 1, rank = 0;
  if (kind == SYNC_NORM && training) {
    THPObjectPtr group(PyObject_CallFunctionObjArgs(group_of_norm, bn, nullptr));
    if (!group) return false;
    if (group.get() != Py_None) {
      const char* name;
      long long w, r;
      if (!PyArg_ParseTuple(group.get(), "sLL", &name, &w, &r)) return false;
      call.group = name;
      world = w;
      rank = r;
    }
  }
  if (batch && world == 1 && x.numel() == x.size(1)) return false;  // an error in training
  if (!call.is_differentiable(x)) call.mode |= INFERENCE;
  return make_key(x, call, world, rank, key);
}

// ---------------------------------------------------------------- what an operator is given

const Tensor& tensor_of(PyObject* found, const char* name) {
  TORCH_CHECK_TYPE(THPVariable_Check(found), name, ": expected a tensor, got ",
                   Py_TYPE(found)->tp_name);
  const Tensor& t = THPVariable_Unpack(found);
  TORCH_CHECK_VALUE(!is_transformed(t) && is_materialized(t), name,
                    ": expected a plain, dense tensor, got one of ", t.key_set());
  return t;
}

const Tensor& map_of(PyObject* found) {
  const Tensor& x = tensor_of(found, "x");
  TORCH_CHECK_VALUE(is_map(x), "x: expected a map (N, C, ...) of floating-point values on a GPU, ",
                    "got ", x.scalar_type(), " of ", x.sizes(), " on ", x.device());
  return x;
}

// Raises where anything does not fit. No state: that of a backward pass, which reads none.
void read_tensors(const Tensor& x, PyObject* parameters, PyObject* state, Call& call, Key& key) {
  auto read = [](PyObject* tuple, const char* const* names, auto& tensors) {
    const auto count = static_cast<Py_ssize_t>(tensors.size());
    TORCH_CHECK_VALUE(PyTuple_GET_SIZE(tuple) == count, "expected ", count, " tensors, ", names[0],
                      " and so on, got ", PyTuple_GET_SIZE(tuple));
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* found = PyTuple_GET_ITEM(tuple, i);
      tensors[i] = found == Py_None ? &no_tensor : &tensor_of(found, names[i]);
    }
  };
  read(parameters, OWN, call.parameters);
  const auto& [mean, var, tracked] = call.state;
  if (state == nullptr) {
    call.state.fill(&no_tensor);
  } else {
    read(state, OWN + PARAMETERS, call.state);
    const bool needed = call.mode & UPDATE || !(call.mode & BATCH);
    TORCH_CHECK_VALUE(mean->defined() == var->defined() && (mean->defined() || !needed),
                      "running_mean, running_var: expected both", needed ? "" : " or none",
                      ", got ", mean->defined() ? "the first" : var->defined() ? "the second"
                                                                               : "none");
    TORCH_CHECK_VALUE(!(call.mode & CUMULATIVE) || tracked->defined(),
                      "tracked: expected a counter for a cumulative average, got None");
  }
  const int i = misfit(x, call);
  if (i >= 0) {
    const Tensor& t = i < PARAMETERS ? *call.parameters[i] : *call.state[i - PARAMETERS];
    TORCH_CHECK_VALUE(t.defined(), OWN[i], ": expected a tensor, got None");
    TORCH_CHECK_VALUE(false, OWN[i], ": expected sizes, dtype and device that fit a map of ",
                      x.sizes(), " on ", x.device(), " and ", call.parameters[3]->numel(),
                      " hidden units (b_in's), got ", t.scalar_type(), " of ", t.sizes(),
                      " with strides ", t.strides(), " on ", t.device());
  }
  TORCH_CHECK_VALUE(make_key(x, call, 1, 0, key), "x: expected less than ", INT32_MAX / 2,
                    " values in a channel, and channels or SC's hidden units in a batch, got ",
                    x.sizes(), " and ", call.parameters[3]->numel(), " hidden units");
}

// ---------------------------------------------------------------- Python

template <typename F>
PyObject* guarded(F&& body) {
  try {
    return body();
  } catch (python_error& e) {  // of a hook on saved tensors, say
    e.restore();
  } catch (const c10::OutOfMemoryError& e) {
    THPObjectPtr torch(PyImport_ImportModule("torch"));
    THPObjectPtr type(torch ? PyObject_GetAttrString(torch, "OutOfMemoryError") : nullptr);
    if (type) PyErr_SetString(type, e.what_without_backtrace());
  } catch (const c10::ValueError& e) {
    PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
  } catch (const c10::TypeError& e) {
    PyErr_SetString(PyExc_TypeError, e.what_without_backtrace());
  } catch (const c10::Error& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  return nullptr;
}

PyObject* as_tuple(const Key& key) {
  THPObjectPtr tuple(PyTuple_New(key.size()));
  if (!tuple) throw python_error();
  for (size_t i = 0; i < key.size(); ++i)
    PyTuple_SET_ITEM(tuple.get(), i, PyLong_FromLongLong(key[i]));
  return tuple.release();
}

struct Found {
  Tensor x;  // as kernels read it
  std::shared_ptr<Plan> plan;  // owned: another thread may add plans. Null where there is none yet
};

Found find_plan(const Tensor& x, Key& key) {
  bool channels_last = false;
  Found found{dense(x, channels_last), nullptr};
  if (channels_last) key[5] |= CHANNELS_LAST;
  const auto at = plans.find(key);
  if (at != plans.end()) found.plan = at->second;
  return found;
}

// call(x, bn, sc, batch_shared, ndims) -> y; None: not the plain case; or, where there is no
// plan yet, the key of the one that add_plan wants.
PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 5 || !PyTuple_Check(args[4])) {
    PyErr_SetString(PyExc_TypeError, "expected call(x, bn, sc, batch_shared, ndims: tuple)");
    return nullptr;
  }
  if (!THPVariable_CheckTypeExact(Py_TYPE(args[0])) || is_watched()) Py_RETURN_NONE;
  const Tensor& given = THPVariable_Unpack(args[0]);
  if (!fits(given, args[4])) Py_RETURN_NONE;
  return guarded([&]() -> PyObject* {
    Call found;
    Key key;
    if (!read_call(given, args[1], args[2], args[3] == Py_True, found, key)) {
      if (PyErr_Occurred()) return nullptr;
      Py_RETURN_NONE;
    }
    const auto [x, plan] = find_plan(given, key);
    return plan == nullptr ? as_tuple(key) : THPVariable_Wrap(forward(plan, x, found));
  });
}

// forward(x, parameters: 6, state: 3, mode, eps, momentum, bound) -> [y, kept]; or, where there is
// no plan yet, its key. Below autograd.
PyObject* forward_of_tensors(PyObject*, PyObject* args) {
  PyObject *map, *parameters, *state;
  long long mode;
  Call found;
  auto& [eps, momentum, bound] = found.scalars;
  if (!PyArg_ParseTuple(args, "OO!O!Lddd:forward", &map, &PyTuple_Type, &parameters,
                        &PyTuple_Type, &state, &mode, &eps, &momentum, &bound))
    return nullptr;
  return guarded([&]() -> PyObject* {
    BelowAutograd below;
    found.mode = mode & (OF_A_GRADIENT | UPDATE | CUMULATIVE | INFERENCE);
    Key key;
    const Tensor& given = map_of(map);
    read_tensors(given, parameters, state, found, key);
    const auto [x, plan] = find_plan(given, key);
    if (plan == nullptr) return as_tuple(key);
    Made made = run_forward(*plan, x, found);
    if (!made.kept.defined()) {
      c10::OptionalDeviceGuard guard(x.device());
      made.kept = empty({0}, {1}, plan->accumulator, x);
    }
    return Py_BuildValue("[NN]", wrap(made.y), wrap(made.kept));
  });
}

// backward(dy, x, kept, parameters: 6, mode, eps, bound, x_needs_gradient) -> [dx, gradients],
// each a tensor of its own, or None; or, where there is no plan yet, its key. Below autograd.
PyObject* backward_of_tensors(PyObject*, PyObject* args) {
  PyObject *gradient, *map, *kept_, *parameters;
  long long mode;
  int needs_dx;
  Call found;
  found.scalars.momentum = 0;
  if (!PyArg_ParseTuple(args, "OOOO!Lddp:backward", &gradient, &map, &kept_, &PyTuple_Type,
                        &parameters, &mode, &found.scalars.eps, &found.scalars.bound, &needs_dx))
    return nullptr;
  return guarded([&]() -> PyObject* {
    BelowAutograd below;
    found.mode = (mode & OF_A_GRADIENT) | BACKWARD;
    Key key;
    const Tensor& given = map_of(map);
    read_tensors(given, parameters, nullptr, found, key);
    const Tensor& dy = tensor_of(gradient, "dy");
    TORCH_CHECK_VALUE(dy.sizes() == given.sizes() && dy.device() == given.device(),
                      "dy: expected the sizes and device of x, ", given.sizes(), " on ",
                      given.device(), ", got ", dy.sizes(), " on ", dy.device());
    const auto [x, plan] = find_plan(given, key);
    if (plan == nullptr) return as_tuple(key);
    Tensor kept = tensor_of(kept_, "kept");
    TORCH_CHECK_VALUE(kept.numel() == plan->values_kept() && kept.device() == x.device() &&
                          kept.scalar_type() == plan->accumulator,
                      "kept: expected what the forward pass gave, ", plan->values_kept(),
                      " values of ", plan->accumulator, " on ", x.device(), ", got ",
                      kept.numel(), " of ", kept.scalar_type(), " on ", kept.device());
    std::array<Tensor, PARAMETERS> p, made;
    for (int i = 0; i < PARAMETERS; ++i) p[i] = *found.parameters[i];
    Tensor dx;
    {
      pybind11::gil_scoped_release released;
      c10::OptionalDeviceGuard guard(x.device());
      if (!kept.is_contiguous() || !is_aligned(kept))
        kept = kept.clone(at::MemoryFormat::Contiguous);
      std::array<char*, PARAMETERS> gradients = {};
      for (int i = 0; i < PARAMETERS; ++i) {
        if (!p[i].defined()) continue;
        if (!p[i].is_contiguous()) p[i] = p[i].contiguous();
        made[i] = empty(p[i].sizes(), p[i].strides(), p[i].scalar_type(), x);
        gradients[i] = address(made[i]);
      }
      dx = run_backward(*plan, laid_out_as(x, dy), x, p, kept, Tensor(), gradients,
                        found.scalars, found.group, needs_dx);
    }
    return Py_BuildValue("[NNNNNNN]", wrap(dx), wrap(made[0]), wrap(made[1]), wrap(made[2]),
                         wrap(made[3]), wrap(made[4]), wrap(made[5]));
  });
}

// add_plan(key, blob of int64)
PyObject* add_plan(PyObject*, PyObject* args) {
  PyObject* tuple;
  const char* data;
  Py_ssize_t size;
  if (!PyArg_ParseTuple(args, "O!y#", &PyTuple_Type, &tuple, &data, &size)) return nullptr;
  return guarded([&]() -> PyObject* {
    Key key;
    TORCH_CHECK(PyTuple_GET_SIZE(tuple) == (Py_ssize_t)key.size(), "a key of another length");
    for (size_t i = 0; i < key.size(); ++i) {
      key[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
      if (PyErr_Occurred()) return nullptr;
    }
    std::vector<int64_t> v(size / 8);
    std::memcpy(v.data(), data, v.size() * 8);
    size_t at = 0;
    auto next = [&] {
      TORCH_CHECK(at < v.size(), "plan too short");
      return v[at++];
    };
    auto plan = std::make_shared<Plan>();
    plan->kept = next();
    plan->mu = next();
    plan->sigma = next();
    plan->scratch = next();
    plan->backward_scratch = next();
    plan->gradients = next();
    for (auto& offset : plan->offsets) offset = next();
    plan->table = next();
    plan->accumulator = static_cast<at::ScalarType>(next());
    for (auto* list : {&plan->forward, &plan->backward}) {
      for (int64_t n = next(); n > 0; --n) {
        Launch l;
        l.function = reinterpret_cast<Handle>(next());
        if (l.function != nullptr) {
          l.grid = static_cast<unsigned>(next());
          l.threads = static_cast<unsigned>(next());
          l.shared = static_cast<unsigned>(next());
          const int64_t count = next();
          TORCH_CHECK(count <= MAX_ARGUMENTS, "too many arguments: ", count);
          for (int64_t i = 0; i < count; ++i) {
            const int64_t source = next();
            TORCH_CHECK(source >= 0 && source <= NUMBER, "no such source: ", source);
            l.sources.push_back(static_cast<int16_t>(source));
            l.values.push_back(next());
          }
        }
        list->push_back(std::move(l));
      }
    }
    TORCH_CHECK(at == v.size(), "plan too long");
    plan->hidden = key[4];
    plan->dtypes = key[6];
    if (plans.size() >= MOST_PLANS) plans.clear();
    plans[key] = std::move(plan);
    Py_RETURN_NONE;
  });
}

// load(cubin: bytes, name: str, shared: int, device: int) -> (handle, registers, local bytes)
PyObject* load(PyObject*, PyObject* args) {
  const char *image, *name;
  Py_ssize_t size;
  int shared, device;
  if (!PyArg_ParseTuple(args, "y#sii", &image, &size, &name, &shared, &device)) return nullptr;
  return guarded([&]() -> PyObject* {
    std::optional<c10::OptionalDeviceGuard> guard;
    if (!accepts_cpu) guard.emplace(c10::Device(c10::DeviceType::CUDA, device));
    ensure_context(device);
    const RelaxedCapture relaxed;
    Handle module = nullptr, function = nullptr;
    check(driver().module_load(&module, image), "cuModuleLoadData");
    check(driver().get_function(&function, module, name), "cuModuleGetFunction");
    if (shared > 48 * 1024)
      check(driver().set_attribute(function, 8 /* MAX_DYNAMIC_SHARED_SIZE_BYTES */, shared),
            "cuFuncSetAttribute");
    int registers = 0, local = 0;
    check(driver().get_attribute(&registers, 4 /* NUM_REGS */, function), "cuFuncGetAttribute");
    check(driver().get_attribute(&local, 3 /* LOCAL_SIZE_BYTES */, function),
          "cuFuncGetAttribute");
    return Py_BuildValue("(Kii)", reinterpret_cast<unsigned long long>(function), registers,
                         local);
  });
}

// configure(kind_of_type, group_of_norm, double_backward, global hooks: tuple of 4 dicts)
PyObject* configure(PyObject*, PyObject* args) {
  PyObject *kind, *group, *backward, *hooks;
  if (!PyArg_ParseTuple(args, "OOOO!", &kind, &group, &backward, &PyTuple_Type, &hooks))
    return nullptr;
  if (PyTuple_GET_SIZE(hooks) != static_cast<Py_ssize_t>(global_hooks.size())) {
    PyErr_SetString(PyExc_ValueError, "expected 4 dicts of hooks");
    return nullptr;
  }
  for (size_t i = 0; i < global_hooks.size(); ++i) {
    Py_INCREF(global_hooks[i] = PyTuple_GET_ITEM(hooks, i));
    if (!PyDict_Check(global_hooks[i])) {
      PyErr_SetString(PyExc_TypeError, "expected dicts of hooks");
      return nullptr;
    }
  }
  Py_INCREF(kind_of_type = kind);
  Py_INCREF(group_of_norm = group);
  Py_INCREF(double_backward = backward);
  Py_RETURN_NONE;
}

// use_driver(path): tests put their own in the CUDA driver's place, and maps on the CPU.
PyObject* use_driver(PyObject*, PyObject* args) {
  const char* path;
  if (!PyArg_ParseTuple(args, "s", &path)) return nullptr;
  driver_path = path;
  accepts_cpu = true;
  Py_RETURN_NONE;
}

// forget_plans(): graphs that are alive keep theirs.
PyObject* forget_plans(PyObject*, PyObject*) {
  plans.clear();
  Py_RETURN_NONE;
}

// host.py's: one more where what they tell each other changes, so that a host that was built
// earlier is not used.
constexpr int INTERFACE = 1;

PyMethodDef methods[] = {
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL,
     nullptr},
    {"forward", forward_of_tensors, METH_VARARGS, nullptr},
    {"backward", backward_of_tensors, METH_VARARGS, nullptr},
    {"add_plan", add_plan, METH_VARARGS, nullptr},
    {"forget_plans", forget_plans, METH_NOARGS, nullptr},
    {"load", load, METH_VARARGS, nullptr},
    {"configure", configure, METH_VARARGS, nullptr},
    {"use_driver", use_driver, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_host", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__host() {
  names = new Names;
  PyObject* made = PyModule_Create(&module);
  if (made != nullptr && PyModule_AddIntConstant(made, "INTERFACE", INTERFACE) < 0)
    Py_CLEAR(made);
  return made;
}
