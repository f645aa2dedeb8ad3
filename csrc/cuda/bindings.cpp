// Python's door to the CUDA kernels. Tensors arrive as addresses and strides, with a device and a stream.
#include <stdexcept>
#include <tuple>

#include "../arguments.h"
#include "span_kl.h"
#include "topk.h"

using namespace sadkern;

namespace {

// (address, inner, outer stride, inner stride)
Rows rows_of(const Arguments& given, const char* name) {
  const auto [address, inner, outer_stride, inner_stride] =
      given.get<std::tuple<uintptr_t, int, int64_t, int64_t>>(name);
  return {reinterpret_cast<void*>(address), inner, outer_stride, inner_stride};
}

template <class Args>
void launch(void (*kernel)(const Args&, int, void*), const Args& args, const Arguments& given) {
  if (args.dtype == DType::float32) throw std::invalid_argument("dtype: expected bfloat16 or float16");
  const int device = given.get<int>("device");
  void* const stream = given.pointer<void>("stream");
  py::gil_scoped_release release;
  kernel(args, device, stream);
}

void span_kl(const py::kwargs& kwargs) {
  const Arguments given{kwargs};
  SpanKlArgs args{};
  args.rows = given.get<int>("rows");
  args.vocab = given.get<int>("vocab");
  args.student_vocab = given.get<int>("student_vocab");
  args.dtype = given.named("dtype", kDTypes);
  args.student = rows_of(given, "student");
  args.teacher = rows_of(given, "teacher");
  args.dstudent = rows_of(given, "dstudent");
  args.supervised = given.pointer<const uint8_t>("supervised");
  args.row_weights = given.pointer<const float>("row_weights");
  args.labels = given.pointer<const int64_t>("labels");
  args.divergence = given.named("divergence", kDivergences);
  args.mix = given.get<float>("mix");
  args.inv_temperature = given.get<float>("inv_temperature");
  args.ce_weight = given.get<float>("ce_weight");
  args.inv_softcap = given.get<float>("inv_softcap");
  args.per_token = given.pointer<float>("per_token");
  args.cross_entropy = given.pointer<float>("cross_entropy");
  args.teacher_entropy = given.pointer<float>("teacher_entropy");
  args.agreement = given.pointer<uint8_t>("agreement");
  constexpr decltype(&span_kl_tvd) kernels[] = {span_kl_forward_kl,      span_kl_reverse_kl,
                                                span_kl_jsd,             span_kl_skew_forward_kl,
                                                span_kl_skew_reverse_kl, span_kl_tvd};
  launch(kernels[static_cast<int>(args.divergence)], args, given);
}

void topk_(const py::kwargs& kwargs) {
  const Arguments given{kwargs};
  TopkArgs args{};
  args.rows = given.get<int>("rows");
  args.vocab = given.get<int>("vocab");
  args.dtype = given.named("dtype", kDTypes);
  args.logits = rows_of(given, "logits");
  args.k = given.get<int>("k");
  args.inv_temperature = given.get<float>("inv_temperature");
  args.ids = given.pointer<int32_t>("ids");
  args.logprobs = given.pointer<float>("logprobs");
  args.tail_mass = given.pointer<float>("tail_mass");
  args.entropy = given.pointer<float>("entropy");
  args.lse = given.pointer<float>("lse");
  launch(topk, args, given);
}

}  // namespace

// Compiled for tests the module has another name: the interpreter may know both.
#ifndef SADKERN_NVCC
#define SADKERN_CUDA_MODULE _cuda_shim
#else
#define SADKERN_CUDA_MODULE _cuda
#endif

PYBIND11_MODULE(SADKERN_CUDA_MODULE, m) {
  m.doc() = "sadkern's CUDA kernels. sadkern/backends/cuda.py is their only caller.";
  m.def("span_kl", &span_kl);
  m.def("topk", &topk_);
  m.attr("shared_bytes") = py::dict(py::arg("span_kl") = kSpanKlShared, py::arg("topk") = kTopkShared);
#ifdef SADKERN_NVCC
  m.attr("nvcc") = SADKERN_NVCC;  // which, and for what chips
#endif
}
