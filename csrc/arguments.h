// How a kernel's arguments come from Python: by the names of its argument struct, tensors as addresses.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <string>

#include "divergence.h"
#include "dtype.h"

namespace sadkern {

namespace py = pybind11;

inline const std::map<std::string, DType> kDTypes = {
    {"float32", DType::float32}, {"bfloat16", DType::bfloat16}, {"float16", DType::float16}};

inline const std::map<std::string, Divergence> kDivergences = {
    {"forward_kl", Divergence::forward_kl},
    {"reverse_kl", Divergence::reverse_kl},
    {"jsd", Divergence::jsd},
    {"skew_forward_kl", Divergence::skew_forward_kl},
    {"skew_reverse_kl", Divergence::skew_reverse_kl},
    {"tvd", Divergence::tvd}};

struct Arguments {
  py::kwargs given;

  template <class T>
  T get(const char* name) const {
    return given[name].cast<T>();
  }
  // An address; 0 stands for an absent tensor.
  template <class T>
  T* pointer(const char* name) const {
    return reinterpret_cast<T*>(get<uintptr_t>(name));
  }
  template <class T>
  T named(const char* name, const std::map<std::string, T>& known) const {
    return known.at(get<std::string>(name));
  }
};

}  // namespace sadkern
