// Large fresh outputs cost more in page faults than in arithmetic: 64 MiB of 4 KiB pages take longer
// to map than its gradient takes to compute. Huge pages cut that by a factor of 512 where the system
// allows them on request; elsewhere the advice does nothing.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace sadkern {

inline void advise_huge_pages(uintptr_t begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t first = (begin + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (begin + bytes) & ~(kPage - 1);
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace sadkern
