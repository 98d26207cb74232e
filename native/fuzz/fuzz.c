/* A coverage-guided fuzzer for everything that reads untrusted bytes: the decoder, and with its output the
   resize and the affine transform.

   The first bytes of an input are box, size and matrix; the rest is the file. README.md has the commands.
   With -DTHREADS it becomes a program that decodes the files of a folder in four threads at once, for
   ThreadSanitizer. */

#include <stdlib.h>
#include <string.h>

#include "../pixels.h"

static const char *library(void) {
  const char *path = getenv("LIBJPEG");
  return path ? path : "libjpeg.so.62";
}

enum {
  HEAD = 16,
  LONGEST = 1 << 16
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static int ready = 0;
  if (!ready && use_libjpeg(library())) abort();
  ready = 1;
  if (size < HEAD || size > LONGEST) return 0;
  uint16_t numbers[HEAD / 2];
  memcpy(numbers, data, HEAD);
  /* Mostly boxes inside small images, and sometimes any box. */
  uint32_t mask = numbers[0] & 0x8000 ? 0xFFFF : 0x3F;
  struct box box = {numbers[0] & mask, numbers[1] & mask, (numbers[0] & mask) + (numbers[2] & mask),
                    (numbers[1] & mask) + (numbers[3] & mask)};
  int width = numbers[4] % 70, height = numbers[5] % 70;
  struct how how = {numbers[6] & 1 ? BICUBIC : BILINEAR, numbers[6] >> 1 & 1,
                    simd() && (numbers[6] >> 2 & 1)};

  uint8_t *file = malloc(size - HEAD + 1); /* of exactly this size, to detect reads after its end */
  memcpy(file, data + HEAD, size - HEAD);
  size_t length = 4 * (size_t)width * height;
  uint8_t *pixels = malloc(length + 1), *again = malloc(length + 1), *moved = malloc(length + 1);
  if (crop_and_resize(file, size - HEAD, box, width, height, how, pixels) == OK) {
    if (simd()) { /* both paths give the same pixels */
      how.simd = !how.simd;
      if (crop_and_resize(file, size - HEAD, box, width, height, how, again) != OK) abort();
      for (size_t i = 0; i < length; i++)
        if (i % 4 != 3 && pixels[i] != again[i]) abort();
    }
    double a[6];
    for (int i = 0; i < 6; i++) a[i] = ((int16_t)numbers[i]) / (i % 3 == 2 ? 100.0 : 10000.0);
    affine(pixels, width, height, a, 0xFF102030, how, moved);
    if (numbers[7] & 1) { /* sometimes a matrix of random bits */
      memcpy(a, data, sizeof a < size ? sizeof a : size);
      affine(pixels, width, height, a, 0xFF102030, how, moved);
    }
  }
  free(file);
  free(pixels);
  free(again);
  free(moved);
  return 0;
}

#ifdef THREADS
#include <pthread.h>
#include <stdio.h>

static uint8_t *files[256];
static size_t sizes[256];
static int count = 0;

static void *decode_all(void *argument) {
  static const struct box whole = {3, 5, 40, 37};
  uint8_t *pixels = malloc(4 * 24 * 24), *moved = malloc(4 * 24 * 24);
  const double a[6] = {0.9, 0.2, 1, -0.2, 0.9, 2};
  for (int round = 0; round < 20; round++)
    for (int i = 0; i < count; i++) {
      struct how how = {BICUBIC, 0, simd() && (round & 1)};
      if (crop_and_resize(files[i], sizes[i], whole, 24, 24, how, pixels) == OK)
        affine(pixels, 24, 24, a, 0, how, moved);
    }
  free(pixels);
  free(moved);
  return argument;
}

int main(int argc, char **argv) {
  if (use_libjpeg(library())) return 1;
  for (int i = 1; i < argc && count < 256; i++) {
    FILE *file = fopen(argv[i], "rb");
    if (!file) continue;
    files[count] = malloc(LONGEST);
    size_t size = fread(files[count], 1, LONGEST, file);
    fclose(file);
    if (size <= HEAD) continue;
    memmove(files[count], files[count] + HEAD, size - HEAD);
    sizes[count++] = size - HEAD;
  }
  pthread_t threads[4];
  for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, decode_all, NULL);
  for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
  printf("%d files, 4 threads, 20 rounds\n", count);
  return 0;
}
#endif
