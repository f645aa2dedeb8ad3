// How a row is read and written: by tiles of whole vectors; and what the kernels do alike with it.
#pragma once

#include "element.h"
#include "span_kl.h"

namespace sadkern {
namespace {

// What stays in the L1 cache between a tile's maxima and its exponentials.
constexpr int kTile = 2048;

template <class Args>
SADKERN_INLINE char* row_pointer(const Args& a, const Rows& rows, int64_t i) {
  int64_t offset = 0;
  for (int d = a.leading - 1; d >= 0; --d) {
    offset += i % a.sizes[d] * rows.strides[d];
    i /= a.sizes[d];
  }
  return static_cast<char*>(rows.data) + offset * size_of(a.dtype);
}

// Entries of the tile that begins at `begin`.
SADKERN_INLINE int tile_width(int64_t vocab, int64_t begin) {
  return static_cast<int>(vocab - begin < kTile ? vocab - begin : kTile);
}

// A row's logits by tiles of whole vectors: a ragged end is a copy, filled up with -inf.
template <class E>
class Tiles {
 public:
  void open(const void* row, int64_t vocab) {
    row_ = static_cast<const Raw*>(row);
    whole_ = vocab % kLanes == 0 ? vocab : vocab / kTile * kTile;
    const int rest = static_cast<int>(vocab - whole_);
    if (rest == 0) return;
    memcpy(end_, row_ + whole_, rest * sizeof(Raw));
    for (int j = rest; j < rest + kLanes; ++j) end_[j] = E::kNegInf;
  }
  SADKERN_INLINE const typename E::Raw* operator[](int64_t begin) const {
    return begin < whole_ ? row_ + begin : end_;
  }

 private:
  using Raw = typename E::Raw;
  const Raw* row_ = nullptr;
  int64_t whole_ = 0;
  alignas(64) Raw end_[kTile + kLanes];
};

// A row's gradient, written by tiles.
template <class E>
class Gradient {
 public:
  void open(void* row, bool past_caches) {
    row_ = static_cast<Raw*>(row);
    past_caches_ = past_caches;
  }

  void write_one(int64_t at, float entry) const {
    alignas(64) Raw buffer[kLanes];
    E::store(buffer, splat(entry));
    row_[at] = buffer[0];
  }

  // Entries [begin, begin + n), of which `entries(j)` gives the vector at begin + j.
  template <class F>
  SADKERN_INLINE void write(int64_t begin, int n, F entries) const {
    constexpr uintptr_t kVector = kLanes * sizeof(Raw);
    Raw* to = row_ + begin;
    if (n % kLanes != 0) {
      alignas(64) Raw buffer[kTile];
      for (int j = 0; j < n; j += kLanes) E::store(buffer + j, entries(j));
      memcpy(to, buffer, n * sizeof(Raw));
    } else if (past_caches_ && reinterpret_cast<uintptr_t>(to) % kVector == 0) {
      for (int j = 0; j < n; j += kLanes) E::stream(to + j, entries(j));
    } else {
      for (int j = 0; j < n; j += kLanes) E::store(to + j, entries(j));
    }
  }

 private:
  using Raw = typename E::Raw;
  Raw* row_ = nullptr;
  bool past_caches_ = false;
};

// The student's side of a row at work, whatever its teacher is.
template <class E>
class StudentRow {
 protected:
  StudentRow(const RowArgs& a, bool past_caches)
      : past_caches_(past_caches), inv_temperature_(1 / a.temperature), a_(a) {}

  void open(int64_t i) {
    student_.open(row_pointer(a_, a_.student, i), a_.vocab);
    if (a_.dstudent.data) gradient_.open(row_pointer(a_, a_.dstudent, i), past_caches_);
    label_ = a_.labels ? a_.labels[i] : -1;
    scale_ = a_.row_weights[i] * inv_temperature_;
    hard_scale_ = a_.row_weights[i] * a_.ce_weight;
  }
  // Hard labels know no temperature: a sum of their own is then needed.
  SADKERN_INLINE bool softens() const { return label_ >= 0 && a_.temperature != 1; }

  // `log_h`: log of the sum of e^(logit - maximum) at temperature 1.
  SADKERN_INLINE void normalise(double max_s, double log_h) {
    max_s_ = splat(max_s);
    lse_h_ = log_h;
  }
  SADKERN_INLINE double cross_entropy(double log_h) const {
    if (label_ < 0) return 0;
    const Vec near = below_max(student_[label_ / kTile * kTile] + label_ % kTile / kLanes * kLanes);
    return log_h - double{near[label_ % kLanes]} * a_.temperature;
  }

  // Writes a tile's entries: the hard label's gradient added, then taken through the softcap.
  template <class F>
  SADKERN_INLINE void finish(int64_t begin, F entries) const {
    if (label_ < 0 && a_.softcap == 0) return gradient_.write(begin, width(begin), entries);
    gradient_.write(begin, width(begin), [&](int j) {
      return finished(E::load(student_[begin] + j), entries(j), [&](Vec q) {
        return lane_indices() + (int)(begin + j) == (int)label_ ? q - 1.0f : q;
      });
    });
  }
  // The same of one entry.
  SADKERN_INLINE void finish_one(int64_t at, float logit, float entry) const {
    const Vec out = finished(splat(logit), splat(entry), [&](Vec q) {
      return at == label_ ? q - 1.0f : q;
    });
    gradient_.write_one(at, out[0]);
  }

  // The student's logits less their maximum.
  SADKERN_INLINE Vec below_max(const typename E::Raw* logits) const {
    return below_max(E::load(logits));
  }
  SADKERN_INLINE int width(int64_t begin) const { return tile_width(a_.vocab, begin); }

  const bool past_caches_;
  const float inv_temperature_;
  Tiles<E> student_;
  Gradient<E> gradient_;
  int64_t label_ = -1;
  float scale_ = 0;
  Vec max_s_{};

 private:
  SADKERN_INLINE Vec below_max(Vec logits) const {
    return multiply_subtract(logits, inv_temperature_, max_s_);
  }
  template <class F>
  SADKERN_INLINE Vec finished(Vec logits, Vec entries, F less_label) const {
    if (label_ >= 0) {
      entries += hard_scale_ * less_label(exp(below_max(logits) * a_.temperature - lse_h_));
    }
    if (a_.softcap != 0) {
      const Vec tanh = logits * (1 / a_.softcap);
      entries *= 1.0f - tanh * tanh;
    }
    return entries;
  }

  const RowArgs& a_;
  float hard_scale_ = 0, lse_h_ = 0;
};

inline void zero_entries(const RowArgs& a, int64_t i, int64_t from) {
  if (!a.dstudent.data) return;
  char* row = row_pointer(a, a.dstudent, i);
  memset(row + from * size_of(a.dtype), 0, (a.student_vocab - from) * size_of(a.dtype));
}

template <class Args>
int64_t rows_of(const Args& a) {
  int64_t rows = 1;
  for (int d = 0; d < a.leading; ++d) rows *= a.sizes[d];
  return rows;
}

// `step(row, i)` for every i < rows, `group` of them at a time, by a Row of each thread's own. False where
// a Row could not have its memory.
template <class Make, class Step>
bool each_row(int64_t rows, int threads, int group, Make make, Step step) {
  bool complete = true;
#pragma omp parallel num_threads(threads) reduction(&& : complete)
  {
    auto row = make();
    complete = row.has_memory();
#pragma omp for schedule(dynamic, group)
    for (int64_t i = 0; i < rows; ++i) {
      if (complete) step(row, i);
    }
    stream_fence();
  }
  return complete;
}

// Every row of a loss: `read` finds everything but the gradient, `write` then writes that.
template <class Row, class Args>
bool all_rows(const Args& a, int threads) {
  const int64_t rows = rows_of(a);
  int64_t supervised = 0;
  for (int64_t i = 0; i < rows; ++i) supervised += a.supervised[i] != 0;
  // A gradient that no cache could hold until it is used goes straight to memory.
  const bool past_caches = a.dstudent.data != a.student.data &&
                           supervised * a.vocab * size_of(a.dtype) > (int64_t{8} << 20);
  // Short rows in groups: the fetching ahead of a row's end then serves the next one.
  const int group = static_cast<int>(a.vocab < 65536 ? 65536 / a.vocab : 1);
  const auto make = [&] { return Row(a, past_caches); };
  return each_row(rows, threads, group, make, [&](Row& row, int64_t i) {
    if (a.supervised[i]) {
      row.read(i);
      if (a.dstudent.data) row.write();
      zero_entries(a, i, a.vocab);
    } else {
      row.skip(i);
      zero_entries(a, i, 0);
    }
  });
}

}  // namespace
}  // namespace sadkern
