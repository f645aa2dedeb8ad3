// The builds of the CPU kernels, one per instruction set, and the choice among them at run time.
#pragma once

#include <string>
#include <vector>

#include "span_kl.h"

namespace sadkern {

struct Isa {
  std::string name;  // "avx512", "avx2" or "baseline"
  SpanKl span_kl;
};

// Those that this processor can run, fastest first.
const std::vector<Isa>& runnable_isas();

// The fastest, unless SADKERN_ISA in the environment or `choose_isa` names another.
const Isa& chosen_isa();

// Throws std::invalid_argument for a name that cannot run here.
void choose_isa(const std::string& name);

}  // namespace sadkern
