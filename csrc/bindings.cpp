// Python's door to the compiled core. Tensors arrive as addresses, sizes and strides: this file knows
// no torch, so that one build serves every version of it.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cpu/buffer.h"
#include "cpu/isa.h"

using namespace sadkern;

namespace {

const std::map<std::string, Tail> kTails = {
    {"bucket", Tail::bucket}, {"renormalize", Tail::renormalize}, {"none", Tail::none}};

// (address, leading strides)
Rows rows_of(const Arguments& given, const char* name) {
  const auto [address, strides] = given.get<std::pair<uintptr_t, std::vector<int64_t>>>(name);
  if (strides.size() > kMaxLeading) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(strides.size()) +
                                " leading dimensions, expected at most " +
                                std::to_string(kMaxLeading));
  }
  Rows out{reinterpret_cast<void*>(address), {}};
  std::copy(strides.begin(), strides.end(), out.strides);
  return out;
}

template <class Args>
void sizes_into(Args& args, const Arguments& given) {
  const auto sizes = given.get<std::vector<int64_t>>("sizes");
  args.leading = static_cast<int>(sizes.size());  // as many as strides, which `rows` counted
  std::copy(sizes.begin(), sizes.end(), args.sizes);
}

void rows_into(RowArgs& args, const Arguments& given) {
  args.student = rows_of(given, "student");
  args.dstudent = rows_of(given, "dstudent");
  sizes_into(args, given);
  args.vocab = given.get<int64_t>("vocab");
  args.student_vocab = given.get<int64_t>("student_vocab");
  args.dtype = given.named("dtype", kDTypes);
  args.supervised = given.pointer<const uint8_t>("supervised");
  args.row_weights = given.pointer<const float>("row_weights");
  args.labels = given.pointer<const int64_t>("labels");
  args.divergence = given.named("divergence", kDivergences);
  args.mix = given.get<float>("mix");
  args.temperature = given.get<float>("temperature");
  args.ce_weight = given.get<float>("ce_weight");
  args.softcap = given.get<float>("softcap");
  args.per_token = given.pointer<float>("per_token");
  args.cross_entropy = given.pointer<float>("cross_entropy");
  args.teacher_entropy = given.pointer<float>("teacher_entropy");
  args.agreement = given.pointer<uint8_t>("agreement");
}

template <class Args>
void launch(bool (*kernel)(const Args&, int), const Args& args, const Arguments& given) {
  const int threads = given.get<int>("threads");
  bool complete;
  {
    py::gil_scoped_release release;
    complete = kernel(args, threads);
  }
  if (!complete) throw std::bad_alloc();
}

void span_kl(const py::kwargs& kwargs) {
  const Arguments given{kwargs};
  SpanKlArgs args{};
  args.teacher = rows_of(given, "teacher");
  rows_into(args, given);
  launch(chosen_isa().span_kl, args, given);
}

// A row that holds an id twice, or -1.
int64_t span_kl_topk(const py::kwargs& kwargs) {
  const Arguments given{kwargs};
  SpanKlTopkArgs args{};
  rows_into(args, given);
  args.ids = given.pointer<const int32_t>("ids");
  args.logprobs = given.pointer<const float>("logprobs");
  args.tail = given.pointer<const float>("tail");
  args.entropy = given.pointer<const float>("entropy");
  args.k = given.get<int64_t>("k");
  args.tail_mode = given.named("tail_mode", kTails);
  args.tail_mass = given.pointer<float>("tail_mass");
  int64_t repeated = -1;
  args.repeated = &repeated;
  launch(chosen_isa().span_kl_topk, args, given);
  return repeated;
}

void topk(const py::kwargs& kwargs) {
  const Arguments given{kwargs};
  TopkArgs args{};
  args.logits = rows_of(given, "logits");
  sizes_into(args, given);
  args.vocab = given.get<int64_t>("vocab");
  args.dtype = given.named("dtype", kDTypes);
  args.k = given.get<int64_t>("k");
  args.temperature = given.get<float>("temperature");
  args.ids = given.pointer<int32_t>("ids");
  args.logprobs = given.pointer<float>("logprobs");
  args.tail_mass = given.pointer<float>("tail_mass");
  args.entropy = given.pointer<float>("entropy");
  args.lse = given.pointer<float>("lse");
  launch(chosen_isa().topk, args, given);
}

// The kernels' merge by itself, so that its laws can be tested. A state is its fields in order.
using StateFields = std::array<double, 8>;
StateFields merge_states(const StateFields& a, const StateFields& b, double temperature) {
  auto state = [](const StateFields& f) {
    return RowState<double>{f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7]};
  };
  const RowState<double> out =
      merge(state(a), state(b), temperature, [](double x) { return std::exp(x); });
  return {out.max_s, out.sum_s, out.max_t, out.sum_t, out.ent_t, out.cross_t, out.cross_s, out.sum_h};
}

py::dict build_info() {
  std::vector<std::string> isas;
  for (const Isa& isa : runnable_isas()) isas.push_back(isa.name);
  py::dict info;
  info["compiler"] = __VERSION__;
  info["openmp"] = _OPENMP;
  info["isas"] = isas;
  info["isa"] = chosen_isa().name;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "sadkern's compiled core. sadkern/backends/native.py is its only caller.";
  m.def("span_kl", &span_kl);
  m.def("span_kl_topk", &span_kl_topk);
  m.def("topk", &topk);
  m.def("merge_states", &merge_states);
  py::class_<Buffer>(m, "Buffer", py::buffer_protocol())
      .def(py::init<std::size_t>())
      .def_buffer([](const Buffer& buffer) {
        return py::buffer_info(static_cast<std::uint8_t*>(buffer.data()),
                               static_cast<py::ssize_t>(buffer.bytes()));
      });
  m.def("build_info", &build_info);
  m.def("choose_isa", &choose_isa);
}
