/* Pillow's own pixels, faster. README.md says what each file is.

   Pixels are four bytes: R, G, B and one that nobody reads; rows have no gaps. Nothing here keeps state but
   the table of libjpeg's calls, so any number of threads may be in it at once. */

#include <stddef.h>
#include <stdint.h>

enum {
  OK = 0,
  NOT_OURS = 1,
  NO_MEMORY = 2
};
enum {
  BILINEAR = 2,
  BICUBIC = 3
}; /* Pillow's numbers */

enum {
  LARGEST = 1 << 26, /* pixels of an image; larger ones are for Pillow to decode or to refuse */
  PADDING =
      32, /* bytes behind every input of the loops over pixels, which may be read and count for nothing */
};

struct box {
  uint32_t left, top, right, bottom;
};

struct how {
  int filter;         /* BILINEAR or BICUBIC */
  int vertical_first; /* the order of the two passes of a resize */
  int simd;           /* AVX2: only where simd() says so */
};

/* ---- what Python calls ---- */

#define EXPORT __attribute__((visibility("default")))

/* The sha256 of these files, by which it is noticed that they have changed since they were compiled. */
EXPORT const char *source(void);

/* Does this machine have AVX2? */
EXPORT int simd(void);

/* `path`: a shared library that is linked with libjpeg-turbo, whose calls are taken. Returns 0 if all of them
 * are there. */
EXPORT int use_libjpeg(const char *path);

/* The pixels of a box of a JPEG, resampled to width x height. Returns OK, NOT_OURS (Pillow must decode this
 * file) or NO_MEMORY. */
EXPORT int crop_and_resize(const uint8_t *data, size_t size, struct box box, int width, int height,
                           struct how how, uint8_t *out);

/* Each pixel (x, y) of `out` from (a0 x + a1 y + a2, a3 x + a4 y + a5) of `in`, both width x height; `fill`
 * where that is outside. */
EXPORT void affine(const uint8_t *in, int width, int height, const double a[6], uint32_t fill, struct how how,
                   uint8_t *out);

/* ---- between the files ---- */

int decode(const uint8_t *data, size_t size, struct box box, uint8_t *out);
int resample(const uint8_t *in, int from_width, int from_height, int width, int height, struct how how,
             uint8_t *out);

enum {
  BITS = 32 - 8 - 2
}; /* of a coefficient behind its point */

struct taps {
  int length, size;   /* of the output; of the longest list of coefficients */
  int *first, *count; /* input of the first coefficient, how many there are */
  int32_t *k;         /* `length` lists of `size`; those behind `count` are 0 */
};

/* The loops over pixels, for any machine and for AVX2. */
struct loops {
  /* Rows of `from` pixels become rows of taps->length. */
  void (*resize_rows)(const uint8_t *in, int from, int rows, const struct taps *taps, uint8_t *out);
  /* Columns, in rows of `width` pixels, become columns of taps->length. */
  void (*resize_columns)(const uint8_t *in, int width, const struct taps *taps, uint8_t *out);
  void (*transform)(const uint8_t *in, int width, int height, const double a[6], uint32_t fill, int filter,
                    uint8_t *out);
};

extern const struct loops scalar, avx2;

static inline int within(int i, int length) { return i < 0 ? 0 : i < length ? i : length - 1; }

/* Where a pixel of an affine transform comes from: left of and above it, and how far behind. */
struct origin {
  int column, row; /* -1 for half a pixel at the edge */
  double dx, dy;
};

/* Of pixel (x, y); 0 where it lies outside of the image. */
static inline int origin_of(struct origin *at, const double a[6], int x, int y, int width, int height) {
  double left = a[0] * (x + 0.5) + a[1] * (y + 0.5) + a[2], top = a[3] * (x + 0.5) + a[4] * (y + 0.5) + a[5];
  if (!(left >= 0.0 && left < width && top >= 0.0 && top < height)) return 0;
  left -= 0.5;
  top -= 0.5;
  at->column = left < 0.0 ? -1 : (int)left; /* the floor: both are at least -0.5 */
  at->row = top < 0.0 ? -1 : (int)top;
  at->dx = left - at->column;
  at->dy = top - at->row;
  return 1;
}
