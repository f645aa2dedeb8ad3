// The builds of the CPU kernels, one per instruction set, and the choice among them at run time.
#pragma once

#include <string>
#include <vector>

#include "span_kl_topk.h"
#include "topk.h"

namespace sadkern {

struct Isa {
  std::string name;  // "avx512", "avx2" or "baseline"
  bool (*span_kl)(const SpanKlArgs&, int threads);
  bool (*span_kl_topk)(const SpanKlTopkArgs&, int threads);
  bool (*topk)(const TopkArgs&, int threads);
};

// Those that this processor can run, fastest first.
const std::vector<Isa>& runnable_isas();

// The fastest, unless SADKERN_ISA in the environment or `choose_isa` names another.
const Isa& chosen_isa();

// Throws std::invalid_argument for a name that cannot run here.
void choose_isa(const std::string& name);

}  // namespace sadkern
