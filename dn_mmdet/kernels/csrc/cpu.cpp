// The four primitives over contiguous maps, and the small part between them, on CPUs.
//
// Names are those of functional.py; equations (1) to (8) are there. A row is one channel of one
// sample: `size` values that lie side by side. Rows are spread over torch's threads, and each
// is summed up in vectors, the vectors of a block in double.
//
// Source of the maths: Liu, Gao, Lv, "Dynamic Normalization", arXiv 2101.06073.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// One binary for every x86 machine; the loader picks what the one at hand can do.
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t BLOCK = 4096;      // values summed in the map's own type
constexpr int64_t GRAIN = 32768;     // values that are worth a thread, as in torch
// Where (mean - shift)^2 exceeds this many times the variance, too many digits cancelled.
constexpr double CANCELLATION = 4;

template <typename T, int64_t BYTES = 64>
struct Vector {
  static constexpr int64_t LANES = BYTES / sizeof(T);
  typedef T Lanes __attribute__((vector_size(BYTES)));

  static INLINE void load(const T* from, Lanes& to) { std::memcpy(&to, from, sizeof(to)); }
  static INLINE void store(const Lanes& from, T* to) { std::memcpy(to, &from, sizeof(from)); }
  static INLINE double sum(const Lanes& lanes) {
    T halves[LANES];
    store(lanes, halves);
    for (int64_t width = LANES / 2; width > 0; width /= 2)
      for (int64_t i = 0; i < width; ++i) halves[i] += halves[width + i];
    return halves[0];
  }
};

// ---------------------------------------------------------------------------- rows

// Sums of (x - shift) and (x - shift)^2.
template <typename T>
INLINE void shifted_sums(const T* x, int64_t size, T shift, double& sum, double& square_sum) {
  using V = Vector<T>;
  using Lanes = typename V::Lanes;
  sum = square_sum = 0;
  int64_t i = 0;
  while (size - i >= 2 * V::LANES) {
    const int64_t end = std::min(size, i + BLOCK) - 2 * V::LANES;
    Lanes s0 = {}, s1 = {}, q0 = {}, q1 = {}, d0, d1;
    for (; i <= end; i += 2 * V::LANES) {
      V::load(x + i, d0);
      V::load(x + i + V::LANES, d1);
      d0 -= shift;
      d1 -= shift;
      s0 += d0;
      s1 += d1;
      q0 += d0 * d0;
      q1 += d1 * d1;
    }
    if (size - i < 2 * V::LANES && size - i >= V::LANES) {
      V::load(x + i, d0);
      d0 -= shift;
      s0 += d0;
      q0 += d0 * d0;
      i += V::LANES;
    }
    sum += V::sum(s0 + s1);
    square_sum += V::sum(q0 + q1);
  }
  for (; i < size; ++i) {
    const double d = x[i] - shift;
    sum += d;
    square_sum += d * d;
  }
}

// Mean and population variance in one pass, in two where the middle value is an outlier.
template <typename T>
FOR_EACH_CPU void row_moments(const T* x, int64_t size, T& mean, T& var) {
  double sum, square_sum;
  T shift = x[size / 2];  // the first is a corner, and padding makes corners outliers
  for (int pass = 0; pass < 2; ++pass) {
    shifted_sums(x, size, shift, sum, square_sum);
    const double offset = sum / size, variance = square_sum / size - offset * offset;
    mean = shift + offset;
    var = variance < 0 ? 0 : variance;  // NaN stays
    if (!(offset * offset > CANCELLATION * variance)) return;
    shift = mean;
  }
}

template <typename T>
FOR_EACH_CPU void row_affine(const T* x, T* y, int64_t size, T m, T a, T c) {
  for (int64_t i = 0; i < size; ++i) y[i] = a * (x[i] - m) + c;
}

// Sums of dy (x - m) and dy.
template <typename T>
FOR_EACH_CPU void row_reduce(const T* dy, const T* x, int64_t size, T m, T& da, T& dc) {
  using V = Vector<T>;
  using Lanes = typename V::Lanes;
  double product_sum = 0, sum = 0;
  int64_t i = 0;
  while (size - i >= 2 * V::LANES) {
    const int64_t end = std::min(size, i + BLOCK) - 2 * V::LANES;
    Lanes p0 = {}, p1 = {}, s0 = {}, s1 = {}, x0, x1, dy0, dy1;
    for (; i <= end; i += 2 * V::LANES) {
      V::load(x + i, x0);
      V::load(x + i + V::LANES, x1);
      V::load(dy + i, dy0);
      V::load(dy + i + V::LANES, dy1);
      p0 += dy0 * (x0 - m);
      p1 += dy1 * (x1 - m);
      s0 += dy0;
      s1 += dy1;
    }
    if (size - i < 2 * V::LANES && size - i >= V::LANES) {
      V::load(x + i, x0);
      V::load(dy + i, dy0);
      p0 += dy0 * (x0 - m);
      s0 += dy0;
      i += V::LANES;
    }
    product_sum += V::sum(p0 + p1);
    sum += V::sum(s0 + s1);
  }
  for (; i < size; ++i) {
    product_sum += double(dy[i]) * (x[i] - m);
    sum += dy[i];
  }
  da = product_sum;
  dc = sum;
}

template <typename T>
FOR_EACH_CPU void row_input_gradient(const T* dy, const T* x, T* dx, int64_t size, T m, T a, T p,
                                     T q) {
  for (int64_t i = 0; i < size; ++i) dx[i] = a * dy[i] + (p * (x[i] - m) + q);
}

template <typename Row>
void for_each_row(int64_t rows, int64_t size, const Row& row) {
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / size), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(r);
  });
}

// ----------------------------------------------------------------- what may be read

// Not where its storage was freed, as by untyped_storage().resize_(0).
bool has_memory(const Tensor& t) {
  return t.has_storage() && (t.numel() == 0 || t.storage().data() != nullptr);
}

// Asked before a pointer is taken: it could lead past the end of a smaller tensor, into the
// memory of another device, or to values whose sign is still to be flipped.
void check(const Tensor& t, const char* name, at::IntArrayRef sizes) {
  TORCH_CHECK(t.defined() && t.layout() == at::kStrided && has_memory(t) && !t._is_zerotensor(),
              name, ": expected a dense tensor with memory");
  TORCH_CHECK(t.device().is_cpu(), "Expected all tensors to be on the CPU, but ", name, " is on ",
              t.device());
  TORCH_CHECK(t.sizes() == sizes, name, " should have the shape ", sizes, " not ", t.sizes());
  TORCH_CHECK(t.is_floating_point(), name, ": expected a floating-point dtype, got ", t.dtype());
}

// Of a tensor that is read as it lies.
void check_values(const Tensor& t, const char* name, at::IntArrayRef sizes,
                  at::ScalarType dtype) {
  check(t, name, sizes);
  TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous() && !t.is_neg(), name,
              ": expected a contiguous tensor of ", dtype, ", got one of ", t.scalar_type(),
              " with the strides ", t.strides());
}

// Of a map (N, C, ...) with values.
void check_map(const Tensor& x) {
  check_values(x, "input", x.sizes(), x.scalar_type());
  TORCH_CHECK(x.dim() > 1 && x.numel() > 0, "input: expected a map (N, C, ...) with values, got ",
              x.sizes());
}

// Of coefficients (N, C) of the map x.
void check_coefficients(const Tensor& t, const char* name, const Tensor& x) {
  check_values(t, name, {x.size(0), x.size(1)}, x.scalar_type());
}

// A parameter or buffer, as a contiguous tensor of this dtype.
Tensor as(const Tensor& t, const char* name, at::IntArrayRef sizes, at::ScalarType dtype) {
  check(t, name, sizes);
  return t.scalar_type() == dtype && t.is_contiguous() && !t.is_neg()
             ? t
             : t.resolve_neg().to(dtype).contiguous();
}

OptionalTensor as(const OptionalTensor& t, const char* name, at::IntArrayRef sizes,
                  at::ScalarType dtype) {
  return t ? OptionalTensor(as(*t, name, sizes, dtype)) : t;
}

// inner_norm.check_parts at a tenth of the time: whether a norm's tensors (each may be None) and
// SC's (or none) are plain tensors of the map's device that have the sizes for so many channels.
bool fits(const Tensor& x, int64_t channels, const py::tuple& norm, const py::tuple& sc) {
  const auto device = x.device();
  const auto plain = [device](PyObject* object, at::IntArrayRef sizes) {
    if (!THPVariable_CheckExact(object)) return false;
    const Tensor& t = THPVariable_Unpack(object);
    return t.sizes() == sizes && t.device() == device && t.is_floating_point() && has_memory(t);
  };
  if (!has_memory(x)) return false;
  for (size_t i = 0; i < norm.size(); ++i)
    if (PyObject* part = PyTuple_GET_ITEM(norm.ptr(), i); part != Py_None && !plain(part, channels))
      return false;
  if (sc.size() == 0) return true;
  PyObject* const b_in = PyTuple_GET_ITEM(sc.ptr(), 1);
  if (sc.size() != 4 || !THPVariable_CheckExact(b_in)) return false;
  const int64_t units = THPVariable_Unpack(b_in).numel(), two = 2 * channels;
  return plain(PyTuple_GET_ITEM(sc.ptr(), 0), {units, two}) && plain(b_in, units) &&
         plain(PyTuple_GET_ITEM(sc.ptr(), 2), {two, units}) &&
         plain(PyTuple_GET_ITEM(sc.ptr(), 3), two);
}

// ------------------------------------------------------------------- the primitives

template <typename T>
void moments_of(const T* x, int64_t rows, int64_t size, T* m, T* v) {
  for_each_row(rows, size, [=](int64_t r) { row_moments(x + r * size, size, m[r], v[r]); });
}

template <typename T>
void affine_of(const T* x, T* y, int64_t rows, int64_t size, const T* m, const T* a, const T* c) {
  for_each_row(rows, size, [=](int64_t r) {
    row_affine(x + r * size, y + r * size, size, m[r], a[r], c[r]);
  });
}

int64_t row_size(const Tensor& x) { return x.numel() / (x.size(0) * x.size(1)); }

std::tuple<Tensor, Tensor> moments(const Tensor& x) {
  check_map(x);
  Tensor m = at::empty({x.size(0), x.size(1)}, x.options()), v = at::empty_like(m);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "moments", [&] {
    moments_of(x.const_data_ptr<scalar_t>(), m.numel(), row_size(x),
               m.mutable_data_ptr<scalar_t>(), v.mutable_data_ptr<scalar_t>());
  });
  return {m, v};
}

Tensor affine(const Tensor& x, const Tensor& m, const Tensor& a, const Tensor& c) {
  check_map(x);
  check_coefficients(m, "m", x);
  check_coefficients(a, "a", x);
  check_coefficients(c, "c", x);
  Tensor y = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "affine", [&] {
    affine_of(x.const_data_ptr<scalar_t>(), y.mutable_data_ptr<scalar_t>(), m.numel(), row_size(x),
              m.const_data_ptr<scalar_t>(), a.const_data_ptr<scalar_t>(),
              c.const_data_ptr<scalar_t>());
  });
  return y;
}

std::tuple<Tensor, Tensor> reduce(const Tensor& dy, const Tensor& x, const Tensor& m) {
  check_map(x);
  check_values(dy, "dy", x.sizes(), x.scalar_type());
  check_coefficients(m, "m", x);
  Tensor da = at::empty_like(m), dc = at::empty_like(m);
  const int64_t size = row_size(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "reduce", [&] {
    const scalar_t *dys = dy.const_data_ptr<scalar_t>(), *xs = x.const_data_ptr<scalar_t>(),
                   *ms = m.const_data_ptr<scalar_t>();
    scalar_t *das = da.mutable_data_ptr<scalar_t>(), *dcs = dc.mutable_data_ptr<scalar_t>();
    for_each_row(m.numel(), size, [=](int64_t r) {
      row_reduce(dys + r * size, xs + r * size, size, ms[r], das[r], dcs[r]);
    });
  });
  return {da, dc};
}

Tensor input_gradient(const Tensor& dy, const Tensor& x, const Tensor& m, const Tensor& a,
                      const Tensor& p, const Tensor& q) {
  check_map(x);
  check_values(dy, "dy", x.sizes(), x.scalar_type());
  check_coefficients(m, "m", x);
  check_coefficients(a, "a", x);
  check_coefficients(p, "p", x);
  check_coefficients(q, "q", x);
  Tensor dx = at::empty_like(x);
  const int64_t size = row_size(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "input_gradient", [&] {
    const scalar_t *dys = dy.const_data_ptr<scalar_t>(), *xs = x.const_data_ptr<scalar_t>(),
                   *ms = m.const_data_ptr<scalar_t>(), *as = a.const_data_ptr<scalar_t>(),
                   *ps = p.const_data_ptr<scalar_t>(), *qs = q.const_data_ptr<scalar_t>();
    scalar_t* dxs = dx.mutable_data_ptr<scalar_t>();
    for_each_row(m.numel(), size, [=](int64_t r) {
      row_input_gradient(dys + r * size, xs + r * size, dxs + r * size, size, ms[r], as[r], ps[r],
                         qs[r]);
    });
  });
  return dx;
}

// ------------------------------------------------------------------- the small part

// What an SC module and the norm around it are made of.
struct Norm {
  OptionalTensor w, b;  // (C,) of the inner norm
  Tensor w_in, b_in, w_out, b_out;
  double eps;
  std::optional<double> bound;
  bool standardized;

  Norm(const OptionalTensor& weight, const OptionalTensor& bias, const std::vector<Tensor>& sc,
       double eps, std::optional<double> bound, bool standardized, int64_t channels,
       at::ScalarType dtype)
      : eps(eps), bound(bound), standardized(standardized) {
    TORCH_CHECK(sc.size() == 4, "expected SC's w_in, b_in, w_out, b_out, got ", sc.size(),
                " tensors");
    const int64_t units = sc[1].numel(), two = 2 * channels;
    w = as(weight, "weight", channels, dtype);
    b = as(bias, "bias", channels, dtype);
    w_in = as(sc[0], "w_in", {units, two}, dtype);
    b_in = as(sc[1], "b_in", units, dtype);
    w_out = as(sc[2], "w_out", {two, units}, dtype);
    b_out = as(sc[3], "b_out", two, dtype);
  }

  int64_t channels() const { return b_out.numel() / 2; }
  int64_t units() const { return b_in.numel(); }
};

// tanh, which the compiler can turn into vectors; float's to an absolute 1e-7.
INLINE float tanh_of(float t) {
  const float exponent = std::min(std::abs(t), 10.f) * -2.885390082f;  // of 2, in exp(-2 |t|)
  const int32_t whole = static_cast<int32_t>(exponent - 0.5f);
  const float r = (exponent - whole) * 0.6931471806f;
  constexpr auto inverse = [](int k) { return 1.f / k; };  // divisions are slow
  const float series = 1 + r * (1 + r * inverse(2) * (1 + r * inverse(3) * (1 + r * inverse(4) * (
                       1 + r * inverse(5) * (1 + r * inverse(6) * (1 + r * inverse(7)))))));
  const int32_t bits = (whole + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  const float e = series * power;
  return std::copysign((1 - e) / (1 + e), t);
}

INLINE double tanh_of(double t) { return std::tanh(t); }

template <int64_t BYTES, typename T>
INLINE T dot(const T* x, const T* y, int64_t size) {
  using V = Vector<T, BYTES>;
  typename V::Lanes products = {}, from_x, from_y;
  int64_t i = 0;
  for (; i + V::LANES <= size; i += V::LANES) {
    V::load(x + i, from_x);
    V::load(y + i, from_y);
    products += from_x * from_y;
  }
  T total = i ? V::sum(products) : 0;
  for (; i < size; ++i) total += x[i] * y[i];
  return total;
}

// SC's hidden units (H,) and outputs, bound tanh(...) (2C,), for one row of inputs (2C,).
template <typename T>
FOR_EACH_CPU void sc_row(const T* __restrict inputs, const T* __restrict w_in,
                         const T* __restrict b_in, const T* __restrict w_out,
                         const T* __restrict b_out, int64_t units, int64_t outputs, bool bounded,
                         T bound, T* __restrict hidden, T* __restrict out) {
  for (int64_t h = 0; h < units; ++h) {
    const T unit = b_in[h] + dot<64>(w_in + h * outputs, inputs, outputs);
    hidden[h] = unit < 0 ? 0 : unit;  // NaN stays
  }
  for (int64_t j = 0; j < outputs; ++j)
    out[j] = b_out[j] + dot<32>(w_out + j * units, static_cast<const T*>(hidden), units);
  if (bounded)
    for (int64_t j = 0; j < outputs; ++j) out[j] = bound * tanh_of(out[j]);
}

// Over samples, of which there can be a million: one after the other, float would lose digits.
using Sum = double;

template <typename T>
FOR_EACH_CPU void batch_statistics(const T* __restrict m, const T* __restrict v, int64_t samples,
                                   int64_t channels, Sum* __restrict sums, T* __restrict mu,
                                   T* __restrict var) {
  std::fill(sums, sums + channels, Sum(0));
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t i = 0; i < channels; ++i) sums[i] += m[n * channels + i];
  for (int64_t i = 0; i < channels; ++i) mu[i] = sums[i] / samples;
  std::fill(sums, sums + channels, Sum(0));
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t i = 0; i < channels; ++i) {
      const T d = m[n * channels + i] - mu[i];
      sums[i] += v[n * channels + i] + d * d;
    }
  for (int64_t i = 0; i < channels; ++i) var[i] = sums[i] / samples;
}

// SC's inputs (2C,) for one sample.
template <typename T>
FOR_EACH_CPU void sc_inputs(const T* __restrict m, const T* __restrict v, const T* __restrict mu,
                            const T* __restrict sigma, int64_t channels, T eps, bool standardized,
                            T* __restrict inputs) {
  for (int64_t i = 0; i < channels; ++i) {
    const T s = std::sqrt(v[i] + eps);
    inputs[i] = standardized ? (m[i] - mu[i]) / sigma[i] : m[i];
    inputs[channels + i] = standardized ? s / sigma[i] - 1 : s;
  }
}

// a and c (C,) of equation (7) for one sample, whose g and h are `out` (2C,).
template <typename T>
FOR_EACH_CPU void scale_and_shift(const T* __restrict m, const T* __restrict mu,
                                  const T* __restrict sigma, const T* __restrict out, const T* w,
                                  const T* b, int64_t channels, T* __restrict a,
                                  T* __restrict c) {
  for (int64_t i = 0; i < channels; ++i) {
    const T scale = 1 + out[i];
    a[i] = w ? scale * (w[i] / sigma[i]) : scale / sigma[i];
    const T shift = b ? out[channels + i] + scale * b[i] : out[channels + i];
    c[i] = shift + a[i] * (m[i] - mu[i]);
  }
}

// The raw pointers of a Norm, and the small part's forward pass over rows of them.
template <typename T>
struct Small {
  const T *w, *b, *w_in, *b_in, *w_out, *b_out;
  int64_t channels, units;
  T eps, bound;
  bool bounded, standardized;

  explicit Small(const Norm& norm)
      : w(norm.w ? norm.w->const_data_ptr<T>() : nullptr),
        b(norm.b ? norm.b->const_data_ptr<T>() : nullptr), w_in(norm.w_in.const_data_ptr<T>()),
        b_in(norm.b_in.const_data_ptr<T>()), w_out(norm.w_out.const_data_ptr<T>()),
        b_out(norm.b_out.const_data_ptr<T>()), channels(norm.channels()), units(norm.units()),
        eps(norm.eps), bound(norm.bound.value_or(0)), bounded(norm.bound.has_value()),
        standardized(norm.standardized) {}

  void inputs(const T* m, const T* v, const T* mu, const T* sigma, T* to) const {
    sc_inputs(m, v, mu, sigma, channels, eps, standardized, to);
  }
  void outputs(const T* inputs, T* hidden, T* out) const {
    sc_row(inputs, w_in, b_in, w_out, b_out, units, 2 * channels, bounded, bound, hidden, out);
  }
  void combine(const T* m, const T* mu, const T* sigma, const T* out, T* a, T* c) const {
    scale_and_shift(m, mu, sigma, out, w, b, channels, a, c);
  }
  // Samples whose small part is worth a thread. SC may have lost all its units, to pruning.
  int64_t grain() const {
    return std::max<int64_t>(1, GRAIN / (4 * channels * std::max<int64_t>(1, units)));
  }
};

// In the wider dtype: a variance that float16 cannot hold is not yet the average's.
void step_average(const Tensor& running, const Tensor& value, double momentum) {
  const auto wide = at::promote_types(running.scalar_type(), value.scalar_type());
  if (running.scalar_type() == wide) {
    running.lerp_(value.to(wide), momentum);
  } else {
    running.copy_(running.to(wide).lerp_(value, momentum));
  }
}

// a, c, and what backward needs: mu, sigma (C,), SC's inputs, hidden units and outputs.
std::vector<Tensor> coefficients(const Tensor& m, const Tensor& v, int64_t size,
                                 const OptionalTensor& running_mean,
                                 const OptionalTensor& running_var, const OptionalTensor& mean_average,
                                 const OptionalTensor& var_average, double momentum,
                                 const OptionalTensor& w, const OptionalTensor& b,
                                 const std::vector<Tensor>& sc, double eps,
                                 std::optional<double> bound, bool standardized,
                                 bool batch_shared) {
  TORCH_CHECK(m.dim() == 2 && m.size(0) > 0 && size > 0, "m: expected (N, C), got ", m.sizes());
  check_coefficients(m, "m", m);
  check_coefficients(v, "v", m);
  const int64_t samples = m.size(0), channels = m.size(1), rows = batch_shared ? 1 : samples;
  const Norm norm(w, b, sc, eps, bound, standardized, channels, m.scalar_type());
  for (const auto& [mean, var] : {std::tie(running_mean, running_var),
                                  std::tie(mean_average, var_average)})
    TORCH_CHECK(mean.has_value() == var.has_value(), "expected a mean and a variance, or neither");
  if (mean_average) {
    check(*mean_average, "running_mean", channels);
    check(*var_average, "running_var", channels);
  }
  Tensor mu, var;
  if (running_mean) {
    mu = as(*running_mean, "running_mean", channels, m.scalar_type());
    var = as(*running_var, "running_var", channels, m.scalar_type());
  } else {
    mu = at::empty({channels}, m.options());
    var = at::empty_like(mu);
  }
  Tensor sigma = at::empty_like(mu), inputs = at::empty({rows, 2 * channels}, m.options());
  Tensor hidden = at::empty({rows, norm.units()}, m.options()), out = at::empty_like(inputs);
  Tensor a = at::empty_like(m), c = at::empty_like(m);
  AT_DISPATCH_FLOATING_TYPES(m.scalar_type(), "coefficients", [&] {
    const scalar_t *ms = m.const_data_ptr<scalar_t>(), *vs = v.const_data_ptr<scalar_t>();
    if (!running_mean) {
      std::vector<Sum> sums(channels);
      batch_statistics(ms, vs, samples, channels, sums.data(), mu.mutable_data_ptr<scalar_t>(),
                       var.mutable_data_ptr<scalar_t>());
    }
    if (mean_average) {
      const double count = samples * size;
      step_average(*mean_average, mu, momentum);
      step_average(*var_average, var * (count / (count - 1)), momentum);
    }
    const Small<scalar_t> small(norm);
    const scalar_t *mus = mu.const_data_ptr<scalar_t>(), *vars = var.const_data_ptr<scalar_t>();
    scalar_t *sigmas = sigma.mutable_data_ptr<scalar_t>(),
             *ins = inputs.mutable_data_ptr<scalar_t>(),
             *units = hidden.mutable_data_ptr<scalar_t>(),
             *outs = out.mutable_data_ptr<scalar_t>(), *as = a.mutable_data_ptr<scalar_t>(),
             *cs = c.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < channels; ++i) sigmas[i] = std::sqrt(vars[i] + small.eps);
    if (batch_shared) {
      std::copy(mus, mus + channels, ins);
      std::copy(sigmas, sigmas + channels, ins + channels);
      small.outputs(ins, units, outs);
      for (int64_t n = 0; n < samples; ++n)
        small.combine(ms + n * channels, mus, sigmas, outs, as + n * channels, cs + n * channels);
      return;
    }
    at::parallel_for(0, samples, small.grain(), [=](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t row = n * channels;
        small.inputs(ms + row, vs + row, mus, sigmas, ins + 2 * row);
        small.outputs(ins + 2 * row, units + n * small.units, outs + 2 * row);
        small.combine(ms + row, mus, sigmas, outs + 2 * row, as + row, cs + row);
      }
    });
  });
  return {a, c, mu, sigma, inputs, hidden, out};
}

// The gradients of a and c, as those of SC's outputs before the bound and of (1 + g) / sigma.
//
// For one row of SC (one sample, or all of them together). da holds sum dy (x - m) and becomes
// all that a receives.
template <typename T>
FOR_EACH_CPU void through_scale_and_shift(const T* __restrict da, const T* __restrict dc,
                                          const T* __restrict sigma, const T* __restrict out,
                                          const T* w, const T* b, int64_t channels,
                                          bool bounded, T bound, T* __restrict dout,
                                          Sum* __restrict dper_sigma, Sum* __restrict db) {
  for (int64_t i = 0; i < channels; ++i) {
    const T scale = 1 + out[i], per_sigma = w ? w[i] / sigma[i] : 1 / sigma[i];
    dout[i] = da[i] * per_sigma + (b ? dc[i] * b[i] : 0);
    dout[channels + i] = dc[i];
    dper_sigma[i] += da[i] * scale;
    db[i] += dc[i] * scale;
  }
  if (bounded)
    for (int64_t i = 0; i < 2 * channels; ++i) dout[i] *= bound - out[i] * out[i] / bound;
}

// p, q of equation (8) times size, without what comes through mu and sigma; what does, added up.
template <typename T>
FOR_EACH_CPU void through_inputs(const T* __restrict dinputs, const T* __restrict inputs,
                                 const T* __restrict sigma, int64_t channels, bool standardized,
                                 T* __restrict p, T* __restrict q, Sum* __restrict dmu,
                                 Sum* __restrict dsigma) {
  if (standardized) {
    for (int64_t i = 0; i < channels; ++i) {
      const T dm = dinputs[i] / sigma[i], ds = dinputs[channels + i] / sigma[i];
      const T s = inputs[channels + i] + 1;  // s / sigma
      dmu[i] -= dm;
      dsigma[i] -= dm * inputs[i] + ds * s;
      p[i] = ds / (s * sigma[i]);
      q[i] = dm;
    }
  } else {
    for (int64_t i = 0; i < channels; ++i) {
      p[i] = dinputs[channels + i] / inputs[channels + i];
      q[i] = dinputs[i];
    }
  }
}

template <typename T>
FOR_EACH_CPU void through_statistics(const T* __restrict m, const T* __restrict mu,
                                     const T* __restrict through_var,
                                     const T* __restrict through_mu, int64_t channels, T size,
                                     T* __restrict p, T* __restrict q) {
  for (int64_t i = 0; i < channels; ++i) {
    p[i] = (p[i] + through_var[i]) / size;
    q[i] = (q[i] + (m[i] - mu[i]) * through_var[i] + through_mu[i]) / size;
  }
}

// p, q, and the gradients of w, b and SC's four parameters; see torch_ops.Coefficients.
std::vector<Tensor> coefficients_backward(const Tensor& da, const Tensor& dc, const Tensor& m,
                                          const Tensor& a, const Tensor& mu, const Tensor& sigma,
                                          const Tensor& inputs, const Tensor& hidden,
                                          const Tensor& out, int64_t size, const OptionalTensor& w,
                                          const OptionalTensor& b, const std::vector<Tensor>& sc,
                                          double eps, std::optional<double> bound,
                                          bool standardized, bool batch_shared, bool training) {
  TORCH_CHECK(m.dim() == 2 && m.size(0) > 0 && size > 0, "m: expected (N, C), got ", m.sizes());
  const int64_t samples = m.size(0), channels = m.size(1), rows = batch_shared ? 1 : samples;
  const Norm norm(w, b, sc, eps, bound, standardized, channels, m.scalar_type());
  for (const auto& [t, name] : {std::pair<const Tensor&, const char*>(da, "da"), {dc, "dc"},
                                {m, "m"}, {a, "a"}})
    check_coefficients(t, name, m);
  check_values(mu, "mu", channels, m.scalar_type());
  check_values(sigma, "sigma", channels, m.scalar_type());
  check_values(inputs, "inputs", {rows, 2 * channels}, m.scalar_type());
  check_values(hidden, "hidden", {rows, norm.units()}, m.scalar_type());
  check_values(out, "out", {rows, 2 * channels}, m.scalar_type());
  Tensor received = at::empty_like(m), dout = at::empty_like(out);
  Tensor p = at::empty_like(m), q = at::empty_like(m);
  Tensor dw, db, dw_in, db_in, dw_out, db_out;
  if (norm.w) dw = at::empty({channels}, m.options());
  if (norm.b) db = at::empty({channels}, m.options());
  AT_DISPATCH_FLOATING_TYPES(m.scalar_type(), "coefficients_backward", [&] {
    const scalar_t *ms = m.const_data_ptr<scalar_t>(), *mus = mu.const_data_ptr<scalar_t>(),
                   *sigmas = sigma.const_data_ptr<scalar_t>(), *as = a.const_data_ptr<scalar_t>(),
                   *outs = out.const_data_ptr<scalar_t>(), *dcs = dc.const_data_ptr<scalar_t>(),
                   *das = da.const_data_ptr<scalar_t>();
    const Small<scalar_t> small(norm);
    const scalar_t *ws = small.w, *bs = small.b;
    std::vector<Sum> sums(4 * channels);
    Sum *dper_sigma = sums.data(), *dshift = dper_sigma + channels, *dmu = dshift + channels,
        *dsigma = dmu + channels;
    scalar_t *all = received.mutable_data_ptr<scalar_t>(),
             *douts = dout.mutable_data_ptr<scalar_t>();
    std::vector<scalar_t> shared_dc;
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t i = 0, r = n * channels; i < channels; ++i, ++r) {
        all[r] = das[r] + dcs[r] * (ms[r] - mus[i]);
        dmu[i] -= as[r] * dcs[r];
      }
    if (batch_shared) {
      std::vector<Sum> both(2 * channels);
      for (int64_t n = 0; n < samples; ++n)
        for (int64_t i = 0; i < channels; ++i) {
          both[i] += all[n * channels + i];
          both[channels + i] += dcs[n * channels + i];
        }
      std::copy(both.begin(), both.begin() + channels, all);
      shared_dc.assign(both.begin() + channels, both.end());
      dcs = shared_dc.data();
    }
    for (int64_t r = 0; r < rows; ++r)
      through_scale_and_shift(all + r * channels, dcs + r * channels, sigmas,
                              outs + 2 * r * channels, ws, bs, channels, small.bounded,
                              small.bound, douts + 2 * r * channels, dper_sigma, dshift);
    if (norm.w)
      std::transform(dper_sigma, dper_sigma + channels, sigmas, dw.mutable_data_ptr<scalar_t>(),
                     [](Sum sum, scalar_t each) { return static_cast<scalar_t>(sum / each); });
    if (norm.b) std::copy(dshift, dshift + channels, db.mutable_data_ptr<scalar_t>());
    // bfloat16 products would lose what the statistics kept.
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    dw_out = at::mm(dout.t(), hidden);
    db_out = dout.sum(0);
    Tensor du = at::threshold_backward(at::mm(dout, norm.w_out), hidden, 0);
    dw_in = at::mm(du.t(), inputs);
    db_in = du.sum(0);
    Tensor dinputs = at::mm(du, norm.w_in);
    const scalar_t *dins = dinputs.const_data_ptr<scalar_t>(),
                   *ins = inputs.const_data_ptr<scalar_t>();
    scalar_t *ps = p.mutable_data_ptr<scalar_t>(), *qs = q.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < channels; ++i)
      dsigma[i] = -dper_sigma[i] * (ws ? ws[i] : 1) / (sigmas[i] * sigmas[i]);
    if (batch_shared) {
      std::fill(ps, ps + m.numel(), scalar_t(0));
      std::fill(qs, qs + m.numel(), scalar_t(0));
      for (int64_t i = 0; i < channels; ++i) {
        dmu[i] += dins[i];
        dsigma[i] += dins[channels + i];
      }
    } else {
      for (int64_t n = 0; n < samples; ++n)
        through_inputs(dins + 2 * n * channels, ins + 2 * n * channels, sigmas, channels,
                       standardized, ps + n * channels, qs + n * channels, dmu, dsigma);
    }
    std::vector<scalar_t> through_var(channels), through_mu(channels);
    if (training)  // else mu and sigma are constants
      for (int64_t i = 0; i < channels; ++i) {
        through_var[i] = dsigma[i] / sigmas[i] / samples;
        through_mu[i] = dmu[i] / samples;
      }
    for (int64_t n = 0; n < samples; ++n)
      through_statistics(ms + n * channels, mus, through_var.data(), through_mu.data(), channels,
                         scalar_t(size), ps + n * channels, qs + n * channels);
  });
  return {p, q, dw, db, dw_in, db_in, dw_out, db_out};
}

// ------------------------------------------------------------------- a layer at once

// y where nothing needs a gradient and the statistics are the running ones.
//
// Each thread takes whole samples, and a sample's second pass finds it in the cache. Where
// there are fewer samples than threads, these share the rows of each.
Tensor infer(const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
             const OptionalTensor& w, const OptionalTensor& b, const std::vector<Tensor>& sc,
             double eps, std::optional<double> bound, bool standardized, bool batch_shared) {
  check_map(x);
  const int64_t samples = x.size(0), channels = x.size(1), size = row_size(x);
  const Norm norm(w, b, sc, eps, bound, standardized, channels, x.scalar_type());
  const Tensor mu = as(running_mean, "running_mean", channels, x.scalar_type());
  const Tensor var = as(running_var, "running_var", channels, x.scalar_type());
  Tensor y = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "infer", [&] {
    const Small<scalar_t> small(norm);
    const scalar_t *xs = x.const_data_ptr<scalar_t>(), *mus = mu.const_data_ptr<scalar_t>(),
                   *vars = var.const_data_ptr<scalar_t>();
    scalar_t* ys = y.mutable_data_ptr<scalar_t>();
    std::vector<scalar_t> sigma(channels);
    for (int64_t i = 0; i < channels; ++i) sigma[i] = std::sqrt(vars[i] + small.eps);
    if (batch_shared) {  // the same for all samples: nothing of x is needed
      std::vector<scalar_t> space(6 * channels + small.units);
      scalar_t *ins = space.data(), *out = ins + 2 * channels, *a = out + 2 * channels,
               *c = a + channels;
      std::copy(mus, mus + channels, ins);
      std::copy(sigma.begin(), sigma.end(), ins + channels);
      small.outputs(ins, c + channels, out);
      small.combine(mus, mus, sigma.data(), out, a, c);
      for_each_row(samples * channels, size, [=](int64_t r) {
        const int64_t i = r % channels;
        row_affine(xs + r * size, ys + r * size, size, mus[i], a[i], c[i]);
      });
      return;
    }
    const auto samples_from = [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> space(8 * channels + small.units);
      scalar_t *m = space.data(), *v = m + channels, *a = v + channels, *c = a + channels,
               *ins = c + channels, *out = ins + 2 * channels, *hidden = out + 2 * channels;
      for (int64_t n = begin; n < end; ++n) {
        const int64_t offset = n * channels * size;
        moments_of(xs + offset, channels, size, m, v);
        small.inputs(m, v, mus, sigma.data(), ins);
        small.outputs(ins, hidden, out);
        small.combine(m, mus, sigma.data(), out, a, c);
        affine_of(xs + offset, ys + offset, channels, size, m, a, c);
      }
    };
    if (samples < at::get_num_threads()) {
      samples_from(0, samples);
    } else {
      at::parallel_for(0, samples, std::max<int64_t>(1, GRAIN / (channels * size)), samples_from);
    }
  });
  return y;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "The primitives of Dynamic Normalization over contiguous maps on CPUs.";
  module.attr("INTERFACE") = 1;  // raised whenever a function takes or gives something else
  const auto free = py::call_guard<py::gil_scoped_release>();
  module.def("fits", &fits);
  module.def("moments", &moments, free);
  module.def("affine", &affine, free);
  module.def("reduce", &reduce, free);
  module.def("input_gradient", &input_gradient, free);
  module.def("coefficients", &coefficients, free);
  module.def("coefficients_backward", &coefficients_backward, free);
  module.def("infer", &infer, free);
}
