/* Computes the same pixels as Pillow, but faster. README.md describes the files.

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
}; /* the numbers that Pillow uses */

enum {
  LARGEST = 1 << 26, /* largest number of pixels; Pillow decodes or refuses larger images */
  PADDING =
      32, /* bytes after each input of the loops over pixels, which may be read but are not used */
};

struct box {
  uint32_t left, top, right, bottom;
};

struct how {
  int filter;         /* BILINEAR or BICUBIC */
  int vertical_first; /* the order of the two passes of a resize */
  int simd;           /* use AVX2; only if simd() is true */
};

/* ---- functions that Python calls ---- */

#define EXPORT __attribute__((visibility("default")))

/* The sha256 of these files, to detect that they have changed since they were compiled. */
EXPORT const char *source(void);

/* Whether this machine has AVX2. */
EXPORT int simd(void);

/* `path`: a shared library that is linked with libjpeg-turbo; its functions are used. Returns 0 if all of
 * them were found. */
EXPORT int use_libjpeg(const char *path);

/* The pixels of a box of a JPEG, resampled to width x height. Returns OK, NOT_OURS (Pillow must decode this
 * file) or NO_MEMORY. */
EXPORT int crop_and_resize(const uint8_t *data, size_t size, struct box box, int width, int height,
                           struct how how, uint8_t *out);

/* Each pixel (x, y) of `out` is the pixel (a0 x + a1 y + a2, a3 x + a4 y + a5) of `in`, or `fill` if that is
 * outside. Both are width x height. */
EXPORT void affine(const uint8_t *in, int width, int height, const double a[6], uint32_t fill, struct how how,
                   uint8_t *out);

/* ---- functions that the C files share ---- */

int decode(const uint8_t *data, size_t size, struct box box, uint8_t *out);
int resample(const uint8_t *in, int from_width, int from_height, int width, int height, struct how how,
             uint8_t *out);

enum {
  BITS = 32 - 8 - 2
}; /* fractional bits of a coefficient */

struct taps {
  int length, size;   /* length of the output; size of the longest list of coefficients */
  int *first, *count; /* input of the first coefficient; number of coefficients */
  int32_t *k;         /* `length` lists of `size` coefficients; those after `count` are 0 */
};

/* The loops over pixels, one version for any machine and one for AVX2. */
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

/* The source of a pixel of an affine transform: the pixel to its left and above, and the distance to it. */
struct origin {
  int column, row; /* -1 for half a pixel at the edge */
  double dx, dy;
};

/* For pixel (x, y); returns 0 if it is outside of the image. */
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
