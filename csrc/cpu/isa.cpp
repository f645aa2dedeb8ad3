#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace sadkern {
namespace {

std::vector<Isa> detect() {
  std::vector<Isa> isas;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    isas.push_back({"avx512", span_kl_avx512, span_kl_topk_avx512, topk_avx512});
  }
  // Every processor with AVX2 has F16C, which older compilers cannot ask for.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    isas.push_back({"avx2", span_kl_avx2, span_kl_topk_avx2, topk_avx2});
  }
#endif
  isas.push_back({"baseline", span_kl_baseline, span_kl_topk_baseline, topk_baseline});
  return isas;
}

const Isa& named(const std::string& name) {
  std::string known;
  for (const Isa& isa : runnable_isas()) {
    if (isa.name == name) return isa;
    known += (known.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("instruction set '" + name + "' cannot run here; expected one of: " +
                              known);
}

const Isa*& choice() {
  static const Isa* isa = [] {
    const char* wanted = std::getenv("SADKERN_ISA");
    return wanted && *wanted ? &named(wanted) : &runnable_isas().front();
  }();
  return isa;
}

}  // namespace

const std::vector<Isa>& runnable_isas() {
  static const std::vector<Isa> isas = detect();
  return isas;
}

const Isa& chosen_isa() { return *choice(); }

void choose_isa(const std::string& name) { choice() = &named(name); }

}  // namespace sadkern
