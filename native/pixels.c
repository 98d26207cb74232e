/* The functions that Python calls. */

#include <stdlib.h>

#include "pixels.h"

#ifndef SOURCE
#define SOURCE "" /* setup.py defines it */
#endif
const char *source(void) { return SOURCE; }

int simd(void) {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx2") != 0;
#else
  return 0;
#endif
}

int crop_and_resize(const uint8_t *data, size_t size, struct box box, int width, int height, struct how how,
                    uint8_t *out) {
  if (box.left >= box.right || box.top >= box.bottom || box.right > UINT16_MAX || box.bottom > UINT16_MAX)
    return NOT_OURS;
  if (width < 1 || height < 1 || width > UINT16_MAX || height > UINT16_MAX) return NOT_OURS;
  int from_width = box.right - box.left, from_height = box.bottom - box.top;
  if ((uint64_t)from_width * from_height > LARGEST) return NOT_OURS;
  uint8_t *pixels = malloc(4 * (size_t)from_width * from_height + PADDING);
  if (!pixels) return NO_MEMORY;
  int status = decode(data, size, box, pixels);
  if (status == OK) status = resample(pixels, from_width, from_height, width, height, how, out);
  free(pixels);
  return status;
}

void affine(const uint8_t *in, int width, int height, const double a[6], uint32_t fill, struct how how,
            uint8_t *out) {
  (how.simd ? &avx2 : &scalar)->transform(in, width, height, a, fill, how.filter, out);
}
