/* What the compiler in the guest builds and runs: integer, vector, x87 and library code whose output is the same on every
 * x86-64 processor (no contraction, no function that the C library chooses different results for). */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t seed = 0x9e3779b97f4a7c15u;
static uint64_t next(void) {
  seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
  return seed;
}

static uint64_t hash(const void *data, size_t size) {
  uint64_t h = 0xcbf29ce484222325u;
  for (const unsigned char *at = data; size-- > 0; ++at) h = (h ^ *at) * 0x100000001b3u;
  return h;
}

static int compare(const void *a, const void *b) {
  uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return x < y ? -1 : x > y;
}

static void sort(void) {
  static uint64_t v[20000];
  for (int i = 0; i < 20000; ++i) v[i] = next();
  qsort(v, 20000, sizeof v[0], compare);
  for (int i = 1; i < 20000; ++i)
    if (v[i - 1] > v[i]) printf("unsorted\n");
  printf("sort %016llx\n", (unsigned long long)hash(v, sizeof v));
}

/* Vectorized by the higher levels. */
static void arrays(void) {
  static double a[96][96], b[96][96], c[96][96];
  static float f[4096];
  static int32_t n[4096];
  static uint8_t bytes[4096];
  for (int i = 0; i < 96; ++i)
    for (int j = 0; j < 96; ++j) a[i][j] = (double)(next() >> 40) / 3, b[i][j] = (double)(next() >> 44) / 7;
  for (int i = 0; i < 96; ++i)
    for (int k = 0; k < 96; ++k)
      for (int j = 0; j < 96; ++j) c[i][j] += a[i][k] * b[k][j];
  for (int i = 0; i < 4096; ++i) n[i] = (int32_t)next(), bytes[i] = (uint8_t)next();
  for (int i = 0; i < 4096; ++i) f[i] = (float)n[i] * 0.5f + (float)bytes[i];
  for (int i = 0; i < 4096; ++i) n[i] = n[i] > 0 ? n[i] * 3 : n[i] >> bytes[i] % 31;
  for (int i = 0; i < 4096; ++i) bytes[i] = (uint8_t)(bytes[i] * 7 ^ n[i]);
  printf("arrays %016llx %016llx %016llx %016llx\n", (unsigned long long)hash(c, sizeof c),
         (unsigned long long)hash(f, sizeof f), (unsigned long long)hash(n, sizeof n),
         (unsigned long long)hash(bytes, sizeof bytes));
}

static void numbers(void) {
  long double x = 1, sum = 0;
  for (int i = 1; i < 5000; ++i) {
    x = x * 1.0000123L + 1 / (long double)i;
    sum += x / (i * (long double)i);
    if (i % 1000 == 0) printf("%.20Lg %.20Lg %La\n", x, sum, sum);
  }
  double d = 1;
  for (int i = 0; i < 200; ++i) {
    d = d * -1.7 + i;
    if (i % 20 == 0) printf("%.17g %a %f\n", d, d, d / 3);
  }
  unsigned __int128 wide = 1;
  for (int i = 1; i < 200; ++i) {
    wide = wide * (next() | 1) + i;
    if (i % 40 == 0)
      printf("%016llx %016llx\n", (unsigned long long)(wide / 1000003 >> 64), (unsigned long long)(wide % 1000003));
  }
}

static jmp_buf out;
static int descend(int depth, ...) {
  va_list list;
  va_start(list, depth);
  int sum = va_arg(list, int) + (int)va_arg(list, double);
  va_end(list);
  if (depth == 0) longjmp(out, sum % 1000 + 1);
  return descend(depth - 1, sum, 1.5 * depth) + 1;
}

struct node {
  struct node *left, *right;
  char name[24];
};

static struct node *insert(struct node *at, const char *name) {
  if (at == NULL) {
    at = calloc(1, sizeof *at);
    strcpy(at->name, name);
  } else {
    struct node **side = strcmp(name, at->name) < 0 ? &at->left : &at->right;
    *side = insert(*side, name);
  }
  return at;
}

static uint64_t walk(const struct node *at) {
  if (at == NULL) return 0;
  return walk(at->left) * 31 + hash(at->name, strlen(at->name)) + walk(at->right) * 17;
}

static void library(void) {
  struct node *root = NULL;
  char name[24], text[64];
  for (int i = 0; i < 4000; ++i) {
    snprintf(name, sizeof name, "n%llx", (unsigned long long)(next() >> 20));
    root = insert(root, name);
  }
  printf("tree %016llx\n", (unsigned long long)walk(root));
  for (int i = 0; i < 2000; ++i) {
    char *block = malloc(next() % 5000 + 64);
    memset(block, i, 64);
    memmove(block + 3, block, 40);
    if (block[i % 64] != (char)i) printf("memory\n");
    free(block);
  }
  const int jumped = setjmp(out);
  if (jumped == 0) descend(100, 7, 2.5);
  printf("jumped %d\n", jumped);
  double sum = 0;
  for (int i = 0; i < 500; ++i) {
    snprintf(text, sizeof text, "%.15g", (double)(int64_t)next() / 1e7);
    sum += strtod(text, NULL);
  }
  printf("text %.17g %s\n", sum, text);
}

/* A machine with jumps that no predictor knows. */
static void machine(void) {
  uint32_t r[4] = {1, 2, 3, 4};
  for (int i = 0; i < 300000; ++i) {
    const uint32_t op = (uint32_t)next();
    uint32_t *to = &r[op >> 4 & 3], from = r[op >> 6 & 3];
    switch (op & 15) {
      case 0: *to += from; break;
      case 1: *to -= from; break;
      case 2: *to ^= from; break;
      case 3: *to = *to << (from & 31) | *to >> (-from & 31); break;
      case 4: *to *= from | 1; break;
      case 5: *to /= from | 1; break;
      case 6: *to %= from | 1; break;
      case 7: *to = (uint32_t)((int32_t)*to >> (op >> 8 & 31)); break;
      case 8: *to = from != 0 ? (uint32_t)__builtin_ctz(from) : 32; break;
      case 9: *to = (uint32_t)__builtin_popcount(from) + op; break;
      case 10: *to = __builtin_bswap32(from); break;
      case 11: *to = (int32_t)from < (int32_t)*to ? from : *to; break;
      case 12: *to = (uint32_t)((uint64_t)from * *to >> 32); break;
      default: *to += op; break;
    }
  }
  printf("machine %08x %08x %08x %08x\n", r[0], r[1], r[2], r[3]);
}

int main(void) {
  sort();
  arrays();
  numbers();
  library();
  machine();
  return 0;
}
